"""Losses: values by hand and by independent restatement, invariances, and what must be refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers.models import hf_model
from helpers.rows import HINT, QUESTIONS, forwards, one_pair, row_values
from helpers.tiers import unit_first
from hypothesis import given, settings
from hypothesis import strategies as st

from ctlens import losses
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import EncodedPair, Matched, PairBatch, collate, encode, pad
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import ACT, BCT, KLCT, MLPCT, AttCT, AttMass, AttOut, Forwards, Loss
from ctlens.losses.attct import RenormalisedKeys, RestKeys, block_rows, seen_keys, with_opening
from ctlens.losses.distances import (
    cosine_distance,
    jensen_shannon,
    kl_divergence,
    kl_of_masses,
    mean_squared_error,
    normalised_mse,
    relative_squared_error,
    smooth_l1,
    squared_error,
)
from ctlens.models.hooks import FINAL_NORM, run_capturing
from ctlens.models.loading import load_model

ALL = [
    *(
        ACT(),
        ACT(distance="mse"),
        ACT(distance="relative"),
        ACT(site="resid_pre", layers="last"),
        ACT(site="resid_mid"),
        ACT(final_norm=True),
    ),
    *(MLPCT(), MLPCT(site="mlp_out"), MLPCT(distance="smooth_l1"), MLPCT(site="mlp_out", distance="normalised_mse")),
    *(AttCT(), AttCT(keys="rest"), AttCT(distance="l2", heads="mean"), AttCT(distance="kl_clean_wrapped")),
    *(AttCT(keys="lifted", window=window) for window in ("shared", "content", "last")),
    AttCT(keys="lifted", distance="kl_clean_wrapped", heads="mean"),
    *(AttCT(keys=keys, sink="kept") for keys in ("raw", "renormalised", "rest")),
    *(AttCT(keys="lifted", sink="dropped"), AttCT(distance="mse"), AttCT(distance="mse", keys="rest", sink="kept")),
    *(BCT(), BCT(prompt=True), KLCT(), KLCT(window="last"), KLCT(window="content"), KLCT(temperature=2.0)),
    *(AttOut(), AttOut(distance="squared"), AttOut(site="attn_out", distance="mse"), AttOut(distance="relative")),
    *(AttMass(), AttMass(per_key=True, window="last"), AttMass(per_key=True, window="content", outside=True)),
]
WINDOWS_OF_ALL = ("shared", "content", "last")
INTERNAL = [loss for loss in ALL if loss.windows and loss.needs_clean_activations]


@pytest.fixture(scope="module")
def model(tokenizer) -> LensModel:
    return load_model(hf_model("llama"), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def rows(tokenizer) -> list[EncodedPair]:
    pairs = [Pair(prompt(q), prompt(HINT * (i + 1) + q), target="(A" * (i + 1)) for i, q in enumerate(QUESTIONS)]
    return list(encode(pairs, tokenizer, windows=WINDOWS_OF_ALL, n_ctx=256).rows)


def test_act_is_the_sum_of_squares_averaged_over_tokens_then_pairs(model, rows) -> None:
    values = row_values(model, ACT(), collate(rows))["blocks.1.hook_resid_post"]

    for value, row in zip(values, rows, strict=True):
        clean, wrapped = one_pair(model, row, "blocks.1.hook_resid_post")
        by_hand = sum(float(((w - c) ** 2).sum()) for c, w in zip(clean, wrapped, strict=True)) / len(clean)
        assert value.item() == pytest.approx(by_hand, rel=1e-4)


def test_mlpct_is_one_minus_the_cosine(model, rows) -> None:
    values = row_values(model, MLPCT(), collate(rows))["blocks.0.mlp.hook_post"]

    for value, row in zip(values, rows, strict=True):
        clean, wrapped = one_pair(model, row, "blocks.0.mlp.hook_post")
        cosines = [float(c @ w / (c.norm() * w.norm())) for c, w in zip(clean, wrapped, strict=True)]
        assert value.item() == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-5)


def per_token(model: LensModel, rows: list[EncodedPair], loss: ACT | MLPCT, name: str, by_hand) -> None:
    """A vector loss is the mean of `by_hand(wrapped, clean)` over the aligned tokens of each pair."""
    for value, row in zip(row_values(model, loss, collate(rows))[name], rows, strict=True):
        clean, wrapped = one_pair(model, row, name)
        each = [by_hand(w, c) for w, c in zip(wrapped.tolist(), clean.tolist(), strict=True)]
        assert value.item() == pytest.approx(sum(each) / len(each), rel=1e-4)


def test_relative_act_divides_by_the_clean_norm_at_every_site(model, rows) -> None:
    def by_hand(wrapped: list[float], clean: list[float]) -> float:
        return sum((w - c) ** 2 for w, c in zip(wrapped, clean, strict=True)) / sum(c**2 for c in clean)

    for site in ("resid_pre", "resid_mid", "resid_post"):
        per_token(model, rows, ACT(site=site, distance="relative"), f"blocks.1.hook_{site}", by_hand)


@pytest.mark.parametrize(
    ("site", "name"), [("mlp_post", "blocks.0.mlp.hook_post"), ("mlp_out", "blocks.0.hook_mlp_out")]
)
def test_the_other_distances_of_mlpct_by_loops(model, rows, site, name) -> None:
    def huber(wrapped: list[float], clean: list[float]) -> float:
        gaps = [abs(w - c) for w, c in zip(wrapped, clean, strict=True)]
        return sum(gap**2 / 2 if gap < 1 else gap - 0.5 for gap in gaps) / len(gaps)

    def of_units(wrapped: list[float], clean: list[float]) -> float:
        w_norm, c_norm = math.hypot(*wrapped), math.hypot(*clean)
        return sum((w / w_norm - c / c_norm) ** 2 for w, c in zip(wrapped, clean, strict=True)) / len(clean)

    per_token(model, rows, MLPCT(site=site, distance="smooth_l1"), name, huber)
    per_token(model, rows, MLPCT(site=site, distance="normalised_mse"), name, of_units)


def test_attct_is_the_divergence_of_the_content_block_per_head_without_renormalising(model, rows) -> None:
    values = row_values(model, AttCT(), collate(rows))["blocks.1.attn.hook_pattern"]

    for value, row in zip(values, rows, strict=True):
        clean, wrapped = one_pair(model, row, "blocks.1.attn.hook_pattern")
        assert value.item() == pytest.approx(published_jsd(clean, wrapped), abs=1e-6)


def published_jsd(clean: torch.Tensor, wrapped: torch.Tensor) -> float:
    """The stack paper's formula in plain Python: logs floored at 1e-9, mean over heads and queries."""

    def log(x: float) -> float:
        return math.log(max(x, 1e-9))

    rows = []
    for c_row, w_row in zip(clean.flatten(0, 1).tolist(), wrapped.flatten(0, 1).tolist(), strict=True):
        middle = [(c + w) / 2 for c, w in zip(c_row, w_row, strict=True)]
        kl_c = sum(c * (log(c) - log(m)) for c, m in zip(c_row, middle, strict=True))
        kl_w = sum(w * (log(w) - log(m)) for w, m in zip(w_row, middle, strict=True))
        rows.append((kl_c + kl_w) / 2)
    return sum(rows) / len(rows)


