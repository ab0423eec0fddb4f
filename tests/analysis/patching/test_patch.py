"""Patching: every value is that of one plain forward pass, whatever the batch, the path and the lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers.models import hf_model, made
from helpers.pairwise import pairwise
from helpers.patching import CLOSE, EQUAL, PAIRS, TOKENIZER, logit_diff, one_site, swept
from helpers.tiers import loosely_typed, unit_first, unit_first_rows
from scipy.stats import t
from torch import Tensor
from transformer_lens import patching as tl_patching

from ctlens.analysis import Patching, patch
from ctlens.analysis.base.contrast import contrasts
from ctlens.analysis.patching import sweep as ours
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.alignment import opening
from ctlens.data.batch import EncodedPair, encode
from ctlens.data.pairs import Pair, prompt
from ctlens.data.token_kinds import TOKEN_KINDS, token_kinds
from ctlens.models.hooks import SHORTHANDS, run_capturing
from ctlens.models.loading import load_model

pytestmark = pytest.mark.boundary

KINDS = ("made here", "llama", "gpt2")
PATHS = ("suffix", "hooks")


@pytest.fixture(scope="module", params=unit_first(("made here", "gpt2")))
def model(request: pytest.FixtureRequest) -> LensModel:
    return made() if request.param == "made here" else load_model(hf_model(request.param), tokenizer=TOKENIZER)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to compute; the fast one is kept from all sites by taking it away."""
    if request.param == "hooks":
        monkeypatch.setattr(ours, "read_blocks", lambda *parts: None)
    return request.param


def replaced(model: LensModel, site: str, layer: int, new: Tensor) -> list[tuple[str, Callable[..., Any]]]:
    """Hooks that replace an activation as a whole; for `resid_mid` what the block makes of it, on every class alike."""
    name = SHORTHANDS[site].format(layer=layer)
    if site == "resid_mid":
        block = getattr(model, "blocks")[layer]  # noqa: B009 (models are typed by structure)
        name = SHORTHANDS["resid_post"].format(layer=layer)
        new = new + block.mlp(block.ln2(new))
    return [(name, lambda activation, hook: new)]


def plainly(model: LensModel, row: EncodedPair, site: str, layer: int) -> Iterator[float]:
    """Patch after patch, a forward pass each: heads, then positions."""
    name = SHORTHANDS[site].format(layer=layer)
    source = run_capturing(model, torch.tensor([row.clean.ids]), [name], grad=False)[1][name]
    target = run_capturing(model, torch.tensor([row.wrapped.ids]), [name], grad=False)[1][name]
    twins = list(zip(row.alignments["shared"].clean, row.alignments["shared"].wrapped, strict=True))
    keys = [(step, step) for step in range(min(opening(row.clean, row.wrapped), *twins[0]))] + twins
    for head in range(4 if site in ("z", "pattern") else 1):
        for here, there in twins:
            new = target.clone()
            if site == "z":
                new[0, there, head] = source[0, here, head]
            elif site == "pattern":
                new[0, head, there] = 0
                for key, twin in keys:
                    new[0, head, there, twin] = source[0, head, here, key]
            else:
                new[0, there] = source[0, here]
            with torch.no_grad():
                hooks = replaced(model, site, layer, new)
            yield logit_diff(model, row.wrapped.ids, hooks)


@pytest.mark.parametrize("model", unit_first(KINDS), indirect=True)
@pytest.mark.parametrize("site", SHORTHANDS)
def test_every_value_is_that_of_one_plain_forward_pass(model: LensModel, site: str, path: str):
    row = encode(PAIRS[:1], TOKENIZER, n_ctx=256).rows[0]
    found = swept(model, PAIRS, site)
    width = len(row.alignments["shared"].clean)
    for layer in range(2):
        values = found.values[0, layer, ..., -width:, 0].ravel()
        np.testing.assert_allclose(values, list(plainly(model, row, site, layer)), **CLOSE)
    assert found.target[0, 0] == pytest.approx(logit_diff(model, row.wrapped.ids, []), abs=1e-5)
    assert found.source[0, 0] == pytest.approx(logit_diff(model, row.clean.ids, []), abs=1e-5)
    assert np.abs(found.values[0] - found.target[0]).max(initial=0, where=~np.isnan(found.values[0])) > 1e-3


