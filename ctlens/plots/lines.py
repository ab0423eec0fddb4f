"""Small multiples of lines, one panel per quantity: over the steps of trainings, over depth, or over a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.curves import draw_curve, draw_line, layer_ticks
from ctlens.plots.intervals import CurveWithX, Intervals, checked_with_x
from ctlens.plots.panels import PanelLayout, fit_panels, panel_grid, subplots
from ctlens.plots.theme import MUTED, finish, label, ordered

_LAYOUT = PanelLayout(height=190, gap=54, below=54, side=0.05)
_MARKER = 6  # pixels, chosen by eye: the panels are small


def cross_loss_steps(
    curves: Mapping[str, Mapping[str, CurveWithX]], title: str, *, subtitle: str | None = None
) -> go.Figure:
    """How does every loss go while a model is trained with one of them?

    One panel per loss that is measured, one line per loss that is trained with; all panels have one logarithmic scale.

    Args:
        curves: per loss measured and per loss trained with, the steps and at each the value as a
            multiple of that before training, with its interval; NaN where not measured.
        title: the question or the answer.
        subtitle: one line under the title.

    Raises:
        CtlensError: no loss, no line in a panel, or an array that is not one number per step.
    """
    figure = _empty([f"measured by {label(name)}" for name in curves])
    listed: set[str] = set()
    for subplot, (measured, lines) in zip(subplots(len(curves)), curves.items(), strict=True):
        require_some(f"curves[{measured!r}]", lines)
        for trained, curve in lines.items():
            steps, numbers = checked_with_x(f"curve {trained!r} of {measured!r}", curve)
            shown = _on_log_axis(numbers)
            draw_curve(figure, trained, steps, shown, size=_MARKER, listed=trained not in listed, **subplot.at)
            listed.add(trained)
    caption = (
        "Lines are losses as multiples of their value before training, by the loss trained with; bands are 95% "
        "intervals; the vertical axis is logarithmic, the dotted line is no change."
    )
    finish(figure, title, subtitle, kind="cross_loss_steps", caption=caption)
    _mark_level(figure, 1)
    figure.update_yaxes(type="log", dtick="D2", tickformat="~g", matches="y")
    return _labelled(figure, len(curves), "training step", "times before training")


def update_ranks(
    ranks: Mapping[str, Mapping[str, ArrayLike]], title: str, *, y_title: str, subtitle: str | None = None
) -> go.Figure:
    """How did trainings change each kind of matrix, and at which depth?

    Args:
        ranks: per matrix and per training, the quantity `[layer]`; NaN where a layer lacks the matrix.
        title: the question or the answer.
        y_title: the quantity with its unit.
        subtitle: one line under the title.

    Raises:
        CtlensError: no matrix, no training, or trainings of different depth.
    """
    figure = _empty(list(ranks))
    for number, (subplot, (matrix, lines)) in enumerate(zip(subplots(len(ranks)), ranks.items(), strict=True)):
        require_some(f"ranks[{matrix!r}]", lines)
        layers = np.arange(np.size(next(iter(lines.values()))))
        for name, values in lines.items():
            value = checked(f"{name!r} of {matrix!r}", values, len(layers))
            draw_line(figure, name, layers, value, size=_MARKER, listed=number == 0, **subplot.at)
        figure.update_xaxes(**layer_ticks(len(layers), most=8), **subplot.at)
    finish(figure, title, subtitle, kind="update_ranks", caption="Layer 0 is the first layer.")
    figure.update_yaxes(rangemode="tozero")
    return _labelled(figure, len(ranks), "layer", y_title)


def costs(
    curves: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]], title: str, *, y_title: str, limit: float
) -> go.Figure:
    """How does the cost of each way to work grow with a model?

    Args:
        curves: per size that grows and per way to work, the sizes and the cost at each.
        title: the question or the answer.
        y_title: the cost with its unit.
        limit: the cost that is allowed, a dotted line.

    Raises:
        CtlensError: no size, no way to work, or not one cost per size.
    """
    figure = _empty(list(curves))
    looks = ordered(list(dict.fromkeys(name for lines in curves.values() for name in lines)))
    for number, (subplot, (size, lines)) in enumerate(zip(subplots(len(curves)), curves.items(), strict=True)):
        require_some(f"curves[{size!r}]", lines)
        ticks = np.unique(np.concatenate([np.asarray(sizes, dtype=float) for sizes, _ in lines.values()]))
        for name, (sizes, cost) in lines.items():
            value = checked(f"{name!r} over {size!r}", cost, np.size(sizes))
            options = {"size": _MARKER, "listed": number == 0, "look": looks[name]}
            draw_line(figure, name, np.asarray(sizes), value, **options, **subplot.at)
        figure.update_xaxes(type="log", tickvals=ticks.tolist(), **subplot.at)
        figure.update_yaxes(title_text=y_title if subplot.leftmost else None, **subplot.at)
    caption = f"The dotted line is {limit:g}; the horizontal axis is logarithmic."
    finish(figure, title, None, kind="costs", caption=caption)
    _mark_level(figure, limit)
    figure.update_yaxes(rangemode="tozero", matches="y")
    return fit_panels(figure, len(curves), _LAYOUT)


def _empty(names: Sequence[str]) -> go.Figure:
    require_some("panels", names)
    return panel_grid(names, _LAYOUT)


def _mark_level(figure: go.Figure, level: float) -> None:
    """A dotted line across every panel."""
    everywhere: dict[str, Any] = {"row": "all", "col": "all"}
    figure.add_hline(level, line={"color": MUTED, "dash": "dot", "width": 1.2}, **everywhere)


def _labelled(figure: go.Figure, n_panels: int, x_title: str, y_title: str) -> go.Figure:
    """Names the axes at the edges, and gives the finished figure its height."""
    for subplot in subplots(n_panels):
        figure.update_xaxes(title_text=x_title if subplot.lowest else None, showgrid=False, **subplot.at)
        figure.update_yaxes(title_text=y_title if subplot.leftmost else None, **subplot.at)
    return fit_panels(figure, n_panels, _LAYOUT)


def _on_log_axis(numbers: Intervals) -> Intervals:
    """NaN for the numbers that a logarithmic axis cannot show."""
    return Intervals(*[np.where(array > 0, array, np.nan) for array in numbers])