def full_pattern(model: LensModel, ids: tuple[int, ...], name: str) -> torch.Tensor:
    return run_capturing(model, torch.tensor([ids]), [name], grad=False)[1][name][0]


@pytest.mark.parametrize("distance", ["jsd", "l2", "kl_clean_wrapped"])
@pytest.mark.parametrize("heads", ["each", "mean"])
@pytest.mark.parametrize("window", ["shared", "content", "last"])
@pytest.mark.parametrize("padding", unit_first(["right", "left"]))
def test_lifted_attct_compares_whole_rows_with_nothing_on_keys_without_a_twin(
    model, rows, distance, heads, window, padding
) -> None:
    loss = AttCT(keys="lifted", distance=distance, heads=heads, window=window)
    name = "blocks.1.attn.hook_pattern"

    for value, row in zip(row_values(model, loss, collate(rows, padding))[name], rows, strict=True):
        assert value.item() == pytest.approx(lifted_by_loops(model, row, loss, name), rel=1e-3, abs=1e-6)


def lifted_by_loops(model: LensModel, row: EncodedPair, loss: AttCT, name: str) -> float:
    shared = row.alignments["shared"]
    queries = row.alignments[loss.window]
    twin = dict(zip(shared.clean, shared.wrapped, strict=True))
    twin[0] = 0  # the BOS opens both prompts
    clean = full_pattern(model, row.clean.ids, name)
    wrapped = full_pattern(model, row.wrapped.ids, name)
    if loss.heads == "mean":
        clean, wrapped = clean.mean(0, keepdim=True), wrapped.mean(0, keepdim=True)
    values = []
    for head_clean, head_wrapped in zip(clean.tolist(), wrapped.tolist(), strict=True):
        for c, w in zip(queries.clean, queries.wrapped, strict=True):
            lifted = [0.0] * len(row.wrapped.ids)
            for here, there in twin.items():
                lifted[there] = head_clean[c][here]
            values.append(row_distance(loss.distance, lifted, head_wrapped[w]))
    return sum(values) / len(values)


