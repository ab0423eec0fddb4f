"""The kit for intervals, which every figure uses: whiskers at markers, bands along curves, grey bands behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.core.errors import CtlensError
from ctlens.plots.arrays import checked
from ctlens.plots.theme import MUTED

Curve = tuple[ArrayLike, ArrayLike, ArrayLike]
"""Value, lower end and upper end of the interval, each `[dose]`, `[layer]` or `[part]`."""
CurveWithX = tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]
"""Steps or strengths of a curve that has its own, then value, lower end and upper end, each `[step]`."""
IntervalGrid = tuple[ArrayLike, ArrayLike, ArrayLike]
"""Value, lower end and upper end of the interval, each `[row, column]`."""
NullBand = tuple[ArrayLike, ArrayLike]
"""Lower and upper end of what chance gives, each `[layer]` or `[strength]`."""

# All three chosen by eye: bands of methods lie over each other, the null behind them, the target behind everything.
BAND_OPACITY = 0.14
NULL_COLOUR = "rgba(110, 110, 110, 0.28)"
TARGET_COLOUR = "rgba(128, 128, 128, 0.13)"
MARKERS_SPREAD = 0.72  # of the step between two labels, over which the markers of a label spread; chosen by eye


class Intervals(NamedTuple):
    """Numbers with the ends of their intervals: three arrays of one shape."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def checked_intervals(name: str, numbers: Sequence[ArrayLike] | np.ndarray, *shape: int) -> Intervals:
    """Value and interval as float arrays, each of exactly `shape`.

    Raises:
        CtlensError: there are not three arrays, a shape differs, or there is nothing to draw.
    """
    if len(numbers) != 3:
        raise CtlensError(f"{name} has {len(numbers)} arrays: give value, lower end and upper end.")
    value, low, high = numbers
    return Intervals(checked(name, value, *shape), checked(name, low, *shape), checked(name, high, *shape))


def checked_with_x(name: str, curve: CurveWithX) -> tuple[np.ndarray, Intervals]:
    """The steps of a curve, and its estimates at each.

    Raises:
        CtlensError: the arrays differ in length, or there is nothing to draw.
    """
    x, *numbers = curve
    length = np.size(x)
    return checked(name, x, length), checked_intervals(name, numbers, length)


def whiskers(numbers: Intervals, *, slim: bool = False) -> dict[str, object]:
    """Plotly's error bars from the lower to the upper ends; none where something is NaN.

    `slim` ones are for lines, of which several stand close to each other.
    """
    return {
        "array": (numbers.high - numbers.value).tolist(),
        "arrayminus": (numbers.value - numbers.low).tolist(),
        "thickness": 1.2 if slim else 1.6,
        "width": 2 if slim else 4,
    }


def interval_hover(name: str, numbers: Intervals) -> dict[str, Any]:
    """The text of a trace under the pointer: its name, the rate and the interval."""
    return {
        "customdata": np.stack([numbers.low, numbers.high], axis=1).tolist(),
        "hovertemplate": f"{name}: %{{y:.1%}} [%{{customdata[0]:.1%}}, %{{customdata[1]:.1%}}]<extra></extra>",
    }


def side_by_side(n_marks: int) -> np.ndarray:
    """Steps from a label of the axis to each of the marks that stand around it.

    >>> side_by_side(3).tolist(), side_by_side(2).tolist()
    ([-1.0, 0.0, 1.0], [-0.5, 0.5])
    """
    return np.arange(n_marks) - (n_marks - 1) / 2


def draw_band(
    figure: go.Figure,
    x: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    colour: str,
    group: str,
    name: str | None = None,
    listed: bool = False,
    **at: Any,
) -> None:
    """A shaded band between two curves.

    Args:
        figure: it gets one more trace.
        x: where the ends are, `[x]`.
        low: lower ends `[x]`; where an end is NaN the band goes straight on to the next.
        high: upper ends `[x]`.
        colour: of the filling.
        group: of the legend, which shows and hides the band with its curve.
        name: of a band that is no curve's interval; the table of the figure has rows for it.
        listed: whether the legend names it.
        at: row and column of the panel.
    """
    known = np.isfinite(low + high)  # a NaN would break the outline of the band
    figure.add_scatter(
        x=[*x[known].tolist(), *x[known][::-1].tolist()],
        y=[*high[known].tolist(), *low[known][::-1].tolist()],
        fill="toself",
        fillcolor=colour,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        name=name,
        legendgroup=group,
        showlegend=listed,
        **at,
    )


def draw_null(figure: go.Figure, x: np.ndarray, band: NullBand, name: str, *, listed: bool, **at: Any) -> None:
    """The grey band of what chance gives, under a name that says which chance.

    Raises:
        CtlensError: an end is not one number per `x`.
    """
    low, high = band
    ends = checked(name, low, len(x)), checked(name, high, len(x))
    draw_band(figure, x, *ends, colour=NULL_COLOUR, group=name, name=name, listed=listed, **at)


def shade_target(figure: go.Figure, low: float, high: float) -> None:
    """Shades a range of the vertical axis in every panel, between dotted lines, and names it in the legend once."""
    everywhere: dict[str, Any] = {"row": "all", "col": "all", "layer": "below"}
    figure.add_hrect(low, high, fillcolor=TARGET_COLOUR, line_width=0, **everywhere)
    figure.layout.shapes[0].update(name=f"target: {low:.0%} to {high:.0%}", showlegend=True)
    for end in (low, high):
        figure.add_hline(end, line={"color": MUTED, "dash": "dot", "width": 1}, **everywhere)
