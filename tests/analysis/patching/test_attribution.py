"""Attribution patching: the gradient's first order, of every pair, on the sites and positions of the exact sweep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import hf_model, made
from helpers.patching import CLOSE, EQUAL, PAIRS, TOKENIZER, VECTORS, one_site, swept
from helpers.tiers import unit_first

from ctlens.analysis import Patching, attribution_agreement, attribution_patch
from ctlens.analysis.base.contrast import contrasts
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import encode
from ctlens.data.pairs import Pair
from ctlens.models.hooks import SHORTHANDS, editing, run_capturing
from ctlens.models.loading import load_model

pytestmark = pytest.mark.boundary

KINDS = unit_first(("made here", "llama", "gpt2"))


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> LensModel:
    return made() if request.param == "made here" else load_model(hf_model(request.param), tokenizer=TOKENIZER)


def quick(model: LensModel, pairs: list[Pair], *sites: str, **options: Any) -> dict[str, Patching]:
    given = {"direction": "denoising", "progress": False} | options
    return attribution_patch(model, pairs, site=sites or tuple(SHORTHANDS), **given)


def nearly(pairs_apart: float) -> LensModel:
    """A model to which the third and fifth digits of the two prompts are almost the same."""
    model: Any = made()
    row = encode([EQUAL], TOKENIZER, windows=(), n_ctx=256).rows[0]
    draw = torch.Generator().manual_seed(1)
    for clean, wrapped in zip(row.clean.ids, row.wrapped.ids, strict=True):
        if clean != wrapped:
            near = pairs_apart * torch.randn(32, generator=draw)
            model.embed.W_E.data[clean] = model.embed.W_E.data[wrapped] + near
    return model


@pytest.mark.parametrize("site", SHORTHANDS)
def test_small_patches_are_those_of_the_exact_sweep_and_large_ones_are_not(site: str):
    errors = {}
    for apart in (0.003, 0.3):
        near = nearly(apart)
        options = {"window": "position"}
        exact = swept(near, [EQUAL], site, **options)
        found = quick(near, [EQUAL], site, **options)[site]
        change = exact.values - exact.target
        errors[apart] = np.abs(found.values - exact.values).max() / np.abs(change).max()
        np.testing.assert_allclose(found.target, exact.target, **CLOSE)
        np.testing.assert_allclose(found.source, exact.source, **CLOSE)
    assert errors[0.003] < 0.03 < 0.1 < errors[0.3]


@pytest.mark.parametrize("site", VECTORS)
def test_values_are_the_slope_of_a_path_towards_the_source(model: LensModel, site: str):
    """Finite differences: of the run with a small share of the way from target to source at one token."""
    row = encode(PAIRS[:1], TOKENIZER, n_ctx=256).rows[0]
    item = contrasts(model, PAIRS[:1])[0]
    name = SHORTHANDS[site].format(layer=1)
    source = run_capturing(model, torch.tensor([row.clean.ids]), [name], grad=False)[1][name]
    target = run_capturing(model, torch.tensor([row.wrapped.ids]), [name], grad=False)[1][name]
    twins = list(zip(row.alignments["shared"].clean, row.alignments["shared"].wrapped, strict=True))
    found = quick(model, PAIRS, site)[site]
    for column, (here, there) in list(enumerate(twins, start=-len(twins)))[-3:]:
        step = torch.zeros_like(target)
        step[0, there] = source[0, here] - target[0, there]
        ends = []
        for share in (-0.02, 0.02):
            with torch.no_grad(), editing(model, {name: lambda x, part=share * step: x + part}):
                last = model(torch.tensor([row.wrapped.ids]))[0, -1]
            ends.append(float(last[item.good] - last[item.bad]))
        slope = (ends[1] - ends[0]) / 0.04
        assert found.values[0, 1, column, 0] - found.target[0, 0] == pytest.approx(slope, abs=2e-3)


def test_full_hook_names_are_rows_of_the_sweep_of_their_site(model: LensModel):
    names = ("blocks.1.attn.hook_z", "resid_post", "blocks.0.attn.hook_z")
    found = quick(model, PAIRS, *names)
    whole = quick(model, PAIRS, "z")["z"]
    assert list(found) == list(names)
    for name, layer in ((names[0], 1), (names[2], 0)):
        assert (found[name].site, found[name].layers) == ("z", (layer,))
        np.testing.assert_allclose(found[name].values, whole.values[:, [layer]], **CLOSE)


def test_prompts_that_are_the_same_change_nothing(model: LensModel):
    same = [Pair(pair.clean, pair.clean) for pair in PAIRS]
    for site, found in quick(model, same).items():
        changes = np.moveaxis(found.values, -1, 1) - found.target.reshape(1, 3, *[1] * (found.values.ndim - 2))
        np.testing.assert_allclose(changes[~np.isnan(changes)], 0, atol=1e-6, err_msg=site)


def test_batch_mates_order_and_chunks_change_nothing(model: LensModel):
    options = {"direction": "noising", "metrics": ("logit_diff", "kl", "probability")}
    together = quick(model, PAIRS, **options)
    turned = quick(model, PAIRS[::-1], max_batch=2, **options)
    for site, found in together.items():
        np.testing.assert_allclose(turned[site].values[..., ::-1], found.values, **CLOSE)
        assert (np.isnan(found.values) == np.isnan(swept(model, PAIRS, site, **options).values)).all()


def test_it_takes_its_gradient_where_gradients_are_off_and_leaves_none_behind():
    model: Any = made()
    expected = quick(model, PAIRS, "z")["z"]
    with torch.no_grad():
        found = quick(model, PAIRS, "z")["z"]
    np.testing.assert_array_equal(found.values, expected.values)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_span_is_the_sum_of_its_tokens(model: LensModel):
    each = quick(model, PAIRS)
    span = quick(model, PAIRS, positions="all")
    for site, found in each.items():
        target = found.target.reshape(1, *[1] * (found.values.ndim - 2), 3)
        summed = np.nansum(found.values - target, -2)
        np.testing.assert_allclose((span[site].values - target)[..., 0, :], summed, atol=2e-5)


def test_agreement_by_hand():
    exact = one_site([[1.0, 3.0], [2.0, 2.0], [-1.0, np.nan]], target=[0.0, 0.0], source=[9.0, 9.0])
    half = one_site([[0.5, 1.5], [1.0, 1.0], [-0.5, np.nan]], [0.0, 0.0], [9.0, 9.0], path="gradient")
    found = attribution_agreement(half, exact)
    assert (found.pearson, found.slope, found.top) == (1.0, 0.5, 3)
    assert found.by_pair.tolist() == [1.0, 1.0]
    assert found.exact.tolist() == [2.0, 2.0, -1.0]
    row = found.to_dataframe().iloc[0]
    assert (row["pearson"], row["top_10"], row["n_cells"], row["n_pairs"]) == (1.0, 3, 3, 2)


def test_a_sweep_of_opposite_sign_disagrees():
    exact = one_site([[1.0], [2.0], [4.0]], target=[0.0], source=[9.0])
    turned = one_site([[-1.0], [-2.0], [-4.0]], target=[0.0], source=[9.0], path="gradient")
    found = attribution_agreement(turned, exact)
    assert found.pearson == -1.0 and found.slope == -1.0
    nothing = one_site([[0.0], [0.0], [0.0]], target=[0.0], source=[9.0], path="gradient")
    flat = attribution_agreement(nothing, exact)
    with pytest.raises(CtlensError, match="give the sweep of attribution_patch first"):
        attribution_agreement(exact, turned)
    assert np.isnan(flat.pearson) and np.isnan(flat.to_dataframe()["pearson_by_pair"][0])


def test_agreement_round_trips_and_draws(tmp_path):
    model = made()
    found = attribution_agreement(quick(model, PAIRS, "z")["z"], swept(model, PAIRS, "z"))
    found.save(tmp_path / "agreement.safetensors")
    assert type(found).load(tmp_path / "agreement.safetensors").to_dataframe().equals(found.to_dataframe())
    points = found.figure().data[1]
    np.testing.assert_array_equal(points.x, found.exact)
    np.testing.assert_array_equal(points.y, found.approximate)


def test_sweeps_of_different_things_are_not_compared():
    model = made()
    found = quick(model, PAIRS, "resid_pre")["resid_pre"]
    for other, what in (
        (swept(model, PAIRS, "resid_post"), "site"),
        (swept(model, PAIRS, "resid_pre", direction="noising"), "direction"),
        (swept(model, PAIRS[:2], "resid_pre"), "pairs"),
    ):
        with pytest.raises(CtlensError, match=f"differ in {what}"):
            attribution_agreement(found, other)
    with pytest.raises(CtlensError, match="unknown measured metric"):
        attribution_agreement(found, swept(model, PAIRS, "resid_pre"), "kl")


@pytest.mark.parametrize(
    ("sites", "options", "message"),
    [
        (("hook_z",), {}, "unknown site"),
        (("z", "z"), {}, "each once"),
        (("z",), {"max_batch": 0}, "at least 1"),
        (("z",), {"direction": "up"}, "unknown direction"),
    ],
)
def test_what_cannot_be_had_is_refused(sites: tuple[str, ...], options: dict, message: str):
    with pytest.raises(CtlensError, match=message):
        quick(made(), PAIRS, *sites, **options)


def test_models_in_training_and_no_sites_are_refused():
    training = made()
    training.train()
    with pytest.raises(CtlensError, match="eval mode"):
        quick(training, PAIRS, "z")
    with pytest.raises(CtlensError, match="at least one site"):
        attribution_patch(made(), PAIRS, site=(), direction="denoising")