# A site, a kind of model and a way to compute are met in pairs; a value by all three is held to a plain pass above.
TWO_OF_SITE_MODEL_AND_PATH = pytest.mark.parametrize(
    ("site", "model", "path"), unit_first_rows(pairwise([*SHORTHANDS], KINDS, PATHS), 4), indirect=["model", "path"]
)
THEIRS = {
    ("resid_pre", "each"): tl_patching.get_act_patch_resid_pre,
    ("attn_out", "each"): tl_patching.get_act_patch_attn_out,
    ("mlp_out", "each"): tl_patching.get_act_patch_mlp_out,
    ("z", "each"): tl_patching.get_act_patch_attn_head_out_by_pos,
    ("z", "all"): tl_patching.get_act_patch_attn_head_out_all_pos,
}


@pytest.mark.parametrize(
    ("theirs", "model", "path"), unit_first_rows(pairwise([*THEIRS], KINDS, PATHS), 2), indirect=["model", "path"]
)
def test_values_are_those_of_transformer_lens(model: LensModel, theirs: tuple[str, str], path: str):
    (site, positions) = theirs
    sweep = cast(Any, THEIRS[theirs])
    row = encode([EQUAL], TOKENIZER, windows=(), n_ctx=256).rows[0]
    item = contrasts(model, [EQUAL])[0]
    names = [SHORTHANDS[site].format(layer=layer) for layer in range(2)]
    cache: Any = run_capturing(model, torch.tensor([row.clean.ids]), names, grad=False)[1]
    with torch.no_grad():
        expected = sweep(
            model,
            torch.tensor([row.wrapped.ids]),
            cache,
            lambda logits: logits[0, -1, item.good] - logits[0, -1, item.bad],
        ).numpy()
    expected = expected.swapaxes(1, 2) if expected.ndim == 3 else expected
    found = swept(model, [EQUAL], site, window="position", positions=positions, skip_unchanged=False)
    np.testing.assert_allclose(found.values[0, ..., 0].reshape(expected.shape), expected, **CLOSE)


@TWO_OF_SITE_MODEL_AND_PATH
def test_a_run_patched_with_itself_is_itself(model: LensModel, site: str, path: str):
    same = [Pair(pair.clean, pair.clean) for pair in PAIRS]
    found = swept(model, same, site, skip_unchanged=False, metrics=("logit_diff", "kl"))
    np.testing.assert_allclose(found.values, _spread(found), **CLOSE)
    skipped = swept(model, same, site)
    np.testing.assert_array_equal(skipped.values, _spread(skipped))


def _spread(found: Patching) -> np.ndarray:
    """The target's baselines in the shape of the values, NaN where these are."""
    shape = (len(found.metrics), *[1] * (found.values.ndim - 2), found.values.shape[-1])
    return np.where(np.isnan(found.values), np.nan, found.target.reshape(shape))


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post"])
def test_the_whole_stream_patched_is_the_source_run(model: LensModel, site: str, path: str):
    metrics = ("logit_diff", "probability", "kl")
    found = swept(model, [EQUAL], site, window="position", positions="all", metrics=metrics)
    assert abs(found.source[0, 0] - found.target[0, 0]) > 1e-2 and found.source[2, 0] == 0
    np.testing.assert_allclose(found.values[:, :, 0, 0], found.source.repeat(2, 1), **CLOSE)
    np.testing.assert_allclose(found.normalised("kl", smallest_gap=0.0)["value"], 1.0, atol=1e-3)


@pytest.mark.parametrize("site", ["attn_out", "z"])
def test_the_only_head_of_the_only_layer_is_the_source_run(site: str, path: str):
    model = made(n_layers=1, n_heads=1)
    found = swept(model, PAIRS, site, positions="last")
    np.testing.assert_allclose(found.values[0].reshape(-1), found.source[0], **CLOSE)
    assert np.abs(found.source - found.target).max() > 1e-3


