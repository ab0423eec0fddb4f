"""A model whose weights are split among processes trains, loss for loss, to what one process trains it to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import chat_model
from helpers.processes import together
from helpers.sharding import CASES, alone, read

from ctlens.core.errors import CtlensError
from ctlens.losses import LOSSES
from ctlens.models.sharding import shard
from ctlens.training.processes import Processes

OF_THREE = ("act", "bct", "rmct", "several", "calibrated", "moving", "gemma2", "qwen3 adapters", "mlpct")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders in which two and three processes wrote what their trainings ended with."""
    folders = {}
    for count, names in ((2, tuple(CASES)), (3, OF_THREE)):
        folders[count] = tmp_path_factory.mktemp(f"of{count}")
        done = together(count, "helpers.sharding", str(folders[count]), *names)
        assert done.returncode == 0, done.stderr[-4000:]
    return folders


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "name"), [*((2, name) for name in CASES), *((3, name) for name in OF_THREE)], ids=lambda part: str(part)
)
def test_processes_that_share_a_model_train_it_as_one_does(
    ended: dict[int, Path], tmp_path: Path, count: int, name: str
) -> None:
    one = alone(name, count, tmp_path)
    shared = read(ended[count], name)

    assert float(one["history"].abs().max()) > 0
    gradient = [value.norm() for key, value in one.items() if key.startswith("gradient")]
    norm = max(1.0, float(torch.stack(gradient).norm()))
    for key in one.keys() | shared.keys():
        here = one.get(key)
        there = shared.get(key)
        if here is None or there is None:  # a weight that no loss reaches: its gradient is zero, or there is none
            known = here if there is None else there
            assert key.startswith("gradient") and known is not None and not known.any()
        else:
            size = norm if key.startswith("gradient") else 1.0
            torch.testing.assert_close(
                there / size, here / size, atol=1e-5, rtol=1e-5, msg=lambda text, at=key: f"{at}: {text}"
            )


def test_every_loss_is_among_the_trainings() -> None:
    assert set(LOSSES) <= {name for case in CASES.values() for name, _ in case.losses}


def test_a_process_that_nobody_launched_cannot_share_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(CtlensError, match="needs several processes: start them with torchrun"):
        shard(chat_model("llama"))


@pytest.mark.parametrize(("n_rows", "n_parts", "fits"), [(8, 3, True), (7, 3, True), (5, 2, True), (3, 2, False)])
def test_a_batch_must_give_every_process_as_many_parts(n_rows: int, n_parts: int, fits: bool) -> None:
    two = Processes()
    two.count = 2
    shares = []
    for index in range(two.count):
        two.index = index
        shares.append(min(n_parts, len(two.share(list(range(n_rows))))))
    assert (len(set(shares)) == 1) == fits
    if fits:
        two.require_equal_parts(n_rows, n_parts)
        return
    with pytest.raises(CtlensError, match="3 prompts or pairs give 2 processes unequal numbers of 2 parts"):
        two.require_equal_parts(n_rows, n_parts)
