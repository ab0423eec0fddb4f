"""Sharded trainings from the command line: killed, resumed by another number of processes, saved and exported."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers.models import Call
from helpers.processes import place_of_training, together
from transformers import AutoModelForCausalLM

from ctlens.models.hooks import run
from ctlens.models.loading import load_model
from ctlens.models.parameters import present_weights

pytestmark = [pytest.mark.processes, pytest.mark.slow]

WORDS = ("right", "a thing", "here", "no", "what", "it")
TRAIN = "train --model hf --pairs pairs.jsonl --quiet --steps 4 --batch-size 6 --loss act --loss bct --retention 1"
DIES = """
import os, signal, sys, time
from ctlens.training import trainer
whole = trainer.Trainer.take_step
def step(self):
    if len(self.history) == 3 and os.environ["RANK"] == "1":
        open("died", "w").write(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self)
trainer.Trainer.take_step = step
from ctlens.cli import main
main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = place_of_training(tmp_path_factory.mktemp("sharded"), WORDS)
    (folder / "dies.py").write_text(DIES)
    return folder


@pytest.mark.parametrize("what", ["weights", "adapters"])
def test_a_killed_training_ends_everywhere_and_goes_on_with_another_number_of_processes(
    place: Path, what: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    train = f"{TRAIN} --trainable attn,mlp,embed" if what == "weights" else f"{TRAIN} --lora-rank 2 --lr 0.01"
    shared = f"{train} --shard --checkpoint-every 2 --out {what}"

    killed = together(2, "dies", *shared.split(), folder=place)
    passed = time.time() - float((place / "died").read_text())

    assert killed.returncode != 0 and passed < 15
    assert not (place / what).exists()
    assert [path.name for path in (place / f"{what}.partial").iterdir()] == ["sharded-2"]

    resumed = together(3, "ctlens", *shared.split(), "--resume", folder=place)
    alone = call(f"{train} --accumulate 3 --out {what}-alone")

    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert alone.code == 0, alone.err
    assert resumed.stdout.count(f"Run: {what}") == 1
    assert not (place / f"{what}.partial").exists()
    histories = [pd.read_csv(place / name / "history.csv", keep_default_na=False) for name in (f"{what}-alone", what)]
    assert histories[0][["step", "name", "hook_name"]].equals(histories[1][["step", "name", "hook_name"]])
    pd.testing.assert_series_equal(histories[1]["value"], histories[0]["value"], rtol=1e-4, atol=1e-5)
    weights = [present_weights(load_model(place / name)) for name in (f"{what}-alone", what)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-5, rtol=1e-5)

    assert call(f"export --model {what} --out {what}-hf").code == 0
    hf = AutoModelForCausalLM.from_pretrained(place / f"{what}-hf")
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(hf(tokens).logits, run(load_model(place / what), tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["a slice", "the state", "nothing else"])
def test_a_damaged_checkpoint_is_refused_in_one_sentence(place: Path, which: str) -> None:
    out = f"damaged-{which.replace(' ', '-')}"
    shared = f"{TRAIN} --shard --checkpoint-every 2 --out {out}".split()
    assert together(2, "dies", *shared, folder=place).returncode != 0
    folder = place / f"{out}.partial" / "sharded-2"
    slices = sorted(folder.glob("*.safetensors"))
    assert len(slices) >= 2
    if which == "a slice":
        content = bytearray(slices[-1].read_bytes())
        content[-1] ^= 1  # a bit of the last number
        slices[-1].write_bytes(content)
    if which == "the state":
        state = folder / "state.json"
        state.write_text(state.read_text().replace('"steps": 2', '"steps": 1'))

    resumed = together(2, "ctlens", *shared, "--resume", folder=place)

    if which == "nothing else":
        assert resumed.returncode == 0, resumed.stderr[-2000:]
        return
    assert resumed.returncode != 0
    name = slices[-1].name if which == "a slice" else "state.json"
    assert f"{name} is not what was written (its digest is another), so that it was damaged: remove" in resumed.stderr
    assert not (place / out).exists()


def test_a_checkpoint_of_other_settings_or_of_one_process_is_refused(place: Path, call: Call, monkeypatch) -> None:
    monkeypatch.chdir(place)
    killed = together(2, "dies", *f"{TRAIN} --shard --checkpoint-every 2 --out other".split(), folder=place)
    assert killed.returncode != 0

    alone = call(f"{TRAIN} --out other --resume")
    assert alone.code == 2 and "is of a sharded training: go on with --shard" in alone.err
    changed = together(2, "ctlens", *f"{TRAIN} --lr 0.1 --shard --out other --resume".split(), folder=place)
    assert changed.returncode != 0
    assert "of other settings (settings.lr is 0.001 there and 0.1 here)" in changed.stderr


def test_processes_that_share_a_model_evaluate_it_as_one_does(place: Path, call: Call, monkeypatch) -> None:
    monkeypatch.chdir(place)
    rows = [{"clean": f"Is it {word}?", "wrapped": f"No. Is it {word}?", "good": "yes", "bad": "no"} for word in WORDS]
    (place / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate = "evaluate --model hf --pairs asked.jsonl --quiet"

    shared = together(2, "ctlens", *f"{evaluate} --shard --out shared.csv".split(), folder=place)
    alone = call(f"{evaluate} --out alone.csv")

    assert (shared.returncode, alone.code) == (0, 0), shared.stderr[-3000:] + alone.err
    assert shared.stdout.count("How often answers are bad and good") == 1
    one = pd.read_csv(place / "alone.csv")
    pd.testing.assert_frame_equal(pd.read_csv(place / "shared.csv"), one, rtol=1e-5)
    assert len(one) > 3
    monkeypatch.delenv("RANK", raising=False)
    assert call(f"{evaluate} --shard").code == 2


def test_shard_needs_a_launcher(place: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("RANK", raising=False)
    ended = call(f"{TRAIN} --shard --out nothing")
    assert ended.code == 2 and "start them with torchrun --nproc-per-node N -m ctlens train" in ended.err
    assert not (place / "nothing").exists()