@TWO_OF_SITE_MODEL_AND_PATH
def test_batch_mates_order_and_chunks_change_nothing(model: LensModel, site: str, path: str):
    options = {"direction": "noising", "metrics": ("logit_diff", "kl")}
    together = swept(model, PAIRS, site, **options)
    for other in (swept(model, PAIRS[::-1], site, **options), swept(model, PAIRS[::-1], site, max_batch=2, **options)):
        np.testing.assert_allclose(other.values[..., ::-1], together.values, **CLOSE)
        np.testing.assert_allclose(other.source[..., ::-1], together.source, **CLOSE)
    for index, pair in enumerate(PAIRS):
        alone = swept(model, [pair], site, **options)
        width = alone.values.shape[-2]
        np.testing.assert_allclose(together.values[..., -width:, index], alone.values[..., 0], **CLOSE)
        assert np.isnan(together.values[..., :-width, index]).all()


def test_a_span_is_all_its_tokens_at_once(model: LensModel, path: str):
    row = encode(PAIRS[1:2], TOKENIZER, n_ctx=256).rows[0]
    twins = list(zip(row.alignments["shared"].clean, row.alignments["shared"].wrapped, strict=True))
    name = "blocks.1.hook_attn_out"
    source = run_capturing(model, torch.tensor([row.clean.ids]), [name], grad=False)[1][name]
    target = run_capturing(model, torch.tensor([row.wrapped.ids]), [name], grad=False)[1][name]
    for positions, chosen in (("all", twins), ("content", twins[:-1]), ("last", twins[-1:])):
        new = target.clone()
        for here, there in chosen:
            new[0, there] = source[0, here]
        expected = logit_diff(model, row.wrapped.ids, replaced(model, "attn_out", 1, new))
        found = swept(model, PAIRS, "attn_out", positions=positions, layers="last")
        assert found.values.shape == (1, 1, 1, 3)
        np.testing.assert_allclose(found.values[0, 0, 0, 1], expected, **CLOSE)


@pytest.mark.parametrize("site", ["resid_pre", "mlp_out", "z", "pattern"])
def test_skipping_what_cannot_change_changes_nothing(model: LensModel, site: str, path: str):
    skipped = swept(model, [EQUAL], site, window="position", skip_unchanged=True)
    computed = swept(model, [EQUAL], site, window="position", skip_unchanged=False)
    np.testing.assert_allclose(skipped.values, computed.values, **CLOSE)
    assert (skipped.values[..., 0, 0] == skipped.target).all()  # the first token opens both prompts


def test_several_sites_in_one_sweep_are_a_sweep_each(model: LensModel, path: str):
    options: Any = {"direction": "noising", "metrics": ("logit_diff", "kl"), "progress": False}
    together = patch(model, PAIRS, site=[*SHORTHANDS][::-1], **options)
    assert list(together) == [*SHORTHANDS][::-1]
    assert list(patch(model, PAIRS, site=["z"], layers="last", **options)) == ["z"]  # a list stays by site
    for site, found in together.items():
        alone = patch(model, PAIRS, site=site, **options)
        np.testing.assert_allclose(found.values, alone.values, **CLOSE)
        assert (found.site, found.path, found.metrics, found.tokens) == (site, alone.path, alone.metrics, alone.tokens)
        np.testing.assert_allclose(found.source, alone.source, **CLOSE)


def test_full_hook_names_are_rows_of_the_sweep_of_their_site(model: LensModel, path: str):
    names = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z", "blocks.1.attn.hook_z", "mlp_post"]
    together = patch(model, PAIRS, site=names, direction="denoising", progress=False)
    assert list(together) == names
    for name, (site, layer) in zip(names[:3], [("resid_post", 1), ("z", 0), ("z", 1)], strict=True):
        whole = swept(model, PAIRS, site)
        assert (together[name].site, together[name].layers, together[name].path) == (site, (layer,), whole.path)
        np.testing.assert_allclose(together[name].values, whole.values[:, [layer]], **CLOSE)
        np.testing.assert_allclose(swept(model, PAIRS, name).values, together[name].values, **CLOSE)
    assert together["mlp_post"].layers == (0, 1)


