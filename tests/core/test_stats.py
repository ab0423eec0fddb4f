"""Intervals against hand values and against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from ctlens.core.errors import CtlensError
from ctlens.core.stats import bootstrap, bootstrap_mean, difference, jackknife, wilson, wilson_of_share


@pytest.mark.parametrize(("successes", "n"), [(7, 20), (0, 96), (96, 96), (1, 1)])
def test_wilsons_interval_is_scipys_also_of_a_share(successes: int, n: int) -> None:
    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")

    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson_of_share(successes / n, n) == wilson(successes, n)


def test_a_share_of_fewer_items_is_less_certain() -> None:
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


def test_the_bootstrap_mean_covers_the_true_mean_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    samples = draw.normal(3.0, 2.0, size=(200, 40))

    hits = [low <= 3.0 <= high for _, low, high in (bootstrap_mean(sample) for sample in samples)]

    assert 0.88 <= np.mean(hits) <= 0.99


def test_the_bootstrap_mean_keeps_the_other_axes() -> None:
    values = np.arange(24.0).reshape(4, 3, 2)

    mean, low, high = bootstrap_mean(values)

    np.testing.assert_allclose(mean, values.mean(0))
    assert low.shape == (3, 2) and (low < mean).all() and (mean < high).all()


def test_the_bootstrap_of_a_statistic_agrees_with_the_one_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(size=60)

    ((low, high), fixed) = bootstrap(lambda items: [float(values[items].mean()), 2.0], 60)

    _, expected_low, expected_high = bootstrap_mean(values)
    assert (low, high) == pytest.approx((expected_low, expected_high), abs=0.05)
    assert fixed == (2.0, 2.0)


@pytest.mark.parametrize(("holders", "known"), [(1, False), (10, True)])
def test_a_statistic_that_few_items_carry_has_no_interval(holders: int, known: bool) -> None:
    """Without one item 37% of the resamples lack it, without ten 0.001%."""
    values = np.where(np.arange(20) < holders, 1.0, np.nan)

    ((low, high),) = bootstrap(lambda items: [_mean_of_known(values[items])], 20)

    assert (low, high) == (1.0, 1.0) if known else np.isnan([low, high]).all()


def _mean_of_known(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def test_nothing_has_no_interval() -> None:
    with pytest.raises(CtlensError, match="needs at least one answer, not 0: ask more prompts"):
        wilson(0, 0)
    with pytest.raises(CtlensError, match="a mean of no values was asked for: give at least one"):
        bootstrap_mean(np.empty((0, 2)))


def test_one_item_has_an_interval_without_width() -> None:
    assert bootstrap(lambda items: [float(items.sum())], 1) == [(0.0, 0.0)]
    assert [float(v) for v in bootstrap_mean(np.array([2.0]))] == [2.0, 2.0, 2.0]


def test_a_jackknife_of_a_mean_is_its_t_interval() -> None:
    """With one item per group, the standard error of the mean of 1, 2, 4 and 9 is `sqrt(38 / 3) / 2`; t is 3.182."""
    values = np.array([1.0, 2.0, 4.0, 9.0])

    low, high = jackknife(lambda items: np.array([values[items].mean(), 7.0]), 4)

    reach = 3.182446 * (38 / 3) ** 0.5 / 2
    assert low == pytest.approx([4 - reach, 7]) and high == pytest.approx([4 + reach, 7])


def test_the_mean_of_two_values_has_an_interval_and_that_of_one_has_none() -> None:
    mean, low, high = bootstrap_mean(np.array([0.0, 1.0]))

    assert (mean, low, high) == (0.5, 0, 1)
    assert bootstrap_mean(np.array([3.0])) == (3, 3, 3)
