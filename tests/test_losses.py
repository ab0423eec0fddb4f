"""Losses: values by hand and by independent restatement, invariances, and what must be refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import hf_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ctlens import losses
from ctlens.batch import EncodedPair, PairBatch, collate, encode
from ctlens.errors import CtlensError
from ctlens.hooks import capture
from ctlens.losses import ACT, BCT, MLPCT, AttCT, Forwards, Loss
from ctlens.losses.attct import aligned_block
from ctlens.losses.distances import cosine_distance, jensen_shannon, kl_divergence, mean_squared_error, squared_error
from ctlens.models import load_model
from ctlens.pairs import Pair, prompt
from ctlens.types import LensModel

QUESTIONS = ("Which term best describes the disease?", "Is it right?", "When a creature experiences feeling, what?")
HINT = "I may be in the minority here. "
ALL = [ACT(), ACT(distance="mse"), MLPCT(), MLPCT(site="mlp_out"), AttCT(), AttCT(keys="rest"), BCT(), BCT(prompt=True)]
INTERNAL = [loss for loss in ALL if loss.windows]


@pytest.fixture(scope="module")
def model(tokenizer) -> LensModel:
    return load_model(hf_model("llama"), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def rows(tokenizer) -> list[EncodedPair]:
    pairs = [Pair(prompt(q), prompt(HINT * (i + 1) + q), target="(A" * (i + 1)) for i, q in enumerate(QUESTIONS)]
    return list(encode(pairs, tokenizer, n_ctx=256).rows)


def forwards(model: LensModel, loss: Loss, batch: PairBatch, other: LensModel | None = None) -> Forwards:
    names = loss.hook_names(model)
    clean = capture(other or model, batch.clean.tokens, names, grad=False, mask=batch.clean.needed_mask)[1]
    logits, wrapped = capture(model, batch.wrapped.tokens, names, grad=True, mask=batch.wrapped.needed_mask)
    return Forwards(batch, clean, wrapped, logits)


def row_values(model: LensModel, loss: Loss, batch: PairBatch) -> dict[str, torch.Tensor]:
    return loss.row_values(forwards(model, loss, batch), loss.hook_names(model))


def one_pair(model: LensModel, row: EncodedPair, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations at the aligned tokens of one pair, clean and wrapped, by plain indexing."""
    alignment = row.alignments["shared"]
    sides = []
    for prompt_, positions in ((row.clean, alignment.clean), (row.wrapped, alignment.wrapped)):
        activation = capture(model, torch.tensor([prompt_.ids]), [name], grad=False)[1][name][0]
        sides.append(activation[list(positions)] if activation.ndim == 2 else activation[:, positions][:, :, positions])
    return sides[0], sides[1]


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