def row_distance(distance: str, clean: list[float], wrapped: list[float]) -> float:
    if distance == "jsd":
        return published_jsd(torch.tensor([[clean]]), torch.tensor([[wrapped]]))
    if distance == "l2":
        return sum((c - w) ** 2 for c, w in zip(clean, wrapped, strict=True))
    logs = [c * math.log(max(c, 1e-9) / max(w, 1e-9)) for c, w in zip(clean, wrapped, strict=True)]
    return sum(logs) - sum(clean) + sum(wrapped)


@pytest.mark.parametrize("distance", ["jsd", "l2", "kl_clean_wrapped"])
@pytest.mark.parametrize("heads", ["each", "mean"])
def test_attct_on_the_block_with_every_distance_and_with_averaged_heads(model, rows, distance, heads) -> None:
    loss = AttCT(distance=distance, heads=heads)
    name = "blocks.1.attn.hook_pattern"

    for value, row in zip(row_values(model, loss, collate(rows))[name], rows, strict=True):
        clean, wrapped = one_pair(model, row, name)
        if heads == "mean":
            clean = clean.mean(0, keepdim=True)
            wrapped = wrapped.mean(0, keepdim=True)
        pairs = zip(clean.flatten(0, 1).tolist(), wrapped.flatten(0, 1).tolist(), strict=True)
        each = [row_distance(distance, c, w) for c, w in pairs]
        assert value.item() == pytest.approx(sum(each) / len(each), rel=1e-4, abs=1e-6)


def whole(clean: torch.Tensor, wrapped: torch.Tensor, loss: Loss) -> float:
    """The loss on patterns `[head, q, k]` or states `[pos, d]` of one pair of equal tokens, all in the window."""
    length = clean.shape[-2]
    positions = torch.arange(length)[None]
    side = pad([tuple(range(length))])
    matched = Matched(positions, positions, torch.ones(1, length, dtype=torch.bool))
    batch = PairBatch(
        side,
        side,
        torch.zeros_like(side.mask),
        {"shared": matched},
        torch.tensor([0]),
        *[torch.zeros_like(side.mask)] * 2,
    )
    both = Forwards(batch, {"p": clean[None]}, {"p": wrapped[None]}, torch.zeros(1, length, 2))
    return loss.row_values(both, ["p"])["p"].item()


def test_with_nothing_outside_the_window_rest_and_lifted_are_the_divergence_of_whole_rows() -> None:
    clean, wrapped = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)

    full = jensen_shannon(clean, wrapped).mean().item()

    for keys in ("raw", "rest", "lifted"):
        assert whole(clean, wrapped, AttCT(keys=keys)) == pytest.approx(full, rel=1e-5)


def test_identical_states_have_exactly_no_loss_but_for_the_rounding_of_a_cosine() -> None:
    draw = torch.Generator().manual_seed(0)
    pattern = torch.randn(4, 6, 6, generator=draw).softmax(-1)
    states = torch.randn(6, 12, generator=draw)
    vectors = [ACT(distance=name) for name in ACT.distances] + [
        MLPCT(distance=name) for name in MLPCT.distances if name != "cosine"
    ]

    for distance in ("jsd", "l2", "mse", "kl_clean_wrapped"):
        for keys in ("raw", "renormalised", "rest", *(("lifted",) if distance != "mse" else ())):
            assert whole(pattern, pattern, AttCT(keys=keys, distance=distance)) == 0
    assert [loss for loss in vectors if whole(states, states, loss) != 0] == []
    assert abs(whole(states, states, MLPCT())) < 1e-6


