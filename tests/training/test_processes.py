"""Two processes train as one does, one of them writes, and when one fails both end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers.models import Call, Ended
from helpers.processes import ENVIRONMENT, PATIENCE, place_of_training

from ctlens.core.errors import CtlensError
from ctlens.losses import LossValue
from ctlens.models.loading import load_model
from ctlens.models.parameters import present_weights
from ctlens.training.processes import SHARDED, Accelerated, Processes, processes
from ctlens.training.step import Seen, Step

ACCELERATE = (
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--cpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
)
WORDS = ("right", "a thing", "here", "no")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place_of_training(tmp_path_factory.mktemp("processes"), WORDS)


def launched(place: Path, line: str) -> Ended:
    """A command in two processes."""
    command = [*ACCELERATE, "-m", "ctlens", *line.split()]
    done = subprocess.run(command, cwd=place, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)
    return Ended(done.returncode, done.stdout, done.stderr)


TRAIN = "train --model hf --pairs pairs.jsonl --quiet --steps 3 --batch-size 3 --loss act --loss bct --retention 1"


@pytest.mark.processes
def test_two_processes_train_as_one_does_and_one_of_them_writes(
    place: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    call("--help")
    alone = call(f"{TRAIN} --out alone")
    together = launched(place, f"{TRAIN} --checkpoint-every 2 --out together")

    assert (alone.code, together.code) == (0, 0), alone.err + together.err
    assert together.out.count("Run: together") == 1
    here = pd.read_csv(place / "alone" / "history.csv", keep_default_na=False)
    there = pd.read_csv(place / "together" / "history.csv", keep_default_na=False)
    assert here[["step", "name", "hook_name"]].equals(there[["step", "name", "hook_name"]])
    pd.testing.assert_series_equal(there["value"], here["value"], rtol=1e-4, atol=1e-7)
    weights = [present_weights(load_model(place / name)) for name in ("alone", "together")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-5, rtol=1e-4)
    assert sorted(path.name for path in place.iterdir()) == ["alone", "hf", "pairs.jsonl", "together"]


@pytest.mark.processes
def test_when_one_fails_none_waits(place: Path) -> None:
    (place / "failing.py").write_text(
        "import os, sys\nfrom ctlens.training import trainer\nwhole = trainer.Trainer.take_step\n"
        "def step(self):\n    if len(self.history) == 1 and os.environ['RANK'] == '1':\n        os._exit(7)\n"
        "    return whole(self)\ntrainer.Trainer.take_step = step\n"
        f"sys.argv = ['ctlens', *'{TRAIN} --out failed'.split()]\nfrom ctlens.cli import main\nmain()\n"
    )
    start = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*ACCELERATE, "failing.py"], cwd=place, env=environment, capture_output=True, timeout=PATIENCE
    )
    assert done.returncode != 0
    assert time.monotonic() - start < 60  # and not after the half hour that the other would wait for it
    assert not (place / "failed").exists()


def test_alone_nothing_is_shared_and_nothing_changes() -> None:
    one = Processes()
    numbers = torch.ones(2)
    assert processes().count == 1 and one.is_main and one.share([3, 1, 2]) == [3, 1, 2]
    assert one.sum_numbers(numbers) is numbers


def test_shares_are_every_row_once_and_nearly_equal() -> None:
    shares = []
    for index in range(3):
        one = Processes()
        one.count = 3
        one.index = index
        shares.append(one.share([5, 8, 1, 7]))
    assert [row for share in shares for row in share] == [5, 8, 1, 7]
    assert {len(share) for share in shares} == {1, 2}
    with pytest.raises(CtlensError, match="2 pairs are too few for 3 processes: raise batch_size"):
        one.share([1, 2])


def test_what_processes_saw_adds_up() -> None:
    parts = []
    for value, share in ((2.0, 0.25), (6.0, 0.75)):
        seen = Seen()
        total = torch.tensor(value)
        seen.add("act", LossValue(total, {"here": total}), share)
        seen.add("tracked/bct", LossValue(total, {}), share)
        seen.add_retention(torch.tensor(value / 4))
        parts.append(seen)
    others = torch.stack(list(parts[1].sums.values()))

    step = Step(1, 0.1, parts[0].summed(lambda numbers: numbers + others), torch.tensor(1.0))

    assert step.losses == {"act": 5.0, "retention": 2.0, "total": 7.0}
    assert step.tracked == {"tracked/bct": 5.0} and step.by_hook == {"act": {"here": 5.0}}
    assert (step.index, step.lr, step.grad_norm) == (1, 0.1, 1.0)


@pytest.mark.parametrize("name", SHARDED)
def test_split_weights_are_refused_in_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(CtlensError, match="asks accelerate to split the weights, which ctlens does itself"):
        Accelerated()
