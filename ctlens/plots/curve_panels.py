"""Small multiples of curves over any amount, each panel with a quantity of its own and the chance it stands against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from ctlens.plots.arrays import require_some
from ctlens.plots.curves import draw_curve, layer_ticks
from ctlens.plots.intervals import Curve, NullBand, checked_intervals, draw_null
from ctlens.plots.panels import PanelLayout, fit_panels, panel_grid, subplots
from ctlens.plots.theme import MUTED, finish, looks_of

_LAYOUT = PanelLayout(height=240, gap=60, below=54, side=0.075)
_WIDTH = 1100  # pixels, chosen by eye
_MARKER = 6  # pixels, chosen by eye: the panels are small
_DOTTED = {"line": {"color": MUTED, "dash": "dot", "width": 1.2}, "layer": "below"}


class CurvePanel(NamedTuple):
    """One panel: its curves by name, what they count, and the band in which chance lies, under its name.

    Attributes:
        curves: the value and its interval at every amount.
        y_title: the quantity with its unit.
        null: the band and its name; None for none.
        levels: values with a meaning, as dotted lines.
    """

    curves: Mapping[str, Curve]
    y_title: str
    null: tuple[str, NullBand] | None = None
    levels: Sequence[float] = ()


def curve_panels(
    x: Sequence[float],
    panels: Mapping[str, CurvePanel],
    title: str,
    *,
    x_title: str,
    caption: str,
    marked: Sequence[float] = (),
    subtitle: str | None = None,
    kind: str = "curve_panels",
) -> go.Figure:
    """How do several quantities go with one amount? One panel per quantity.

    Methods have their looks; curves of other things go from dark to light in their order.

    Args:
        x: the amounts, such as layers.
        panels: per name of a panel, what it holds.
        title: the question or the answer.
        x_title: what the amounts are.
        caption: how to read the figure.
        marked: amounts with a meaning, as dotted lines in every panel.
        subtitle: one line under the title.
        kind: which sort of figure this is, see `finish`.

    Raises:
        CtlensError: no panel, no curve in one, no amount, or an array that is not one number per amount.
    """
    require_some("panels", panels)
    require_some("amounts", x)
    figure = panel_grid(list(panels), _LAYOUT)
    at_x = np.asarray(x, dtype=float)
    looks = looks_of(dict.fromkeys(name for panel in panels.values() for name in panel.curves))
    listed: set[str] = set()
    for subplot, (panel_name, panel) in zip(subplots(len(panels)), panels.items(), strict=True):
        require_some(f"curves of {panel_name!r}", panel.curves)
        if panel.null is not None:
            name, band = panel.null
            draw_null(figure, at_x, band, name, listed=name not in listed, **subplot.at)
            listed.add(name)
        for name, curve in panel.curves.items():
            numbers = checked_intervals(f"curve {name!r}", curve, len(at_x))
            options = {"look": looks[name], "size": _MARKER, "listed": name not in listed}
            draw_curve(figure, name, at_x, numbers, **options, **subplot.at)
            listed.add(name)
        for level in panel.levels:
            figure.add_hline(level, **_DOTTED, **subplot.at)
        for amount in marked:
            figure.add_vline(amount, **_DOTTED, **subplot.at)
    finish(figure, title, subtitle, kind=kind, caption=caption)
    if np.array_equal(at_x, at_x[0] + np.arange(len(at_x))):  # layers, or numbers of heads
        figure.update_xaxes(**layer_ticks(len(at_x), most=8, first=int(at_x[0])))
    for subplot, panel in zip(subplots(len(panels)), panels.values(), strict=True):
        figure.update_xaxes(title_text=x_title if subplot.lowest else None, showgrid=False, **subplot.at)
        figure.update_yaxes(title_text=panel.y_title, **subplot.at)
    return fit_panels(figure, len(panels), _LAYOUT).update_layout(width=_WIDTH)
