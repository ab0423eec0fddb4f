"""The effect of a direction beside that of random ones, a panel a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.curves import Curve
from ctlens.plots.panels import Place, fit, panels, places
from ctlens.plots.rates import whiskers
from ctlens.plots.theme import MUTED, Style, drawn_for, finish, label

Band = tuple[ArrayLike, ArrayLike]
"""Lower and upper end, each `[x]`."""
Against = tuple[Mapping[str, Curve], Band]
"""The curves of one panel, and the random band behind them."""

HEIGHT, GAP, BELOW = 210, 58, 54
BAND_COLOUR = "rgba(110, 110, 110, 0.28)"
# Hues that no method has: a panel is a model, a line is what was done to it.
LINES = {
    "direction": Style("the direction", "#8e2f9e", "circle", "solid"),
    "opposite": Style("its opposite", "#cf4a86", "circle-open", "dot"),
}


def against_random(
    shown: Mapping[str, Against],
    x: Sequence[float],
    title: str,
    *,
    x_title: str,
    y_title: str,
    subtitle: str | None = None,
) -> go.Figure:
    """Is the effect of a direction larger than that of random ones, and in which model?

    Args:
        shown: per model, its curves (`"direction"`, `"opposite"`), the mean and its interval, and
            the random band; all on one scale.
        x: the layers or the strengths.
        title: the question or the answer.
        x_title: what `x` counts.
        y_title: the effect with its unit.
        subtitle: one line under the title.

    Raises:
        CtlensError: no model, nothing on the axis, or an array that is not one number per `x`.
    """
    require_some("models", shown)
    require_some(x_title, x)
    figure = panels([label(name) for name in shown], height=HEIGHT, gap=GAP, side=0.05)
    for (name, (curves, band)), (place, *_) in zip(shown.items(), places(len(shown)), strict=True):
        draw_band(figure, place, name, x, band, name="random directions", listed=name == next(iter(shown)))
        for kind, curve in curves.items():
            _draw(figure, place, kind, x, curve, listed=name == next(iter(shown)))
        figure.update_traces(meta=drawn_for(name), **place)
        figure.add_hline(0, line={"color": MUTED, "width": 1}, layer="below", **place)
    caption = "Lines are means over pairs, bars their 95% intervals; the grey band is from the lowest to the highest"
    finish(figure, title, subtitle, kind="against_random", caption=f"{caption} random direction of equal size.")
    figure.update_yaxes(matches="y")
    for place, first, last in places(len(shown)):
        figure.update_xaxes(title_text=x_title if last else None, tickvals=list(x), **place)
        figure.update_yaxes(title_text=y_title if first else None, showticklabels=first, **place)
    return fit(figure, len(shown), height=HEIGHT, gap=GAP, below=BELOW)


def draw_band(
    figure: go.Figure, place: Place, model: str, x: Sequence[float], band: Band, *, name: str, listed: bool
) -> None:
    """A grey band in one panel, in the legend where `listed`."""
    low, high = (checked(f"the band of {model!r}", end, len(x)).tolist() for end in band)
    figure.add_scatter(
        x=[*x, *x[::-1]],
        y=[*high, *low[::-1]],
        fill="toself",
        fillcolor=BAND_COLOUR,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        name=name,
        legendgroup="band",
        showlegend=listed,
        **place,
    )


def _draw(figure: go.Figure, place: Place, kind: str, x: Sequence[float], curve: Curve, *, listed: bool) -> None:
    value, low, high = (checked(f"curve {kind!r}", array, len(x)) for array in curve)
    look = LINES[kind]
    figure.add_scatter(
        x=list(x),
        y=value.tolist(),
        error_y=whiskers(value, low, high),
        mode="lines+markers",
        name=look.label,
        legendgroup=kind,
        showlegend=listed,
        line={"color": look.colour, "dash": look.dash, "width": 2.2},
        marker={"color": look.colour, "symbol": look.symbol, "size": 8},
        **place,
    )
