"""A number with the interval that what was measured supports: over organisms, or over prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Int

from ctlens.core.stats import bootstrap, student
from ctlens.study.looks import Training
from ctlens.study.results import SEVERAL

Items: TypeAlias = Int[np.ndarray, " item"]
OfItems: TypeAlias = Callable[[Items], float]


@dataclass(frozen=True)
class Sample:
    """A number of one training, as a function of which of its prompts count, repeats allowed.

    Attributes:
        n: how many prompts there are.
        value: the number of some of them, NaN where it is not defined.
    """

    n: int
    value: OfItems

    def whole(self) -> float:
        """The number of all prompts."""
        return float(self.value(np.arange(self.n)))


@dataclass(frozen=True)
class Estimate:
    """A number, the ends of its 95 percent interval, and what the interval is over.

    Attributes:
        value, low, high: NaN where not measured.
        n: how many of `over` there are.
        over: `"prompts"`, `"prompts and seeds"` or `"organisms"`.
    """

    value: float
    low: float
    high: float
    n: int
    over: str


PROMPTS, SEEDS, ORGANISMS = "prompts", "prompts and seeds", "organisms"
NOTHING = Estimate(float("nan"), float("nan"), float("nan"), 0, PROMPTS)


def estimate(samples: Mapping[Training, Sample]) -> Estimate:
    """The mean over trainings with its interval; trainings whose number is not defined do not count.

    Seeds of one organism say nothing of another one. So only from `SEVERAL` organisms on, the interval is
    Student's over the organisms' means. With fewer it is a bootstrap over prompts, for these very
    models, whose trainings share their resamples; and where there are as many trainings it spans
    Student's interval over them too, for neither stands for the other.

    >>> pairs = np.array([0.0, 1.0, 2.0, 3.0])
    >>> found = estimate({(0, 0): Sample(4, lambda items: pairs[items].mean())})
    >>> found.value, found.n, found.over
    (1.5, 4, 'prompts')
    >>> estimate({(0, seed): Sample(4, lambda items, seed=seed: float(seed)) for seed in range(3)})
    Estimate(value=1.0, low=-1.484..., high=3.484..., n=4, over='prompts and seeds')
    """
    values = {training: sample.whole() for training, sample in samples.items()}
    values = {training: value for training, value in values.items() if not np.isnan(value)}
    if not values:
        return NOTHING
    means = by_organism(values)
    value = float(means.mean())
    if len(means) >= SEVERAL:
        return Estimate(value, *student(means), len(means), ORGANISMS)
    known = [samples[training] for training in values]
    n = min(sample.n for sample in known)
    ((low, high),) = bootstrap(lambda items: [float(np.mean([sample.value(items) for sample in known]))], n)
    if len(values) < SEVERAL:
        return Estimate(value, low, high, n, PROMPTS)
    ends = student(np.array(list(values.values())))
    return Estimate(value, min(low, ends[0]), max(high, ends[1]), n, SEEDS)


def spanned(
    value: float, ends: tuple[float, float], n: int, trainings: Mapping[Training, float], level: float
) -> Estimate:
    """As `estimate`, where the interval over prompts is known and each training has one number.

    Args:
        value, ends, n: the number, its interval over prompts, and how many prompts there are.
        trainings: the number of each training.
        level: of confidence.
    """
    means = by_organism(trainings)
    if len(means) >= SEVERAL:
        return Estimate(float(means.mean()), *student(means, level), len(means), ORGANISMS)
    if len(trainings) < SEVERAL:
        return Estimate(value, *ends, n, PROMPTS)
    others = student(np.array(list(trainings.values())), level)
    return Estimate(value, min(ends[0], others[0]), max(ends[1], others[1]), n, SEEDS)


def by_organism(values: Mapping[Training, float]) -> Float[np.ndarray, " organism"]:
    """The mean over the trainings of each organism."""
    organisms = sorted({organism for organism, _ in values})
    return np.array([np.mean([v for (number, _), v in values.items() if number == one]) for one in organisms])
