"""The numbers of a training stay on its device until they are read, and are the same however seldom that is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from helpers.models import Call, hf_model
from helpers.reading import host_reads, plant
from helpers.tiers import unit_first

import ctlens as ct
from ctlens import losses
from ctlens.core.errors import CtlensError, NotFinite
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair
from ctlens.models.parameters import present_parameters
from ctlens.models.sources import MODEL_FILE

DRAWING = ("opct", "rmct")
"""They train on answers that the trained model draws, token by token on the host."""
NAMES = [name for name in losses.names() if name not in DRAWING]
CONFIG = ct.TrainConfig(steps=9, batch_size=4, max_new_tokens=2)
KINDS = {
    "cached": {},
    "uncached": {"cache": False},
    "lora": {"trainable": ct.LoRA(2)},
    "in parts, layer by layer": {"accumulate": 2, "memory": "layers"},
    "blocks again": {"memory": "blocks"},
}


@pytest.fixture(scope="module")
def base() -> LensModel:
    return ct.load_organism()


def pairs_of(name: str) -> list[Pair]:
    """Eight pairs; for F2C four, twice, with targets, so that the variants of a prompt have teachers."""
    if name != "f2c":
        return ct.threats.get("sycophancy").pairs(8)
    return [replace(pair, target=pair.clean.good) for pair in ct.threats.get("sycophancy").pairs(4) for _ in range(2)]


def weights(model: LensModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in present_parameters(model).items()}


def reads_of(trainer: ct.Trainer, n_steps: int) -> list[str]:
    with host_reads([trainer.reference, trainer.model]) as found:
        for _ in range(n_steps):
            trainer.take_step()
        return list(found)


@pytest.mark.parametrize("kind", unit_first(KINDS))
@pytest.mark.parametrize("name", unit_first(NAMES))
def test_no_step_waits_for_the_device_but_to_read_the_numbers(base: LensModel, name: str, kind: str) -> None:
    config = replace(CONFIG, **KINDS[kind])
    trainer = ct.Trainer(base, pairs_of(name), name, config, track=["klct"] if name == "act" else [], log_every=3)
    for _ in range(3):
        trainer.take_step()  # an epoch of two steps, in which the reference's side is worked out and kept on the CPU

    assert reads_of(trainer, 2) == []
    assert reads_of(trainer, 1) == ["tolist"]
    assert len(trainer.history) == 6


@pytest.mark.boundary
@pytest.mark.parametrize("name", unit_first(["act", "attct", "bct", "dpo"]))
def test_no_step_of_a_huggingface_model_waits_either(tokenizer: Any, name: str) -> None:
    model = ct.load_model(hf_model("llama"), tokenizer=tokenizer)
    pairs = [
        ct.Pair(ct.prompt(f"Is it {word}?", good="yes", bad="no"), ct.prompt(f"I say no. Is it {word}?", bad="no"))
        for word in ("right", "here", "a thing", "so")
    ]
    trainer = ct.Trainer(model, pairs, name, replace(CONFIG, batch_size=2), log_every=9)
    for _ in range(2):
        trainer.take_step()

    assert reads_of(trainer, 2) == []


@pytest.mark.parametrize("what", ["item", "bool", "tolist", "cpu", "to", "mask", "nonzero"])
def test_whatever_reads_within_a_step_is_seen(base: LensModel, what: str) -> None:
    trainer = ct.Trainer(base, pairs_of("act"), "act", replace(CONFIG, retention=0.0), log_every=9)
    for _ in range(2):
        trainer.take_step()
    plant(cast(Any, trainer.model).blocks[0], what)

    assert len(reads_of(trainer, 1)) == 1


def test_the_default_reads_every_step_and_what_is_not_finite_before_the_update(base: LensModel) -> None:
    trainer = ct.Trainer(base, pairs_of("act"), "act", CONFIG)

    assert trainer.log_every == 1 and len(reads_of(trainer, 1)) > 1
    assert trainer.take_step().is_read


LOSSES = [ct.ACT(), ct.AttCT(), [ct.BCT(), ct.MLPCT()], ct.DPO(), ct.OPCT(), ct.ACT(clean="refresh(2, gated)")]


@pytest.mark.parametrize("loss", unit_first(LOSSES), ids=str)
def test_numbers_and_weights_are_the_same_however_seldom_they_are_read(base: LensModel, loss: Any) -> None:
    seen: list[Any] = []
    for every in (1, 4, 100):
        trainer = ct.Trainer(base, pairs_of("act"), loss, CONFIG, track=["klct"], log_every=every)
        steps = list(trainer)
        numbers = [(step.losses, step.tracked, step.by_hook, step.lr, step.grad_norm) for step in steps]
        seen.append((trainer.history.rows, numbers, weights(trainer.model)))

    for rows, numbers, trained in seen[1:]:
        assert (rows, numbers) == seen[0][:2]
        assert all(torch.equal(value, trained[name]) for name, value in seen[0][2].items())


def test_the_history_is_read_whenever_it_is_asked_for_and_a_step_by_itself(base: LensModel) -> None:
    trainer = ct.Trainer(base, pairs_of("act"), "act", CONFIG, log_every=4)
    first = trainer.take_step()
    second = trainer.take_step()

    assert trainer.taken == 2 and not first.is_read and not second.is_read
    assert first.losses["total"] == pytest.approx(first.losses["act"] + first.losses["retention"])
    assert first.is_read and not second.is_read
    assert trainer.history.series("total")[0] == first.losses["total"] and second.is_read
    assert len(trainer.history) == len(trainer.run.history) == 2


class Kept:
    """Kept is a logger that lists the steps it is given, and at which step it is given them."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.ended = 0

    def begin(self, settings: Any) -> None:
        assert not self.seen

    def log(self, step: int, values: Any) -> None:
        self.seen.append(step)

    def end(self) -> None:
        self.ended += 1