@pytest.mark.parametrize(
    ("sites", "options", "message"),
    [
        ((), {}, "at least one site"),
        (("z", "z"), {}, "each once"),
        (("z", "blocks.1.attn.hook_z"), {"layers": [1]}, "each once"),
    ],
)
def test_no_sites_and_repeated_ones_are_refused(sites: tuple[str, ...], options: dict, message: str):
    with pytest.raises(CtlensError, match=message):
        patch(made(), PAIRS, site=sites, direction="denoising", **options)


@pytest.mark.parametrize("site", ["resid_post", "z"])
def test_noising_is_denoising_with_the_sides_exchanged(model: LensModel, site: str):
    turned = [Pair(pair.wrapped, pair.clean) for pair in [EQUAL]]
    there = swept(model, [EQUAL], site, window="position", direction="noising")
    back = swept(model, turned, site, window="position")
    assert (there.values == back.values).all() and (there.source == back.source).all()
    assert not np.allclose(there.values, swept(model, [EQUAL], site, window="position").values)


def test_some_layers_are_rows_of_all_of_them(model: LensModel, path: str):
    some = swept(model, PAIRS, "z", layers=[1])
    all_of_them = swept(model, PAIRS, "z", layers="all")
    assert some.layers == (1,)
    np.testing.assert_allclose(some.values, all_of_them.values[:, 1:], **CLOSE)


def test_answers_that_begin_alike_are_read_where_they_part(model: LensModel, path: str):
    pair = Pair(prompt("Is it?", "is right", "is that"), prompt("no. Is it?", "is right", "is that"))
    item = contrasts(model, [pair])[0]
    found = swept(model, [pair], "resid_post", layers="last", metrics=("logit_diff", _good_logit))
    with torch.no_grad():
        logits = model(torch.tensor([item.prompt]))[0, -1]
    assert found.target[:, 0] == pytest.approx([float(logits[item.good] - logits[item.bad]), float(logits[item.good])])
    np.testing.assert_allclose(found.values[:, 0, -1], found.source, **CLOSE)


def _good_logit(logits: Tensor, rows: Any) -> Tensor:
    return logits.gather(-1, rows.answers[:, :1])[:, 0]


def test_probability_and_divergence_are_those_of_the_softmax():
    model = made()
    found = swept(model, PAIRS[:1], "resid_post", metrics=("probability", "kl"))
    row = encode(PAIRS[:1], TOKENIZER, n_ctx=256).rows[0]
    item = contrasts(model, PAIRS[:1])[0]
    with torch.no_grad():
        clean = model(torch.tensor([row.clean.ids]))[0, -1].softmax(-1)
        wrapped = model(torch.tensor([row.wrapped.ids]))[0, -1].softmax(-1)
    kl = sum(p * float(np.log(p / q)) for p, q in zip(clean.tolist(), wrapped.tolist(), strict=True))
    assert found.target[:, 0] == pytest.approx([float(wrapped[item.good]), kl], rel=1e-4)
    assert found.source[:, 0] == pytest.approx([float(clean[item.good]), 0], abs=1e-6)


def test_a_share_is_the_ratio_of_the_means_over_the_pairs_that_have_the_position():
    found = one_site([[np.nan, 3.0], [1.0, 1.0]], target=[0.0, 1.0], source=[2.0, 5.0])
    table = found.normalised()
    assert table["value"].tolist() == [0.5, (1 + 0) / (2 + 4)]
    assert table["position"].tolist() == [-2, -1] and table["n_pairs"].tolist() == [1, 2]
    # 1 of 2 and 0 of 4: the two move the ratio by 2/9 each way; Student's factor of two pairs is 12.706
    assert table["ci_high"][1] - 1 / 6 == pytest.approx(12.7062 * 2 / 9, rel=1e-4)
    assert found.to_dataframe()["value"].tolist() == [3.0, 1.0]
    assert np.isnan(table["ci_low"][0])  # one pair has it


