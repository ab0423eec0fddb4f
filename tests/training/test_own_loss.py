"""A loss of one's own is registered before a training with it begins, and its run is read back where it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
from helpers.attention import PAIRS
from helpers.models import made

import ctlens as ct
from ctlens import losses
from ctlens.core.errors import CtlensError
from ctlens.losses.base import Distance, VectorLoss
from ctlens.losses.distances import cosine_distance


@dataclass(frozen=True)
class Direction(VectorLoss):
    """The residual stream points where it did on the clean prompt."""

    name: ClassVar[str] = "direction"
    sites: ClassVar[tuple[str, ...]] = ("resid_post",)
    distances: ClassVar[Mapping[str, Distance]] = {"cosine": cosine_distance}
    site: str = "resid_post"
    distance: str = "cosine"


@dataclass(frozen=True)
class Nameless(Direction):
    """A loss without a name of its own."""

    name: ClassVar[str] = ""


@pytest.fixture(autouse=True)
def registry(monkeypatch) -> dict[str, type[losses.Loss]]:
    """The registry, put back afterwards."""
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))
    return losses.LOSSES


def test_a_training_with_a_loss_that_is_not_registered_is_refused_before_its_first_step() -> None:
    with pytest.raises(CtlensError, match=r"'direction' is not registered.*ctlens.losses.register\(Direction\)"):
        ct.Trainer(made(), PAIRS, Direction(), ct.TrainConfig(steps=1, batch_size=3))


def test_a_registered_loss_is_saved_and_loaded_and_its_absence_is_named(registry, tmp_path) -> None:
    assert losses.register(Direction) is Direction
    run = ct.train(made(), PAIRS, Direction(weight=2.0), config=ct.TrainConfig(steps=1, batch_size=3), progress=False)
    run.save(tmp_path / "run")

    assert ct.load_run(tmp_path / "run").losses == (Direction(weight=2.0),)
    assert losses.get("direction") == Direction()

    del registry["direction"]
    with pytest.raises(CtlensError, match=r"'direction' is not registered here.*import its class"):
        ct.load_run(tmp_path / "run")


def test_a_cell_that_is_run_twice_registers_the_new_class() -> None:
    losses.register(Direction)
    again = dataclass(frozen=True)(type("Direction", (Direction,), {"__module__": __name__}))

    assert losses.register(again) is again
    assert losses.LOSSES["direction"] is again


def test_a_name_that_is_taken_and_no_name_are_refused() -> None:
    taken = dataclass(frozen=True)(type("Mine", (Direction,), {"__module__": __name__, "name": "act"}))

    with pytest.raises(CtlensError, match=r"a loss 'act' is there already \(ACT\)"):
        losses.register(taken)
    with pytest.raises(CtlensError, match="Nameless has no name"):
        losses.register(Nameless)
    assert losses.get("act") == ct.ACT()