@pytest.mark.parametrize("loss", [ACT(clean="own"), MLPCT(clean="own"), AttCT(clean="own", keys="lifted")], ids=repr)
def test_the_clean_side_has_no_gradient_even_where_it_is_the_model_s_own(model, rows, loss) -> None:
    batch = collate(rows)
    both = forwards(model, loss, batch)
    clean = {name: state.detach().requires_grad_() for name, state in both.clean.items()}
    wrapped = {name: state.detach().requires_grad_() for name, state in both.wrapped.items()}

    loss.compute(dataclasses.replace(both, clean=clean, wrapped=wrapped), loss.factors(model)).total.backward()

    assert all(state.grad is None for state in clean.values())
    assert all(state.grad is not None and state.grad.abs().max() > 0 for state in wrapped.values())


def test_no_divergence_of_attct_exceeds_log_2_and_disjoint_rows_reach_it() -> None:
    clean = torch.eye(6)[None]
    wrapped = torch.eye(6).roll(1, 0)[None]

    for keys in ("raw", "rest", "lifted"):
        assert whole(clean, wrapped, AttCT(keys=keys)) == pytest.approx(math.log(2), rel=1e-6)


def rows_by_loops(model: LensModel, row: EncodedPair, loss: AttCT, name: str) -> float:
    """The loss of one pair by dictionaries of mass, for any keys: the opening of a pair without a frame is its BOS."""
    shared = row.alignments["shared"]
    twin = dict(zip(shared.clean, shared.wrapped, strict=True)) | ({0: 0} if loss.sink == "kept" else {})
    clean = full_pattern(model, row.clean.ids, name).tolist()
    wrapped = full_pattern(model, row.wrapped.ids, name).tolist()
    values = []
    for head_clean, head_wrapped in zip(clean, wrapped, strict=True):
        for c, w in zip(shared.clean, shared.wrapped, strict=True):
            here = [head_clean[c][key] for key in twin]
            there = [head_wrapped[w][key] for key in twin.values()]
            if loss.keys == "renormalised":
                here = [mass / sum(here) for mass in here]
                there = [mass / sum(there) for mass in there]
            if loss.keys == "rest":
                here = [*here, 1 - sum(here)]
                there = [*there, 1 - sum(there)]
            if loss.keys == "lifted":
                added = [key for key in range(len(row.wrapped.ids)) if key not in {0, *twin.values()}]
                here = [*here, *[0.0] * len(added)]
                there = [*there, *(head_wrapped[w][key] for key in added)]
            gap = row_distance("l2" if loss.distance == "mse" else loss.distance, here, there)
            values.append(gap / len(here) if loss.distance == "mse" else gap)
    return sum(values) / len(values)


@pytest.mark.parametrize("keys", ["raw", "renormalised", "rest", "lifted"])
@pytest.mark.parametrize("sink", ["kept", "dropped"])
@pytest.mark.parametrize("distance", ["jsd", "mse"])
@pytest.mark.parametrize("padding", unit_first(["right", "left"]))
def test_sink_tokens_are_keys_or_are_not_whatever_the_keys(model, rows, keys, sink, distance, padding) -> None:
    if (keys, distance) == ("lifted", "mse"):
        distance = "l2"
    loss = AttCT(keys=keys, sink=sink, distance=distance)
    name = "blocks.1.attn.hook_pattern"

    for value, row in zip(row_values(model, loss, collate(rows, padding))[name], rows, strict=True):
        assert value.item() == pytest.approx(rows_by_loops(model, row, loss, name), rel=1e-3, abs=1e-6)


def test_the_sink_is_kept_by_whole_rows_and_dropped_by_windows_unless_told_otherwise(model, rows) -> None:
    batch = collate(rows)

    for keys, usual, other in (("raw", "dropped", "kept"), ("rest", "dropped", "kept"), ("lifted", "kept", "dropped")):
        default = row_values(model, AttCT(keys=keys, sink=None), batch)
        same = row_values(model, AttCT(keys=keys, sink=usual), batch)
        another = row_values(model, AttCT(keys=keys, sink=other), batch)
        for name, value in default.items():
            assert torch.equal(value, same[name])
            assert (value - another[name]).abs().min() > 1e-6


def test_attention_to_the_wrapper_costs_lifted_keys_and_not_the_published_ones(model, rows) -> None:
    """The gradient on the mass of a wrapper key: zero where the block is cut, positive where rows are whole."""
    for keys, pushed in (("raw", False), ("lifted", True)):
        both = forwards(model, AttCT(keys=keys, distance="l2"), collate(rows[:1]))
        name, pattern = next(iter(both.wrapped.items()))
        pattern.retain_grad()
        AttCT(keys=keys, distance="l2").row_values(both, [name])[name].sum().backward()
        alignment = rows[0].alignments["shared"]
        added = range(1, alignment.wrapped[0])
        assert pattern.grad is not None
        assert bool((pattern.grad[0][:, list(alignment.wrapped)][:, :, list(added)] > 0).all()) == pushed


