"""Attention that is cut is gone, the rest of its row is scaled up, and what the answer loses is measured."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.attention import NAMES, PAIRS
from helpers.models import byte_level_tokenizer, odd_model

from ctlens.analysis import Knockout, attention_diff, knockout
from ctlens.analysis.attention.cuts import Cut, edges, planned_cuts, random_keys, without_edges
from ctlens.analysis.base.contrast import contrast_batches, contrasts
from ctlens.analysis.base.positions import segments
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import EncodedPair, encode
from ctlens.data.chat import Turn, render
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.models.bridges import huggingface_config, is_bridge
from ctlens.models.hooks import editing, run_capturing
from ctlens.models.loading import build, load_model
from ctlens.models.parameters import copy_model
from ctlens.models.weights import ModelConfig, initial_weights, load_weights

TOKENIZER = byte_level_tokenizer(chat=True)


def rows() -> list[EncodedPair]:
    return list(encode(PAIRS, TOKENIZER, n_ctx=256).rows)


def said(model: LensModel, ids: tuple[int, ...]) -> tuple[float, float]:
    """Logit difference and P(bad) behind a prompt, by a plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1]
    good = TOKENIZER("the", add_special_tokens=False)["input_ids"][0]
    bad = TOKENIZER("a", add_special_tokens=False)["input_ids"][0]
    return float(logits[good] - logits[bad]), float(logits.softmax(-1)[bad])


def test_a_cut_row_is_the_softmax_over_the_keys_that_are_left() -> None:
    scores = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    cut = torch.zeros(2, 3, 5, 5, dtype=torch.bool)
    cut[0, 1, 2, [0, 3]] = True
    found = without_edges(scores.softmax(-1), cut)
    torch.testing.assert_close(found, scores.masked_fill(cut, -torch.inf).softmax(-1))
    assert torch.equal(found[1], scores.softmax(-1)[1])


def test_a_row_that_would_have_nothing_left_is_refused() -> None:
    with pytest.raises(CtlensError, match="without any attention"):
        without_edges(torch.tensor([[[[0.4, 0.6]]]]), torch.ones(1, 1, 1, 2, dtype=torch.bool))


