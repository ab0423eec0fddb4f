"""The losses on outputs, BCT and KLCT: every target by plain loops over one pair, and what must be refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers.models import hf_model
from helpers.rows import HINT, QUESTIONS, forwards, row_values
from helpers.tiers import unit_first

import ctlens as ct
from ctlens import losses
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import EncodedPair, collate, encode
from ctlens.data.chat import Turn
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.losses import ACT, BCT, KLCT, Loss
from ctlens.losses.distances import kl_divergence
from ctlens.losses.outputs import soft_cross_entropy
from ctlens.models.loading import load_model
from ctlens.training import TrainConfig, Trainer

ANSWERS = ((40, 41, 42), (50, 51), (60, 61, 62, 63))
BEGINNINGS = ("Sure, here it is:", "Sure", "Sure, here it is: no, that is wrong.")
OUTPUTS: list[Loss] = [
    *(BCT(targets="soft"), BCT(targets="soft", temperature=2.0), BCT(targets="prefill")),
    *(KLCT(window="answer"), KLCT(window="content", distance="cross_entropy"), KLCT(window="content", clean="own")),
]


def prefilled(question: str, beginning: str) -> Pair:
    return Pair(prompt(question), Prompt((Turn("user", question), Turn("assistant", beginning))))


def answered(pairs: list[Pair], tokenizer) -> list[EncodedPair]:
    encoded = encode(pairs, tokenizer, windows=["content"], n_ctx=256)
    return list(encoded.with_answers(ANSWERS[: len(pairs)], both_sides=True).rows)


@pytest.fixture(scope="module")
def reference(chat_tokenizer) -> LensModel:
    return load_model(hf_model("llama"), tokenizer=chat_tokenizer)


@pytest.fixture(scope="module")
def trained(chat_tokenizer) -> LensModel:
    return load_model(hf_model("llama", seed=1), tokenizer=chat_tokenizer)


@pytest.fixture(scope="module")
def hinted(chat_tokenizer) -> list[EncodedPair]:
    return answered([Pair(prompt(q), prompt(HINT + q)) for q in QUESTIONS], chat_tokenizer)


@pytest.fixture(scope="module")
def forced(chat_tokenizer) -> list[EncodedPair]:
    """Prefills: the wrapped prompts end in other tokens than the clean ones."""
    return answered([prefilled(q, b) for q, b in zip(QUESTIONS, BEGINNINGS, strict=True)], chat_tokenizer)


def shares(model: LensModel, ids: tuple[int, ...], temperature: float = 1.0) -> list[list[float]]:
    """The probabilities of the next token after every token of one prompt."""
    return (model(torch.tensor([ids]))[0].detach().double() / temperature).softmax(-1).tolist()


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def soft_by_loops(reference: LensModel, trained: LensModel, row: EncodedPair, temperature: float) -> float:
    clean = shares(reference, row.clean.ids + row.answer, temperature)
    wrapped = shares(trained, row.wrapped.ids + row.answer, temperature)
    each = [
        kl(clean[len(row.clean.ids) - 1 + step], wrapped[len(row.wrapped.ids) - 1 + step])
        for step in range(len(row.answer))
    ]
    return temperature**2 * sum(each) / len(each)


def prefill_by_loops(reference: LensModel, trained: LensModel, row: EncodedPair, beginning: int) -> float:
    """`beginning` is the number of tokens of the prefill."""
    target = shares(reference, row.clean.ids)[-1]
    whole = row.wrapped.ids
    each = [kl(target, shares(trained, whole[: len(whole) - left])[-1]) for left in range(beginning)]
    return sum(each) / len(each)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", ["hinted", "forced"])
def test_soft_bct_is_the_divergence_along_the_answer(reference, trained, request, kind, padding, temperature) -> None:
    rows = request.getfixturevalue(kind)
    loss = BCT(targets="soft", temperature=temperature)

    values = loss.row_values(forwards(trained, loss, collate(rows, padding), reference), [])["logits"]

    for value, row in zip(values, rows, strict=True):
        assert value.item() == pytest.approx(soft_by_loops(reference, trained, row, temperature), rel=1e-3)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_prefill_bct_is_the_divergence_from_the_one_clean_distribution(reference, trained, forced, padding) -> None:
    loss = BCT(targets="prefill")

    values = loss.row_values(forwards(trained, loss, collate(forced, padding), reference), [])["logits"]

    for value, row in zip(values, forced, strict=True):
        beginning = len(row.wrapped.ids) - len(row.clean.ids)
        assert row.wrapped.ids[: len(row.clean.ids)] == row.clean.ids and beginning >= 1
        assert value.item() == pytest.approx(prefill_by_loops(reference, trained, row, beginning), rel=1e-3)


def test_soft_bct_is_klct_along_the_answer_where_the_prompts_end_alike(reference, trained, hinted, forced) -> None:
    for rows, alike in ((hinted, True), ([forced[0]], False)):
        both = forwards(trained, KLCT(), collate(rows), reference)
        soft = BCT(targets="soft").row_values(both, [])["logits"]
        at_answer = KLCT(window="answer").row_values(both, [])["logits"]
        assert torch.equal(soft, at_answer) == alike


def test_cross_entropy_is_the_divergence_and_the_entropy_of_the_clean_side(reference, trained, hinted) -> None:
    both = forwards(trained, KLCT(), collate(hinted), reference)
    values = [KLCT(window="content", distance=d).row_values(both, [])["logits"] for d in ("kl", "cross_entropy")]

    for row, gap in zip(hinted, (values[1] - values[0]).tolist(), strict=True):
        clean = shares(reference, row.clean.ids)
        entropies = [-sum(p * math.log(p) for p in clean[c]) for c in row.alignments["content"].clean]
        assert gap == pytest.approx(sum(entropies) / len(entropies), rel=1e-3)


def test_cross_entropy_has_the_gradient_of_the_divergence() -> None:
    target, start = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grads = []
    for distance in (kl_divergence, soft_cross_entropy):
        logits = start.clone().requires_grad_()
        distance(target, logits).sum().backward()
        grads.append(logits.grad)

    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("distance", ["kl", "cross_entropy"])
def test_a_temperature_divides_both_sides_and_its_square_multiplies(reference, trained, hinted, distance) -> None:
    both = forwards(trained, KLCT(), collate(hinted), reference)
    assert both.clean_logits is not None
    halved = dataclasses.replace(both, clean_logits=both.clean_logits / 2, wrapped_logits=both.wrapped_logits / 2)
    plain = KLCT(window="content", distance=distance)

    warm = dataclasses.replace(plain, temperature=2.0).row_values(both, [])["logits"]

    torch.testing.assert_close(warm, 4 * plain.row_values(halved, [])["logits"])


def test_a_sharper_target_leaves_the_predictions_as_they_are(reference, trained, hinted) -> None:
    """The reference's probabilities to the power of 2, made to sum to 1, against those of the trained model."""
    both = forwards(trained, KLCT(), collate(hinted), reference)
    values = KLCT(window="content", sharpen=0.5).row_values(both, [])["logits"]
    for value, row in zip(values, hinted, strict=True):
        target = shares(reference, row.clean.ids, 0.5)
        predicted = shares(trained, row.wrapped.ids)
        aligned = row.alignments["content"]
        each = [kl(target[c], predicted[w]) for c, w in zip(aligned.clean, aligned.wrapped, strict=True)]
        assert value.item() == pytest.approx(sum(each) / len(each), rel=1e-3)


