"""Intervals of numbers whose items go together, because they are about one topic or stand under one wrapper text.

The prompts of a threat are a grid of a few topics and wrapper texts. Two prompts about one topic tell less than two
about different ones, so an interval that takes prompts as independent is too narrow; `benchmarks/coverage.py` measures
how often it holds the truth, and how often ours does. Here the variance is that of two-way clusters (Cameron, Gelbach
and Miller, 2011), with Satterthwaite's degrees of freedom for the few clusters that there are, and never less than that
of independent items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, stats

from ctlens.core.stats import LEVEL, RESAMPLES, Interval, wilson_of_share

FEWEST_CLUSTERS = 5
"""With fewer clusters of a kind there is no interval: how much they differ cannot be known from so few."""
WithInterval: TypeAlias = tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."], Float[np.ndarray, "..."]]
"""Numbers, and the lower and the upper ends of their intervals."""
_ROUNDING = 1e-9
_NO_INTERVAL = (float("nan"), float("nan"))


class Spread(NamedTuple):
    """How uncertain a number is: its variance, that of as many independent items, and the degrees of freedom."""

    variance: Float[np.ndarray, ...]
    independent: Float[np.ndarray, ...]
    freedom: Float[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class Clusters:
    """The clusters of some items, of each kind: which items share a topic, and which a wrapper text.

    Attributes:
        kinds: the names of the kinds that group the items, for example `("topic", "wrapper")`.
        numbers: the number of each item's cluster, a row per kind.

    >>> grid = Clusters.of({"topic": ["mira", "mira", "dintis"], "wrapper": ["bet", "hint", "bet"]})
    >>> len(grid), grid.too_few
    (3, '2 topics and 2 wrappers')
    """

    kinds: tuple[str, ...]
    numbers: Int[np.ndarray, "kind item"]

    @staticmethod
    def of(labels: Mapping[str, Sequence[str]]) -> Clusters:
        """Makes the clusters from the labels of the items, by kind.

        A kind groups nothing where every item has a label of its own, and says nothing of others where all share one:
        then a number is of that topic or wrapper. Such kinds are left out.
        """
        numbers = {kind: np.unique(list(given), return_inverse=True)[1] for kind, given in labels.items()}
        known = {kind: row for kind, row in numbers.items() if 1 < len(set(row.tolist())) < len(row)}
        n = max(map(len, labels.values()), default=0)
        return Clusters(tuple(known), np.array([*known.values()], dtype=int).reshape(len(known), n))

    def __len__(self) -> int:
        return self.numbers.shape[1]

    def take(self, chosen: Int[np.ndarray, " chosen"] | Bool[np.ndarray, " item"]) -> Clusters:
        """Takes the clusters of some items, chosen by number or by a mask."""
        return Clusters(self.kinds, self.numbers[:, chosen])

    @staticmethod
    def alone(n: int) -> Clusters:
        """Makes the clusters of items of which none go together."""
        return Clusters((), np.zeros((0, n), dtype=int))

    @property
    def too_few(self) -> str:
        """The kinds that have too few clusters for an interval, in words; empty where there are enough of each."""
        counts = {kind: len(set(row.tolist())) for kind, row in zip(self.kinds, self.numbers, strict=True)}
        return " and ".join(f"{n} {kind}s" for kind, n in counts.items() if n < FEWEST_CLUSTERS)

    def resamples(self, seed: int = 0) -> Int[np.ndarray, "resample item"]:
        """Draws how often each item counts in each resample of `pigeonhole`, without resamples that have no item."""
        drawn = pigeonhole([*self.numbers] or [np.arange(len(self))], seed)
        return drawn[drawn.any(-1)]

    def spread(self, influence: Float[np.ndarray, "item ..."]) -> Spread:
        """Computes the spread of a number from how much each item moves it.

        Args:
            influence: of each item, as of a mean its deviation from the mean; they sum to 0.
        """
        n = len(influence)
        if n < 2:
            nothing = np.full(influence.shape[1:], np.nan)
            return Spread(nothing, nothing, nothing)
        moved = influence.reshape(n, -1) / n
        independent = (moved**2).sum(0) * n / (n - 1)
        total = np.zeros_like(independent)
        squares = np.zeros_like(independent)
        for size in range(1, len(self.kinds) + 1):
            for chosen in combinations(range(len(self.kinds)), size):
                numbers = np.unique(self.numbers[list(chosen)], axis=1, return_inverse=True)[1].reshape(-1)
                n_clusters = int(numbers.max()) + 1
                sums = np.zeros((n_clusters, moved.shape[1]))
                np.add.at(sums, numbers, moved)
                part = (sums**2).sum(0) * n_clusters / (n_clusters - 1)
                total += (-1) ** (size + 1) * part
                squares += part**2 / (n_clusters - 1)
        more = total > independent * (1 + _ROUNDING)
        freedom = np.where(more, total**2 / np.where(squares > 0, squares, 1), n - 1).clip(min=1)
        shape = influence.shape[1:]
        found = np.where(more, total, independent)
        return Spread(found.reshape(shape), independent.reshape(shape), freedom.reshape(shape))


def half_width(
    influence: Float[np.ndarray, "item ..."], clusters: Clusters | None = None, level: float = LEVEL
) -> Float[np.ndarray, ...]:
    """Computes how far the interval of a number reaches to either side of it; NaN with too few clusters.

    Args:
        influence: of each item on the number, see `Clusters.spread` and `influences`.
        clusters: of the items; None where none go together.
        level: of confidence.
    """
    clusters = Clusters.alone(len(influence)) if clusters is None else clusters
    if clusters.too_few:
        return np.full(influence.shape[1:], np.nan)
    spread = clusters.spread(influence)
    return stats.t.ppf((1 + level) / 2, spread.freedom) * np.sqrt(spread.variance)


def clustered_mean(
    values: Float[np.ndarray, "item ..."], clusters: Clusters | None = None, level: float = LEVEL
) -> WithInterval:
    """Computes the mean over items with its interval: mean, low, high; the ends are NaN with too few clusters.

    >>> _, low, high = clustered_mean(np.arange(10.0))  # items of their own: Student's interval
    >>> round(float(low), 3), round(float(high), 3)
    (2.334, 6.666)
    """
    mean = values.mean(0)
    reach = half_width(values - mean, clusters, level)
    return mean, mean - reach, mean + reach


def simultaneous_mean(
    values: Float[np.ndarray, "item ..."], clusters: Clusters | None = None, *, n_means: int | None = None
) -> WithInterval:
    """Computes means over items with intervals that all hold at once at 95 percent: mean, low, high.

    It is Bonferroni's correction, with as many degrees of freedom as the kind with the fewest clusters leaves: some of
    many variances are far too small by chance, and Satterthwaite's freedom would trust them. How often all of 64 hold
    is measured in `benchmarks/coverage.py`. The ends are NaN with too few clusters.

    Args:
        values: of each item.
        clusters: of the items; None where none go together.
        n_means: how many means there are in all, where these are some of them.
    """
    clusters = Clusters.alone(len(values)) if clusters is None else clusters
    mean = values.mean(0)
    if clusters.too_few or len(values) < 2:
        return mean, np.full(mean.shape, np.nan), np.full(mean.shape, np.nan)
    n_means = n_means or max(1, int(np.prod(mean.shape)))
    freedom = min([len(values), *(len(set(row.tolist())) for row in clusters.numbers)]) - 1
    quantile = stats.t.ppf(1 - (1 - LEVEL) / 2 / n_means, freedom)
    reach = quantile * np.sqrt(clusters.spread(values - mean).variance)
    return mean, mean - reach, mean + reach


def clustered_ratio(
    above: Float[np.ndarray, "item ..."], below: Float[np.ndarray, "item ..."], clusters: Clusters | None = None
) -> WithInterval:
    """Computes the ratio of two means over the same items with its interval, by linearisation: ratio, low, high.

    All are NaN where the mean below is 0, and the ends with too few clusters.

    Args:
        above, below: of each item, of shapes that broadcast.
        clusters: of the items; None where none go together.

    >>> ratio, low, high = clustered_ratio(np.array([1.0, 3.0, 2.0]), np.array([2.0, 6.0, 4.0]))
    >>> float(ratio), float(low), float(high)  # the same share of every item
    (0.5, 0.5, 0.5)
    """
    mean = np.where(below.mean(0) == 0, np.nan, below.mean(0))
    ratio = above.mean(0) / mean + 0.0  # no -0.0
    reach = half_width((above - ratio * below) / mean, clusters)
    return ratio, ratio - reach, ratio + reach


def influences(without: Float[np.ndarray, "item ..."]) -> Float[np.ndarray, "item ..."]:
    """Computes how much each item moves smooth statistics, from their values without it (the jackknife).

    They are NaN for a statistic that is not defined without some item.
    """
    return (len(without) - 1) * (without.mean(0) - without)


def clustered_statistic(
    statistic: Callable[[Int[np.ndarray, " chosen"]], Sequence[float]],
    n: int,
    clusters: Clusters | None = None,
    level: float = LEVEL,
) -> list[Interval]:
    """Computes the intervals of several smooth statistics, given as one function of item numbers.

    The ends are NaN with too few clusters, and where leaving an item out leaves the statistic undefined.

    Args:
        statistic: the statistics.
        n: how many items there are.
        clusters: of the items; None where none go together.
        level: of confidence.

    >>> ((low, high),) = clustered_statistic(lambda chosen: [np.arange(10.0)[chosen].mean()], 10)
    >>> round(low, 3), round(high, 3)
    (2.334, 6.666)
    """
    every = np.arange(n)
    value = np.array(statistic(every), dtype=float)
    if clusters is not None and clusters.too_few:
        return [_NO_INTERVAL] * len(value)
    without = np.array([statistic(np.delete(every, item)) for item in every], dtype=float)
    reach = half_width(influences(without), clusters, level)
    return list(zip((value - reach).tolist(), (value + reach).tolist(), strict=True))


def pigeonhole(groups: Sequence[Int[np.ndarray, " item"]], seed: int = 0) -> Int[np.ndarray, "resample item"]:
    """Draws how often each item counts in each resample of the pigeonhole bootstrap (Owen, 2007).

    The groups of each kind are drawn with replacement, and an item counts as often as all of its groups were drawn
    together. For statistics that are not smooth; its intervals are wide where items hardly go together.

    Args:
        groups: of each kind, the number of each item's group, from 0; -1 for an item in none.
        seed: of the draws.
    """
    draw = np.random.default_rng(seed)
    counts = np.ones((RESAMPLES, len(groups[0])), dtype=int)
    for numbers in groups:
        n_groups = int(numbers.max()) + 1
        drawn = draw.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=RESAMPLES)
        counts[:, numbers >= 0] *= drawn[:, numbers[numbers >= 0]]
    return counts


def effective_size(influence: Float[np.ndarray, " item"], clusters: Clusters, n: int, level: float = LEVEL) -> float:
    """Computes how many independent items would tell a share as exactly as these do; NaN with too few clusters.

    It is Korn and Graubard's (1998): the number of items over the design effect, and over how much wider Student's
    interval is than the normal one. Where the items do not go together it is the number of items, and where all count
    alike nothing shows how they go together.

    Args:
        influence: of each item on the share, see `Clusters.spread`.
        clusters: of the items.
        n: how many items the share is of.
        level: of confidence.
    """
    if clusters.too_few:
        return float("nan")
    spread = clusters.spread(influence)
    if not spread.variance > spread.independent:
        return float(n)
    wider = stats.t.ppf((1 + level) / 2, spread.freedom) / stats.norm.ppf((1 + level) / 2)
    return float(n * spread.independent / spread.variance / wider**2)


def clustered_rate(
    flags: Bool[np.ndarray, " item"], clusters: Clusters | None = None, level: float = LEVEL
) -> tuple[float, float, float, float]:
    """Computes a share, how many independent items would tell it as exactly, and Wilson's interval of so many.

    >>> flags = np.arange(96) < 24
    >>> share, size, low, high = clustered_rate(flags)
    >>> share, size, round(low, 3), round(high, 3)  # items of their own: Wilson's interval of 24 of 96
    (0.25, 96.0, 0.174, 0.345)
    """
    clusters = Clusters.alone(len(flags)) if clusters is None else clusters
    share = float(flags.mean())
    size = effective_size(flags - share, clusters, len(flags), level)
    return share, size, *wilson_of_share(share, size, level)


def paired_difference(
    gained: Float[np.ndarray, " item"], lost: Float[np.ndarray, " item"], clusters: Clusters, level: float = LEVEL
) -> Interval:
    """Computes the interval of the difference of two shares of the same items.

    Both models of a comparison answer the same prompts, and most answers are alike: only those that are not tell the
    two apart. The interval is Tango's score interval (1998) for paired shares, and where items go together each side of
    it is as many times longer as Student's interval of the clusters is than the normal one of independent items.

    Args:
        gained: of each item, 1 where it counts for the first share alone, else 0; or the mean of that over several
            trainings, whose answers to one item are not taken as independent.
        lost: the same of the second share.
        clusters: of the items.
        level: of confidence.

    >>> gained = (np.arange(50) < 9).astype(float)
    >>> grid = Clusters.of({"item": [str(number) for number in range(50)]})
    >>> low, high = paired_difference(gained, np.zeros(50), grid)
    >>> round(low, 3), round(high, 3)
    (0.096, 0.308)
    """
    if clusters.too_few:
        return _NO_INTERVAL
    differences = gained - lost
    value = float(differences.mean())
    n = len(differences)
    z = float(stats.norm.ppf((1 + level) / 2))
    low, high = _tango(float(gained.mean()) * n, float(lost.mean()) * n, n, z)
    spread = clusters.spread(differences - value)
    if not spread.variance > spread.independent:
        return low, high
    student = stats.t.ppf((1 + level) / 2, spread.freedom) * np.sqrt(spread.variance)
    longer = float(student / (z * np.sqrt(spread.independent)))
    return max(-1.0, value - longer * (value - low)), min(1.0, value + longer * (high - value))


def _tango(gained: float, lost: float, n: int, reach: float) -> Interval:
    """Finds the differences at which the score statistic of Tango (1998) is as far from 0 as `reach`."""
    found = (gained - lost) / n

    def score(difference: float) -> float:
        b = -gained - lost + (2 * n - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        share = (np.sqrt(max(b**2 - 8 * n * c, 0)) - b) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        return (gained - lost - n * difference) / np.sqrt(max(variance, 1e-300))

    def end(reach: float, bracket: tuple[float, float]) -> float:
        return float(optimize.root_scalar(lambda d: score(d) - reach, bracket=bracket, method="brentq").root)

    inside = 1 - 1e-9
    low = -1.0 if found <= -inside else end(reach, (-inside, found))
    high = 1.0 if found >= inside else end(-reach, (found, inside))
    return low, high
