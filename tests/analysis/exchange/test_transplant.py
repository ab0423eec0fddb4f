"""Transplants: every value is that of one plain forward pass; a planted edit is found where it was made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import planted
from helpers.models import CHAT_MODELS, chat_model
from helpers.pairwise import pairwise
from helpers.patching import CLOSE, logit_diff
from helpers.tiers import unit_first_rows
from helpers.transplants import PAIRS, edited, moved

from ctlens.analysis import Transplant, transplant
from ctlens.analysis.patching import sweep as patching_sweep
from ctlens.analysis.patching.jobs import patch_pairs
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import encode
from ctlens.data.pairs import Pair, prompt
from ctlens.models.hooks import resolve, run_capturing
from ctlens.models.parameters import copy_model
from ctlens.models.weights import canonical_weights, load_weights

PATHS = ("suffix", "hooks")
SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "mlp_post", "pattern")


@pytest.fixture(scope="module", params=CHAT_MODELS)
def models(request: pytest.FixtureRequest) -> tuple[LensModel, LensModel]:
    """Source and target, with the final norm and the unembedding in common."""
    target = chat_model(request.param)
    return moved(target), target


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "hooks":
        monkeypatch.setattr(patching_sweep, "read_blocks", lambda *parts: None)
    return request.param


def exchanged(models: tuple[LensModel, LensModel], pairs: list[Pair] = PAIRS, **options: Any) -> Transplant:
    return transplant(*models, pairs, **{"progress": False} | options)


def at_positions(row: Any, side: str) -> dict[str, list[int]]:
    """Worked out from the alignment of the pair."""
    length = len(getattr(row, side).ids)
    aligned = [place for place in getattr(row.alignments["shared"], side) if place != length - 1]
    return {"last": [length - 1], "content": aligned, "wrapper": list(row.wrapper), "all": list(range(length))}


@pytest.mark.parametrize(
    ("site", "models", "path"),
    unit_first_rows(pairwise(SITES, ("made here", "gpt2"), PATHS), 8),
    indirect=["models", "path"],
)
def test_every_value_is_that_of_one_plain_forward_pass(models: tuple[LensModel, LensModel], site: str, path: str):
    source, target = models
    positions = ("last", "content", "wrapper", "all")
    found = exchanged(models, site=site, positions=positions)
    row = encode(PAIRS[1:2], target.tokenizer, n_ctx=256).rows[0]
    ids = row.wrapped.ids
    places = at_positions(row, "wrapped")
    for quantity, (model, other) in enumerate(((target, source), (source, target))):
        assert found.unpatched[quantity, 0, 1] == pytest.approx(logit_diff(model, ids, []), abs=1e-5)
        assert found.source[quantity, 0, 1] == pytest.approx(logit_diff(other, ids, []), abs=1e-5)
        for layer, name in enumerate(resolve(model, site)):
            ours = run_capturing(model, torch.tensor([ids]), [name], grad=False)[1][name]
            theirs = run_capturing(other, torch.tensor([ids]), [name], grad=False)[1][name]
            for at, position in enumerate(positions):
                for head in range(4 if site in ("z", "pattern") else 1):
                    new = ours.clone()
                    where = {"z": (0, places[position], head), "pattern": (0, head, places[position])}
                    part = where.get(site, (0, places[position]))
                    new[part] = theirs[part]
                    expected = logit_diff(model, ids, [(name, lambda activation, hook, new=new: new)])
                    cell = (quantity, 0, layer, head, at, 1) if found.values.ndim == 6 else (quantity, 0, layer, at, 1)
                    assert found.values[cell] == pytest.approx(expected, abs=2e-5), (layer, position, head)
    assert np.abs(found.values - found.unpatched.reshape(2, 1, *[1] * (found.values.ndim - 3), 3)).max() > 1e-3


def test_the_whole_stream_behind_the_last_layer_is_the_other_model(models: tuple[LensModel, LensModel], path: str):
    metrics = ("logit_diff", "probability", "kl")
    for positions in ("last", "all"):
        found = exchanged(models, layers="last", positions=positions, metrics=metrics)
        np.testing.assert_allclose(found.values[:, :, 0, 0], found.source, **CLOSE)
        assert np.abs(found.source[:, 0] - found.unpatched[:, 0]).min() > 1e-2
        table = found.normalised("kl", smallest_gap=1e-4)
        np.testing.assert_allclose(table["value"], 1.0, atol=1e-3)
    elsewhere = exchanged(models, layers="last", positions=("content", "wrapper"))
    np.testing.assert_allclose(
        elsewhere.values, np.broadcast_to(found.unpatched[:, :1, None, None], (2, 1, 1, 2, 3)), **CLOSE
    )


def test_an_equal_model_changes_nothing_and_has_no_shares(models: tuple[LensModel, LensModel], path: str):
    source = models[0]
    found = exchanged((source, copy_model(source)), site="z", positions=("last", "wrapper"))
    np.testing.assert_allclose(found.values - found.unpatched[:, :, None, None, None], 0, atol=1e-5)
    for refused in (found.normalised, found.figure):
        with pytest.raises(CtlensError, match="logit_diff differs by 0 between source and target: a share of less"):
            refused()


@pytest.mark.parametrize("site", ["resid_post", "z"])
def test_batch_mates_order_and_chunks_change_nothing(models: tuple[LensModel, LensModel], site: str):
    options: dict[str, Any] = {"site": site, "positions": ("last", "wrapper"), "metrics": ("logit_diff", "kl")}
    together = exchanged(models, **options)
    turned = exchanged(models, PAIRS[::-1], max_batch=2, **options)
    np.testing.assert_allclose(turned.values[..., ::-1], together.values, **CLOSE)
    np.testing.assert_allclose(turned.unpatched[..., ::-1], together.unpatched, **CLOSE)
    for index, pair in enumerate(PAIRS):
        alone = exchanged(models, [pair], **options)
        np.testing.assert_allclose(alone.values[..., 0], together.values[..., index], **CLOSE)


def test_exchanged_models_exchange_the_directions(models: tuple[LensModel, LensModel]):
    there = exchanged(models, site="attn_out")
    back = exchanged(models[::-1], site="attn_out")
    np.testing.assert_allclose(back.values[::-1], there.values, **CLOSE)
    np.testing.assert_allclose(back.effect(), -there.effect(), **CLOSE)


def test_the_clean_prompts_are_read_where_asked(models: tuple[LensModel, LensModel]):
    turned = [Pair(pair.wrapped, pair.clean) for pair in PAIRS]
    here = exchanged(models, PAIRS, side="clean", positions=("last", "all"))
    there = exchanged(models, turned, side="wrapped", positions=("last", "all"))
    np.testing.assert_allclose(here.values, there.values, **CLOSE)
    np.testing.assert_allclose(here.unpatched, there.unpatched, **CLOSE)
    assert not np.allclose(here.values, exchanged(models, positions=("last", "all")).values)


def test_answers_that_begin_alike_are_read_where_they_part(models: tuple[LensModel, LensModel]):
    pair = Pair(prompt("Is it?", "is right", "is that"), prompt("no. Is it?", "is right", "is that"))
    found = exchanged(models, [pair], layers="last", positions="last")
    np.testing.assert_allclose(found.values[:, :, 0, 0], found.source, **CLOSE)
    item = patch_pairs(models[0], [pair], "denoising", "last", "shared")[0].contrast
    with torch.no_grad():
        logits = models[0](torch.tensor([item.prompt]))[0, -1]
    assert found.source[0, 0, 0] == pytest.approx(float(logits[item.good] - logits[item.bad]), abs=1e-5)


def shares(found: Transplant) -> dict[str, np.ndarray]:
    table = found.normalised()
    return {quantity: np.array(part["value"]) for quantity, part in table.groupby("quantity")}


@pytest.mark.parametrize("part", ["W_O", "W_V"])
def test_an_edit_of_one_attention_is_found_there_and_nowhere_else(part: str):
    """Layer 1 no longer writes the cue: what it writes at the last token is the whole effect, in both directions."""
    models = (edited(part), planted.model())
    attention = exchanged(models, planted.pairs(), site="attn_out", positions="last")
    mlp = exchanged(models, planted.pairs(), site="mlp_out", positions="last")
    for values in shares(attention).values():
        np.testing.assert_allclose(values, [0, 1, 0], atol=1e-5)
    for values in shares(mlp).values():
        np.testing.assert_allclose(values, 0, atol=1e-5)
    heads = shares(exchanged(models, planted.pairs(), site="z", positions="last"))
    for values in heads.values():  # an edit of W_O lies behind z
        np.testing.assert_allclose(values, [0, float(part == "W_V"), 0], atol=1e-5)


def test_the_stream_carries_an_edit_from_its_layer_on_at_the_last_token_alone():
    found = exchanged((edited("W_O"), planted.model()), planted.pairs(), positions=("last", "content", "wrapper"))
    for _, part in found.normalised().groupby("quantity"):
        by_place = part.pivot(index="positions", columns="layer", values="value")
        np.testing.assert_allclose(by_place.loc["last"], [0, 1, 1], atol=1e-5)
        np.testing.assert_allclose(by_place.loc[["content", "wrapper"]], 0, atol=1e-5)


def test_what_is_left_in_later_weights_is_seen_in_one_direction():
    """Two edits that each repair the answer: putting back the stream of one leaves the other at work."""
    base = planted.model()
    fixed = edited("W_O")
    weights = canonical_weights(fixed)
    read = planted.model("masked")
    weights["unembed.W_U"] = canonical_weights(read)["unembed.W_U"]
    load_weights(fixed, weights)
    values = shares(exchanged((fixed, base), planted.pairs(), positions="last", layers=[1]))
    assert values["sufficient"][0] == pytest.approx(1, abs=0.05)
    assert values["lost"][0] == pytest.approx(0, abs=0.05)


def by_hand() -> Transplant:
    """Two pairs, one metric, two layers, one choice of positions: the target says 0 and 2, the source 4 and 4."""
    values = np.array([[[[[1.0, 2.0]], [[4.0, 4.0]]]], [[[[4.0, 4.0]], [[0.0, 2.0]]]]])
    low, high = np.array([[0.0, 2.0]]), np.array([[4.0, 4.0]])
    baselines = np.stack([low, high]), np.stack([high, low])
    return Transplant(values, *baselines, ("logit_diff",), (3, 5), ("last",), "resid_post", "wrapped", "suffix")


def test_a_share_is_the_ratio_of_the_means_in_both_directions():
    table = by_hand().normalised()
    assert table["quantity"].tolist() == ["sufficient"] * 2 + ["lost"] * 2
    assert table["layer"].tolist() == [3, 5, 3, 5] and set(table["positions"]) == {"last"}
    assert table["value"].tolist() == [1 / 6, 1.0, 0.0, 1.0]  # not the mean of 1/4 and 0
    # 1 of 4 and 0 of 2: the two move the ratio by 1/9 each way; Student's factor of two pairs is 12.706
    assert table["ci_high"][0] - 1 / 6 == pytest.approx(12.7062 / 9, rel=1e-4) and set(table["n_pairs"]) == {2}
    raw = by_hand().to_dataframe()
    assert raw["value"].tolist() == [1.5, 4, 4, 1] and raw["unpatched"].tolist() == [1, 1, 4, 4]
    assert by_hand().effect().tolist() == [4, 2]


def test_what_two_trainings_keep_is_their_effect_over_the_base_with_the_other_s_part():
    table = by_hand().kept(np.array([-2.0, 0.0]))
    assert table["quantity"].tolist() == ["target keeps"] * 2 + ["source keeps"] * 2
    assert table["value"].tolist() == [(3 + 2) / (2 + 2), 10 / 4, 10 / 10, (2 + 2) / 10]
    with pytest.raises(CtlensError, match="differs by 0.4 between target and base"):
        by_hand().kept(np.array([-0.4, 1.6]))
    with pytest.raises(CtlensError, match="kl is measured from the other model"):
        replace(by_hand(), metrics=("kl",)).kept(np.zeros(2))


def test_methods_that_do_alike_are_compared_over_their_base(models: tuple[LensModel, LensModel]):
    one, base = models
    other = copy_model(one)
    found = exchanged((one, other))
    table = found.kept(exchanged((one, base)).unpatched[0, 0], smallest_gap=0.0)
    np.testing.assert_allclose(table["value"], 1, atol=1e-3)
    with pytest.raises(CtlensError, match="differs by 0 between source and target"):
        found.normalised()


def test_results_round_trip(tmp_path, models: tuple[LensModel, LensModel]):
    for site in ("resid_post", "z"):
        found = exchanged(models, site=site, metrics=("logit_diff", "kl"))
        found.save(tmp_path / "transplant.safetensors")
        assert Transplant.load(tmp_path / "transplant.safetensors").to_dataframe().equals(found.to_dataframe())
        assert len(found.to_dataframe()) == found.values[..., 0].size


def test_a_figure_has_a_panel_per_direction_and_a_line_per_source():
    drawn = by_hand().compare({"bct": by_hand()}, label="act")
    lines = [trace for trace in drawn.data if trace.mode == "lines+markers"]
    assert [(line.name, line.xaxis) for line in lines] == [("ACT", "x"), ("BCT", "x"), ("ACT", "x2"), ("BCT", "x2")]
    assert list(lines[0].x) == [3, 5] and list(lines[2].y) == [0.0, 1.0]
    assert list(lines[0].y) == pytest.approx([1 / 6, 5 / 6])  # of 1/6 at the first layer and all at the second
    names = [note.text for note in drawn.layout.annotations]
    assert names[:2] == ["source into target: share that appears", "target into source: share that is lost"]
    with pytest.raises(CtlensError, match="unknown measured positions 'content'"):
        by_hand().figure("content")
    with pytest.raises(CtlensError, match="unknown measured metric 'kl'"):
        by_hand().figure(metric="kl")


def test_what_the_layers_add_is_the_share_of_the_last_one(models: tuple[LensModel, LensModel]):
    by_hand_rows = by_hand().added()
    assert by_hand_rows["value"].tolist() == pytest.approx([1 / 6, 5 / 6, 0.0, 1.0])
    found = exchanged(models, positions=("last", "content"))
    keys = ["quantity", "positions"]
    added = found.added(smallest_gap=0.0)
    whole = found.normalised(smallest_gap=0.0).query("layer == 1").set_index(keys)["value"]
    np.testing.assert_allclose(added.groupby(keys)["value"].sum()[whole.index], whole, **CLOSE)
    first = found.normalised(smallest_gap=0.0).query("layer == 0")["value"]
    np.testing.assert_allclose(added.query("layer == 0")["value"], first, **CLOSE)
    with pytest.raises(CtlensError, match="attn_out is each layer's own and does not add up"):
        exchanged(models, site="attn_out").added(smallest_gap=0.0)


def test_a_site_that_does_not_add_up_is_drawn_as_it_is(models: tuple[LensModel, LensModel]):
    found = exchanged(models, site="attn_out", positions="last")
    drawn = found.figure(smallest_gap=0.0)
    lines = [trace for trace in drawn.data if trace.mode == "lines+markers"]
    shares = found.normalised(smallest_gap=0.0).query("quantity == 'sufficient'")["value"]
    np.testing.assert_allclose(lines[0].y, shares)
    assert drawn.layout.meta["title"].startswith("Where does the training live")


def test_a_figure_says_which_sources_have_no_effect():
    none = by_hand()
    still = replace(none, source=none.unpatched + 0.1)
    drawn = none.compare({"retention": still}, label="act")
    assert {trace.name for trace in drawn.data if trace.name} == {"ACT"}
    assert "not drawn, effect too small: retention only (0.1)" in drawn.layout.meta["subtitle"]
    with pytest.raises(CtlensError, match="differs by 0.1 between source and target"):
        still.compare({"act": still}, label="retention")


def test_heads_are_drawn_as_a_grid_per_direction(models: tuple[LensModel, LensModel]):
    found = exchanged(models, site="z", positions="last")
    drawn = found.figure(smallest_gap=0.0)
    assert [np.shape(trace.z) for trace in drawn.data] == [(2, 4), (2, 4)]
    table = found.normalised(smallest_gap=0.0)
    assert drawn.data[1].z[1][2] == table.query("quantity == 'lost' and layer == 1 and head == 2")["value"].item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "hook_z"}, "unknown site"),
        ({"side": "benign"}, "unknown side"),
        ({"positions": "each"}, "unknown choice of positions"),
        ({"positions": ()}, "at least one choice"),
        ({"positions": ("last", "last")}, "each once"),
        ({"positions": "wrapper", "side": "clean"}, "a clean prompt has no wrapper"),
        ({"metrics": ("accuracy",)}, "unknown metric"),
        ({"max_batch": 0}, "at least 1"),
        ({"layers": [2]}, "layer 2 does not exist"),
    ],
)
def test_what_cannot_be_had_is_refused(options: dict[str, Any], message: str):
    model = chat_model("made here")
    with pytest.raises(CtlensError, match=message):
        exchanged((model, model), **options)


def test_models_that_do_not_compare_and_pairs_without_tokens_are_refused():
    model = chat_model("made here")
    other = planted.model()
    with pytest.raises(CtlensError, match="do not compare: n_layers"):
        exchanged((model, other))
    same = [Pair(PAIRS[0].clean, PAIRS[0].clean)]
    with pytest.raises(CtlensError, match="pair 1 has no token at 'wrapper'"):
        exchanged((model, model), same, positions="wrapper")
    training = copy_model(model)
    training.train()
    with pytest.raises(CtlensError, match="eval mode"):
        exchanged((training, model))
