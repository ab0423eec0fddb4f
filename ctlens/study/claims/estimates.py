"""A number with its interval: over organisms where a study has enough, else over topics, wrapper texts and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ctlens.core.clusters import clustered_statistic
from ctlens.core.stats import Interval, student
from ctlens.study.analyses import Training
from ctlens.study.claims.statistic import Items, Statistic, whole
from ctlens.study.results import SEVERAL


@dataclass(frozen=True)
class ClaimEstimate:
    """A number, the ends of its 95 percent interval, and what the interval is over.

    Attributes:
        value, low, high: NaN where not measured.
        n: how many prompts or organisms there are.
        over: `"prompts"`, `"prompts and seeds"` or `"organisms"`; prompts by their topics and wrapper texts.
    """

    value: float
    low: float
    high: float
    n: int
    over: str


PROMPTS = "prompts"
SEEDS = "prompts and seeds"
ORGANISMS = "organisms"
NOTHING = ClaimEstimate(float("nan"), float("nan"), float("nan"), 0, PROMPTS)


def claim_estimate(statistics: Mapping[Training, Statistic]) -> ClaimEstimate:
    """Computes the mean over trainings with its interval; trainings whose number is not defined do not count.

    Seeds of one organism say nothing about another organism. So with `SEVERAL` organisms or more, the interval is
    Student's over the organisms' means. With fewer it is over the topics and wrapper texts of these very models,
    see `ctlens.core.clusters`. With `SEVERAL` trainings or more of too few organisms it spans Student's interval
    over the trainings as well, because prompts and seeds vary each in their own way.

    Args:
        statistics: of each training, over the same prompts.

    >>> from ctlens.study.claims.statistic import of_prompts
    >>> ramp = np.array([0.0, 1.0, 2.0, 3.0])
    >>> found = claim_estimate({(0, 0): of_prompts("ramp", "", ramp, np.mean)})
    >>> found.value, found.n, found.over
    (1.5, 4, 'prompts')
    >>> claim_estimate({(0, seed): of_prompts("constant", "", np.full(4, float(seed)), np.mean) for seed in range(3)})
    ClaimEstimate(value=1.0, low=-1.484..., high=3.484..., n=4, over='prompts and seeds')
    """
    values = {training: whole(statistic) for training, statistic in statistics.items()}
    values = {training: value for training, value in values.items() if not np.isnan(value)}
    if not values:
        return NOTHING
    means = by_organism(values)
    value = float(means.mean())
    if len(means) >= SEVERAL:
        return ClaimEstimate(value, *student(means), len(means), ORGANISMS)
    known = [statistics[training] for training in values]
    n = min(statistic.n for statistic in known)

    def mean(items: Items) -> list[float]:
        return [float(np.mean([statistic.of(items) for statistic in known]))]

    ((low, high),) = clustered_statistic(mean, n, known[0].clusters)
    if len(values) < SEVERAL:
        return ClaimEstimate(value, low, high, n, PROMPTS)
    ends = student(np.array(list(values.values())))
    return ClaimEstimate(value, *_both((low, high), ends), n, SEEDS)


def spanned(
    value: float, ends: tuple[float, float], n: int, trainings: Mapping[Training, float], level: float
) -> ClaimEstimate:
    """Makes the estimate of a number whose interval in one training is known, from one number per training.

    The rule is that of `claim_estimate`: over organisms where there are `SEVERAL`, else the known interval,
    widened to Student's over the trainings where there are `SEVERAL` of those.

    Args:
        value, ends, n: the number, its interval, and how many prompts there are.
        trainings: the number of each training.
        level: of confidence.
    """
    means = by_organism(trainings)
    if len(means) >= SEVERAL:
        return ClaimEstimate(float(means.mean()), *student(means, level), len(means), ORGANISMS)
    if len(trainings) < SEVERAL:
        return ClaimEstimate(value, *ends, n, PROMPTS)
    others = student(np.array(list(trainings.values())), level)
    return ClaimEstimate(value, *_both(ends, others), n, SEEDS)


def _both(one: Interval, other: Interval) -> Interval:
    """The interval that spans two; none where one has too few clusters to be known."""
    return float(np.minimum(one[0], other[0])), float(np.maximum(one[1], other[1]))


def by_organism(values: Mapping[Training, float]) -> Float[np.ndarray, " organism"]:
    """The mean over the trainings of each organism."""
    organisms = sorted({organism for organism, _ in values})
    return np.array([np.mean([v for (number, _), v in values.items() if number == one]) for one in organisms])
