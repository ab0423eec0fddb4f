"""Intervals against hand values and against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from ctlens.core.errors import CtlensError
from ctlens.core.stats import difference, wilson, wilson_of_share


@pytest.mark.parametrize(("successes", "n"), [(7, 20), (0, 96), (96, 96), (1, 1)])
def test_wilsons_interval_is_scipys_also_of_a_share(successes: int, n: int) -> None:
    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")

    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson_of_share(successes / n, n) == wilson(successes, n)


def test_a_share_of_fewer_items_is_less_certain() -> None:
    assert all(wilson_of_share(0.0, n)[0] == 0.0 and wilson_of_share(1.0, n)[1] == 1.0 for n in range(1, 200))
    low, high = wilson_of_share(0.25, 96)
    lower, higher = wilson_of_share(0.25, 40.5)

    assert lower < low < 0.25 < high < higher
    assert np.isnan(wilson_of_share(0.25, float("nan"))).all()


def of_counts(successes: int, n: int, others: int, other_n: int) -> tuple[float, float]:
    return difference(successes / n, wilson(successes, n), others / other_n, wilson(others, other_n))


def test_the_difference_of_equal_rates_holds_zero_and_turns_its_sign() -> None:
    low, high = of_counts(10, 40, 30, 40)

    assert high < 0
    assert of_counts(30, 40, 10, 40) == pytest.approx((-high, -low))
    assert of_counts(0, 50, 0, 50)[0] < 0 < of_counts(0, 50, 0, 50)[1]


def test_nothing_has_no_interval() -> None:
    with pytest.raises(CtlensError, match="needs at least one answer, not 0: ask more prompts"):
        wilson(0, 0)
