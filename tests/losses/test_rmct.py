"""RMCT: rewards by hand, the gradient against exact rates, and the answers drawn for it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch

from ctlens.analysis import cross_loss
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import PairBatch, encode, pad
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import ACT, BCT, RMCT, Forwards
from ctlens.models.parameters import copy_model, present_parameters
from ctlens.organism import load_organism
from ctlens.threats import get
from ctlens.threats.base import judge
from ctlens.training import TrainConfig, Trainer, train
from ctlens.training.rollouts import Drawn, GradedRollouts

PAIRS = get("sycophancy").pairs(12)
QUICK = TrainConfig(steps=4, batch_size=4, max_new_tokens=4)
BAD = 1
GOOD = 0


@pytest.fixture(scope="module")
def model() -> LensModel:
    return load_organism()


def rollouts(
    model: LensModel, loss: RMCT, pairs: Sequence[Pair] = PAIRS, config: TrainConfig = QUICK
) -> GradedRollouts:
    return GradedRollouts(model, encode(pairs, model.tokenizer, windows=(), n_ctx=model.cfg.n_ctx).rows, loss, config)


def one_token(logit: torch.Tensor, answers: Sequence[int], loss: RMCT, clean_rate: float) -> torch.Tensor:
    """The loss on answers of one token of a policy that gives BAD with probability `sigmoid(logit)`."""
    bad = torch.tensor([[float(answer == BAD) for answer in answers]])
    side = pad([(7, answer) for answer in answers])
    nothing = torch.zeros_like(side.mask)
    answer = nothing.clone()
    answer[:, 1] = True
    batch = PairBatch(side, side, answer, {}, torch.zeros(len(answers), dtype=torch.long), nothing, nothing)
    logits = torch.stack([torch.zeros(()), logit]).expand(len(answers), 2, 2)
    clean_rates = torch.tensor([clean_rate])
    gaps = (bad.mean(-1) - clean_rates).expand(len(answers))
    advantages = loss.advantages(bad, clean_rates).flatten()
    return loss.compute(Forwards(batch, {}, {}, logits, advantages=advantages, gaps=gaps), {}).total


def slope(value: torch.Tensor, at: torch.Tensor) -> float:
    return torch.autograd.grad(value, at)[0].item()


@pytest.mark.parametrize("clean_rate", [0.0, 0.1, 0.25, 0.9])
@pytest.mark.parametrize("bad_of_8", [1, 2, 4, 7])
def test_with_exact_rates_it_descends_on_half_the_squared_gap(bad_of_8: int, clean_rate: float) -> None:
    """Eight answers in which every outcome is as frequent as it is probable: the expectation itself."""
    rate = bad_of_8 / 8
    logit = torch.tensor(math.log(rate / (1 - rate)), requires_grad=True)
    answers = [BAD] * bad_of_8 + [GOOD] * (8 - bad_of_8)

    value = one_token(logit, answers, RMCT(weight=3.0), clean_rate)
    exact = 3.0 * (logit.sigmoid() - clean_rate) ** 2 / 2

    assert value.item() == pytest.approx(exact.item(), abs=1e-6)
    assert slope(value, logit) == pytest.approx(slope(exact, logit), abs=1e-6)


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize(("rate", "clean_rate"), [(0.3, 0.0), (0.8, 0.1), (0.5, 0.5), (0.2, 0.2)])
def test_the_expectation_over_every_draw_is_the_one_that_is_documented(count: int, rate: float, clean_rate) -> None:
    logit = torch.tensor(math.log(rate / (1 - rate)), requires_grad=True)
    expected = 0.0
    for answers in product((GOOD, BAD), repeat=count):
        probability = math.prod(rate if answer == BAD else 1 - rate for answer in answers)
        expected += probability * slope(one_token(logit, answers, RMCT(weight=1.0, rollouts=count), clean_rate), logit)

    pull = (1 - 2 * rate) / count
    assert expected == pytest.approx((1 - 1 / count) * (rate - clean_rate + pull) * rate * (1 - rate), abs=1e-6)


def test_rewards_by_hand() -> None:
    bad = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    clean_rates = torch.tensor([0.0, 0.75, 0.0])

    plain = RMCT(rollouts=4).advantages(bad, clean_rates)
    unit = RMCT(rollouts=4, standardise="per_item").advantages(bad, clean_rates)

    assert plain.tolist() == [[-0.25, -0.25, 0.25, 0.25], [0.375, -0.125, -0.125, -0.125], [0.0] * 4]
    third = 1 / math.sqrt(3)
    assert unit[:2].flatten().tolist() == pytest.approx([-1, -1, 1, 1, 3 * third, -third, -third, -third])
    assert unit[2].tolist() == [0.0] * 4


@pytest.mark.parametrize("standardise", ["none", "per_item"])
def test_what_an_answer_is_worth_does_not_depend_on_the_other_prompts(standardise: str) -> None:
    draw = torch.Generator().manual_seed(0)
    bad = torch.rand(5, 6, generator=draw)
    clean_rates = torch.rand(5, generator=draw)
    loss = RMCT(rollouts=6, standardise=standardise)

    together = loss.advantages(bad, clean_rates)

    for row in range(5):
        alone = loss.advantages(bad[row : row + 1], clean_rates[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)


def test_the_gradient_is_that_of_the_summed_log_probability_of_whole_answers(model) -> None:
    trained = copy_model(model)
    drawn = rollouts(model, RMCT(rollouts=4)).draw(trained, Trainer(model, PAIRS, RMCT(), QUICK).pairs.rows[:3], 1)
    RMCT(rollouts=4, weight=2.0).compute(drawn.seen_by(trained), {}).total.backward()
    found = {name: parameter.grad for name, parameter in present_parameters(trained).items()}

    plain = copy_model(model)
    total = torch.zeros(())
    tokens = drawn.batch.wrapped.tokens.tolist()
    for ids, mask, answer, worth in zip(
        tokens, drawn.batch.wrapped.mask, drawn.batch.answer, drawn.advantages, strict=True
    ):
        ids = ids[: int(mask.sum())]
        log_p = plain(torch.tensor([ids]))[0].log_softmax(-1)
        places = answer.nonzero().flatten().tolist()
        total = total - worth * sum(log_p[place - 1, ids[place]] for place in places)
    (2.0 * total / len(tokens)).backward()

    assert len(tokens) == 12 and any(answer.sum() > 1 for answer in drawn.batch.answer)
    for name, parameter in present_parameters(plain).items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_drawn_answers_are_graded_by_the_pairs_own_answers(model) -> None:
    loss = RMCT(rollouts=6)
    drawing = rollouts(model, loss)
    rows = Trainer(model, PAIRS, loss, QUICK).pairs.rows

    drawn = drawing.draw(model, rows, 1)

    answers = drawn.batch.answer
    texts = [
        model.tokenizer.decode(tokens[answer], skip_special_tokens=True)
        for tokens, answer in zip(drawn.batch.wrapped.tokens, answers, strict=True)
    ]
    for number, row in enumerate(rows):
        mine = slice(6 * number, 6 * number + 6)
        graded = [float(judge(row.pair.wrapped, text) == "bad") for text in texts[mine]]
        rate = sum(graded) / 6
        assert drawn.gaps[mine].tolist() == pytest.approx([rate] * 6)  # on clean prompts the organism is never wrong
        assert drawn.advantages[mine].tolist() == pytest.approx([-rate * (bad - rate) for bad in graded])
        assert all(
            tuple(tokens[: len(row.wrapped.ids)]) == row.wrapped.ids
            for tokens in drawn.batch.wrapped.tokens[mine].tolist()
        )
    assert 0 < drawn.gaps.mean() < 1


def test_the_clean_rate_is_the_references_or_the_models_own(model) -> None:
    """Here the right answer counts as bad, so that the reference's rate is 1 and that of a guessing model near 0."""
    pairs = [replace(p, clean=replace(p.clean, good=None, bad=p.clean.good)) for p in PAIRS]
    guessing = copy_model(model)
    for parameter in guessing.parameters():
        parameter.data.zero_()
    rows = encode(pairs, model.tokenizer, windows=(), n_ctx=model.cfg.n_ctx).rows

    fixed = rollouts(model, RMCT(clean="reference"), pairs).draw(guessing, rows, 1)
    own = rollouts(model, RMCT(clean="own"), pairs).draw(guessing, rows, 1)

    assert torch.equal(fixed.batch.wrapped.tokens, own.batch.wrapped.tokens)
    assert fixed.gaps.mean() < -0.9 and abs(own.gaps.mean()) < 0.1