def test_a_sink_keeps_its_share_of_a_cut_row() -> None:
    """The softmax of gpt-oss: one more score, the sink's, that no key has."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 5, 5, generator=draw)
    sink = torch.randn(1, 3, 1, 1, generator=draw).expand(2, 3, 5, 1)
    cut = torch.zeros(2, 3, 5, 5, dtype=torch.bool)
    cut[0, 1, 2, [0, 3]] = True

    def softmax(scores: torch.Tensor) -> torch.Tensor:
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]

    torch.testing.assert_close(without_edges(softmax(scores), cut), softmax(scores.masked_fill(cut, -torch.inf)))


def test_a_row_that_sums_to_more_than_one_is_refused() -> None:
    with pytest.raises(CtlensError, match="a row of attention sums to 1.4, so it is no softmax"):
        without_edges(torch.tensor([[[[0.8, 0.6]]]]), torch.tensor([[[[True, False]]]]))


def test_a_knockout_in_a_model_with_sinks_is_masking_the_scores_of_huggingface() -> None:
    hf: Any = odd_model("gpt_oss")
    for layer in hf.model.layers:
        layer.self_attn.sinks.data += 2.0  # published sinks are of this size
    model = load_model(hf, tokenizer=TOKENIZER)
    hf.set_attn_implementation("eager")
    found = knockout(model, PAIRS, queries="last", keys="wrapper", progress=False)
    masked = [
        _masked(hf, item.prompt, list(row.wrapper)) for item, row in zip(contrasts(model, PAIRS), rows(), strict=True)
    ]
    expected = [
        float(logits[item.good] - logits[item.bad])
        for logits, item in zip(masked, contrasts(model, PAIRS), strict=True)
    ]
    from_first = list(zip(found.kinds, found.layers, strict=True)).index(("from", 0))

    np.testing.assert_allclose(found.cut[0, 0, from_first], expected, atol=1e-4)
    assert np.abs(found.cut[0, 0, from_first] - found.uncut[0, 0]).max() > 1e-2


@torch.no_grad()
def _masked(hf: Any, ids: Any, keys: list[int]) -> torch.Tensor:
    """The last logits of plain `transformers`, whose last token does not see some keys."""
    least = torch.finfo(torch.float32).min
    mask = torch.full((len(ids), len(ids)), least).triu(1)
    mask[-1, keys] = least
    masks = {"full_attention": mask[None, None], "sliding_attention": mask[None, None]}
    return hf(torch.tensor([ids]), attention_mask=masks).logits[0, -1]


def test_cutting_a_pattern_is_masking_the_scores(model) -> None:
    """The model's own softmax over masked scores against the edited pattern, at one head of one layer."""
    if is_bridge(model) and huggingface_config(model) is None:
        pytest.skip("a native bridge does not compute with its scores hook")
    other: Any = copy_model(model)
    found = knockout(model, PAIRS[:1], by="head", layers=1, heads=[2], progress=False)
    keys = list(rows()[0].wrapper)

    def mask(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        scores = scores.clone()
        scores[:, 2, -1, keys] = -1e9
        return scores

    try:
        other.add_hook("blocks.1.attn.hook_attn_scores", mask)
        expected = said(other, rows()[0].wrapped.ids)
    finally:
        other.reset_hooks()
    assert found.cut[0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert abs(found.effects()[0, 0, 0, 0]) > 1e-5


@pytest.mark.parametrize("queries", ["last", "content", "all"])
def test_every_cut_is_what_a_plain_loop_over_the_pattern_finds(model, queries: str) -> None:
    found = knockout(model, PAIRS, queries=queries, heads=[1, 3], progress=False)
    assert list(zip(found.kinds, found.layers, strict=True)) == [("alone", 0), ("alone", 1), ("from", 0), ("from", 1)]
    for number, row in enumerate(rows()):
        last = len(row.wrapped.ids) - 1
        asking = {
            "last": [last],
            "content": [at for at in row.alignments["shared"].wrapped if at != last],
            "all": [at for at in range(last + 1) if at not in row.wrapper],
        }[queries]
        for at, layers in enumerate(([0], [1], [0, 1], [1])):
            other: Any = copy_model(model)
            edit = partial(cut_by_loops, queries=asking, keys=row.wrapper)
            for layer in layers:
                other.add_hook(NAMES[layer], edit)
            assert found.cut[0, :, at, number].tolist() == pytest.approx(said(other, row.wrapped.ids), abs=2e-4)
        assert found.uncut[0, :, number].tolist() == pytest.approx(said(model, row.wrapped.ids), abs=1e-4)


def cut_by_loops(pattern: torch.Tensor, hook: Any, queries: list[int], keys: tuple[int, ...]) -> torch.Tensor:
    pattern = pattern.clone()
    for head in (1, 3):
        for query in queries:
            pattern[0, head, query, list(keys)] = 0
            pattern[0, head, query] /= pattern[0, head, query].sum()
    return pattern


def test_rows_sum_to_one_after_the_cut_in_the_models_own_pass(model) -> None:
    items = contrasts(model, PAIRS)
    (batch,) = contrast_batches(model, items, 8, progress=False)
    chosen = edges(batch, rows(), "all", [row.wrapper for row in rows()])
    plan = planned_cuts([0, 1], range(4), "layer")[2]
    with editing(model, plan.edits(model, chosen)):
        after = run_capturing(model, batch.side.tokens, NAMES, grad=False)[1]
    for pattern in after.values():
        torch.testing.assert_close(
            pattern.sum(-1)[batch.side.mask[:, None].expand(-1, 4, -1)].float(),
            torch.ones(()).expand(int(batch.side.mask.sum()) * 4),
            atol=1e-4,
            rtol=0,
        )
        assert pattern[chosen[:, None].expand_as(pattern)].abs().max() == 0


def test_a_last_token_that_sees_only_the_first_says_the_same_to_every_prompt(llama) -> None:
    whole = Cut("from", (0, 1), tuple(range(4)))
    items = contrasts(llama, PAIRS)
    (batch,) = contrast_batches(llama, items, 8, progress=False)
    keys = [range(1, len(item.prompt)) for item in items]
    with editing(llama, whole.edits(llama, edges(batch, rows(), "last", keys))):
        cut = batch.logit_diff(batch.at_last(llama(batch.side.tokens)))
    uncut = batch.logit_diff(batch.at_last(llama(batch.side.tokens)))
    torch.testing.assert_close(cut, cut[:1].expand_as(cut), atol=1e-4, rtol=0)
    assert (uncut - uncut[0]).abs().max() > 1e-2


def copier() -> tuple[LensModel, list[Pair]]:
    """One head that attends alike to all tokens and copies; only the wrapper's word speaks for the bad answer."""
    config = ModelConfig(d_vocab=400, n_layers=1, n_heads=1, d_model=32, d_mlp=8, n_ctx=64)
    weights = {name: torch.zeros_like(value) for name, value in initial_weights(config, 0).items()}
    for name in ("blocks.0.ln1.w", "blocks.0.ln2.w", "ln_final.w"):
        weights[name] += 1
    for name in ("blocks.0.attn.W_V", "blocks.0.attn.W_O"):
        weights[name][0] = torch.eye(32)
    hint = TOKENIZER("z", add_special_tokens=False)["input_ids"][0]
    bad = TOKENIZER("a", add_special_tokens=False)["input_ids"][0]
    weights["embed.W_E"][:, 0] = 1
    weights["embed.W_E"][hint] = torch.eye(32)[1]
    weights["unembed.W_U"][1, bad] = 1
    model = build(config, TOKENIZER)
    load_weights(model, weights)
    return model, [Pair(prompt("Is it?", "the", "a"), prompt("z" * 3 * n + " Is it?", "the", "a")) for n in (1, 2)]


def test_a_head_that_copies_the_hint_says_nothing_of_it_once_it_is_cut_off() -> None:
    model, pairs = copier()
    found = knockout(model, pairs, progress=False)
    hint = TOKENIZER("z", add_special_tokens=False)["input_ids"][0]
    for number, row in enumerate(encode(pairs, TOKENIZER, n_ctx=64).rows):
        n = len(row.wrapped.ids)
        share = row.wrapped.ids.count(hint) / n
        assert hint not in row.clean.ids and share > 0.05
        stream = np.array([1 + 32**0.5 * (1 - share), 32**0.5 * share])
        expected = -stream[1] / np.sqrt((stream**2).sum() / 32)
        assert found.uncut[0, 0, number] == pytest.approx(expected, rel=1e-3)
        assert found.attention[0, 0, number] == pytest.approx(len(row.wrapper) / n, rel=1e-4)
    assert found.uncut[0, 0].max() < -0.1
    assert np.abs(found.cut[0, 0]).max() < 1e-5
    assert (found.effects()[0, 0] > 0.1).all() and (found.effects()[1, 0] < 0).all()  # the null makes the hint louder
    assert (found.effects("p_bad")[0, 0] < 0).all()
    table = found.to_dataframe().query("measure == 'logit_diff' and kind == 'alone'").iloc[0]
    assert table["cut"] == pytest.approx(0, abs=1e-5) and table["beyond"] > table["effect"] > 0


def test_attention_is_that_of_attention_diff(llama) -> None:
    found = knockout(llama, PAIRS, by="head", progress=False)
    expected = attention_diff(llama, llama, PAIRS, progress=False).before
    np.testing.assert_allclose(found.attention[0].T.reshape(3, 2, 4), expected, rtol=1e-3, atol=1e-5)
    content = knockout(llama, PAIRS, queries="content", by="head", progress=False).attention[0].T.reshape(3, 2, 4)
    expected = attention_diff(llama, llama, PAIRS, progress=False).of("before", "mass", "content")
    np.testing.assert_allclose(content, expected, rtol=1e-3, atol=1e-5)


def test_a_layer_with_all_its_heads_and_the_last_layer_from_it_on_are_the_same_cut(llama) -> None:
    found = knockout(llama, PAIRS, progress=False)
    np.testing.assert_allclose(found.cut[:, :, 1], found.cut[:, :, 3], atol=1e-6)
    single = knockout(llama, PAIRS, by="head", layers=-1, heads=[0], progress=False)
    assert (single.kinds, single.layers, single.heads) == (("head",), (1,), (0,))


def test_random_keys_are_as_many_others_and_depend_on_the_prompt_alone() -> None:
    for row in rows():
        draws = random_keys(row, row.wrapper, 0)
        assert draws == random_keys(row, row.wrapper, 0) != random_keys(row, row.wrapper, 1)
        for keys in draws:
            assert len(set(keys)) == len(row.wrapper) or set(keys) == set(range(1, len(row.wrapped.ids) - 1)) - {
                *row.wrapper
            }
            assert not {0, len(row.wrapped.ids) - 1, *row.wrapper} & set(keys)


@pytest.mark.slow
def test_order_and_batch_mates_change_nothing(llama) -> None:
    whole = knockout(llama, PAIRS, batch_size=64, progress=False)
    single = knockout(llama, PAIRS, batch_size=1, progress=False)
    turned = knockout(llama, PAIRS[::-1], progress=False)
    for name in ("uncut", "cut", "null", "attention", "null_attention"):
        expected = getattr(whole, name)
        np.testing.assert_allclose(getattr(single, name), expected, atol=1e-4)
        np.testing.assert_allclose(getattr(turned, name)[..., ::-1], expected, atol=1e-4)


def test_the_same_model_twice_has_the_same_numbers_and_everything_round_trips(llama, tmp_path) -> None:
    found = knockout({"base": llama, "act": copy_model(llama)}, PAIRS, progress=False)
    assert (found.cut[0] == found.cut[1]).all() and (found.null[0] == found.null[1]).all()
    found.save(tmp_path / "knockout.safetensors")
    again = Knockout.load(tmp_path / "knockout.safetensors")
    assert again.to_dataframe().equals(found.to_dataframe())
    assert (found.n_null_keys <= found.n_keys).all()
    assert found.n_keys.tolist() == [len(segments(row)["wrapper"]) for row in rows()]


@pytest.mark.slow
def test_figures_show_attention_beside_effects(llama) -> None:
    found = knockout({"base": llama, "act": llama}, PAIRS, progress=False)
    figure = found.figure()
    assert [note.text for note in figure.layout.annotations] == [
        "attention before the cut",
        "cut in one layer",
        "cut from a layer on",
    ]
    effect, null = found.effects()[:, 0].mean(-1)
    lines = [np.asarray(trace.y, dtype=float) for trace in figure.data]
    for expected in (found.attention[0, :2].mean(-1), effect[:2], effect[2:], null[:2], null[2:]):
        assert any(np.allclose(line, expected) for line in lines)
    heads = knockout(llama, PAIRS, by="head", progress=False)
    null, markers = heads.figure("p_bad").data
    np.testing.assert_allclose(markers.x, heads.attention[0].mean(-1))
    np.testing.assert_allclose(markers.y, heads.effects("p_bad")[0, 0].mean(-1))
    np.testing.assert_allclose(null.y, heads.effects("p_bad")[1, 0].mean(-1))


BEHIND = Pair(prompt("Is it?", "the", "a"), Prompt((Turn("user", "Is it?"), Turn("assistant", "well, it")), "the", "a"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": "lst"}, "unknown queries 'lst'; did you mean 'last'"),
        ({"keys": "wraper"}, "did you mean 'wrapper'"),
        ({"by": "heads"}, "did you mean 'head'"),
        ({"heads": [4]}, "heads must name some of 0 to 3"),
        ({"heads": []}, "heads must name some of 0 to 3"),
        ({"layers": 5}, "layer 5 does not exist"),
        ({"keys": lambda row: [500]}, "not all in it"),
        ({"keys": lambda row: range(len(row.wrapped.ids))}, "no tokens beside the keys"),
        ({"pairs": [BEHIND], "queries": "content"}, "cannot see the keys"),
        ({"pairs": [Pair(prompt("Is it right?"), prompt("I think so. Is it right?"))]}, "names no good and bad answer"),
    ],
)
def test_what_cannot_be_cut_is_refused(llama, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        knockout(llama, **{"pairs": PAIRS, "progress": False} | options)


def test_the_prompt_is_not_changed_by_a_cut(llama) -> None:
    before = said(llama, render(TOKENIZER, PAIRS[0].wrapped.turns).ids)
    knockout(llama, PAIRS[:1], progress=False)
    assert said(llama, render(TOKENIZER, PAIRS[0].wrapped.turns).ids) == before