@pytest.mark.parametrize(
    ("result", "options", "message"),
    [
        (one_site([[1.0, 2.0]], [0.0, 0.0], [0.4, 0.5]), {}, "differs by 0.45 between"),
        (one_site([[1.0, 2.0]], [0.0, 0.0], [-4.0, 4.0]), {}, "differs by 0 between"),
        (one_site([[1.0]], [0.0], [9.0]), {"metric": "kl"}, "unknown measured metric 'kl'"),
        (one_site([[1.0]], [0.0], [9.0], metrics=("mine",)), {}, "smallest_gap"),
    ],
)
def test_shares_of_no_gap_are_refused(result: Patching, options: dict, message: str):
    with pytest.raises(CtlensError, match=message):
        result.normalised(**options)


def test_the_top_cells_have_intervals_that_hold_for_all_cells_at_once():
    found = one_site([[9.0, np.nan, np.nan], [1.0, 2.0, 3.0], [-3.0, -4.0, -5.0]], [0.0] * 3, [9.0] * 3)
    table = found.top(2)
    alone = found.to_dataframe()

    assert table["position"].tolist() == [-3, -1] and table["value"].tolist() == [9.0, -4.0]
    assert set(table["cells"]) == {3} and np.isnan(table["ci_low"][0]) and not table["differs"][0]
    reach = t.ppf(1 - 0.025 / 3, 2) * 1 / 3**0.5  # deviation 1, three pairs, three cells
    assert (table["ci_low"][1], table["ci_high"][1]) == pytest.approx((-4 - reach, -4 + reach))
    assert alone["ci_high"][2] < 0 < table["ci_high"][1]  # clear alone, but not as the largest of three
    with pytest.raises(CtlensError, match="unknown measured metric 'kl'"):
        found.top(metric="kl")


def test_pairs_without_a_gap_at_a_position_have_no_share_there():
    found = one_site([[1.0, np.nan], [1.0, 1.0]], target=[0.0, 0.0], source=[0.1, 9.0])
    assert np.isnan(found.normalised()["value"][0]) and not np.isnan(found.normalised()["value"][1])


def test_results_round_trip_and_draw(tmp_path):
    for site, shape in (("resid_pre", (2, 7)), ("z", (8, 7))):
        found = swept(made(), PAIRS, site)
        found.save(tmp_path / "patching.safetensors")
        assert Patching.load(tmp_path / "patching.safetensors").to_dataframe().equals(found.to_dataframe())
        drawn = found.figure()
        grid = np.array(drawn.data[0].z, float)
        assert grid.shape == (shape[0], len(found.tokens))
        assert len(drawn.layout.xaxis.ticktext) == len(drawn.layout.xaxis.tickvals) == len(found.tokens)
        table = found.to_dataframe()
        n = (~np.isnan(found.values[0])).sum(-1)
        np.testing.assert_array_equal(table["n_pairs"], n.ravel())
        change = np.nansum(found.values[0] - found.target[0], -1) / n
        np.testing.assert_allclose(grid, change.reshape(grid.shape), atol=1e-6)
    span = swept(made(), PAIRS, "pattern", positions="content")
    assert np.shape(span.figure().data[0].z) == (2, 4)
    assert set(span.to_dataframe()["position"]) == {"content"}


def test_tokens_are_named_where_all_pairs_agree():
    found = swept(made(), [EQUAL, EQUAL], "resid_pre", window="position")
    row = encode([EQUAL], TOKENIZER, windows=(), n_ctx=256).rows[0]
    assert found.tokens == tuple(TOKENIZER.decode([token]) for token in row.wrapped.ids)
    mixed = swept(made(), PAIRS, "resid_pre")
    assert mixed.tokens[-1] and "" in mixed.tokens
    together = swept(made(), PAIRS, "resid_pre", positions="content")
    assert together.tokens == together.kinds == ("",)