@pytest.mark.parametrize("loss", ALL, ids=repr)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_pair_has_the_same_loss_alone_and_in_any_batch(model, rows, loss, padding) -> None:
    together = row_values(model, loss, collate(rows[::-1], padding))

    for index, row in enumerate(rows[::-1]):
        for name, alone in row_values(model, loss, collate([row])).items():
            torch.testing.assert_close(together[name][index], alone[0], rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
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

    for loss in (ACT(), MLPCT(), AttCT(keys="rest"), BCT()):
        together = row_values(model, loss, collate(mixed, padding))
        for index, row in enumerate(mixed):
            for name, alone in row_values(model, loss, collate([row])).items():
                torch.testing.assert_close(together[name][index], alone[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", INTERNAL, ids=repr)
def test_identical_prompts_have_exactly_no_loss(model, tokenizer, loss) -> None:
    same = encode([Pair(prompt(q), prompt(q)) for q in QUESTIONS], tokenizer, n_ctx=256)

    values = row_values(model, loss, collate(same.rows))

    assert max(value.abs().max().item() for value in values.values()) < 5e-7


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_gradients_reach_the_wrapped_side_and_never_the_reference(tokenizer, rows, loss) -> None:
    reference, trained = (load_model(hf_model("llama", seed=s), tokenizer=tokenizer) for s in (0, 1))

    loss.compute(forwards(trained, loss, collate(rows), reference), loss.hook_names(trained)).total.backward()

    assert all(parameter.grad is None for parameter in reference.parameters())
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained.parameters())


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_a_loss_captured_without_gradient_is_refused(model, rows, loss) -> None:
    both = forwards(model, loss, collate(rows))
    cut = {name: value.detach() for name, value in both.wrapped.items()}
    without = dataclasses.replace(both, wrapped=cut, wrapped_logits=both.wrapped_logits.detach())

    with pytest.raises(CtlensError, match="no gradient"):
        loss.compute(without, loss.hook_names(model))


def test_the_total_is_the_weighted_mean_over_hook_points(model, rows) -> None:
    loss = ACT(weight=0.5)

    value = loss.compute(forwards(model, loss, collate(rows)), loss.hook_names(model))

    mean = sum(v.item() for v in value.by_hook.values()) / len(value.by_hook)
    assert list(value.by_hook) == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert value.total.item() == pytest.approx(0.5 * mean, rel=1e-5)


def test_layers_choose_the_hook_points(model) -> None:
    assert AttCT(layers="last").hook_names(model) == ["blocks.1.attn.hook_pattern"]
    assert MLPCT(layers=[0]).hook_names(model) == ["blocks.0.mlp.hook_post"]
    with pytest.raises(CtlensError, match="layer 2 does not exist"):
        ACT(layers=(2,)).hook_names(model)


def test_the_rest_bucket_sees_attention_that_leaves_the_window() -> None:
    clean = torch.tensor([[[[0.5, 0.5, 0.0]] * 3]])
    wrapped = torch.tensor([[[[0.1, 0.1, 0.8]] * 3]])
    positions, valid = torch.tensor([[0, 1]]), torch.tensor([[True, True]])

    rows = [AttCT(keys="rest")._rows(side, positions, valid)[0, 0, 0] for side in (clean, wrapped)]

    torch.testing.assert_close(rows[0], torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(rows[1], torch.tensor([0.1, 0.1, 0.8]))


def test_renormalised_keys_ignore_it() -> None:
    clean = torch.tensor([[[[0.5, 0.5, 0.0]] * 3]])
    wrapped = torch.tensor([[[[0.1, 0.1, 0.8]] * 3]])
    positions, valid = torch.tensor([[0, 1]]), torch.tensor([[True, True]])
    loss = AttCT(keys="renormalised")

    divergence = jensen_shannon(loss._rows(clean, positions, valid), loss._rows(wrapped, positions, valid))

    assert divergence.abs().max() < 1e-6


def test_the_aligned_block_takes_the_named_queries_and_keys_and_zeroes_padding() -> None:
    pattern = torch.arange(16.0).reshape(1, 1, 4, 4)

    block = aligned_block(pattern, torch.tensor([[1, 3, 0]]), torch.tensor([[True, True, False]]))

    assert block[0, :2, 0].tolist() == [[5.0, 7.0, 0.0], [13.0, 15.0, 0.0]]


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
    normalised = mean_squared_error(x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True))

    torch.testing.assert_close(normalised, 2 / 12 * cosine_distance(x, y))


def test_kl_divergence_by_hand_and_its_direction() -> None:
    target, logits = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()

    value = kl_divergence(target, logits)

    assert value.item() == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))
    assert value.item() != pytest.approx(kl_divergence(logits, target).item(), abs=0.05)


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_a_loss_survives_its_config(loss) -> None:
    assert losses.from_config(losses.to_config(loss)) == loss


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("atct", {}, "did you mean 'attct'"),
        ("act", {"layer": "all"}, "did you mean 'layers'"),
        ("act", {"layers": "first_half"}, "layer selection"),
        ("act", {"site": "resid_end"}, "site of act"),
        ("act", {"weight": 0.0}, "positive"),
        ("mlpct", {"distance": "l1"}, "distance of mlpct"),
        ("attct", {"keys": "all"}, "keys of AttCT"),
        ("attct", {"window": "sufix"}, "did you mean 'suffix'"),
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
