"""Shares of an effect: ratios of means over pairs, with intervals, and a refusal where the effect is too small."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from ctlens.analysis.base.metrics import SMALLEST_GAPS
from ctlens.core.clusters import Clusters, WithInterval, clustered_mean, clustered_ratio, simultaneous_mean
from ctlens.core.errors import CtlensError

ClustersOf: TypeAlias = Callable[[Bool[np.ndarray, " pair"]], Clusters | None]
"""Which of some pairs go together, as `ResultOverPairs.clusters` says."""
PairValues: TypeAlias = Float[np.ndarray, " pair"]
CellValues: TypeAlias = Float[np.ndarray, "cell pair"]


def floor_of(metric: str, smallest_gap: float | None) -> float:
    """Gives the smallest gap whose shares are more than noise, in the metric's unit.

    Raises:
        CtlensError: there is none for the metric and none is given.
    """
    floor = SMALLEST_GAPS.get(metric) if smallest_gap is None else smallest_gap
    if floor is None:
        raise CtlensError(f"metric {metric!r} is your own: say with smallest_gap= which gap is more than noise.")
    return floor


def require_gap(metric: str, gap: PairValues, floor: float, between: str) -> None:
    """Raises a `CtlensError` where the mean gap of the pairs is smaller than the floor."""
    if not abs(gap.mean()) >= floor:
        raise CtlensError(
            f"{metric} differs by {gap.mean():.3g} between {between}: "
            f"a share of less than {floor:g} is noise, read the values themselves."
        )


def means(values: CellValues, clusters_of: ClustersOf) -> WithInterval:
    """Averages every cell over the pairs that have it; NaN marks a pair that lacks it.

    >>> value, low, high = means(np.array([[1.0, 3.0], [2.0, np.nan]]), lambda pairs: None)
    >>> value.tolist(), low.round(2).tolist()  # no interval of a cell that one pair has
    ([2.0, 2.0], [-10.71, nan])
    """
    return _by_presence(
        ~np.isnan(values),
        lambda cells, pairs: clustered_mean(values[np.ix_(cells, pairs)].T, clusters_of(pairs)),
    )


def simultaneous_means(values: CellValues, clusters_of: ClustersOf) -> WithInterval:
    """Averages every cell as `means` does, with intervals that hold for all cells at once.

    >>> values = np.array([[1.0, 3.0, 2.0], [2.0, 1.0, np.nan]])
    >>> alone, together = means(values, lambda pairs: None), simultaneous_means(values, lambda pairs: None)
    >>> bool((alone[0] == together[0]).all()), bool((together[1] < alone[1]).all())
    (True, True)
    """
    n_means = int((~np.isnan(values)).any(-1).sum())
    return _by_presence(
        ~np.isnan(values),
        lambda cells, pairs: simultaneous_mean(values[np.ix_(cells, pairs)].T, clusters_of(pairs), n_means=n_means),
    )


def shares(moved: CellValues, gap: PairValues, floor: float, clusters_of: ClustersOf) -> WithInterval:
    """Gives each cell's change as a share of the gap: a ratio of means over pairs, not a mean of ratios.

    >>> moved, gap = np.array([[0.0, 3.0], [1.0, np.nan]]), np.array([2.0, 4.0])
    >>> value, low, high = shares(moved, gap, floor=0.5, clusters_of=lambda pairs: None)
    >>> value.tolist()  # 3 of 6; 1 of 2, for the second pair does not count
    [0.5, 0.5]

    Args:
        moved: NaN where a pair lacks the cell.
        gap: of each pair.
        floor: the share is NaN where the mean gap of the pairs that have the cell is smaller.
        clusters_of: which of the pairs that have a cell go together.
    """

    def share(cells: np.ndarray, pairs: np.ndarray) -> WithInterval:
        below = gap[pairs]
        if abs(below.mean()) < floor:
            none = np.full(cells.sum(), np.nan)
            return none, none, none
        return clustered_ratio(moved[np.ix_(cells, pairs)].T, below[:, None], clusters_of(pairs))

    return _by_presence(~np.isnan(moved), share)


def _by_presence(
    present: Bool[np.ndarray, "cell pair"],
    estimate: Callable[[np.ndarray, np.ndarray], WithInterval],
) -> WithInterval:
    """Estimates together the cells that the same pairs have; NaN for a cell that no pair has."""
    found = np.full((3, len(present)), np.nan)
    patterns, which = np.unique(present, axis=0, return_inverse=True)
    for number, pairs in enumerate(patterns):
        cells = which.reshape(-1) == number
        if pairs.any():
            found[:, cells] = estimate(cells, pairs)
    value, low, high = found
    return value, low, high
