"""Attention before and after: planted patterns come out by hand, and every number as a plain loop has it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import byte_level_tokenizer, hf_model

import ctlens as ct
from ctlens.analysis import AttentionDiff, attention_diff
from ctlens.analysis.attention.diff import ATTENTION_MEASURES
from ctlens.analysis.base.positions import SEGMENTS, key_positions, segments
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import EncodedPair, encode
from ctlens.data.chat import Turn
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.models.hooks import run_capturing
from ctlens.models.loading import load_model
from ctlens.models.parameters import copy_model

TOKENIZER = byte_level_tokenizer(chat=True)
QUESTIONS = ("Is it right?", "When a creature experiences feeling, what?", "Which term best describes the disease?")
PAIRS = [Pair(prompt(q), prompt("I don't think it's right. " * n + q)) for n, q in enumerate(QUESTIONS, 1)]
TALK = (Turn("system", "You are kind."), Turn("user", "Is it?"), Turn("assistant", "Sure."), Turn("user", QUESTIONS[0]))
ADDED = Pair(prompt(QUESTIONS[0]), Prompt(TALK))
KEPT = Pair(Prompt(TALK), Prompt((*TALK[:3], Turn("user", "No. " + QUESTIONS[0]))))


@pytest.fixture(scope="module")
def model() -> LensModel:
    return load_model(hf_model("llama"), tokenizer=TOKENIZER)  # 4 query heads, 2 key heads


@pytest.fixture(scope="module")
def after(model) -> LensModel:
    other = copy_model(model)
    draw = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    return other


def encoded(*pairs: Pair) -> list[EncodedPair]:
    return list(encode(pairs, TOKENIZER, n_ctx=256).rows)


def words(row: EncodedPair, positions: tuple[int, ...]) -> str:
    return "".join(row.wrapped.text[slice(*row.wrapped.offsets[position])] for position in positions)


def planted(model: LensModel, edit: Any) -> LensModel:
    """The model with every pattern replaced by what `edit` makes of it."""
    other: Any = copy_model(model)
    for layer in range(2):
        other.add_hook(f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook: edit(pattern.clone()))
    return other


def test_spans_hold_the_words_they_are_named_for() -> None:
    added, kept = encoded(ADDED, KEPT)
    found = segments(added)
    assert words(added, found["wrapper"]) == "You are kind.Is it?Sure."
    assert words(added, found["content"]) == QUESTIONS[0]
    assert (words(added, found["system"]), words(added, found["answers"])) == ("You are kind.", "Sure.")
    assert found["bos"] == (0,) and set(found["answers"]) < set(found["wrapper"])
    again = segments(kept)
    assert words(kept, again["wrapper"]).strip() == "No."
    assert words(kept, again["answers"]) == "Sure." and not set(again["answers"]) & set(again["wrapper"])
    assert "Is it?" in words(kept, again["rest"])


@pytest.mark.parametrize("pair", [*PAIRS, ADDED, KEPT])
def test_spans_cover_the_prompt_and_overlap_only_where_the_attack_added_messages(pair: Pair) -> None:
    (row,) = encoded(pair)
    found = segments(row)
    assert sorted(set().union(*found.values())) == list(range(len(row.wrapped.ids)))
    without = [position for name in ("wrapper", "content", "bos", "rest") for position in found[name]]
    assert len(without) == len(set(without))


def by_loops(model: LensModel, other: LensModel, row: EncodedPair, queries: str) -> dict[str, np.ndarray]:
    """Every measure of a pair, `[layer, head]` each, from single forward passes and python numbers."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(2)]
    clean = run_capturing(model, torch.tensor([row.clean.ids]), names, grad=False)[1]
    wrapped = run_capturing(other, torch.tensor([row.wrapped.ids]), names, grad=False)[1]
    last = len(row.wrapped.ids) - 1
    aligned = dict(zip(row.alignments["shared"].wrapped, row.alignments["shared"].clean, strict=True))
    tokens = [last] if queries == "last" else [w for w in aligned if w != last]
    shared_start = 0
    message = row.clean.positions(row.clean.contents[-1])[0]
    while row.clean.ids[shared_start] == row.wrapped.ids[shared_start] and shared_start < message:
        shared_start += 1
    twin = {w: w for w in range(shared_start)} | aligned
    found: dict[str, np.ndarray] = {}
    for name, positions in segments(row).items():
        found[f"mass/{queries}/{name}"] = np.zeros((2, 4)) if positions else np.full((2, 4), np.nan)
    found |= {f"entropy/{queries}/": np.zeros((2, 4)), f"jsd/{queries}/": np.zeros((2, 4))}
    for layer, head in np.ndindex(2, 4):
        there = wrapped[names[layer]][0, head].tolist()
        here = clean[names[layer]][0, head].tolist()
        for query in tokens:
            p = there[query]
            q = [here[aligned[query]][twin[key]] if key in twin else 0.0 for key in range(last + 1)]
            p = [*p, 0.0]
            q = [*q, 1 - sum(q)]
            middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
            divergence = [
                sum(a * math.log(a / m) for a, m in zip(side, middle, strict=True) if a > 1e-9) for side in (p, q)
            ]
            share = 1 / len(tokens)
            found[f"jsd/{queries}/"][layer, head] += sum(divergence) / 2 * share
            found[f"entropy/{queries}/"][layer, head] -= sum(a * math.log(a) for a in p if a > 1e-9) * share
            for name, positions in segments(row).items():
                found[f"mass/{queries}/{name}"][layer, head] += sum(p[key] for key in positions) * share
    return found


