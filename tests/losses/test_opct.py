"""OPCT: the expected gradient is the exact one, by enumeration; values by hand; and the answers drawn for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import PairBatch, encode, pad
from ctlens.data.pairs import Pair
from ctlens.losses import ACT, BCT, OPCT, RMCT, Forwards
from ctlens.models.hooks import run
from ctlens.models.parameters import copy_model, present_parameters
from ctlens.organism import load_organism
from ctlens.threats import get
from ctlens.training import TrainConfig, Trainer, train
from ctlens.training.rollouts import RereadRollouts

PAIRS = get("sycophancy").pairs(12)
QUICK = TrainConfig(steps=4, batch_size=4, max_new_tokens=4)
VOCABULARY = 3
ANSWERS = list(product(range(VOCABULARY), repeat=2))
BOTH = ("sampled", "full")


@pytest.fixture(scope="module")
def model() -> LensModel:
    return load_organism()


class Policy(NamedTuple):
    """A policy over answers of two tokens: the logits of the first, and of the second behind each first."""

    first: Tensor
    second: Tensor

    def log_p(self, answer: Sequence[int], temperature: float = 1.0) -> Tensor:
        one, two = answer
        behind = (self.second[one] / temperature).log_softmax(-1)[two]
        return (self.first / temperature).log_softmax(-1)[one] + behind


@pytest.fixture
def trained() -> Policy:
    draw = torch.Generator().manual_seed(0)
    logits = [torch.randn(size, generator=draw).requires_grad_() for size in ((3,), (3, 3))]
    return Policy(*logits)


@pytest.fixture
def reference() -> Policy:
    draw = torch.Generator().manual_seed(1)
    return Policy(*[torch.randn(size, generator=draw) for size in ((3,), (3, 3))])


def value(trained: Policy, reference: Policy, answer: Sequence[int], loss: OPCT) -> Tensor:
    """The loss on one answer, behind a wrapped prompt of two tokens and a clean one of one token."""
    wrapped = pad([(7, 8, *answer)])
    clean = pad([(7, *answer)])
    behind = torch.zeros(1, 4, dtype=torch.bool)
    behind[0, 2:] = True
    nothing = torch.zeros_like(behind)
    batch = PairBatch(clean, wrapped, behind, {}, torch.zeros(1, dtype=torch.long), nothing, behind[:, 1:])
    unread = torch.full((1, 1, VOCABULARY), torch.nan)

    def logits(policy: Policy) -> Tensor:
        return torch.cat([policy.first[None, None], policy.second[answer[0]][None, None], unread], 1)

    own = torch.cat([unread, logits(trained)], 1)
    return loss.compute(Forwards(batch, {}, {}, own, logits(reference)), {}).total


def expected(trained: Policy, reference: Policy, loss: OPCT) -> tuple[float, list[Tensor]]:
    """The mean of the loss and of its gradient over all answers, each as probable as it is drawn."""
    total = torch.zeros(())
    gradients = [torch.zeros_like(part) for part in trained]
    for answer in ANSWERS:
        chance = trained.log_p(answer, loss.temperature).exp().detach()
        found = value(trained, reference, answer, loss)
        total += chance * found.detach()
        for sum_of, part in zip(gradients, torch.autograd.grad(found, trained, allow_unused=True), strict=True):
            sum_of += 0 if part is None else chance * part
    return float(total), gradients


def divergence(one: Tensor, other: Tensor) -> Tensor:
    return (one.softmax(-1) * (one.log_softmax(-1) - other.log_softmax(-1))).sum(-1)


@pytest.mark.parametrize("estimator", BOTH)
def test_over_whole_answers_it_descends_on_their_divergence(trained: Policy, reference: Policy, estimator: str) -> None:
    chances = torch.stack([trained.log_p(answer) for answer in ANSWERS])
    theirs = torch.stack([reference.log_p(answer) for answer in ANSWERS])
    exact = (chances.exp() * (chances - theirs)).sum()

    found, gradients = expected(trained, reference, OPCT(weight=3.0, estimator=estimator, discount=1.0))

    assert found == pytest.approx(3 * exact.item(), abs=1e-6)
    for part, of_exact in zip(gradients, torch.autograd.grad(3 * exact, trained), strict=True):
        torch.testing.assert_close(part, of_exact)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("estimator", BOTH)
def test_without_later_tokens_it_descends_on_each_next_tokens_divergence(
    trained: Policy, reference: Policy, estimator: str, temperature: float
) -> None:
    """Behind beginnings as they are drawn, which are held fixed."""
    loss = OPCT(weight=1.0, estimator=estimator, temperature=temperature)
    if estimator == "sampled" and temperature != 1:
        loss = replace(loss, correction="ratio")
    begun = (trained.first / temperature).softmax(-1).detach()
    exact = divergence(trained.first, reference.first) + (begun * divergence(trained.second, reference.second)).sum()

    _, gradients = expected(trained, reference, loss)

    for part, of_exact in zip(gradients, torch.autograd.grad(exact, trained), strict=True):
        torch.testing.assert_close(part, of_exact)


def test_the_full_estimator_varies_less(trained: Policy, reference: Policy) -> None:
    def spread(estimator: str) -> float:
        loss = OPCT(weight=1.0, estimator=estimator)
        mean = expected(trained, reference, loss)[1][0]
        found = 0.0
        for answer in ANSWERS:
            chance = trained.log_p(answer).exp().item()
            (part,) = torch.autograd.grad(value(trained, reference, answer, loss), [trained.first])
            found += chance * (part - mean).square().sum().item()
        return found

    assert spread("full") < 1e-12 < 0.1 < spread("sampled")  # the first token's sum leaves nothing to chance


@pytest.mark.parametrize("estimator", BOTH)
def test_at_the_reference_it_is_zero_and_has_no_gradient(trained: Policy, estimator: str) -> None:
    same = Policy(*[part.detach() for part in trained])
    for answer in ANSWERS:
        found = value(trained, same, answer, OPCT(estimator=estimator, discount=0.5))
        gradients = torch.autograd.grad(found, trained)
        assert found.item() == pytest.approx(0, abs=1e-6)
        assert max(part.abs().max().item() for part in gradients) < 1e-6


def test_a_token_answers_for_those_behind_it() -> None:
    """Two tokens, each with chance 1/2, that the reference gives 1/4 and 1/8: log-ratios of log 2 and log 4."""
    two = torch.zeros(2)
    trained = Policy(two.clone().requires_grad_(), torch.zeros(2, 2).requires_grad_())
    reference = Policy(torch.tensor([1.0, 3.0]).log(), torch.tensor([[1.0, 7.0], [1.0, 7.0]]).log())
    answer = (0, 0)
    wrapped = pad([(7, 8, *answer)])
    behind = torch.tensor([[False, False, True, True]])
    nothing = torch.zeros_like(behind)
    batch = PairBatch(wrapped, wrapped, behind, {}, torch.zeros(1, dtype=torch.long), nothing, behind)

    def logits(policy: Policy) -> Tensor:
        return torch.stack([two, policy.first, policy.second[0], two])[None]

    def slopes(discount: float) -> list[float]:
        loss = OPCT(weight=1.0, discount=discount)
        total = loss.compute(Forwards(batch, {}, {}, logits(trained), logits(reference)), {}).total
        assert total.item() == pytest.approx(math.log(8))
        first, second = torch.autograd.grad(total, trained)
        return [first[0].item(), second[0, 0].item()]

    half = 0.5  # the slope of a log-probability of 1/2 by its logit
    log_2 = math.log(2)
    assert slopes(0.0) == pytest.approx([half * log_2, half * 2 * log_2])
    assert slopes(1.0) == pytest.approx([half * 3 * log_2, half * 2 * log_2])
    assert slopes(0.5) == pytest.approx([half * 2 * log_2, half * 2 * log_2])


def test_the_clipped_ratio_holds_back_what_would_go_further(trained: Policy, reference: Policy) -> None:
    loss = OPCT(weight=1.0, temperature=0.3, correction="clip")
    for answer in ANSWERS:
        one = answer[0]
        ratio = (trained.first.log_softmax(-1)[one] - (trained.first / 0.3).log_softmax(-1)[one]).exp().item()
        advantage = (reference.first.log_softmax(-1)[one] - trained.first.log_softmax(-1)[one]).item()
        (found,) = torch.autograd.grad(value(trained, reference, answer, loss), [trained.first])
        held = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
        (slope,) = torch.autograd.grad(trained.first.log_softmax(-1)[one], [trained.first])
        torch.testing.assert_close(found, 0 * slope if held else -advantage * ratio * slope, atol=1e-6, rtol=1e-4)


def drawing(model: LensModel, loss: OPCT, pairs: Sequence[Pair] = PAIRS, config: TrainConfig = QUICK) -> Any:
    return RereadRollouts(model, encode(pairs, model.tokenizer, windows=(), n_ctx=model.cfg.n_ctx).rows, loss, config)


def test_the_reference_reads_the_same_answers_behind_the_clean_prompts(model: LensModel) -> None:
    rows = encode(PAIRS[:3], model.tokenizer, windows=(), n_ctx=model.cfg.n_ctx).rows
    drawn = drawing(model, OPCT(rollouts=2)).draw(copy_model(model), rows, 1)

    assert len(drawn.batch.wrapped.tokens) == 6
    for number in range(6):
        row = rows[number // 2]
        wrapped = drawn.batch.wrapped.tokens[number][drawn.batch.wrapped.mask[number]].tolist()
        answer = wrapped[len(row.wrapped.ids) :]
        clean = drawn.batch.clean.tokens[number][drawn.batch.clean.mask[number]].tolist()
        assert answer and tuple(wrapped[: len(row.wrapped.ids)]) == row.wrapped.ids
        assert clean == [*row.clean.ids, *answer]
        alone = run(model, torch.tensor([clean]))[0]
        torch.testing.assert_close(drawn.clean_logits[number, : len(clean)], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("estimator", BOTH)
def test_its_value_does_not_depend_on_padding_or_the_other_rows(model: LensModel, estimator: str) -> None:
    trained = copy_model(model)
    for parameter in trained.parameters():
        parameter.data *= 0.9
    rows = encode(PAIRS[:4], model.tokenizer, windows=(), n_ctx=model.cfg.n_ctx).rows
    loss = OPCT(rollouts=1, estimator=estimator, discount=0.5)
    together = drawing(model, loss).draw(trained, rows, 1)
    values = loss.row_values(together.seen_by(trained), [])["logits"]
    for number, row in enumerate(rows):
        answer = tuple(together.batch.wrapped.tokens[number][together.batch.answer[number]].tolist())
        behind = drawing(model, loss)
        behind.sampled = lambda *given, answer=answer: [[answer]]
        alone = loss.row_values(behind.draw(trained, [row], 1).seen_by(trained), [])["logits"]
        torch.testing.assert_close(alone[0], values[number], atol=1e-4, rtol=1e-4)


def test_clean_to_clean_is_a_training_of_its_own(model: LensModel) -> None:
    """Losses on activations are zero there for the reference alone; this one pulls any other model back to it."""
    pairs = [Pair(pair.clean, pair.clean) for pair in PAIRS]
    moved = copy_model(model)
    for parameter in moved.parameters():
        parameter.data *= 0.8
    rows = encode(pairs, model.tokenizer, windows=(), n_ctx=model.cfg.n_ctx).rows
    loss = OPCT(estimator="full")
    found = loss.compute(drawing(model, loss, pairs).draw(moved, rows, 1).seen_by(moved), {})
    assert found.total.item() > 0.1
    found.total.backward()
    assert max(float(p.grad.abs().max()) for p in present_parameters(moved).values() if p.grad is not None) > 1e-3


def test_a_steps_answers_depend_on_the_seed_and_the_step_alone(model: LensModel) -> None:
    rows = encode(PAIRS[:6], model.tokenizer, windows=(), n_ctx=model.cfg.n_ctx).rows

    def tokens(step: int, seed: int = 0) -> list[list[int]]:
        config = replace(QUICK, seed=seed)
        return drawing(model, OPCT(), config=config).draw(model, rows, step).batch.wrapped.tokens.tolist()

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(2) and tokens(3) != tokens(3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", BOTH)
def test_training_brings_the_answers_to_the_references(model: LensModel, estimator: str) -> None:
    config = TrainConfig(steps=16, batch_size=12, max_new_tokens=4, lr=1e-3)
    first = train(model, PAIRS, OPCT(estimator=estimator), config=config, progress=False)
    second = train(model, PAIRS, OPCT(estimator=estimator), config=config, progress=False)

    assert first.history.to_dataframe().equals(second.history.to_dataframe())
    values = first.history.series("opct")
    assert values[0] > 1 and sum(values[-4:]) < 0.5 * 4 * values[0]


def test_beside_other_losses_it_leaves_theirs_as_they_are(model: LensModel) -> None:
    alone = next(Trainer(model, PAIRS, [ACT(), BCT(), RMCT()], QUICK)).losses
    beside = next(Trainer(model, PAIRS, [ACT(), BCT(), RMCT(), OPCT()], QUICK)).losses

    assert {name: beside[name] for name in ("act", "bct", "rmct")} == {
        name: alone[name] for name in ("act", "bct", "rmct")
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollouts": 0}, "rollouts must be at least 1, not 0"),
        ({"estimator": "exact"}, "estimator of OPCT"),
        ({"discount": 1.5}, "discount is a share, 0 to 1"),
        ({"discount": -0.1}, "discount is a share, 0 to 1"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"correction": "ppo"}, "correction of OPCT"),
        ({"correction": "ratio"}, "need no correction"),
        ({"correction": "ratio", "temperature": 0.7, "estimator": "full"}, "there is no ratio to correct"),
        ({"weight": 0.0}, "weight must be a positive number, not 0.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        OPCT(**options)


def test_what_it_cannot_train_on_is_refused(model: LensModel) -> None:
    with pytest.raises(CtlensError, match="a prompt with its answer"):
        Trainer(model, PAIRS, OPCT(), replace(QUICK, max_new_tokens=120, retention=0))
    rows = encode(PAIRS[:2], model.tokenizer, windows=(), n_ctx=model.cfg.n_ctx).rows
    drawn = drawing(model, OPCT()).draw(model, rows, 1)
    with pytest.raises(CtlensError, match="needs sampled answers"):
        OPCT().row_values(replace(drawn.seen_by(model), clean_logits=None), [])