@loosely_typed
def test_sweeps_to_compare_with_go_by_label() -> None:
    effect = swept(made(), PAIRS, "resid_pre", layers=[0], positions="last")
    with pytest.raises(CtlensError, match="go by their labels: give a dictionary"):
        effect.compare(cast(Any, [effect]), label="attack")


@pytest.mark.parametrize(("direction", "side"), [("denoising", "wrapped"), ("noising", "clean")])
def test_columns_have_the_kind_of_the_patched_runs_tokens(direction: str, side: str):
    found = swept(made(), [EQUAL], "resid_pre", window="position", direction=direction)
    row = encode([EQUAL], TOKENIZER, windows=(), n_ctx=256).rows[0]
    assert found.kinds == dict(zip(("clean", "wrapped"), token_kinds(row.clean, row.wrapped), strict=True))[side]
    mixed = swept(made(), PAIRS, "resid_pre", direction=direction)
    assert mixed.kinds[-1] == "assistant header" and set(mixed.kinds) <= {*TOKEN_KINDS, ""}


def test_sweeps_are_drawn_on_one_scale_and_only_where_they_patch_the_same():
    effect = swept(made(), PAIRS, "resid_pre")
    null = replace(effect, values=effect.target[0] + (effect.values - effect.target[0]) / 100)
    figure = effect.compare({"null": null}, label="attack")
    grids = [np.array(trace.z, float) for trace in figure.data[:2]]
    np.testing.assert_allclose(grids[1], grids[0] / 100, atol=1e-6)
    assert figure.layout.coloraxis.cmax == pytest.approx(np.nanmax(np.abs(grids[0])))
    for other in (
        swept(made(), PAIRS, "resid_mid"),
        swept(made(), PAIRS, "resid_pre", direction="noising"),
        swept(made(), PAIRS, "resid_pre", layers=[0]),
        swept(made(), PAIRS, "resid_pre", positions="last"),
        replace(effect, window="content"),
    ):
        with pytest.raises(CtlensError, match="sweep 'null' has another site"):
            effect.compare({"null": other}, label="attack")
    with pytest.raises(CtlensError, match="two results are called 'null'"):
        effect.compare({"null": null}, label="null")
    told = figure.layout.meta["subtitle"]
    assert "each token by itself" in told and "first order" not in told
    assert "logit_diff, to first order" in replace(effect, path="gradient").figure().layout.meta["subtitle"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "hook_z"}, "unknown site"),
        ({"site": "blocks.1.hook_z"}, "did you mean 'blocks.1.attn.hook_z'"),
        ({"site": "blocks.2.attn.hook_z"}, "layer 2 does not exist"),
        ({"site": "blocks.1.attn.hook_z", "layers": [0]}, "stands in layer 1, and the layers are"),
        ({"direction": "backwards"}, "unknown direction"),
        ({"positions": "first"}, "unknown choice of positions"),
        ({"positions": "wrapper"}, "no twin in the clean prompt"),
        ({"window": "answer"}, "unknown alignment window"),
        ({"window": "position"}, "as many on both sides"),
        ({"window": "explicit"}, "none of the 3 pairs aligns"),
        ({"metrics": ("accuracy",)}, "unknown metric"),
        ({"metrics": ()}, "no metrics"),
        ({"metrics": ("kl", "kl")}, "two metrics"),
        ({"metrics": (lambda logits, rows: logits,)}, "one number per row"),
        ({"max_batch": 0}, "at least 1"),
        ({"layers": [2]}, "layer 2 does not exist"),
    ],
)
def test_what_cannot_be_had_is_refused(options: dict, message: str):
    with pytest.raises(CtlensError, match=message):
        swept(made(), PAIRS, **{"site": "z"} | options)


def test_pairs_without_answers_and_models_in_training_are_refused():
    with pytest.raises(CtlensError, match="names no good and bad answer"):
        swept(made(), [Pair(prompt("a?"), prompt("no. a?"))], "z")
    training = made()
    training.train()
    with pytest.raises(CtlensError, match="eval mode"):
        swept(training, PAIRS, "z")
