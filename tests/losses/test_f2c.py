"""F2C: who votes and who teaches, the value by loops, and what a consensus cannot be had from."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.models import hf_model

from ctlens.analysis import cross_loss
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import EncodedPair, collate, encode
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import BCT, F2C, Forwards
from ctlens.models.hooks import run
from ctlens.models.loading import load_model
from ctlens.organism import load_organism
from ctlens.threats import get
from ctlens.threats.base import judge
from ctlens.training import TrainConfig, Trainer, train
from ctlens.training.answers import majority, reference_answers

QUESTIONS = ("Is it right?", "Which term best describes the disease?")
BEFORE = ("no, ", "I may be in the minority here, but ", "Sure, here it is: ")
QUICK = TrainConfig(steps=3, batch_size=6, max_new_tokens=3)


@pytest.fixture(scope="module")
def model(tokenizer) -> LensModel:
    return load_model(hf_model("llama"), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def rows(model, tokenizer) -> list[EncodedPair]:
    """Three variants of two prompts, whose answers are what the model gives to the second variant."""
    pairs = [Pair(prompt(q), prompt(before + q)) for q in QUESTIONS for before in BEFORE]
    encoded = encode(pairs, tokenizer, windows=(), n_ctx=256).rows
    answers = [greedy(model, encoded[3 * number + 1].wrapped.ids) for number in range(2)]
    return [replace(row, answer=answers[number // 3]) for number, row in enumerate(encoded)]


@pytest.fixture(scope="module")
def organism() -> LensModel:
    return load_organism()


def greedy(model: LensModel, ids: tuple[int, ...], count: int = 3) -> tuple[int, ...]:
    tokens = list(ids)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tuple(tokens[len(ids) :])


def row_values(model: LensModel, loss: F2C | BCT, rows: list[EncodedPair], padding="right") -> torch.Tensor:
    batch = collate(rows, padding)
    logits = run(model, batch.wrapped.tokens, batch.wrapped.needed_mask)
    return loss.row_values(Forwards(batch, {}, {}, logits), [])["logits"]


def by_loops(model: LensModel, rows: list[EncodedPair], align_weight: float, teachers: int) -> list[float]:
    """The loss one pair at a time, every distribution as a list."""
    predicted = []
    surprise = []
    for row in rows:
        logits = model(torch.tensor([row.wrapped.ids + row.answer]))[0].detach().double()
        start = len(row.wrapped.ids) - 1
        predicted.append(logits[start : start + len(row.answer)].log_softmax(-1))
        picked = [predicted[-1][place, token].item() for place, token in enumerate(row.answer)]
        surprise.append(-sum(picked) / len(picked))
    values = []
    for number, row in enumerate(rows):
        group = [i for i, other in enumerate(rows) if (other.clean.ids, other.answer) == (row.clean.ids, row.answer)]
        voters = [i for i in group if tuple(predicted[i].argmax(-1).tolist()) == rows[i].answer]
        chosen = sorted(voters, key=lambda i: surprise[i])[: min(teachers, len(group) - 1)]
        alignment = 0.0
        if chosen and number not in chosen:
            for place in range(len(row.answer)):
                mean = sum(predicted[i][place].exp() for i in chosen) / len(chosen)
                alignment += float((mean * (mean.log() - predicted[number][place])).sum()) / len(row.answer)
        values.append(surprise[number] + align_weight * alignment)
    return values


@pytest.mark.parametrize("teachers", [1, 2, 5])
@pytest.mark.parametrize("align_weight", [0.0, 0.1, 2.0])
def test_the_value_by_loops(model, rows, align_weight, teachers) -> None:
    found = row_values(model, F2C(align_weight=align_weight, teachers=teachers), rows)

    assert found.tolist() == pytest.approx(by_loops(model, rows, align_weight, teachers), rel=1e-4)


def test_the_restatement_has_teachers_and_learners(model, rows) -> None:
    aligned = torch.tensor(by_loops(model, rows, 1.0, 2))
    alone = torch.tensor(by_loops(model, rows, 0.0, 2))

    assert [bool(gap > 1e-3) for gap in aligned - alone] == [False, False, True, True, False, True]


def test_where_all_agree_the_least_sure_learns_from_the_others(organism) -> None:
    pairs = get("sycophancy").pairs(60)
    clean = [
        Pair(p.clean, prompt(f"{word} . {p.clean.turns[0].content}"))
        for p in pairs[:4]
        for word in ("sorry", "what", "it")
    ]
    encoded = encode(clean, organism.tokenizer, windows=(), n_ctx=organism.cfg.n_ctx)
    answers = reference_answers(organism, encoded, 4, kind="consensus")
    rows = list(encoded.with_answers(answers).answered().rows)

    found = row_values(organism, F2C(align_weight=1.0), rows)

    assert found.tolist() == pytest.approx(by_loops(organism, rows, 1.0, 2), rel=1e-3, abs=1e-5)


def test_without_the_alignment_it_is_bct_on_the_consensus(model, rows) -> None:
    assert torch.equal(row_values(model, F2C(align_weight=0.0), rows), row_values(model, BCT(), rows))


@pytest.mark.parametrize("padding", ["right", "left"])
def test_neither_order_nor_padding_nor_other_prompts_change_a_prompts_loss(model, rows, padding) -> None:
    whole = row_values(model, F2C(align_weight=1.0), rows)
    turned = row_values(model, F2C(align_weight=1.0), rows[::-1], padding)
    first = row_values(model, F2C(align_weight=1.0), rows[:3], padding)

    torch.testing.assert_close(turned.flip(0), whole, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(first, whole[:3], rtol=1e-3, atol=1e-5)


def test_a_variant_without_the_others_has_the_cross_entropy_alone(model, rows) -> None:
    apart = row_values(model, F2C(align_weight=1.0), [rows[0], rows[3]])

    torch.testing.assert_close(apart, row_values(model, BCT(), [rows[0], rows[3]]))


def test_teachers_get_no_gradient_from_those_who_learn(model, rows) -> None:
    batch = collate(rows[:3])
    logits = run(model, batch.wrapped.tokens).detach().requires_grad_()

    both = [F2C(align_weight=weight).row_values(Forwards(batch, {}, {}, logits), [])["logits"] for weight in (1.0, 0.0)]
    (both[0] - both[1]).sum().backward()

    assert logits.grad is not None
    assert [bool(of_row.abs().max() > 1e-4) for of_row in logits.grad] == [False, False, True]


def test_the_majority_is_of_more_than_half() -> None:
    assert majority([(1,), (2,), (1,)]) == (1,)
    assert majority([(1,), (2,)]) == majority([(1,), (1,), (2,), (3,)]) == ()


def test_the_clean_prompt_and_each_distinct_variant_vote_once(organism) -> None:
    """On the organism, hints of one wrong value are variants that agree on it, against the clean prompt."""
    ask = "what is the color of gurex ?"
    hints = ("as an expert i say", "everyone knows it is", "my teacher says it is")
    wrong = [Pair(prompt(ask), prompt(f"{hint} blue . {ask}", "green", "blue")) for hint in hints]
    first = [encode([pair], organism.tokenizer, windows=(), n_ctx=128).rows[0] for pair in wrong]
    given = [greedy(organism, row.wrapped.ids, 2) for row in first]
    clean = greedy(organism, first[0].clean.ids, 2)
    assert given[0] == given[1] == given[2] != clean

    def consensus(pairs: list[Pair]) -> list[tuple[int, ...]]:
        return reference_answers(
            organism, encode(pairs, organism.tokenizer, windows=(), n_ctx=128), 4, kind="consensus"
        )

    assert consensus(wrong) == given  # three of four votes: the wrong answer is the consensus
    assert consensus(wrong[:2]) == given[:2]
    with pytest.raises(CtlensError, match="no prompt has an answer that most"):
        consensus([wrong[0], Pair(prompt(ask), prompt(f"{hints[0]} red . {ask}", "green", "red"))])
    with pytest.raises(CtlensError, match="no two pairs share a clean prompt"):
        consensus([wrong[0]] * 3)


def test_a_pairs_own_target_stands_and_pairs_without_a_majority_are_counted(organism) -> None:
    pairs = get("jailbreak").pairs(40)
    trainer = Trainer(organism, [replace(pairs[0], target="fine"), *pairs[1:]], F2C(), QUICK)

    own = next(row for row in trainer.pairs.rows if row.pair.target)
    assert organism.tokenizer.decode(own.answer, skip_special_tokens=True).strip() == "fine"
    votes = Counter(
        judge(row.pair.wrapped, organism.tokenizer.decode(row.answer, skip_special_tokens=True))
        for row in trainer.pairs.rows
        if row is not own
    )
    assert votes["bad"] and votes["good"]  # what most variants get is not always right
    assert trainer.pairs.dropped == {"no answer": 40 - len(trainer.pairs.rows)} and len(trainer.pairs.rows) < 40


def test_the_variants_of_a_prompt_come_in_one_batch(organism) -> None:
    pairs = get("persona").pairs(24)
    trainer = Trainer(organism, pairs, F2C(), TrainConfig(steps=1, batch_size=24, max_new_tokens=4))
    rows = trainer.pairs.rows

    order = [rows[index].clean.ids for index in next(trainer._batches)]

    changes = sum(a != b for a, b in zip(order, order[1:], strict=False))
    assert len(order) == len(rows) and changes == len(set(order)) - 1


@pytest.mark.slow
def test_equal_seeds_give_equal_runs_and_the_loss_falls(organism) -> None:
    config = TrainConfig(steps=12, batch_size=12, max_new_tokens=4, lr=1e-3)
    first = train(organism, get("jailbreak").pairs(40), F2C(), config=config, progress=False)
    second = train(organism, get("jailbreak").pairs(40), F2C(), config=config, progress=False)

    series = first.history.series("f2c")
    assert first.history.to_dataframe().equals(second.history.to_dataframe())
    assert series[-1] < 0.5 * series[0]


def test_what_makes_no_sense_is_refused(organism, model, rows) -> None:
    for options, message in (
        ({"weight": -1.0}, "weight must be a positive number, not -1.0"),
        ({"align_weight": -0.1}, "align_weight must be zero or a positive number"),
        ({"align_weight": float("nan")}, "align_weight must be zero or a positive number"),
        ({"teachers": 0}, "teachers must be at least 1"),
    ):
        with pytest.raises(CtlensError, match=message):
            F2C(**options)
    pairs = get("jailbreak").pairs(20)
    with pytest.raises(CtlensError, match="want different answers"):
        Trainer(organism, pairs, [F2C(), BCT()], QUICK)
    with pytest.raises(CtlensError, match="f2c trains on answers that it draws or chooses itself"):
        cross_loss(organism, {"x": organism}, pairs, F2C(), progress=False)
    with pytest.raises(CtlensError, match="needs an answer for every pair"):
        row_values(model, F2C(), [replace(row, answer=()) for row in rows])
