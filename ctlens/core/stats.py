"""Confidence intervals, all from scipy and all at 95 percent."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import stats

from ctlens.core.errors import CtlensError

LEVEL = 0.95
ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
RESAMPLES = 999  # not tuned; with 999, the 25th and the 975th value end a 95 percent interval

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


def wilson_of_share(share: float, n: float, level: float = LEVEL) -> Interval:
    """Computes the Wilson score interval of a share of `n` items, which need not be a whole number; NaN for NaN."""
    if np.isnan(n):
        return float("nan"), float("nan")
    z = float(stats.norm.ppf((1 + level) / 2))
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low = 0.0 if share == 0 else max(centre - reach, 0.0)  # exactly, and not up to rounding
    high = 1.0 if share == 1 else min(centre + reach, 1.0)
    return float(low), float(high)


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


def binomial_above(successes: int, n: int, share: float) -> float:
    """Computes how likely so many successes or more are at a known share: the p value of a one-sided binomial test.

    >>> binomial_above(2, 2, 0.5), binomial_above(0, 9, 0.1)
    (0.25, 1.0)
    """
    return float(stats.binomtest(successes, n, share, alternative="greater").pvalue)


def over_models(
    values: Float[np.ndarray, " model"],
    low: Float[np.ndarray, " model"],
    high: Float[np.ndarray, " model"],
    level: float = LEVEL,
) -> Interval:
    """Computes the interval of a mean over models, each of whose numbers has an interval over the same prompts.

    What is special about the prompts does not average out over models: it is taken to move all of them alike, as far as
    their intervals reach on average, which is cautious. Models differ as well, as far as Student's interval reaches.
    Both vary each in its own way, so each side is the root of the sum of their squares (Zou and Donner, 2008).

    Args:
        values: of each model.
        low, high: the ends of each one's interval, at 95 percent.
        level: of confidence of the interval that is made.

    >>> low, high = over_models(np.arange(10.0), np.arange(10.0) - 3, np.arange(10.0))
    >>> round(low, 3), round(high, 3)  # Student's reach of 2.166, with 3 below and nothing above
    (0.8, 6.666)
    """
    value = float(values.mean())
    ends = student(values, level)
    wider = float(stats.norm.ppf((1 + level) / 2) / stats.norm.ppf((1 + LEVEL) / 2))
    below = np.hypot(value - ends[0], wider * (values - low).mean())
    above = np.hypot(ends[1] - value, wider * (high - values).mean())
    return float(value - below), float(value + above)


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
