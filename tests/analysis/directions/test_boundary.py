"""One direction at the assistant boundary: exact on the planted model, whose repair is one direction or none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import planted

from ctlens.analysis import BoundaryDirection, boundary_direction
from ctlens.analysis.base.nulls import random_from_covariance
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.models.parameters import copy_model, fingerprint
from ctlens.models.weights import canonical_weights, load_weights

PAIRS = planted.pairs()[::2]  # each asked one way, and the other way held out
HELDOUT = planted.pairs()[1::2]
CUE = -1.9  # the mean push of the cues
QUIET: dict[str, Any] = {"layers": [1, 2], "progress": False}


pytestmark = pytest.mark.boundary


@pytest.fixture(scope="module")
def base() -> LensModel:
    return planted.model("base")


@pytest.fixture(scope="module")
def erased() -> LensModel:
    return planted.model("erased")


@pytest.fixture(scope="module")
def found(base: LensModel, erased: LensModel) -> BoundaryDirection:
    return boundary_direction(base, {"erased": erased}, PAIRS, HELDOUT, draws=5, **QUIET)


def test_the_direction_gives_and_takes_what_was_planted(found: BoundaryDirection) -> None:
    gives = [planted.margin(pair, planted.written(pair) - CUE) for pair in HELDOUT]  # the mean cue is taken back
    takes = [planted.margin(pair, CUE) for pair in HELDOUT]  # the mean cue comes back

    for layer in range(2):
        np.testing.assert_allclose(found.logit_diffs[0, 0, layer, 0], gives, atol=2e-3)
        np.testing.assert_allclose(found.logit_diffs[0, 1, layer, 0], takes, atol=2e-3)
    np.testing.assert_allclose(found.norms, abs(CUE), rtol=1e-4)
    plain = [[planted.margin(pair, planted.written(pair)), planted.margin(pair, 0)] for pair in HELDOUT]
    np.testing.assert_allclose(found.plain_logit_diffs, np.transpose(plain), atol=2e-3)


def test_a_share_is_the_ratio_of_the_mean_changes(found: BoundaryDirection) -> None:
    base, trained = found.plain_p_bad
    table = found.to_dataframe().set_index(["edit", "metric", "layer"])

    for edit, moved in (("gives", found.p_bad[0, 0] - base), ("takes", trained - found.p_bad[0, 1])):
        for number, layer in enumerate((1, 2)):
            row: Any = table.loc[(edit, "p_bad", layer)]
            means = moved[number].mean(-1) / (trained - base).mean()
            assert row["share"] == pytest.approx(means[0])
            assert (row["isotropic_low"], row["isotropic_high"]) == pytest.approx((means[1:6].min(), means[1:6].max()))
            assert (row["covariance_low"], row["covariance_high"]) == pytest.approx((means[6:].min(), means[6:].max()))
            assert row["gap"] == pytest.approx((trained - base).mean()) and row["n_pairs"] == len(HELDOUT)


def test_one_direction_is_the_whole_repair_and_random_ones_are_not(found: BoundaryDirection) -> None:
    table: Any = found.to_dataframe()

    assert table["beyond_random"].all() and len(table) == 8
    np.testing.assert_allclose(table["share"], 1, atol=0.05)
    assert found.variants == ("direction", *["isotropic"] * 5, *["covariance"] * 5)


def test_a_repair_in_the_read_out_has_no_direction(base: LensModel) -> None:
    with pytest.raises(CtlensError, match="the direction at layer 1 has no length"):
        boundary_direction(base, {"masked": planted.model("masked")}, PAIRS, HELDOUT, draws=2, **QUIET)


def test_a_direction_that_is_not_read_gives_nothing(base: LensModel) -> None:
    """The other way round: what was "trained" writes another direction as well, which nothing reads."""
    both = copy_model(base)
    weights = canonical_weights(base)
    for name, value in weights.items():
        if name.endswith("W_O"):
            weights[name] = value + (value @ planted.DIRECTION)[..., None] * planted.OTHER
    load_weights(both, weights)
    table: Any = boundary_direction(base, {"both": both}, PAIRS, HELDOUT, draws=5, **QUIET).to_dataframe()

    assert not table["beyond_random"].any()
    logit_diffs: Any = table.query("metric == 'logit_diff'")
    assert (logit_diffs["gap"].abs() < 3).all()  # a longer state makes the norm weigh both answers less


def test_pairs_in_another_order_and_alone_give_equal_answers(base, erased, found: BoundaryDirection) -> None:
    options = {"draws": 5, **QUIET}
    reordered = boundary_direction(base, {"erased": erased}, PAIRS[::-1], HELDOUT[::-1], batch_size=7, **options)

    np.testing.assert_allclose(reordered.logit_diffs[..., ::-1], found.logit_diffs, atol=1e-3)
    np.testing.assert_allclose(reordered.p_bad[..., ::-1], found.p_bad, atol=1e-3)


def test_the_models_are_left_as_they_are(base: LensModel, erased: LensModel) -> None:
    before = [fingerprint(base), fingerprint(erased)]
    boundary_direction(base, {"erased": erased}, PAIRS, HELDOUT, draws=2, **QUIET)

    assert [fingerprint(base), fingerprint(erased)] == before and not (base.training or erased.training)


def test_directions_from_a_covariance_have_it() -> None:
    states = np.random.default_rng(0).normal(size=(1, 400, 3)) * [5.0, 1.0, 0.0]
    drawn = random_from_covariance(states, 2000, seed=1)[:, 0]

    np.testing.assert_allclose(np.linalg.norm(drawn, axis=-1), 1)
    np.testing.assert_allclose(drawn[:, 2], 0, atol=1e-6)  # where nothing varies, none points
    ratio = np.median(abs(drawn[:, 0])) / np.median(abs(drawn[:, 1]))
    angles = np.random.default_rng(2).normal(size=(2000, 2)) * [5.0, 1.0]
    angles /= np.linalg.norm(angles, axis=-1, keepdims=True)
    assert ratio == pytest.approx(np.median(abs(angles[:, 0])) / np.median(abs(angles[:, 1])), rel=0.15)
    np.testing.assert_allclose(drawn, random_from_covariance(states[:, ::-1], 2000, seed=1)[:, 0], atol=1e-6)


def test_the_result_survives_saving_and_its_figure_holds_its_numbers(found: BoundaryDirection, tmp_path) -> None:
    found.save(tmp_path / "boundary.safetensors")
    table = BoundaryDirection.load(tmp_path / "boundary.safetensors").to_dataframe()

    assert table.equals(found.to_dataframe())
    figure: Any = found.figure("takes", "p_bad")
    drawn = next(trace for trace in figure.data if trace.name == "the direction")
    np.testing.assert_allclose(drawn.y, table.query("edit == 'takes' and metric == 'p_bad'")["share"])


def test_what_does_not_fit_is_refused(base: LensModel, erased: LensModel, found: BoundaryDirection) -> None:
    with pytest.raises(CtlensError, match="18 of 18 held-out prompts are fitted on: give pairs of another split"):
        boundary_direction(base, {"erased": erased}, PAIRS, PAIRS, **QUIET)
    with pytest.raises(CtlensError, match="by a label other than 'base'"):
        boundary_direction(base, {"base": erased}, PAIRS, HELDOUT, **QUIET)
    with pytest.raises(CtlensError, match="eval mode"):
        boundary_direction(base, {"erased": copy_model(erased).train()}, PAIRS, HELDOUT, **QUIET)
    with pytest.raises(CtlensError, match="at least 2 random directions, not 1"):
        boundary_direction(base, {"erased": erased}, PAIRS, HELDOUT, draws=1, **QUIET)
    with pytest.raises(CtlensError, match="did you mean 'takes'"):
        found.figure("take")
    with pytest.raises(CtlensError, match="unknown metric"):
        found.figure("takes", "rate")