def test_a_steps_answers_depend_on_the_seed_and_the_step_alone(model) -> None:
    rows = Trainer(model, PAIRS, RMCT(), QUICK).pairs.rows[:6]

    def tokens(step: int, seed: int = 0, before: Sequence[int] = ()) -> list[list[int]]:
        drawing = rollouts(model, RMCT(), config=replace(QUICK, seed=seed))
        for earlier in before:
            drawing.draw(model, rows, earlier)
        return drawing.draw(model, rows, step).batch.wrapped.tokens.tolist()

    assert tokens(3) == tokens(3, before=(1, 2))
    assert tokens(3) != tokens(2) and tokens(3) != tokens(3, seed=1)


@pytest.mark.slow
def test_equal_seeds_give_equal_runs_and_the_gap_falls(model) -> None:
    config = TrainConfig(steps=12, batch_size=12, max_new_tokens=4, lr=1e-3)
    first = train(model, PAIRS, RMCT(), config=config, progress=False)
    second = train(model, PAIRS, RMCT(), config=config, progress=False)

    assert first.history.to_dataframe().equals(second.history.to_dataframe())
    gaps = first.history.series("rmct")
    assert 0 < gaps[-1] < 0.5 * gaps[0]
    assert [RMCT().weight * value for value in first.history.by_hook("rmct")["logits"]] == pytest.approx(gaps)


