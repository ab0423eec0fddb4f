"""What the reference is asked during a training: once a prompt, always among the same batch-mates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers.models import hf_model
from helpers.tiers import unit_first

from ctlens.core.types import LensModel
from ctlens.data.batch import collate
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import ACT, BCT, KLCT, MLPCT, AttCT, Forwards, Loss
from ctlens.models.hooks import run_capturing
from ctlens.models.loading import load_model
from ctlens.training import TrainConfig, Trainer, train
from ctlens.training.order import batches, homes

QUESTIONS = (
    "Which term best describes the disease?",
    "Is it right?",
    "When a creature experiences feeling, what?",
    "Please answer.",
    "(A) isolated cases",
    "Here it is, what is it?",
    "They are likely sensing a texture.",
)
PAIRS = [Pair(prompt(q), prompt("I don't think it's right. " + q)) for q in QUESTIONS]
LOSSES = [
    ACT(),
    ACT(site="resid_mid", window="last"),
    MLPCT(),
    MLPCT(site="mlp_out"),
    AttCT(),
    AttCT(keys="rest"),
    AttCT(keys="renormalised", layers="last"),
    AttCT(keys="lifted", window="last"),
    AttCT(heads="mean"),
    BCT(),
    KLCT(),
    KLCT(window="last"),
    KLCT(window="answer"),
    ACT(window="answer"),
]
QUICK = TrainConfig(steps=7, batch_size=3, lr=3e-3, max_new_tokens=4)


@pytest.fixture
def model(tokenizer) -> LensModel:
    return load_model(hf_model("llama"), tokenizer=tokenizer)


@pytest.fixture
def passes(model, monkeypatch) -> Iterator[Counter[str]]:
    """Counts the forward passes of the reference, by `trainer.history` at the time, and the rows of all of them."""
    counted: Counter[str] = Counter()
    forward = type(model).forward

    def counting(self, tokens, *arguments, **options):
        counted["passes"] += self is model
        counted["rows"] += len(tokens) if self is model else 0
        return forward(self, tokens, *arguments, **options)

    monkeypatch.setattr(type(model), "forward", counting)
    yield counted


def alone(count: int) -> list[list[int]]:
    """Every row drawn by itself."""
    return [[row] for row in range(count)]


def test_homes_are_the_first_epoch_and_the_tail_it_drops() -> None:
    config = TrainConfig(batch_size=3)
    order = batches(alone(7), config)

    found = homes(alone(7), config)

    assert found[:2] == [next(order), next(order)]
    assert [len(rows) for rows in found] == [3, 3, 1]
    assert sorted(row for rows in found for row in rows) == list(range(7))
    assert homes(alone(2), config) == [next(batches(alone(2), config))]
    assert [len(rows) for rows in homes(alone(7), replace(config, accumulate=2))] == [2, 1, 2, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("losses", [AttCT(), [ACT(), KLCT(), BCT()]], ids=str)
def test_no_reference_pass_follows_the_first_epoch(model, passes, losses) -> None:
    config = replace(QUICK, batch_size=2, steps=9)
    trainer = Trainer(model, PAIRS[:6], losses, config)
    for _ in range(3):
        next(trainer)
    after_an_epoch = passes["passes"]

    list(trainer)

    assert trainer.retention is not None and len(trainer.history) == 9
    assert passes["passes"] == after_an_epoch > 0
    list(fresh := Trainer(model, PAIRS[:6], losses, replace(config, cache=False)))
    assert len(fresh.history) == 9 and passes["passes"] > after_an_epoch + 9  # the count sees what it should


def test_fewer_steps_than_an_epoch_ask_no_more_than_they_use(model, passes) -> None:
    trainer = Trainer(model, PAIRS, ACT(), replace(QUICK, steps=1, retention=0.0))
    before = passes["rows"]

    list(trainer)

    assert passes["rows"] - before == 3


def test_only_the_prompts_that_will_be_drawn_are_answered(model) -> None:
    trainer = Trainer(model, PAIRS, ACT(), replace(QUICK, steps=1))

    list(trainer)

    assert 1 <= len(trainer.retention.answers) <= 2 < len(trainer.retention.prompts)


@pytest.mark.parametrize("loss", unit_first(LOSSES, 3), ids=str)
def test_a_loss_from_kept_targets_is_that_of_a_fresh_pass(model, loss: Loss) -> None:
    trainer = Trainer(model, PAIRS, loss, QUICK)
    list(trainer)
    rows = [4, 0, 6, 2]
    (term,) = trainer._terms.values()
    with torch.no_grad(), trainer._passes.open() as forwards:
        kept = forwards.seen(rows, trainer._terms, step=1, grad=False)[loss.name]
    batch = collate([trainer.pairs.rows[row] for row in rows])
    logits, states = run_capturing(model, batch.clean.tokens, term.factors, grad=False)
    fresh = Forwards(batch, states, kept.wrapped, kept.wrapped_logits, logits)

    for name, values in loss.row_values(fresh, list(term.factors)).items():
        found = loss.row_values(kept, list(term.factors))[name]
        assert values.min() > 1e-6
        torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-7)


def test_a_target_does_not_depend_on_when_it_is_needed(model) -> None:
    here = Trainer(model, PAIRS, [ACT(), AttCT()], QUICK)._passes.targets
    there = Trainer(model, PAIRS, [ACT(), AttCT()], QUICK)._passes.targets
    rows = [5, 1, 3]
    late = [6, 2, 0, 4]
    batch = collate([here.pairs.rows[row] for row in rows])
    later = collate([here.pairs.rows[row] for row in late])
    first = here.of(rows, batch, here.names)[0]

    there.of(late, later, there.names)
    second = there.of(rows, batch, here.names)[0]

    assert all(torch.equal(first[name], second[name]) for name in first) and len(first) == 4


@pytest.mark.parametrize("loss", unit_first([ACT(), AttCT(), KLCT(), BCT()]), ids=lambda loss: loss.name)
def test_a_training_is_the_same_without_the_cache(model, loss) -> None:
    kept = train(model, PAIRS, loss, config=replace(QUICK, cache=True), progress=False).history
    fresh = train(model, PAIRS, loss, config=replace(QUICK, cache=False), progress=False).history

    assert kept.series("total") == pytest.approx(fresh.series("total"), rel=1e-3)


def test_a_moving_clean_side_is_the_trained_model_s_own(model) -> None:
    own = Trainer(model, PAIRS[:3], ACT(clean="own"), replace(QUICK, retention=0.0))
    fixed = Trainer(model, PAIRS[:3], ACT(), replace(QUICK, retention=0.0))
    first = [next(trainer).losses["act"] for trainer in (own, fixed)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)  # until the first update they are the same
    batch = collate([own.pairs.rows[row] for row in (0, 1, 2)])
    names = own._terms["act"].factors
    logits, wrapped = run_capturing(own.model, batch.wrapped.tokens, names, grad=False)
    clean = {id(m): run_capturing(m, batch.clean.tokens, names, grad=False)[1] for m in (own.model, model)}

    moved = ACT().measure(Forwards(batch, clean[id(own.model)], wrapped, logits), names).total.item()
    still = ACT().measure(Forwards(batch, clean[id(model)], wrapped, logits), names).total.item()

    assert next(own).losses["act"] == pytest.approx(0.01 * moved, rel=1e-4)
    assert moved != pytest.approx(still, rel=1e-3)


def test_a_moving_clean_side_asks_the_reference_nothing_and_gets_no_gradient(model, passes) -> None:
    trainer = Trainer(model, PAIRS, ACT(clean="own"), replace(QUICK, retention=0.0))
    before = passes["passes"]

    list(trainer)

    assert passes["passes"] == before