@pytest.mark.boundary
@pytest.mark.parametrize("queries", ["last", "content"])
def test_every_measure_is_what_plain_loops_find(model, after, queries: str) -> None:
    pairs = [*PAIRS, ADDED, KEPT]
    result = attention_diff(model, after, pairs, batch_size=3, progress=False)
    for number, row in enumerate(encoded(*pairs)):
        for side, other in enumerate((model, after)):
            for name, expected in by_loops(model, other, row, queries).items():
                found = result.values[side, ATTENTION_MEASURES.index(name), number]
                np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-5, err_msg=name)


def test_spans_that_do_not_overlap_hold_all_the_attention(model) -> None:
    result = attention_diff(model, model, PAIRS, progress=False)
    for queries in ("last", "content"):
        total = sum(result.of("after", "mass", queries, keys) for keys in ("wrapper", "content", "bos", "rest"))
        np.testing.assert_allclose(total, 1.0, atol=1e-5)


def test_a_model_compared_with_itself_has_no_change(model) -> None:
    table = attention_diff(model, model, PAIRS, progress=False).to_dataframe()
    assert (table[["change", "ci_low", "ci_high"]] == 0).all(axis=None)


def test_attention_on_one_key_has_the_mass_the_entropy_and_the_divergence_of_one_key(model) -> None:
    def to_the_first(pattern: torch.Tensor) -> torch.Tensor:
        pattern[:] = 0
        pattern[..., 0] = 1
        return pattern

    def to_itself(pattern: torch.Tensor) -> torch.Tensor:
        return pattern * 0 + torch.eye(pattern.shape[-1])

    first, itself = planted(model, to_the_first), planted(model, to_itself)
    result = attention_diff(first, itself, PAIRS, progress=False)
    for queries in ("last", "content"):
        assert (result.of("before", "mass", queries, "bos") == 1).all()
        assert (result.of("after", "mass", queries, "bos") == 0).all()
        assert np.abs(result.of("before", "entropy", queries)).max() < 1e-6
        assert np.abs(result.of("before", "jsd", queries)).max() < 1e-6  # on the BOS with the wrapper and without
        np.testing.assert_allclose(result.of("after", "jsd", queries), math.log(2), rtol=1e-4)  # disjoint
    assert (result.of("after", "mass", "content", "content") > 0).all()


def test_attention_that_moves_from_the_first_token_to_the_wrapper_is_seen(model) -> None:
    """One bucket for everything outside the content would hold both and see nothing."""

    def on_the_wrapper(pattern: torch.Tensor) -> torch.Tensor:
        pattern[:] = 0
        pattern[:, :, :10, 0] = 1
        pattern[:, :, 10:, 10] = 1
        return pattern

    def on_the_first(pattern: torch.Tensor) -> torch.Tensor:
        pattern[:] = 0
        pattern[..., 0] = 1
        return pattern

    assert all(10 in segments(row)["wrapper"] for row in encoded(*PAIRS))
    result = attention_diff(planted(model, on_the_first), planted(model, on_the_wrapper), PAIRS, progress=False)
    np.testing.assert_allclose(result.of("after", "jsd"), math.log(2), rtol=1e-4)