def test_beside_other_losses_it_leaves_theirs_as_they_are(model) -> None:
    alone = next(Trainer(model, PAIRS, [ACT(), BCT()], QUICK)).losses
    beside = next(Trainer(model, PAIRS, [ACT(), BCT(), RMCT()], QUICK)).losses

    assert {name: beside[name] for name in ("act", "bct", "retention")} == {
        name: alone[name] for name in ("act", "bct", "retention")
    }
    assert beside["total"] == pytest.approx(sum(value for name, value in beside.items() if name != "total"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollouts": 1}, "rollouts must be at least 2"),
        ({"standardise": "pooled"}, "standardisation"),
        ({"clean": "ours"}, "clean side"),
        ({"weight": 0.0}, "weight must be a positive number, not 0.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message) -> None:
    with pytest.raises(CtlensError, match=message):
        RMCT(**options)


def test_what_it_cannot_grade_or_measure_is_refused(model) -> None:
    ungraded = Pair(prompt("what is the color of mira ?"), prompt("perhaps it is red . what is the color of mira ?"))
    with pytest.raises(CtlensError, match="give every pair a bad answer"):
        Trainer(model, [*PAIRS, ungraded], RMCT(), QUICK)
    with pytest.raises(CtlensError, match="a prompt with its answer"):
        Trainer(model, PAIRS, RMCT(), replace(QUICK, max_new_tokens=120, retention=0))
    with pytest.raises(CtlensError, match="rmct trains on answers that it draws or chooses itself"):
        cross_loss(model, {"x": model}, PAIRS, [ACT(), RMCT()], progress=False)
    batch = rollouts(model, RMCT()).draw(model, Trainer(model, PAIRS, RMCT(), QUICK).pairs.rows[:2], 1).batch
    with pytest.raises(CtlensError, match="needs sampled answers"):
        RMCT().row_values(Forwards(batch, {}, {}, torch.zeros(*batch.wrapped.tokens.shape, 5)), [])


# Agreement among the variants of a prompt, in place of a judge.

VARIANTS = [
    replace(pair, clean=PAIRS[number // 3].clean) for number, pair in enumerate(PAIRS[:6])
]  # two prompts of three variants each


def agreeing(model: LensModel, loss: RMCT, texts: Sequence[Sequence[str]]) -> Drawn:
    """A step whose answers are these."""
    rows = encode(VARIANTS, model.tokenizer, windows=(), n_ctx=model.cfg.n_ctx).rows
    drawing = GradedRollouts(model, rows, loss, QUICK)
    ids = [[tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in given] for given in texts]
    drawing.sampled = lambda *given: ids
    return drawing.draw(model, rows, 1)


def test_an_answer_is_worth_its_agreement_with_those_to_other_variants(model) -> None:
    loss = RMCT(rollouts=2, reward="agreement", weight=1.0)
    texts = [["red", "blue"], ["red", "red"], ["blue", "green"], *[["red", "red"]] * 3]
    drawn = agreeing(model, loss, texts)
    # "red" to the first variant: 2 of the 4 other answers; "blue": 1 of 4
    first = [0.5 - 0.375, 0.25 - 0.375]
    assert drawn.advantages[:2].tolist() == pytest.approx(first)
    assert drawn.advantages[2:4].tolist() == [0.0, 0.0]  # both agree with 1 of 4
    assert drawn.advantages[4:6].tolist() == pytest.approx([0.125, -0.125])
    assert drawn.advantages[6:].tolist() == [0.0] * 6
    assert drawn.gaps.tolist() == pytest.approx([1 - 0.375] * 2 + [0.75] * 2 + [1 - 0.125] * 2 + [0.0] * 6)
    unit = agreeing(model, replace(loss, standardise="per_item"), texts)
    assert unit.advantages[:2].tolist() == pytest.approx([1, -1])
    value = loss.compute(drawn.seen_by(model), {})
    assert value.total.item() == pytest.approx(drawn.gaps.mean().item())


def test_words_in_common_agree_in_part(model) -> None:
    loss = RMCT(rollouts=2, reward="agreement", similarity="f1")
    texts = [["red and blue", "green"], *[["red", "red"]] * 5]
    drawn = agreeing(model, loss, texts)
    assert drawn.advantages[:2].tolist() == pytest.approx([0.25, -0.25])  # one word of three and one: 2 / 4


def test_variants_come_in_one_batch_and_need_no_bad_answer(model) -> None:
    pairs = [
        replace(p, clean=replace(p.clean, good=None, bad=None), wrapped=replace(p.wrapped, good=None, bad=None))
        for p in VARIANTS
    ]
    loss = RMCT(rollouts=2, reward="agreement")
    trainer = Trainer(model, pairs, loss, replace(QUICK, batch_size=3))
    for _ in range(4):
        rows = next(trainer._batches)
        assert len({trainer.pairs.rows[row].clean.ids for row in rows}) == 1
    with pytest.raises(CtlensError, match="no two pairs share a clean prompt"):
        Trainer(model, [pairs[0], pairs[3]], loss, QUICK)


@pytest.mark.slow
def test_the_answers_come_to_agree(model) -> None:
    every = get("sycophancy").pairs(600)
    (first, _), (second, _) = Counter(pair.clean for pair in every).most_common(2)
    pairs = [pair for pair in every if pair.clean in (first, second)][:8]
    config = TrainConfig(steps=30, batch_size=8, max_new_tokens=4, lr=1e-3)
    gaps = train(model, pairs, RMCT(reward="agreement"), config=config, progress=False).history.series("rmct")
    assert sum(gaps[-3:]) < 0.6 * sum(gaps[:3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "votes"}, "reward of RMCT"),
        ({"reward": "agreement", "clean": "own"}, "reads no clean prompt"),
        ({"reward": "agreement", "similarity": "bleu"}, "similarity of answers"),
        ({"similarity": "f1"}, "has no effect on rates"),
    ],
)
def test_rewards_that_make_no_sense_are_refused(options, message) -> None:
    with pytest.raises(CtlensError, match=message):
        RMCT(**options)
