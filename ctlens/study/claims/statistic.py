"""The statistic of a claim: a number of one training, with a name and a unit, that any choice of prompts has.

Intervals come from resampled prompts, so a number has to be known for every choice of prompts and not only for all.
Two functions build one: `of_prompts` from an array with a row per prompt, `of_parts` from other statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from ctlens.core.clusters import Clusters

Items: TypeAlias = Int[np.ndarray, " item"]
"""The indices of the prompts that count, repeats allowed."""
PromptValues: TypeAlias = Float[np.ndarray, "prompt ..."]


class Statistic(Protocol):
    """A number of one training, as a function of which of its prompts count."""

    @property
    def name(self) -> str:
        """The number in words."""
        ...

    @property
    def unit(self) -> str:
        """The unit of the number."""
        ...

    @property
    def n(self) -> int:
        """The number of prompts."""
        ...

    @property
    def clusters(self) -> Clusters | None:
        """Which of the prompts go together; None where none do."""
        ...

    def of(self, items: Items) -> float:
        """Computes the number of some of the prompts; NaN where it is not defined."""
        ...


def whole(statistic: Statistic) -> float:
    """Computes the number of all prompts."""
    return float(statistic.of(np.arange(statistic.n)))


def of_prompts(
    name: str,
    unit: str,
    values: PromptValues,
    number: Callable[[PromptValues], float],
    clusters: Clusters | None = None,
) -> Statistic:
    """Builds a statistic from the measurements of every prompt.

    Args:
        name, unit: of the number.
        values: a row per prompt.
        number: the number, given the rows of the prompts that count.
        clusters: which prompts go together; None where none do.

    >>> mean = of_prompts("the mean", "logits", np.array([0.0, 1.0, 5.0]), np.mean)
    >>> whole(mean), mean.of(np.array([0, 1])), mean.n
    (2.0, 0.5, 3)
    """
    return _OfPrompts(name, unit, values, number, clusters)


def of_parts(
    name: str, unit: str, parts: Sequence[Statistic], number: Callable[[Mapping[str, float]], float]
) -> Statistic:
    """Builds a statistic from others of the same prompts.

    Args:
        name, unit: of the number.
        parts: at least one, with different names.
        number: the number, given that of every part by its name.

    >>> act = of_prompts("act", "", np.array([0.0, 1.0]), np.mean)
    >>> bct = of_prompts("bct", "", np.array([0.0, 4.0]), np.mean)
    >>> whole(of_parts("BCT less ACT", "", [act, bct], lambda of: of["bct"] - of["act"]))
    1.5
    """
    return _OfParts(name, unit, tuple(parts), number)


@dataclass(frozen=True)
class _OfPrompts:
    name: str
    unit: str
    values: PromptValues
    number: Callable[[PromptValues], float]
    clusters: Clusters | None

    @property
    def n(self) -> int:
        return len(self.values)

    def of(self, items: Items) -> float:
        return float(self.number(self.values[items]))


@dataclass(frozen=True)
class _OfParts:
    name: str
    unit: str
    parts: tuple[Statistic, ...]
    number: Callable[[Mapping[str, float]], float]

    @property
    def n(self) -> int:
        return self.parts[0].n

    @property
    def clusters(self) -> Clusters | None:
        return self.parts[0].clusters

    def of(self, items: Items) -> float:
        return float(self.number({part.name: part.of(items) for part in self.parts}))
