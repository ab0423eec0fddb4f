"""Small multiples of lines, a panel a quantity: what trainings do over their steps, or over depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.curves import draw_band, draw_line
from ctlens.plots.panels import fit, panels, places
from ctlens.plots.theme import MUTED, finish, label, ordered

HEIGHT, GAP, BELOW = 190, 54, 54
SIDE = 0.05
MARKER = 6

StepCurve = tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]
"""Steps, value, lower end and upper end of the interval, each `[step]`."""


def cross_loss_steps(
    curves: Mapping[str, Mapping[str, StepCurve]], title: str, *, subtitle: str | None = None
) -> go.Figure:
    """How does every loss go while a model is trained with one of them?

    One panel a loss that is measured, one line a loss that is trained with; all panels have one logarithmic scale.

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
    for (measured, lines), (place, *_) in zip(curves.items(), places(len(curves)), strict=True):
        require_some(f"curves[{measured!r}]", lines)
        for trained, curve in lines.items():
            name = f"curve {trained!r} of {measured!r}"
            steps, value, low, high = (checked(name, array, np.size(curve[0])) for array in curve)
            draw_band(figure, trained, steps, _on_log_axis(low), _on_log_axis(high), **place)
            shown = trained not in listed
            draw_line(figure, trained, steps, _on_log_axis(value), size=MARKER, listed=shown, **place)
            listed.add(trained)
    caption = (
        "Lines are losses as multiples of their value before training, by the loss trained with; bands are 95% "
        "intervals; the vertical axis is logarithmic, the dotted line is no change."
    )
    finish(figure, title, subtitle, kind="cross_loss_steps", caption=caption)
    everywhere: dict[str, Any] = {"row": "all", "col": "all"}
    figure.add_hline(1, line={"color": MUTED, "dash": "dot", "width": 1.2}, **everywhere)
    figure.update_yaxes(type="log", dtick="D2", tickformat="~g", matches="y")
    return _labelled(figure, len(curves), "training step", "times before training")


def update_ranks(
    ranks: Mapping[str, Mapping[str, ArrayLike]], title: str, *, y_title: str, subtitle: str | None = None
) -> go.Figure:
    """What did trainings do to each kind of matrix, at which depth?

    Args:
        ranks: per site and per training, the quantity `[layer]`; NaN where a layer lacks the site.
        title: the question or the answer.
        y_title: the quantity with its unit.
        subtitle: one line under the title.

    Raises:
        CtlensError: no site, no training, or trainings of different depth.
    """
    figure = _empty(list(ranks))
    for (site, lines), (place, *_) in zip(ranks.items(), places(len(ranks)), strict=True):
        require_some(f"ranks[{site!r}]", lines)
        layers = np.arange(np.size(next(iter(lines.values()))))
        for name, values in lines.items():
            value = checked(f"{name!r} of {site!r}", values, len(layers))
            draw_line(figure, name, layers, value, size=MARKER, listed=site == next(iter(ranks)), **place)
        figure.update_xaxes(tickmode="linear", tick0=0, dtick=max(1, len(layers) // 8), **place)
    finish(figure, title, subtitle, kind="update_ranks", caption="Layer 0 is the first layer.")
    figure.update_yaxes(rangemode="tozero")
    return _labelled(figure, len(ranks), "layer", y_title)


def costs(
    curves: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]], title: str, *, y_title: str, limit: float
) -> go.Figure:
    """What does a way to work cost, as a model grows?

    Args:
        curves: per size that grows and per way to work, the sizes and the cost at each.
        title: the question or the answer.
        y_title: the cost with its unit.
        limit: what it may be, a dotted line.

    Raises:
        CtlensError: no size, no way to work, or not one cost a size.
    """
    figure = _empty(list(curves))
    looks = ordered(list(dict.fromkeys(name for lines in curves.values() for name in lines)))
    for (size, lines), (place, first, _) in zip(curves.items(), places(len(curves)), strict=True):
        require_some(f"curves[{size!r}]", lines)
        ticks = np.unique(np.concatenate([np.asarray(sizes, dtype=float) for sizes, _ in lines.values()]))
        for name, (sizes, cost) in lines.items():
            value = checked(f"{name!r} over {size!r}", cost, np.size(sizes))
            look, listed = looks[name], size == next(iter(curves))
            draw_line(figure, name, np.asarray(sizes), value, size=MARKER, listed=listed, look=look, **place)
        figure.update_xaxes(type="log", tickvals=ticks.tolist(), **place)
        figure.update_yaxes(title_text=y_title if first else None, **place)
    finish(
        figure, title, None, kind="costs", caption=f"The dotted line is {limit:g}; the horizontal axis is logarithmic."
    )
    everywhere: dict[str, Any] = {"row": "all", "col": "all"}
    figure.add_hline(limit, line={"color": MUTED, "dash": "dot", "width": 1.2}, **everywhere)
    figure.update_yaxes(rangemode="tozero", matches="y")
    return fit(figure, len(curves), height=HEIGHT, gap=GAP, below=BELOW)


def _empty(names: Sequence[str]) -> go.Figure:
    require_some("panels", names)
    return panels(names, height=HEIGHT, gap=GAP, side=SIDE)


def _labelled(figure: go.Figure, count: int, x_title: str, y_title: str) -> go.Figure:
    """Names the axes at the edges, and gives the finished figure its height."""
    for place, first, last in places(count):
        figure.update_xaxes(title_text=x_title if last else None, showgrid=False, **place)
        figure.update_yaxes(title_text=y_title if first else None, **place)
    return fit(figure, count, height=HEIGHT, gap=GAP, below=BELOW)


def _on_log_axis(values: np.ndarray) -> np.ndarray:
    """Without what a logarithmic axis has no place for."""
    return np.where(values > 0, values, np.nan)