def test_lifted_keys_come_from_the_shared_window_unless_the_text_is_explicit(model, tokenizer) -> None:
    explicit = AttCT(keys="lifted", window="explicit")
    assert explicit.windows == ("explicit",)
    assert AttCT(keys="lifted", window="last").windows == ("last", "shared")
    same = encode(
        [Pair(prompt(q), prompt(q), shared=(q,)) for q in QUESTIONS], tokenizer, windows=["explicit"], n_ctx=256
    )

    assert all(value.abs().max() < 5e-7 for value in row_values(model, explicit, collate(same.rows)).values())


def test_lifted_keys_are_the_opening_and_the_shared_part(chat_tokenizer) -> None:
    """The clean "I" is fused in the wrapped prompt, whose wrapper begins with "I": they are no twins."""
    pairs = [Pair(prompt(q), prompt(HINT + q)) for q in QUESTIONS]
    rows = encode(pairs, chat_tokenizer, n_ctx=256).rows
    for padding in ("right", "left"):
        batch = collate(rows, padding)
        keys = with_opening(batch, batch.matched["shared"])
        for index, row in enumerate(rows):
            sides = ((batch.clean, keys.clean, "clean"), (batch.wrapped, keys.wrapped, "wrapped"))
            for side, positions, name in sides:
                found = positions[index][keys.valid[index]] - side.mask[index].int().argmax()
                frame = row.clean.positions((0, row.clean.contents[0][0]))
                assert found.tolist() == [*frame, *getattr(row.alignments["shared"], name)]


def test_bct_is_the_mean_surprise_of_the_answer_tokens(model, rows) -> None:
    values = row_values(model, BCT(), collate(rows))["logits"]

    for value, row in zip(values, rows, strict=True):
        ids = torch.tensor([row.wrapped.ids + row.answer])
        log_p = model(ids)[0].detach().log_softmax(-1)
        start = len(row.wrapped.ids)
        by_hand = -sum(float(log_p[start - 1 + i, token]) for i, token in enumerate(row.answer)) / len(row.answer)
        assert value.item() == pytest.approx(by_hand, rel=1e-4)


def test_bct_with_the_prompt_trains_on_every_token_but_the_first(model, rows) -> None:
    values = row_values(model, BCT(prompt=True), collate(rows))["logits"]

    ids = torch.tensor([rows[0].wrapped.ids + rows[0].answer])
    by_hand = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
    assert values[0].item() == pytest.approx(by_hand.item(), rel=1e-4)


@pytest.mark.parametrize("window", WINDOWS_OF_ALL)
def test_klct_is_the_divergence_from_the_reference_at_the_aligned_tokens(tokenizer, rows, window) -> None:
    reference = load_model(hf_model("llama", seed=0), tokenizer=tokenizer)
    trained = load_model(hf_model("llama", seed=1), tokenizer=tokenizer)
    values = KLCT(window=window).row_values(forwards(trained, KLCT(), collate(rows), reference), [])["logits"]

    for value, row in zip(values, rows, strict=True):
        p = reference(torch.tensor([row.clean.ids]))[0].softmax(-1).tolist()
        q = trained(torch.tensor([row.wrapped.ids]))[0].softmax(-1).tolist()
        alignment = row.alignments[window]
        each = [
            sum(a * math.log(a / b) for a, b in zip(p[c], q[w], strict=True))
            for c, w in zip(alignment.clean, alignment.wrapped, strict=True)
        ]
        assert value.item() == pytest.approx(sum(each) / len(each), rel=1e-3)


def test_klct_on_the_last_token_sees_the_answer_and_no_other_token(model, rows) -> None:
    both = forwards(model, KLCT(), collate(rows))
    last = torch.tensor([len(row.wrapped.ids) - 1 for row in rows])
    logits = both.wrapped_logits.detach().requires_grad_()

    KLCT(window="last").row_values(dataclasses.replace(both, wrapped_logits=logits), [])["logits"].sum().backward()

    assert logits.grad is not None
    assert [grad.abs().sum(-1).nonzero().flatten().tolist() for grad in logits.grad] == [[p] for p in last.tolist()]


