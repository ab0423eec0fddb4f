"""The effect of a direction beside that of random ones, one panel per model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import plotly.graph_objects as go

from ctlens.plots.arrays import require_some
from ctlens.plots.curves import draw_line
from ctlens.plots.intervals import Curve, NullBand, checked_intervals, draw_null, whiskers
from ctlens.plots.panels import PanelLayout, fit_panels, panel_grid, subplots
from ctlens.plots.theme import MUTED, Style, drawn_for, finish, label

CurvesAndNull = tuple[Mapping[str, Curve], NullBand]
"""The curves of one panel, and the band of random directions behind them."""

_LAYOUT = PanelLayout(height=210, gap=58, below=54, side=0.05)
# Hues that no method has: a panel is a model, a line is an intervention on it.
INTERVENTION_STYLES = {
    "direction": Style("the direction", "#8e2f9e", "circle", "solid"),
    "opposite": Style("its opposite", "#cf4a86", "circle-open", "dot"),
    "attack": Style("the attack", "#8e2f9e", "circle", "solid"),
}
_CONCEPT_MARKERS = ("square", "square-open", "diamond", "diamond-open", "triangle-up", "triangle-up-open")
"""Of concepts, each beside its other sign."""


def against_random(
    shown: Mapping[str, CurvesAndNull],
    x: Sequence[float],
    title: str,
    *,
    x_title: str,
    y_title: str,
    subtitle: str | None = None,
) -> go.Figure:
    """Is the effect of a direction larger than that of random ones, and in which model?

    Args:
        shown: per model, its curves (`"direction"`, `"opposite"`, `"attack"`, or a concept's name), the mean and its
            interval, and the random band; all on one scale.
        x: the layers, the strengths or the radii.
        title: the question or the answer.
        x_title: what `x` counts.
        y_title: the effect with its unit.
        subtitle: one line under the title.

    Raises:
        CtlensError: no model, nothing on the axis, or an array that is not one number per `x`.
    """
    require_some("models", shown)
    require_some(x_title, x)
    figure = panel_grid([label(name) for name in shown], _LAYOUT)
    at_x = np.asarray(x)
    concepts = dict.fromkeys(kind for curves, _ in shown.values() for kind in curves if kind not in INTERVENTION_STYLES)
    looks = {name: Style(name, MUTED, marker, "dash") for name, marker in zip(concepts, cycle(_CONCEPT_MARKERS))}
    looks |= INTERVENTION_STYLES
    for number, (subplot, (model, (curves, band))) in enumerate(zip(subplots(len(shown)), shown.items(), strict=True)):
        listed = number == 0
        draw_null(figure, at_x, band, "random directions", listed=listed, **subplot.at)
        for kind, curve in curves.items():
            numbers = checked_intervals(f"curve {kind!r}", curve, len(x))
            options = {"look": looks[kind], "listed": listed, "error_y": whiskers(numbers)}
            draw_line(figure, kind, at_x, numbers.value, **options, **subplot.at)
        figure.update_traces(meta=drawn_for(model), **subplot.at)
        figure.add_hline(0, line={"color": MUTED, "width": 1}, layer="below", **subplot.at)
    caption = (
        "Lines are means over pairs, bars their 95% intervals; the grey band is from the lowest to the highest "
        "random direction of equal size."
    )
    finish(figure, title, subtitle, kind="against_random", caption=caption)
    figure.update_yaxes(matches="y")
    for subplot in subplots(len(shown)):
        figure.update_xaxes(title_text=x_title if subplot.lowest else None, tickvals=list(x), **subplot.at)
        y_words = y_title if subplot.leftmost else None
        figure.update_yaxes(title_text=y_words, showticklabels=subplot.leftmost, **subplot.at)
    return fit_panels(figure, len(shown), _LAYOUT)
