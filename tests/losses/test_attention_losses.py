"""AttCT's relatives: the attention output, and the attention mass on what the attack added."""

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
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import AttMass, AttOut, Loss
from ctlens.models.hooks import run_capturing
from ctlens.models.loading import load_model
from ctlens.training import TrainConfig, Trainer

PAIRS = [Pair(prompt(q), prompt(HINT * (i + 1) + q)) for i, q in enumerate(QUESTIONS)]
PATTERN = "blocks.1.attn.hook_pattern"


@pytest.fixture(scope="module")
def model(tokenizer) -> LensModel:
    return load_model(hf_model("llama"), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def rows(tokenizer) -> list[EncodedPair]:
    return list(encode(PAIRS, tokenizer, windows=["shared", "content", "last"], n_ctx=256).rows)


def one(model: LensModel, ids: tuple[int, ...], name: str) -> torch.Tensor:
    return run_capturing(model, torch.tensor([ids]), [name], grad=False)[1][name][0]


def vector_distance(distance: str, wrapped: list[float], clean: list[float]) -> float:
    squares = sum((w - c) ** 2 for w, c in zip(wrapped, clean, strict=True))
    dot = sum(w * c for w, c in zip(wrapped, clean, strict=True))
    return {
        "cosine": 1 - dot / (math.hypot(*wrapped) * math.hypot(*clean)),
        "mse": squares / len(clean),
        "squared": squares,
        "relative": squares / sum(c**2 for c in clean),
    }[distance]


@pytest.mark.parametrize("distance", list(AttOut.distances))
@pytest.mark.parametrize("padding", ["right", "left"])
def test_attout_is_the_distance_of_every_heads_output_averaged_over_tokens_and_heads(
    model, rows, distance, padding
) -> None:
    name = "blocks.1.attn.hook_z"
    values = row_values(model, AttOut(distance=distance), collate(rows, padding))[name]

    for value, row in zip(values, rows, strict=True):
        clean = one(model, row.clean.ids, name).tolist()
        wrapped = one(model, row.wrapped.ids, name).tolist()
        aligned = row.alignments["shared"]
        each = [
            vector_distance(distance, wrapped[w][head], clean[c][head])
            for c, w in zip(aligned.clean, aligned.wrapped, strict=True)
            for head in range(4)
        ]
        assert value.item() == pytest.approx(sum(each) / len(each), rel=1e-3)


@pytest.mark.parametrize("distance", list(AttOut.distances))
def test_attout_of_the_summed_heads_is_a_vector_loss_like_any(model, rows, distance) -> None:
    name = "blocks.0.hook_attn_out"
    values = row_values(model, AttOut(site="attn_out", distance=distance), collate(rows))[name]

    for value, row in zip(values, rows, strict=True):
        clean = one(model, row.clean.ids, name).tolist()
        wrapped = one(model, row.wrapped.ids, name).tolist()
        aligned = zip(row.alignments["shared"].clean, row.alignments["shared"].wrapped, strict=True)
        each = [vector_distance(distance, wrapped[w], clean[c]) for c, w in aligned]
        assert value.item() == pytest.approx(sum(each) / len(each), rel=1e-3)


def test_the_squared_distance_of_all_heads_is_their_number_times_attouts(model, rows) -> None:
    """The heads' vectors side by side are one vector, whose squared distance is the sum over heads."""
    both = forwards(model, AttOut(), collate(rows))
    flat = {side: {k: v.flatten(2) for k, v in getattr(both, side).items()} for side in ("clean", "wrapped")}
    loss = AttOut(distance="squared")
    names = AttOut().hook_names(model)

    per_head = loss.row_values(both, names)
    whole = loss.row_values(dataclasses.replace(both, **flat), names)

    for name in names:
        torch.testing.assert_close(whole[name], 4 * per_head[name])


def mass_by_loops(model: LensModel, row: EncodedPair, window: str, name: str = PATTERN) -> float:
    pattern = one(model, row.wrapped.ids, name).tolist()
    queries = row.alignments[window].wrapped
    each = [sum(head[q][k] for k in row.wrapper) for head in pattern for q in queries]
    return sum(each) / len(each)


@pytest.mark.parametrize("window", ["shared", "content", "last"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_attmass_is_the_attention_on_what_the_attack_added(model, rows, window, padding) -> None:
    mass = row_values(model, AttMass(window=window, per_key=False), collate(rows, padding))[PATTERN]
    per_key = row_values(model, AttMass(window=window, per_key=True), collate(rows, padding))[PATTERN]

    for index, row in enumerate(rows):
        assert row.wrapper == tuple(range(1, len(row.wrapper) + 1))  # the hint stands behind the BOS
        assert mass[index].item() == pytest.approx(mass_by_loops(model, row, window), rel=1e-4)
        assert per_key[index].item() == pytest.approx(mass[index].item() / len(row.wrapper), rel=1e-5)
    assert (mass > 0).all() and (mass < 1).all()


def uniform(model: LensModel, row: EncodedPair, causal: bool) -> float:
    """The loss where every query attends alike to every key it may see, or to every key."""
    length = len(row.wrapped.ids)
    pattern = torch.ones(1, 4, length, length)
    pattern = pattern.tril() if causal else pattern
    both = dataclasses.replace(
        forwards(model, AttMass(), collate([row])), wrapped={PATTERN: pattern / pattern.sum(-1, keepdim=True)}
    )
    return AttMass().row_values(both, [PATTERN])[PATTERN].item()


def test_attmass_by_hand(model, rows) -> None:
    row = rows[0]
    added = len(row.wrapper)
    queries = row.alignments["shared"].wrapped

    assert uniform(model, row, causal=False) == pytest.approx(added / len(row.wrapped.ids))
    assert uniform(model, row, causal=True) == pytest.approx(sum(added / (q + 1) for q in queries) / len(queries))


def test_the_gradient_of_attmass_is_on_the_wrapper_keys_of_aligned_queries(model, rows) -> None:
    both = forwards(model, AttMass(), collate(rows[:1]))
    pattern = both.wrapped[PATTERN].detach().requires_grad_()

    AttMass().row_values(dataclasses.replace(both, wrapped={PATTERN: pattern}), [PATTERN])[PATTERN].sum().backward()

    expected = torch.zeros_like(pattern)
    queries = torch.tensor(rows[0].alignments["shared"].wrapped)
    keys = torch.tensor(rows[0].wrapper)
    expected[0, :, queries[:, None], keys] = 1 / (4 * len(queries))
    torch.testing.assert_close(pattern.grad, expected)


def test_attmass_reads_no_clean_side(model, rows) -> None:
    both = dataclasses.replace(forwards(model, AttMass(), collate(rows)), clean={}, clean_logits=None)

    assert AttMass().row_values(both, [PATTERN])[PATTERN].shape == (3,)
    assert not AttMass().needs_clean_activations and not AttMass().needs_clean_logits
    assert AttOut().needs_clean_activations


@pytest.mark.parametrize(
    "loss", unit_first([AttOut(), AttOut(site="attn_out"), AttMass(), AttMass(per_key=True)]), ids=repr
)
@pytest.mark.parametrize("kind", unit_first(["organism", "bridge"]))
def test_the_relatives_fall_in_training(model, loss, kind) -> None:
    chosen = ct.load_organism() if kind == "organism" else model
    pairs = ct.threats.get("sycophancy").pairs(16, split="train", seed=0) if kind == "organism" else PAIRS
    lr = 1e-3 if kind == "organism" else 5e-3
    config = TrainConfig(steps=10, batch_size=16, lr=lr, warmup=0, retention=0, trainable=("attn", "mlp"))

    series = [step.losses[loss.name] for step in Trainer(chosen, pairs, loss, config)]

    assert all(map(math.isfinite, series)) and series[-1] < 0.9 * series[0]


def test_behind_a_prefill_the_answers_queries_are_kept_off_it() -> None:
    model = ct.load_organism()
    pairs = ct.threats.get("prefill").pairs(8, split="train", seed=0)
    config = TrainConfig(steps=1, batch_size=8, warmup=0, retention=0)
    trainer = Trainer(model, pairs, AttMass(window="answer", layers="last"), config)

    (values,) = next(trainer).by_hook["attmass"].values()

    name = AttMass(layers="last").hook_names(model)[0]
    rows = [
        dataclasses.replace(row, wrapped=dataclasses.replace(row.wrapped, ids=row.wrapped.ids + row.answer))
        for row in trainer.pairs.rows
    ]
    by_hand = [mass_by_loops(model, row, "answer", name) for row in rows]
    assert values == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-3)


@pytest.mark.parametrize(
    ("clean", "wrapped", "loss"),
    [
        ("Is it right?", "Is it right?", AttMass()),
        ("Is it right?", "Is it right? Is it right?", AttMass(window="suffix")),  # which one is the content?
        ("Is it right?", "Is it right? The best answer is: (", AttMass(window="content")),
    ],
)
def test_a_pair_whose_queries_see_nothing_added_is_refused(model, tokenizer, rows, clean, wrapped, loss) -> None:
    blind = encode([Pair(prompt(clean), prompt(wrapped))], tokenizer, windows=[loss.window], n_ctx=256).rows
    seeing = encode(PAIRS, tokenizer, windows=[loss.window], n_ctx=256).rows

    for batch in (collate(blind), collate([*seeing, *blind])):
        with pytest.raises(CtlensError, match="nothing to suppress in a pair"):
            row_values(model, loss, batch)


def test_attmass_beside_other_losses_leaves_out_a_pair_that_does_not_align(model) -> None:
    odd = Pair(prompt("Is it right?"), prompt(HINT + "Is it right? Please answer"))

    found = ct.analysis.cross_loss(model, {"x": model}, [*PAIRS, odd], AttMass(window="last"), progress=False)

    assert found.dropped == {"attmass": 1}
    assert (found.values[0] == found.values[1])[..., :3].all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("attmass", {"clean": "own"}, "no clean side"),
        ("attmass", {"per_keys": True}, "did you mean 'per_key'"),
        ("attmass", {"layers": "first"}, "layer selection"),
        ("attout", {"site": "pattern"}, "site of attout"),
        ("attout", {"distance": "jsd"}, "distance of attout"),
    ],
)
def test_options_that_mean_nothing_are_refused(name, options, message) -> None:
    with pytest.raises(CtlensError, match=message):
        losses.get(name, **options)


@pytest.mark.parametrize("loss", [AttOut(site="attn_out", clean="own"), AttMass(per_key=True)], ids=repr)
def test_a_loss_survives_its_config(loss: Loss) -> None:
    assert losses.from_config(losses.to_config(loss)) == loss