def test_klct_without_the_references_logits_is_refused(model, rows) -> None:
    both = dataclasses.replace(forwards(model, KLCT(), collate(rows)), clean_logits=None)

    with pytest.raises(CtlensError, match="logits on the clean prompts"):
        KLCT().row_values(both, [])


@pytest.mark.parametrize("loss", ALL, ids=repr)
@pytest.mark.parametrize("padding", unit_first(["right", "left"]))
def test_a_pair_has_the_same_loss_alone_and_in_any_batch(model, rows, loss, padding) -> None:
    together = row_values(model, loss, collate(rows[::-1], padding))

    for index, row in enumerate(rows[::-1]):
        for name, alone in row_values(model, loss, collate([row])).items():
            torch.testing.assert_close(together[name][index], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(
    texts=st.lists(
        st.tuples(st.text("abc .é🟦", max_size=9), st.text("xyz ?ñ", min_size=1, max_size=9)), min_size=1, max_size=4
    ),
    padding=st.sampled_from(["right", "left"]),
    order=st.randoms(use_true_random=False),
)
def test_no_batch_of_random_pairs_changes_a_loss(model, tokenizer, texts, padding, order) -> None:
    pairs = [Pair(prompt(content + "?"), prompt(f"{before}. {content}?"), target="(A") for before, content in texts]
    rows = list(encode(pairs, tokenizer, n_ctx=256).rows)
    mixed = order.sample(rows, len(rows))

    for loss in (ACT(), MLPCT(), AttCT(keys="rest"), AttCT(keys="lifted"), BCT(), KLCT()):
        together = row_values(model, loss, collate(mixed, padding))
        for index, row in enumerate(mixed):
            for name, alone in row_values(model, loss, collate([row])).items():
                torch.testing.assert_close(together[name][index], alone[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", INTERNAL, ids=repr)
def test_identical_prompts_have_exactly_no_loss(model, tokenizer, loss) -> None:
    same = encode([Pair(prompt(q), prompt(q)) for q in QUESTIONS], tokenizer, windows=WINDOWS_OF_ALL, n_ctx=256)

    values = row_values(model, loss, collate(same.rows))

    assert max(value.abs().max().item() for value in values.values()) < 5e-7


@pytest.mark.boundary
@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_gradients_reach_the_wrapped_side_and_never_the_reference(tokenizer, rows, loss) -> None:
    reference = load_model(hf_model("llama", seed=0), tokenizer=tokenizer)
    trained = load_model(hf_model("llama", seed=1), tokenizer=tokenizer)

    loss.compute(forwards(trained, loss, collate(rows), reference), loss.factors(trained)).total.backward()

    assert all(parameter.grad is None for parameter in reference.parameters())
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained.parameters())


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_a_loss_captured_without_gradient_is_refused(model, rows, loss) -> None:
    both = forwards(model, loss, collate(rows))
    cut = {name: value.detach() for name, value in both.wrapped.items()}
    without = dataclasses.replace(both, wrapped=cut, wrapped_logits=both.wrapped_logits.detach())

    with pytest.raises(CtlensError, match="no gradient"):
        loss.compute(without, loss.factors(model))


def test_the_total_is_the_weighted_mean_over_hook_points(model, rows) -> None:
    loss = ACT(weight=0.5)

    value = loss.compute(forwards(model, loss, collate(rows)), loss.factors(model))

    mean = sum(v.item() for v in value.by_hook.values()) / len(value.by_hook)
    assert list(value.by_hook) == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert value.total.item() == pytest.approx(0.5 * mean, rel=1e-5)


def test_layers_choose_the_hook_points(model) -> None:
    assert AttCT(layers="last").hook_names(model) == ["blocks.1.attn.hook_pattern"]
    assert MLPCT(layers=[0]).hook_names(model) == ["blocks.0.mlp.hook_post"]
    with pytest.raises(CtlensError, match="layer 2 does not exist"):
        ACT(layers=(2,)).hook_names(model)


def test_the_last_layer_is_read_after_the_final_norm_where_the_loss_says_so(model, rows) -> None:
    assert ACT(final_norm=True).hook_names(model) == ["blocks.0.hook_resid_post", FINAL_NORM]
    assert ACT(final_norm=True, layers="last", layer_weights="linear").factors(model) == {FINAL_NORM: 1.0}
    with pytest.raises(CtlensError, match="the last layer, which this ACT does not read"):
        ACT(final_norm=True, layers=[0]).hook_names(model)


def test_the_rest_bucket_sees_attention_that_leaves_the_window() -> None:
    clean = torch.tensor([[[[0.5, 0.5, 0.0]] * 3]])
    wrapped = torch.tensor([[[[0.1, 0.1, 0.8]] * 3]])
    positions = torch.tensor([[0, 1]])
    seen = torch.ones(1, 2, 2, dtype=torch.bool)

    rows = [RestKeys.finished(block_rows(side, positions, positions, seen))[0, 0, 0] for side in (clean, wrapped)]

    torch.testing.assert_close(rows[0], torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(rows[1], torch.tensor([0.1, 0.1, 0.8]))


def test_renormalised_keys_ignore_it() -> None:
    clean = torch.tensor([[[[0.5, 0.5, 0.0]] * 3]])
    wrapped = torch.tensor([[[[0.1, 0.1, 0.8]] * 3]])
    positions = torch.tensor([[0, 1]])
    seen = torch.ones(1, 2, 2, dtype=torch.bool)

    rows = [RenormalisedKeys.finished(block_rows(side, positions, positions, seen)) for side in (clean, wrapped)]
    divergence = jensen_shannon(*rows)

    assert divergence.abs().max() < 1e-6


def test_the_aligned_block_takes_the_named_queries_and_keys_and_zeroes_padding() -> None:
    pattern = torch.arange(16.0).reshape(1, 1, 4, 4)

    seen = torch.tensor([[[True, True, False]] * 3])
    block = block_rows(pattern, *[torch.tensor([[1, 3, 0]])] * 2, seen)

    assert block[0, :2, 0].tolist() == [[5.0, 7.0, 0.0], [13.0, 15.0, 0.0]]


def test_a_key_that_only_one_side_has_in_front_of_the_query_is_no_key() -> None:
    """Two texts that changed places: position 0 is 1 on the other side, so neither is a key of the other there."""
    swapped = Matched(torch.tensor([[0, 1, 2]]), torch.tensor([[1, 0, 2]]), torch.ones(1, 3, dtype=torch.bool))

    assert seen_keys(swapped, swapped)[0].int().tolist() == [[1, 0, 1], [0, 1, 1], [1, 1, 1]]

    kept = Matched(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 3]]), torch.tensor([[True, True, False]]))
    assert seen_keys(kept, kept)[0].int().tolist() == [[1, 1, 0]] * 3


