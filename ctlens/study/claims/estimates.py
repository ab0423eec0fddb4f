"""A number with its interval over topics, wrapper texts and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ctlens.core.clusters import clustered_statistic
from ctlens.core.stats import LEVEL, Interval, student, wilson
from ctlens.study.claims.statistic import Items, Statistic, whole
from ctlens.study.results import SEVERAL


@dataclass(frozen=True)
class ClaimEstimate:
    """A number, the ends of its 95 percent interval, and what the interval is over.

    Attributes:
        value, low, high: NaN where not measured.
        prompts_low, prompts_high: the ends of the interval over prompts alone, which all seeds share.
        n: how many prompts there are.
        over: `"prompts"` or `"prompts and seeds"`; prompts by their topics and wrapper texts.
    """

    value: float
    low: float
    high: float
    prompts_low: float
    prompts_high: float
    n: int
    over: str

    def less(self, number: float) -> ClaimEstimate:
        """The estimate of the number less a known one."""
        return replace(
            self,
            value=self.value - number,
            low=self.low - number,
            high=self.high - number,
            prompts_low=self.prompts_low - number,
            prompts_high=self.prompts_high - number,
        )

    def turned(self) -> ClaimEstimate:
        """The estimate of minus the number."""
        return replace(
            self,
            value=-self.value,
            low=-self.high,
            high=-self.low,
            prompts_low=-self.prompts_high,
            prompts_high=-self.prompts_low,
        )


PROMPTS = "prompts"
SEEDS = "prompts and seeds"
_NAN = float("nan")
NOTHING = ClaimEstimate(_NAN, _NAN, _NAN, _NAN, _NAN, 0, PROMPTS)


def claim_estimate(statistics: Mapping[int, Statistic]) -> ClaimEstimate:
    """Computes the mean over trainings with its interval; trainings whose number is not defined do not count.

    The interval is over the topics and wrapper texts of these very models, see `ctlens.core.clusters`. With `SEVERAL`
    trainings or more it spans Student's interval over the trainings as well, because prompts and seeds vary each in
    their own way. About other models it says nothing: that takes several studies, see `ctlens.study.replication`.

    Args:
        statistics: by the seed of the training, over the same prompts.

    >>> from ctlens.study.claims.statistic import of_prompts
    >>> ramp = np.array([0.0, 1.0, 2.0, 3.0])
    >>> found = claim_estimate({0: of_prompts("ramp", "", ramp, np.mean)})
    >>> found.value, found.n, found.over
    (1.5, 4, 'prompts')
    >>> found = claim_estimate({n: of_prompts("constant", "", np.full(4, float(n)), np.mean) for n in range(3)})
    >>> found.value, round(found.low, 3), found.prompts_low, found.over
    (1.0, -1.484, 1.0, 'prompts and seeds')
    """
    values = {seed: whole(statistic) for seed, statistic in statistics.items()}
    values = {seed: value for seed, value in values.items() if not np.isnan(value)}
    if not values:
        return NOTHING
    known = [statistics[seed] for seed in values]

    def mean(items: Items) -> list[float]:
        return [float(np.mean([statistic.of(items) for statistic in known]))]

    n = min(statistic.n for statistic in known)
    ((low, high),) = clustered_statistic(mean, n, known[0].clusters)
    return spanned(float(np.mean(list(values.values()))), (low, high), n, values, LEVEL)


def with_width(found: ClaimEstimate) -> ClaimEstimate:
    """Gives the estimate of a difference of rates a width where all answers were alike: Wilson's, at a rate of 0.

    >>> found = with_width(ClaimEstimate(0.0, 0.0, 0.0, 0.0, 0.0, 96, PROMPTS))
    >>> round(found.low, 3), round(found.high, 3)
    (-0.038, 0.038)
    """
    if not found.n or found.low != found.high:
        return found
    reach = wilson(0, found.n)[1]
    low = found.value - reach
    high = found.value + reach
    return replace(found, low=low, high=high, prompts_low=low, prompts_high=high)


def spanned(
    value: float, ends: tuple[float, float], n: int, trainings: Mapping[int, float], level: float
) -> ClaimEstimate:
    """Makes the estimate of a number whose interval over prompts is known, from one number per training.

    With `SEVERAL` trainings or more the interval is widened to Student's over them.

    Args:
        value, ends, n: the number, its interval, and how many prompts there are.
        trainings: the number of each training, by seed.
        level: of confidence.
    """
    if len(trainings) < SEVERAL:
        return ClaimEstimate(value, *ends, *ends, n, PROMPTS)
    others = student(np.array(list(trainings.values())), level)
    return ClaimEstimate(value, *_both(ends, others), *ends, n, SEEDS)


def _both(one: Interval, other: Interval) -> Interval:
    """The interval that spans two; none where one has too few clusters to be known."""
    return float(np.minimum(one[0], other[0])), float(np.maximum(one[1], other[1]))
