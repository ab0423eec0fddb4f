"""Nulls that several analyses share: random directions, their band, and the warning about a null that stood still."""

from __future__ import annotations

import numpy as np
import pytest

from ctlens.analysis.base.nulls import WEAK_NULL, hardly_moved, random_band, random_directions


@pytest.mark.parametrize("share", [WEAK_NULL, 1.0, np.inf, np.nan])
def test_a_null_that_moved_enough_or_has_no_share_is_not_warned_of(share: float) -> None:
    assert hardly_moved("retention", share, "floor") == ""


def test_a_null_that_stood_still_is_called_weak() -> None:
    assert hardly_moved("retention", 0.0, "control") == (
        "; retention hardly moved (under 0.1% of the others): a weak control"
    )


def test_the_band_is_of_means_over_pairs_not_of_pairs() -> None:
    effects = np.array([[[-9.0, 9.0], [1.0, 3.0], [0.0, 2.0]]])  # [model, draw, pair]

    low, high = random_band(effects)

    assert low.tolist() == [0.0] and high.tolist() == [2.0]


def test_random_directions_are_unit_vectors_and_the_same_in_every_call() -> None:
    drawn = random_directions(5, 4, 2)

    assert drawn.shape == (4, 2, 5)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=-1), 1)
    np.testing.assert_array_equal(drawn, random_directions(5, 4, 2))
