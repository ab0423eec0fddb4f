"""A damaged file in the folder of a run is one sentence that names it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import chat_model, made

from ctlens.core.errors import CtlensError, NotFinite
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import ACT
from ctlens.models.hooks import run
from ctlens.models.lora import LoRA
from ctlens.training import TrainConfig, load_run, train

HEADER = b"step,name,hook_name,value\n"
DAMAGES = {
    "config.json": {
        b"": "config.json is not JSON",
        b"[1]": "config.json is a list, but an object",
        b'{"training": {}}': "config.json lacks 'losses'",
        b'{"training": 3, "losses": []}': "TrainConfig cannot be read from 3",
        b'{"training": {}, "losses": 3}': "config.json does not list a run's losses",
        b'{"training": {}, "losses": ["act"]}': "'act' does not describe a loss",
        b'{"training": {}, "losses": [{"name": ["act"]}]}': "does not describe a loss",
        b'{"training": {"lr": NaN}, "losses": []}': "config.json is refused (NaN is no number of JSON)",
        b'{"training": {"lr": 1, "lr": 2}, "losses": []}': "config.json is refused (the field 'lr' stands twice)",
    },
    "environment.json": {b"{": "environment.json is not JSON", b"\xff": "environment.json is not UTF-8 text in line 1"},
    "model/model.json": {b"": "model.json is not JSON", b"{}": "model.json does not describe a model"},
    "history.csv": {
        b"": "history.csv is no CSV with a header",
        b"step,name,value\n": "history.csv lacks the columns hook_name",
        HEADER + b"1,total,,abc\n": "history.csv, row 1: 'value' is 'abc', but a number is expected",
        HEADER + b"1,total,,0.5\n2.5,total,,0.5\n": "history.csv, row 2: 'step' is '2.5', but a number is expected",
        HEADER + b"1,total\n": "history.csv, row 1: 2 cells, but the header has 4",
        HEADER + b"1,total,,0.": "history.csv, line 2: the file ends within a row",
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = [Pair(prompt("Is it right?"), prompt("I say no. Is it right?"))]
    return train(made(), pairs, ACT(), config=TrainConfig(steps=1)).save(tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in DAMAGES for content in DAMAGES[name]])
def test_a_damaged_file_of_a_run_is_named(saved: Path, tmp_path: Path, name: str, content: bytes) -> None:
    folder = shutil.copytree(saved, tmp_path / "run")
    (folder / name).write_bytes(content)

    with pytest.raises(CtlensError) as found:
        load_run(folder)

    assert DAMAGES[name][content] in str(found.value)


def test_a_history_comes_back_with_every_digit_and_with_what_was_not_measured(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "run")
    (folder / "history.csv").write_bytes(HEADER + b"1,total,,0.30000000000000004\n2,rate,,\n2,act,blocks.0,1e-17\n")

    first, missing, last = load_run(folder).history.rows

    assert first == (1, "total", "", 0.1 + 0.2) and last == (2, "act", "blocks.0", 1e-17)
    assert missing[:3] == (2, "rate", "") and missing[3] != missing[3]


def test_a_run_of_a_broken_model_is_not_written(tmp_path: Path) -> None:
    pairs = [Pair(prompt("Is it right?"), prompt("I say no. Is it right?"))]
    run = train(made(), pairs, ACT(), config=TrainConfig(steps=1))
    next(run.model.parameters()).data[0] = torch.nan

    with pytest.raises(NotFinite, match="the weight .* of the model is not finite"):
        run.save(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_run_from_which_another_model_would_come_is_not_written(tmp_path: Path) -> None:
    model: Any = chat_model("llama")
    model.original_model.model.norm.variance_epsilon = 10.0  # which no file of the model holds
    pairs = [Pair(prompt("Is it right?"), prompt("I say no. Is it right?"))]
    run = train(model, pairs, ACT(), config=TrainConfig(steps=1))

    with pytest.raises(CtlensError, match="would not come back .* its logits, by .*, so nothing was written"):
        run.save(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_adapters_alone_come_back_onto_the_base(tmp_path: Path) -> None:
    base = made()
    pairs = [Pair(prompt("Is it right?"), prompt("I say no. Is it right?"))]
    trained = train(base, pairs, ACT(), config=TrainConfig(steps=2, trainable=LoRA(rank=2)))
    folder = trained.save(tmp_path / "run", adapters_only=True)
    assert not (folder / "model").exists()

    tokens = torch.tensor([[3, 5, 7]])
    found = load_run(folder, base=base)
    assert (found.config, found.history.steps) == (trained.config, trained.history.steps)
    torch.testing.assert_close(run(found.model, tokens), run(trained.model, tokens))
    merged = load_run(trained.save(tmp_path / "merged"))
    torch.testing.assert_close(run(merged.model, tokens), run(found.model, tokens))
    assert torch.equal(run(base, tokens), run(made(), tokens))

    with pytest.raises(CtlensError, match=r"holds adapters alone: give the model that they belong to with base="):
        load_run(folder)
    with pytest.raises(CtlensError, match=r"belong to a model with other weights"):
        load_run(folder, base=trained_whole(base, pairs))
    with pytest.raises(CtlensError, match=r"has no adapters, as it was not trained by a LoRA"):
        train(base, pairs, ACT(), config=TrainConfig(steps=1)).save(tmp_path / "none", adapters_only=True)
    assert not (tmp_path / "none").exists()


def trained_whole(base: LensModel, pairs: list[Pair]) -> LensModel:
    return train(base, pairs, ACT(), config=TrainConfig(steps=1)).model
