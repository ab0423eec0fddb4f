"""Confidence intervals, all from scipy and all at 95 percent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from ctlens.core.errors import CtlensError

LEVEL = 0.95
ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
RESAMPLES = 999  # not tuned; with 999, the 25th and the 975th value end a 95 percent interval
_GROUPS = 10  # of the jackknife; chosen by eye

Interval = tuple[float, float]


def wilson(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Computes the Wilson score interval of a proportion; it has a width even at 0 and 1.

    >>> low, high = wilson(0, 96)
    >>> round(low, 3), round(high, 3)
    (0.0, 0.038)

    Raises:
        CtlensError: `n` is zero.
    """
    if n < 1:
        raise CtlensError(f"an interval of a rate needs at least one answer, not {n}: ask more prompts.")
    return wilson_of_share(successes / n, n, level)


def wilson_rate(flags: Bool[np.ndarray, " item"]) -> tuple[float, int, float, float]:
    """Computes the share of independent flags that are set: share, number of flags, ends of Wilson's interval."""
    n = len(flags)
    return float(flags.mean()), n, *wilson(int(flags.sum()), n)


def wilson_of_share(share: float, n: float, level: float = LEVEL) -> Interval:
    """Computes the Wilson score interval of a share of `n` items, which need not be a whole number; NaN for NaN."""
    if np.isnan(n):
        return float("nan"), float("nan")
    z = float(stats.norm.ppf((1 + level) / 2))
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return float(max(centre - reach, 0.0)), float(min(centre + reach, 1.0))


def student(values: Float[np.ndarray, " item"], level: float = LEVEL) -> Interval:
    """Computes Student's t-interval of a mean; both its ends are NaN for fewer than two items.

    >>> low, high = student(np.arange(10.0))
    >>> round(low, 3), round(high, 3)
    (2.334, 6.666)
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    reach = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - reach), float(values.mean() + reach)


def difference(share: float, ends: Interval, other: float, other_ends: Interval) -> Interval:
    """Computes the interval of a difference of two independent proportions (Newcombe's hybrid score, 1998, method 10).

    Args:
        share, other: the proportions.
        ends, other_ends: their Wilson intervals.

    >>> low, high = difference(56 / 70, wilson(56, 70), 48 / 80, wilson(48, 80))  # Newcombe's table II, (a)
    >>> round(low, 4), round(high, 4)
    (0.0524, 0.3339)
    """
    below = np.hypot(share - ends[0], other_ends[1] - other)
    above = np.hypot(ends[1] - share, other - other_ends[0])
    return float(share - other - below), float(share - other + above)


def bootstrap(statistics: Callable[[Int[np.ndarray, " n"]], Sequence[float]], n: int, seed: int = 0) -> list[Interval]:
    """Computes the percentile bootstrap interval of several statistics, given as one function of item numbers.

    A resample in which a statistic is NaN does not count for it. If more than one resample in twenty is NaN,
    too few items carry the statistic, and both ends of its interval are NaN.
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
    """Computes the mean over items with its percentile bootstrap interval: mean, low, high.

    Raises:
        CtlensError: there are no items.
    """
    if not len(values):
        raise CtlensError("a mean of no values was asked for: give at least one.")
    mean = values.mean(0)
    if len(values) == 1:
        return mean, mean, mean
    low, high = np.quantile(resampled_means(values, seed), ENDS, axis=0)
    return mean, low, high


def resampled_means(values: Float[np.ndarray, "item ..."], seed: int = 0) -> Float[np.ndarray, "resample ..."]:
    """Computes the mean over items in each bootstrap resample, for intervals of values computed from means."""
    return np.tensordot(_counts(len(values), seed) / len(values), values, axes=1)


def _counts(n: int, seed: int) -> Int[np.ndarray, "resample n"]:
    """Counts how often each resample draws each item."""
    numbered = _resamples(n, seed) + n * np.arange(RESAMPLES)[:, None]
    return np.bincount(numbered.ravel(), minlength=n * RESAMPLES).reshape(RESAMPLES, n)


def jackknife(
    statistic: Callable[[Int[np.ndarray, " n"]], Float[np.ndarray, ...]], n: int, seed: int = 0
) -> tuple[Float[np.ndarray, ...], Float[np.ndarray, ...]]:
    """Computes the jackknife interval of a statistic that the bootstrap's repeated items would bias.

    Each of ten random groups of items is left out once. The interval is the value plus and minus the
    delete-a-group standard error times Student's t; its ends are NaN where the statistic is.

    >>> low, high = jackknife(lambda items: np.arange(10.0)[items].mean(), 10)  # t-interval of the mean of 0 to 9
    >>> round(float(low), 3), round(float(high), 3)
    (2.334, 6.666)

    Raises:
        CtlensError: there are fewer than two items.
    """
    if n < 2:
        raise CtlensError(f"a jackknife interval needs at least two pairs, not {n}: give more pairs.")
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
    """Computes means over items with intervals that all hold at once at 95 percent: mean, low, high.

    Every interval reaches the same number of its standard errors to both sides: the 95 percent quantile of the
    largest studentised deviation (the max-t bootstrap of Romano and Wolf, 2005). For correlated quantities
    it is narrower than with Bonferroni's correction.

    Raises:
        CtlensError: there are fewer than two items.
    """
    if len(values) < 2:
        raise CtlensError(f"simultaneous intervals need at least two pairs, not {len(values)}: give more pairs.")
    n = len(values)
    mean = values.mean(0)
    counts = _counts(n, seed) / n
    deviations = (values - mean).reshape(n, -1)
    drawn = counts @ deviations
    errors = ((counts @ deviations**2 - drawn**2).clip(min=0) / (n - 1)) ** 0.5
    # A quantity without spread has no studentised deviation: below 1e-12, which is rounding, it counts as 0.
    largest = np.divide(np.abs(drawn), errors, out=np.zeros_like(drawn), where=errors > 1e-12).max(-1)
    width = np.quantile(largest, LEVEL) * values.std(0, ddof=1) / n**0.5
    return mean, mean - width, mean + width
