"""Confidence intervals, all from scipy and all at 95 percent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from ctlens.core.errors import CtlensError

LEVEL = 0.95
ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
RESAMPLES = 999
_GROUPS = 10

Interval = tuple[float, float]


def wilson(successes: int, n: int, level: float = LEVEL) -> Interval:
    """The Wilson score interval of a proportion at a level of confidence; never empty, also at 0 and 1.

    >>> low, high = wilson(0, 96)
    >>> round(low, 3), round(high, 3)
    (0.0, 0.038)

    Raises:
        CtlensError: `n` is zero.
    """
    if n < 1:
        raise CtlensError("an interval of a rate needs at least one item.")
    interval = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def student(values: Float[np.ndarray, " item"], level: float = LEVEL) -> Interval:
    """Student's t-interval of a mean at a level of confidence; of one item both its ends are NaN.

    >>> low, high = student(np.arange(10.0))
    >>> round(low, 3), round(high, 3)
    (2.334, 6.666)
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    reach = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - reach), float(values.mean() + reach)


def difference(successes: int, n: int, other_successes: int, other_n: int, *, level: float = LEVEL) -> Interval:
    """The interval of a difference of two independent proportions (Newcombe's hybrid score, 1998, method 10).

    >>> low, high = difference(56, 70, 48, 80)  # Newcombe's table II, example (a): 0.0524 to 0.3339
    >>> round(low, 4), round(high, 4)
    (0.0524, 0.3339)
    """
    p, q = successes / n, other_successes / other_n
    (low, high), (other_low, other_high) = wilson(successes, n, level), wilson(other_successes, other_n, level)
    below = np.hypot(p - low, other_high - q)
    above = np.hypot(high - p, q - other_low)
    return float(p - q - below), float(p - q + above)


def bootstrap(statistics: Callable[[Int[np.ndarray, " n"]], Sequence[float]], n: int, seed: int = 0) -> list[Interval]:
    """The percentile bootstrap interval of each of several statistics, given as one function of item numbers.

    A resample in which a statistic is NaN does not count for it. Where that is more than one in
    twenty, too few items carry the statistic for an interval, and both its ends are NaN.
    """
    values = np.array([statistics(items) for items in _resamples(n, seed)], dtype=float)
    return [_percentiles(column) for column in values.T]


def _resamples(n: int, seed: int) -> Int[np.ndarray, "resample n"]:
    return np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))


def _percentiles(values: Float[np.ndarray, " resample"]) -> Interval:
    defined = values[~np.isnan(values)]
    if len(defined) < LEVEL * len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, ENDS)
    return float(low), float(high)


def bootstrap_mean(
    values: Float[np.ndarray, "item ..."], seed: int = 0
) -> tuple[Float[np.ndarray, ...], Float[np.ndarray, ...], Float[np.ndarray, ...]]:
    """The mean over items with its percentile bootstrap interval: mean, low, high.

    Raises:
        CtlensError: there are no items.
    """
    if not len(values):
        raise CtlensError("a mean needs at least one item.")
    mean = values.mean(0)
    if len(values) == 1:
        return mean, mean, mean
    low, high = np.quantile(resampled_means(values, seed), ENDS, axis=0)
    return mean, low, high


def resampled_means(values: Float[np.ndarray, "item ..."], seed: int = 0) -> Float[np.ndarray, "resample ..."]:
    """The mean over items in each bootstrap resample, for the interval of what is computed from a mean."""
    draw = _resamples(len(values), seed)
    counts = np.stack([np.bincount(row, minlength=len(values)) for row in draw]) / len(values)
    return np.tensordot(counts, values, axes=1)


def jackknife(
    statistic: Callable[[Int[np.ndarray, " n"]], Float[np.ndarray, ...]], n: int, seed: int = 0
) -> tuple[Float[np.ndarray, ...], Float[np.ndarray, ...]]:
    """The interval of a statistic that a repeated item would bias: each of ten random groups is left out once.

    Normal, from the delete-a-group standard error and Student's t; NaN where the statistic is.

    >>> low, high = jackknife(lambda items: np.arange(10.0)[items].mean(), 10)  # t-interval of the mean of 0 to 9
    >>> round(float(low), 3), round(float(high), 3)
    (2.334, 6.666)

    Raises:
        CtlensError: there are fewer than two items.
    """
    if n < 2:
        raise CtlensError("a jackknife interval needs at least two items.")
    items = np.random.default_rng(seed).permutation(n)
    groups = np.array_split(items, min(_GROUPS, n))
    left = np.stack([statistic(np.sort(np.setdiff1d(items, group))) for group in groups])
    error = np.sqrt((len(groups) - 1) * left.var(0))
    reach = stats.t.ppf(ENDS[1], len(groups) - 1) * error
    value = statistic(np.arange(n))
    return value - reach, value + reach


def simultaneous_mean(
    values: Float[np.ndarray, "item ..."], seed: int = 0
) -> tuple[Float[np.ndarray, ...], Float[np.ndarray, ...], Float[np.ndarray, ...]]:
    """Means over items with intervals that hold for all of them at once at 95 percent: mean, low, high.

    Each interval is as many of its standard errors wide as the largest of all studentised
    deviations takes (the max-t bootstrap of Romano and Wolf, 2005), so that correlated quantities
    cost less than Bonferroni's correction.

    Raises:
        CtlensError: there are fewer than two items.
    """
    if len(values) < 2:
        raise CtlensError("intervals that hold at once need at least two items.")
    n = len(values)
    mean = values.mean(0)
    draw = _resamples(len(values), seed)
    counts = np.stack([np.bincount(row, minlength=n) for row in draw]) / n
    deviations = (values - mean).reshape(n, -1)
    drawn = counts @ deviations
    errors = ((counts @ deviations**2 - drawn**2).clip(min=0) / (n - 1)) ** 0.5
    largest = np.divide(np.abs(drawn), errors, out=np.zeros_like(drawn), where=errors > 1e-12).max(-1)
    width = np.quantile(largest, LEVEL) * values.std(0, ddof=1) / n**0.5
    return mean, mean - width, mean + width