def test_jensen_shannon_is_symmetric_bounded_and_matches_scipy() -> None:
    from scipy.spatial.distance import jensenshannon

    draw = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 50, 7, generator=draw, dtype=torch.float64)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)

    ours = jensen_shannon(p, q)

    torch.testing.assert_close(ours, jensen_shannon(q, p))
    torch.testing.assert_close(ours, torch.tensor([jensenshannon(a, b) ** 2 for a, b in zip(p, q, strict=True)]))
    assert ours.min() >= 0 and ours.max() <= math.log(2)


def test_sum_is_d_times_mean() -> None:
    x, y = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(squared_error(x, y), 12 * mean_squared_error(x, y))


def test_mean_square_of_normalised_vectors_is_twice_the_cosine_distance_over_d() -> None:
    x, y = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(normalised_mse(x, y), 2 / 12 * cosine_distance(x, y))


def test_the_cosine_s_gradient_is_to_the_last_bit_that_of_torch() -> None:
    plain = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    ours = plain.clone()
    given = torch.rand(5, generator=torch.Generator().manual_seed(1))
    for vectors in (plain, ours):
        vectors[0, 3] = 0  # no direction
        vectors.requires_grad_()
    norms = torch.linalg.vector_norm(plain[0], dim=-1) * torch.linalg.vector_norm(plain[1], dim=-1)
    restated = 1 - torch.linalg.vecdot(plain[0], plain[1]) / norms.clamp(min=1e-8)
    found = cosine_distance(ours[0], ours[1])
    (given @ restated).backward()
    (given @ found).backward()

    assert torch.equal(found, restated) and plain.grad is not None and ours.grad is not None
    assert torch.equal(ours.grad, plain.grad) and ours.grad.isfinite().all()


def test_the_cosine_s_gradient_is_the_slope_of_its_values() -> None:
    x, y = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    assert torch.autograd.gradcheck(cosine_distance, (x, y))
    assert torch.autograd.gradgradcheck(cosine_distance, (x, y))


