"""Shares of an effect: ratios of means over pairs, with intervals, and a refusal where the effect is too small."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from ctlens.analysis.base.metrics import SMALLEST_GAPS
from ctlens.core.errors import CtlensError
from ctlens.core.stats import bootstrap

Counts: TypeAlias = Float[np.ndarray, " pair"]
PerCell: TypeAlias = Float[np.ndarray, " cell"]
PairValues: TypeAlias = Float[np.ndarray, " pair"]
CellValues: TypeAlias = Float[np.ndarray, "cell pair"]
Estimates: TypeAlias = tuple[PerCell, PerCell, PerCell]
"""A number for every cell, and the ends of its 95 percent bootstrap interval over pairs."""


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


def means(values: CellValues) -> Estimates:
    """Averages every cell over the pairs that have it; NaN marks a pair that lacks it."""
    present = ~np.isnan(values)
    known = np.where(present, values, 0)
    return _with_intervals(lambda counts: known @ counts / (present @ counts), values.shape[1])


def shares(moved: CellValues, gap: PairValues, floor: float) -> Estimates:
    """Gives each cell's change as a share of the gap: a ratio of means over pairs, not a mean of ratios.

    >>> value, low, high = shares(np.array([[0.0, 3.0], [1.0, np.nan]]), np.array([2.0, 4.0]), floor=0.5)
    >>> value.tolist()  # 3 of 6; 1 of 2, for the second pair does not count
    [0.5, 0.5]

    Args:
        moved: NaN where a pair lacks the cell.
        gap: of each pair.
        floor: the share is NaN where the mean gap of the pairs that have the cell is smaller.
    """
    present = ~np.isnan(moved)
    known = np.where(present, moved, 0)
    gaps = present * gap

    def share(counts: Counts) -> PerCell:
        below = gaps @ counts
        return np.where(np.abs(below) >= floor * (present @ counts), known @ counts / below + 0.0, np.nan)  # no -0.0

    return _with_intervals(share, len(gap))


def _with_intervals(statistic: Callable[[Counts], PerCell], n_pairs: int) -> Estimates:
    """A statistic of every cell, given as a function of how often each pair counts."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value = statistic(np.ones(n_pairs))
        ends = bootstrap(lambda items: statistic(np.bincount(items, minlength=n_pairs).astype(float)).tolist(), n_pairs)
    low, high = np.array(ends).T
    return value, low, high