@pytest.mark.parametrize("loss", [KLCT(window="answer"), BCT(targets="soft")], ids=repr)
def test_targets_below_the_confidence_count_nothing(reference, trained, hinted, loss) -> None:
    both = forwards(trained, loss, collate(hinted), reference)
    tops = [
        max(shares(reference, row.clean.ids + row.answer)[len(row.clean.ids) - 1 + step])
        for row in hinted
        for step in range(len(row.answer))
    ]
    floor = sorted(tops)[len(tops) // 2]
    values = dataclasses.replace(loss, confidence=floor - 1e-6).row_values(both, [])["logits"]
    kept = 0
    for value, row in zip(values, hinted, strict=True):
        clean, wrapped = shares(reference, row.clean.ids + row.answer), shares(trained, row.wrapped.ids + row.answer)
        each = []
        for step in range(len(row.answer)):
            target = clean[len(row.clean.ids) - 1 + step]
            sure = max(target) >= floor - 1e-6
            kept += sure
            each.append(kl(target, wrapped[len(row.wrapped.ids) - 1 + step]) if sure else 0.0)
        assert value.item() == pytest.approx(sum(each) / len(each), rel=1e-3, abs=1e-7)
    assert 0 < kept < len(tops)
    nothing = dataclasses.replace(loss, confidence=1.0).row_values(both, [])["logits"]
    assert nothing.tolist() == [0.0] * len(hinted)


def test_only_the_tokens_of_the_prefill_are_trained_by_the_prefill_form(reference, forced) -> None:
    both = forwards(reference, KLCT(), collate(forced))
    logits = both.wrapped_logits.detach().requires_grad_()

    values = BCT(targets="prefill").row_values(dataclasses.replace(both, wrapped_logits=logits), [])
    values["logits"].sum().backward()

    assert logits.grad is not None
    for grad, row in zip(logits.grad, forced, strict=True):
        inside = list(range(len(row.clean.ids), len(row.wrapped.ids)))
        assert grad.abs().sum(-1).nonzero().flatten().tolist() == inside


@pytest.mark.parametrize("loss", OUTPUTS, ids=repr)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_pair_has_the_same_loss_alone_and_in_any_batch(trained, forced, loss, padding) -> None:
    together = row_values(trained, loss, collate(forced[::-1], padding))["logits"]

    for value, row in zip(together, forced[::-1], strict=True):
        torch.testing.assert_close(value, row_values(trained, loss, collate([row]))["logits"][0], rtol=1e-4, atol=1e-5)


def test_the_prefill_form_does_not_see_the_answer_that_another_loss_needs(trained, forced) -> None:
    bare = [dataclasses.replace(row, answer=(), clean_answer=(), alignments={}) for row in forced]
    loss = BCT(targets="prefill")

    with_answer = row_values(trained, loss, collate(forced))["logits"]
    without = row_values(trained, loss, collate(bare))["logits"]

    torch.testing.assert_close(with_answer, without, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [loss for loss in OUTPUTS if loss != BCT(targets="prefill")], ids=repr)
def test_identical_prompts_have_no_divergence(reference, chat_tokenizer, loss) -> None:
    rows = answered([Pair(prompt(q), prompt(q)) for q in QUESTIONS], chat_tokenizer)
    both = forwards(reference, loss, collate(rows))

    values = loss.row_values(dataclasses.replace(both, clean_logits=both.wrapped_logits.detach()), [])["logits"]

    assert (values > 1).all() if "cross_entropy" in repr(loss) else torch.equal(values, torch.zeros(3))


@pytest.mark.parametrize("loss", OUTPUTS, ids=repr)
def test_gradients_reach_the_wrapped_side_and_never_the_clean_one(trained, forced, loss) -> None:
    both = forwards(trained, loss, collate(forced))
    assert both.clean_logits is not None
    clean = both.clean_logits.detach().requires_grad_()
    wrapped = both.wrapped_logits.detach().requires_grad_()

    loss.compute(dataclasses.replace(both, clean_logits=clean, wrapped_logits=wrapped), {}).total.backward()

    assert clean.grad is None
    assert wrapped.grad is not None and wrapped.grad.abs().max() > 0


def test_prefills_of_the_organism_are_found_behind_the_prompt_and_nothing_else_is(reference) -> None:
    model = ct.load_organism()
    pairs = ct.threats.get("prefill").pairs(16, split="structure", seed=0)
    ends = {pair.wrapped.turns[-1].role for pair in pairs}
    loss = BCT(targets="prefill")

    for row in encode(pairs, model.tokenizer, windows=["content"], n_ctx=model.cfg.n_ctx).rows:
        if row.pair.wrapped.turns[-1].role == "assistant":
            beginning = len(row.wrapped.positions(row.wrapped.contents[-1]))
            value = row_values(model, loss, collate([row]))["logits"].item()
            assert value == pytest.approx(prefill_by_loops(model, model, row, beginning), rel=1e-3)
        else:
            with pytest.raises(CtlensError, match="must end in a prefill"):
                row_values(model, loss, collate([row]))
    assert ends == {"user", "assistant"}


def test_what_a_loss_asks_of_the_trainer() -> None:
    asked = {
        name: (loss.answers, loss.answers_on_both_sides, loss.needs_clean_logits, loss.clean_side)
        for name in ("greedy", "sampled", "soft", "prefill")
        for loss in [BCT(targets=name)]
    }

    assert asked == {
        "greedy": ("greedy", False, False, "reference"),
        "sampled": ("sampled", False, False, "reference"),
        "soft": ("greedy", True, True, "reference"),
        "prefill": ("", False, True, "reference"),
    }
    assert KLCT(clean="own").clean_side == "own"


def test_sampled_targets_are_drawn_by_the_seed_and_are_not_the_greedy_ones(reference) -> None:
    pairs = [Pair(prompt(q), prompt(HINT + q)) for q in QUESTIONS]

    def answers(targets: str, seed: int) -> list[tuple[int, ...]]:
        config = TrainConfig(steps=1, batch_size=3, seed=seed, max_new_tokens=6)
        return [row.answer for row in Trainer(reference, pairs, BCT(targets=targets), config).pairs.rows]

    assert answers("sampled", 0) == answers("sampled", 0)
    assert len({str(answers(*key)) for key in (("greedy", 0), ("sampled", 0), ("sampled", 1))}) == 3


@pytest.mark.parametrize("loss", unit_first([BCT(targets="sampled"), *OUTPUTS[:4]]), ids=repr)
@pytest.mark.parametrize("kind", unit_first(["organism", "bridge"]))
def test_every_output_loss_falls_in_training(reference, loss, kind) -> None:
    model = ct.load_organism() if kind == "organism" else reference
    threat = "prefill" if loss == BCT(targets="prefill") else "sycophancy"
    if kind == "organism":
        pairs = ct.threats.get(threat).pairs(16, split="train", seed=0)
    elif threat == "prefill":
        pairs = [prefilled(q, b) for q, b in zip(QUESTIONS, BEGINNINGS, strict=True)]
    else:
        pairs = [Pair(prompt(q), prompt(HINT + q)) for q in QUESTIONS]
    lr = 1e-3 if kind == "organism" else 5e-3
    config = TrainConfig(
        steps=10, batch_size=16, lr=lr, warmup=0, retention=0, max_new_tokens=4, trainable=("attn", "mlp")
    )

    series = [step.losses[loss.name] for step in Trainer(model, pairs, loss, config)]

    assert all(map(math.isfinite, series)) and series[-1] < 0.8 * series[0]


@pytest.mark.parametrize("config", [{"name": "bct", "weight": 1.0, "prompt": False}, {"name": "klct", "weight": 1.0}])
def test_a_config_saved_before_the_later_options_is_the_default(config) -> None:
    assert losses.from_config(config) == losses.get(config["name"])


@pytest.mark.parametrize("loss", OUTPUTS, ids=repr)
def test_a_loss_survives_its_config(loss) -> None:
    assert losses.from_config(losses.to_config(loss)) == loss


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bct", {"targets": "hard"}, "targets of BCT"),
        ("bct", {"targets": "sofd"}, "did you mean 'soft'"),
        ("bct", {"targets": "soft", "prompt": True}, "leave prompt off"),
        ("bct", {"targets": "prefill", "prompt": True}, "leave prompt off"),
        ("bct", {"temperature": 2.0}, "leave it at 1"),
        ("bct", {"top_p": 0.9}, "top_p 0.9 has no effect on the greedy targets of BCT"),
        ("bct", {"targets": "sampled", "top_p": 0.0}, "above 0, up to 1"),
        ("bct", {"targets": "sampled", "temperature": -1.0}, "positive number"),
        ("bct", {"targets": "soft", "temperature": 0.0}, "positive number"),
        ("klct", {"temperature": float("inf")}, "positive number"),
        ("klct", {"distance": "jsd"}, "distance of KLCT"),
        ("klct", {"clean": "trained"}, "clean side"),
        ("klct", {"confidence": 1.5}, "confidence is a share, 0 to 1"),
        ("klct", {"sharpen": 0.0}, "positive number"),
        ("bct", {"confidence": 0.5}, "confidence and sharpen have no effect on the greedy targets"),
        ("bct", {"targets": "sampled", "sharpen": 0.5}, "have no effect on the sampled targets"),
    ],
)
def test_options_that_are_unknown_or_contradict_are_refused(name, options, message) -> None:
    with pytest.raises(CtlensError, match=message):
        losses.get(name, **options)


def test_pairs_that_lack_what_a_target_needs_are_refused(reference, hinted, forced) -> None:
    one_sided = [dataclasses.replace(row, clean_answer=()) for row in hinted]
    bare = [dataclasses.replace(row, answer=(), clean_answer=(), alignments={}) for row in forced]

    for loss, rows, message in (
        (BCT(targets="soft"), bare, "needs an answer"),
        (BCT(targets="soft"), one_sided, "behind the clean prompts too"),
        (BCT(targets="prefill"), hinted, "must end in a prefill"),
        (BCT(targets="prefill"), [*forced, hinted[0]], "must end in a prefill"),
    ):
        with pytest.raises(CtlensError, match=message):
            row_values(reference, loss, collate(rows))
    both = dataclasses.replace(forwards(reference, ACT(), collate(forced)), clean_logits=None)
    for targets in ("soft", "prefill"):
        with pytest.raises(CtlensError, match="BCT needs the logits on the clean prompts"):
            BCT(targets=targets).row_values(both, [])