def test_order_and_batch_mates_change_nothing(model, after) -> None:
    pairs = [*PAIRS, ADDED, KEPT]
    whole = attention_diff(model, after, pairs, batch_size=64, progress=False)
    single = attention_diff(model, after, pairs, batch_size=1, progress=False)
    turned = attention_diff(model, after, pairs[::-1], progress=False)
    np.testing.assert_allclose(single.values, whole.values, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(turned.values[:, :, ::-1], whole.values, rtol=1e-3, atol=1e-5)


def test_a_prefill_has_no_twin_of_its_last_token(model) -> None:
    turns = (Turn("user", QUESTIONS[0]), Turn("assistant", "Sure, here"))
    pairs = [Pair(prompt(QUESTIONS[0]), Prompt(turns)), *PAIRS]
    result = attention_diff(model, model, pairs, progress=False)
    assert np.isnan(result.values[:, ATTENTION_MEASURES.index("jsd/last/"), 0]).all()
    table = result.to_dataframe()
    assert set(table.query("quantity == 'jsd' and queries == 'last'")["n_pairs"]) == {3}
    assert set(table.query("quantity == 'jsd' and queries == 'content'")["n_pairs"]) == {4}
    assert "system" not in set(table["keys"])


def made(change: np.ndarray) -> AttentionDiff:
    """A result whose mass on the wrapper changes like that, `[pair, layer, head]`, and nothing else."""
    values = np.full((2, len(ATTENTION_MEASURES), *change.shape), 0.4)
    values[1, ATTENTION_MEASURES.index("mass/last/wrapper")] += change
    return AttentionDiff(values)


def test_a_head_that_is_cut_off_from_the_wrapper_shows_at_its_place() -> None:
    change = np.zeros((5, 2, 3))
    change[:, 1, 2] = -0.3
    table = made(change).to_dataframe()
    first = table.iloc[0]
    assert (first["layer"], first["head"], round(first["change"], 6), first["n_pairs"]) == (1, 2, -0.3, 5)
    assert (first["quantity"], first["queries"], first["keys"]) == ("mass", "last", "wrapper")
    assert (table.change[1:].abs() < 1e-9).all() and len(table) == 16 * 6


def test_the_largest_of_many_changes_by_chance_is_not_called_a_difference() -> None:
    noise = np.random.default_rng(0).normal(size=(40, 30, 30))
    result = made(noise)
    alone = result.to_dataframe().query("quantity == 'mass' and queries == 'last' and keys == 'wrapper'")
    assert ((alone["ci_low"] > 0) | (alone["ci_high"] < 0)).sum() > 20
    assert not result.top(900)["differs"].any() and set(result.top()["heads"]) == {900} and len(result.top()) == 10
    noise[:, 3, 4] += 2
    top = made(noise).top(5)
    assert top["differs"].tolist() == [True, False, False, False, False]
    assert top.iloc[0][["layer", "head"]].tolist() == [3, 4]


def test_every_quantity_has_its_figure_and_the_curve_by_layer(model, after, tmp_path) -> None:
    result = attention_diff(model, after, PAIRS, progress=False)
    for quantity in ("mass", "entropy", "jsd"):
        panels = [np.asarray(trace.z, dtype=float) for trace in result.figure(quantity, "content", "content").data]
        values = [result.of(side, quantity, "content", "content").mean(0) for side in ("before", "after")]
        for panel, expected in zip(panels, [*values, values[1] - values[0]], strict=True):
            np.testing.assert_allclose(panel, expected)
    assert "nats" in str(result.figure("jsd").layout.meta["caption"])
    lines = result.compare({}, label="act").data
    assert any(np.allclose(np.asarray(line.y, dtype=float), result.after.mean((0, 2))) for line in lines if line.name)
    np.testing.assert_allclose(result.curve("before")[0], result.before.mean((0, 2)))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda result: result.of("afterwards"), "unknown time 'afterwards'; did you mean 'after'"),
        (lambda result: result.figure("masss"), "unknown quantity"),
        (lambda result: result.of("after", queries="first"), "unknown queries"),
        (lambda result: result.top(3, keys="systm"), "did you mean 'system'"),
        (lambda result: result.figure(keys="system"), "no pair has mass/last/system"),
    ],
)
def test_names_that_do_not_exist_are_refused(model, ask, message: str) -> None:
    result = attention_diff(model, model, PAIRS, progress=False)
    with pytest.raises(CtlensError, match=message):
        ask(result)


def test_keys_are_a_span_or_a_users_choice_inside_the_prompt() -> None:
    (row,) = encoded(PAIRS[0])
    assert key_positions("wrapper", row) == row.wrapper
    assert key_positions(lambda row: [2, 3], row) == (2, 3)
    for keys, message in (("wraper", "did you mean"), ("system", "no token in system"), (lambda row: [999], "not all")):
        with pytest.raises(CtlensError, match=message):
            key_positions(keys, row)


@pytest.mark.parametrize("threat", ct.threats.names())
def test_every_threat_of_the_organism_has_its_measures(threat: str) -> None:
    base = ct.load_organism()
    pairs = ct.threats.get(threat).pairs(6, split="heldout")
    result = attention_diff(base, base, pairs, progress=False)
    assert not np.isnan(result.of("after")).any() and len(SEGMENTS) == 6
    assert (result.of("before", "jsd", "content") >= -1e-6).all()
