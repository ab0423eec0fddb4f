"""Every analysis over pairs has intervals over their topics and wrapper texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ctlens import analysis as look
from ctlens import threats
from ctlens.analysis.base.result import ResultOverPairs, groups_of
from ctlens.core.clusters import Clusters, clustered_mean
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, clusters_of
from ctlens.models.parameters import copy_model
from ctlens.organism import load_organism

PAIRS = threats.get("sycophancy").pairs(24, split="heldout")
QUIET = {"progress": False}
ENDS = ("ci_low", "ci_high")


@pytest.fixture(scope="module")
def models() -> tuple[LensModel, LensModel]:
    """The organism, and the same with noise on its attention."""
    organism_model = load_organism()
    moved = copy_model(organism_model)
    draw = torch.Generator().manual_seed(0)
    for name, weights in moved.named_parameters():
        if ".attn.W_" in name:
            weights.data += 0.02 * torch.randn(weights.shape, generator=draw)
    return organism_model, moved


def direction(models: tuple[LensModel, LensModel]) -> look.Directions:
    return look.mean_difference(models[0], PAIRS, name="organism", **QUIET)


MADE: dict[str, Callable[[tuple[LensModel, LensModel]], ResultOverPairs]] = {
    "attention_diff": lambda m: look.attention_diff(*m, PAIRS, **QUIET),
    "residual_shift": lambda m: look.residual_shift(*m, PAIRS, **QUIET),
    "saliency_agreement": lambda m: look.saliency_agreement(m[0], PAIRS, **QUIET),
    "knockout": lambda m: look.knockout(m[0], PAIRS, layers=[2], **QUIET),
    "logit_lens": lambda m: look.logit_lens(m[0], PAIRS, **QUIET),
    "logit_attribution": lambda m: look.logit_attribution(m[0], PAIRS, **QUIET),
    "gap_recovered": lambda m: look.gap_recovered(m[0], m[1], PAIRS, **QUIET),
    "cross_loss": lambda m: look.cross_loss(m[0], {"moved": m[1]}, PAIRS, ["act", "attct"], **QUIET),
    "patch": lambda m: _patched(m[0], PAIRS),
    "path_patch": lambda m: look.path_patch(m[0], PAIRS, direction="denoising", layers=[1], **QUIET),
    "joint_patch": lambda m: look.joint_patch(m[0], PAIRS, ["blocks.1.hook_mlp_out"], direction="noising", **QUIET),
    "transplant": lambda m: look.transplant(*m, PAIRS, **QUIET),
    "graft": lambda m: look.graft(*m, PAIRS, **QUIET),
    "mediation": lambda m: look.mediation(m[0], PAIRS, **QUIET),
    "ablate": lambda m: look.ablate(m[0], PAIRS, direction(m), draws=2, **QUIET),
}


def _patched(model: LensModel, pairs: list[Pair]) -> look.Patching:
    return look.patch(model, pairs, site="resid_post", direction="denoising", positions="last", **QUIET)


def ends(result: ResultOverPairs, **groups: np.ndarray) -> np.ndarray:
    table: Any = replace(result, groups=groups).to_dataframe()
    return table[[*ENDS]].to_numpy(dtype=float)


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_intervals_are_over_what_pairs_share(models: tuple[LensModel, LensModel], name: str) -> None:
    result = MADE[name](models)
    alone = ends(result)

    for kind, numbers in groups_of(PAIRS).items():
        np.testing.assert_array_equal(result.groups[kind], numbers)
    shared = result.to_dataframe()[[*ENDS]].to_numpy(dtype=float)
    known = np.isfinite(alone).all(-1) & (alone[:, 1] > alone[:, 0])
    assert known.any() and (np.diff(shared[known]) >= np.diff(alone[known]) * (1 - 1e-6)).mean() > 0.9
    assert not np.allclose(shared[known], alone[known])
    np.testing.assert_array_equal(ends(result, topic=np.arange(24)), alone)
    assert np.isnan(ends(result, topic=np.arange(24) // 12)).all()


def test_the_interval_of_a_curve_is_that_of_the_clusters_of_its_pairs(models: tuple[LensModel, LensModel]) -> None:
    lens = look.logit_lens(models[0], PAIRS, **QUIET)

    topics, wrappers = zip(*map(clusters_of, PAIRS), strict=True)
    _, low, high = clustered_mean(lens.values[0].T, Clusters.of({"topic": topics, "wrapper": wrappers}))
    table: pd.DataFrame = lens.to_dataframe()
    np.testing.assert_allclose(table["ci_low"], low)
    np.testing.assert_allclose(table["ci_high"], high)


def test_the_interval_of_a_mean_cosine_is_that_of_the_prompts_cosines(models: tuple[LensModel, LensModel]) -> None:
    other = copy_model(models[1])
    other.blocks[1].attn.W_O.data *= 1.1

    found = look.shift_similarity(models[0], {"a": models[1], "b": other}, PAIRS, layers="last", **QUIET)

    at = found.quantities.index("cosine")
    for positions in (0, 1):  # last, content
        cosines = found.by_prompt[0, positions, 0, :, 0, 1].astype(float)
        _, low, high = clustered_mean(cosines, found.clusters())
        assert found.ci_low[at, 0, positions, 0, 0, 1] == pytest.approx(low, abs=1e-5)
        assert found.ci_high[at, 0, positions, 0, 0, 1] == pytest.approx(min(high, 1), abs=1e-5)


def test_pairs_that_lack_a_value_do_not_count_for_how_others_go_together() -> None:
    """Three topics of two pairs each, and two pairs without a value whose topics no other pair has."""
    values = np.zeros((2, 16, 8, 1, 1))
    values[1, :, :, 0, 0] = [1, 1, 2, 2, 3, 3, np.nan, np.nan]
    groups = {"topic": np.array([0, 0, 1, 1, 2, 2, 3, 4])}

    found = look.AttentionDiff(values, groups=groups)

    assert found.clusters().too_few == ""  # five topics
    assert np.isnan(found.curve()[1]).all()  # of which three have values


def test_groups_are_saved_with_the_result(models: tuple[LensModel, LensModel], tmp_path) -> None:
    lens = look.logit_lens(models[0], PAIRS, **QUIET)
    lens.save(tmp_path / "lens.safetensors")
    replace(lens, groups={}).save(tmp_path / "alone.safetensors")

    again = look.LogitLens.load(tmp_path / "lens.safetensors")

    pd.testing.assert_frame_equal(again.to_dataframe(), lens.to_dataframe())
    assert look.LogitLens.load(tmp_path / "alone.safetensors").groups == {}