def test_loggers_get_every_step_when_it_is_read(base: LensModel) -> None:
    logger = Kept()
    trainer = ct.Trainer(base, pairs_of("act"), "act", CONFIG, loggers=[logger], log_every=4)
    given = []
    for step in trainer:
        given.append(len(logger.seen))
        assert step.index == len(given)

    assert given == [0, 0, 0, 4, 4, 4, 4, 8, 9]
    assert logger.seen == [*range(1, 10)] and logger.ended == 1


EXPLODING = ct.TrainConfig(steps=9, batch_size=4, max_new_tokens=2, lr=1e30, warmup=0.0, trainable=("attn", "mlp"))


@pytest.mark.parametrize("name", unit_first(["act", "bct", "attmass", "opct"]))
def test_what_is_not_finite_ends_the_training_at_the_next_reading_by_its_own_step(base: LensModel, name: str) -> None:
    logger = Kept()
    trainer = ct.Trainer(base, pairs_of("act"), name, EXPLODING, loggers=[logger], log_every=4)

    with pytest.raises(NotFinite, match="at step 2 the model computes (nan|infinity)"):
        list(trainer)
    if name != "opct":  # which sees it as it draws, before the step has numbers
        with pytest.raises(NotFinite, match="at step 2 "):
            trainer.close()
    assert logger.seen == [1] and logger.ended == (name != "opct")


def test_nothing_is_written_of_a_training_that_is_no_longer_finite(base: LensModel, tmp_path: Path) -> None:
    trainer = ct.Trainer(base, pairs_of("act"), "act", EXPLODING, log_every=100)
    trainer.take_step()
    trainer.checkpoint(tmp_path / "before")
    kept = sorted(tmp_path.rglob("*"))
    for _ in range(3):
        trainer.take_step()

    for _ in range(2):
        with pytest.raises(NotFinite, match="at step 2 "):
            trainer.checkpoint(tmp_path / "before")
        with pytest.raises(NotFinite, match="at step 2 "):
            _ = trainer.run
    assert sorted(tmp_path.rglob("*")) == kept
    trainer.restore(tmp_path / "before")
    assert len(trainer.history) == trainer.taken == 1

    with pytest.raises(NotFinite, match="at step 2 "):
        ct.train(base, pairs_of("act"), "act", config=EXPLODING, out=tmp_path / "run", save_every=3, log_every=100)
    assert not (tmp_path / "run").exists() and not list(tmp_path.rglob(MODEL_FILE))


def test_a_resumed_training_may_read_more_seldom(base: LensModel, tmp_path: Path) -> None:
    whole = ct.Trainer(base, pairs_of("act"), "act", CONFIG)
    list(whole)
    first = ct.Trainer(base, pairs_of("act"), "act", CONFIG)
    first.take_step()
    first.checkpoint(tmp_path)
    second = ct.Trainer(base, pairs_of("act"), "act", CONFIG, log_every=5)
    second.restore(tmp_path)
    list(second)

    assert second.history == whole.history


def test_steps_are_read_at_least_every_so_many(base: LensModel) -> None:
    with pytest.raises(CtlensError, match="log_every"):
        ct.Trainer(base, pairs_of("act"), "act", CONFIG, log_every=0)


def test_the_command_writes_the_same_history(tmp_path: Path, call: Call) -> None:
    for every in (1, 3):
        given = (
            f"train --quiet --threat jailbreak --loss act --steps 4 --batch-size 4 --n-prompts 0 --log-every {every}"
        )
        assert call(f"{given} --out {tmp_path / str(every)}").code == 0
    often = (tmp_path / "1" / "history.csv").read_text()
    seldom = (tmp_path / "3" / "history.csv").read_text()
    assert seldom == often and len(seldom.splitlines()) > 4
    assert "--log-every must be at least 1" in call("train --threat jailbreak --loss act --log-every 0 --out x").err