def test_the_relative_error_does_not_depend_on_the_scale_of_a_layer_and_the_reference_is_the_second() -> None:
    x, y = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(relative_squared_error(100 * x, 100 * y), relative_squared_error(x, y))
    torch.testing.assert_close(relative_squared_error(3 * y, y), torch.full((5,), 4.0))


def test_smooth_l1_is_half_the_mean_square_of_small_gaps() -> None:
    x, y = 0.1 * torch.rand(2, 5, 12, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(smooth_l1(x, y), mean_squared_error(x, y) / 2)


def test_the_kl_of_masses_is_the_kl_of_distributions_and_is_never_negative() -> None:
    draw = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 50, 7, generator=draw)
    share_p, share_q = torch.rand(2, 50, 1, generator=draw)

    torch.testing.assert_close(kl_of_masses(p.softmax(-1), q.softmax(-1)), kl_divergence(p, q))
    assert kl_of_masses(share_p * p.softmax(-1), share_q * q.softmax(-1)).min() >= 0


def test_kl_divergence_by_hand_and_its_direction() -> None:
    target, logits = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()

    value = kl_divergence(target, logits)

    assert value.item() == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))
    assert value.item() != pytest.approx(kl_divergence(logits, target).item(), abs=0.05)


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_a_loss_survives_its_config(loss) -> None:
    assert losses.from_config(losses.to_config(loss)) == loss


@pytest.mark.parametrize(
    "config",
    [
        {
            "name": "act",
            "layers": "all",
            "window": "shared",
            "weight": 0.01,
            "site": "resid_post",
            "distance": "squared",
        },
        {"name": "attct", "layers": "all", "window": "shared", "weight": 200.0, "distance": "jsd", "keys": "raw"},
        {
            "name": "mlpct",
            "layers": "all",
            "window": "shared",
            "weight": 10.0,
            "site": "mlp_post",
            "distance": "cosine",
        },
    ],
)
def test_a_config_saved_before_the_later_options_is_the_default(config) -> None:
    assert losses.from_config(config) == losses.get(config["name"])


@pytest.mark.parametrize(
    ("name", "site", "short"),
    [
        ("act", "blocks.1.hook_resid_mid", "resid_mid"),
        ("mlpct", "blocks.1.mlp.hook_post", "mlp_post"),
        ("attout", "blocks.1.attn.hook_z", "z"),
    ],
)
def test_a_full_hook_name_is_its_site_at_its_layer(model, name, site, short) -> None:
    loss = losses.get(name, site=site)
    assert loss == losses.get(name, site=short, layers=1)
    assert loss.hook_names(model) == [site]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("atct", {}, "did you mean 'attct'"),
        ("act", {"layer": "all"}, "did you mean 'layers'"),
        ("act", {"layers": "first_half"}, "layer selection"),
        ("act", {"site": "resid_end"}, "site of act"),
        ("act", {"site": "blocks.1.attn.hook_z"}, "site of act 'z'"),
        ("act", {"site": "blocks.1.hook_resid_post", "layers": "last"}, "stands in layer 1"),
        ("act", {"weight": 0.0}, "positive"),
        ("mlpct", {"distance": "l1"}, "distance of mlpct"),
        ("attct", {"keys": "all"}, "keys of AttCT"),
        ("attct", {"heads": "all"}, "heads of AttCT"),
        ("attct", {"distance": "kl"}, "distance of AttCT"),
        ("attct", {"sink": "keep"}, "sink of AttCT 'keep'; did you mean 'kept'"),
        ("attct", {"keys": "lifted", "distance": "mse"}, "lifted rows are whole"),
        ("act", {"site": "resid_mid", "final_norm": True}, "the site must be resid_post, not resid_mid"),
        ("attct", {"window": "sufix"}, "did you mean 'suffix'"),
        ("klct", {"window": "end"}, "alignment window"),
        ("klct", {"weight": -1.0}, "positive"),
        ("bct", {"weight": float("nan")}, "positive"),
    ],
)
def test_unknown_names_and_options_are_refused(name, options, message) -> None:
    with pytest.raises(CtlensError, match=message):
        losses.get(name, **options)


def test_bct_refuses_a_pair_without_an_answer(model, tokenizer) -> None:
    bare = encode([Pair(prompt("Is it right?"), prompt(HINT + "Is it right?"))], tokenizer, n_ctx=256)

    with pytest.raises(CtlensError, match="needs an answer"):
        row_values(model, BCT(), collate(bare.rows))
