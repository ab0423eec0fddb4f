"""What one model brings to another: a panel a direction, by layer or by part of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.curves import Curve, draw_band, draw_line
from ctlens.plots.panels import fit, panels, places
from ctlens.plots.rates import whiskers
from ctlens.plots.theme import MUTED, finish, style

HEIGHT, GAP, BELOW, SIDE = 260, 60, 54, 0.07
BARS, WIDE = 0.8, 1100


def exchange_curves(
    layers: Sequence[int],
    shown: Mapping[str, Mapping[str, Curve]],
    title: str,
    *,
    y_title: str,
    subtitle: str | None = None,
) -> go.Figure:
    """At which layer does one model's activation bring its behaviour along? A panel a direction, a line a donor.

    Args:
        layers: the number of each layer.
        shown: per panel and donor, the share of the effect and its interval `[layer]`.
        title: the question or the answer.
        y_title: what is drawn.
        subtitle: one line under the title.

    Raises:
        CtlensError: no panel, no layer, or an array that is not one number a layer.
    """
    require_some("panels", shown)
    require_some("layers", layers)
    figure, x = panels(list(shown), height=HEIGHT, gap=GAP, side=SIDE), np.asarray(layers)
    for (place, first, _), curves in zip(places(len(shown)), shown.values(), strict=True):
        for name, curve in curves.items():
            value, low, high = (checked(f"curve {name!r}", end, len(x)) for end in curve)
            draw_band(figure, name, x, low, high, **place)
            draw_line(figure, name, x, value, listed=first, **place)
    caption = "Lines are ratios of means over pairs, bands their 95% intervals. Layer 0 is the first layer."
    finish(figure, title, subtitle, kind="exchange_curves", caption=caption)
    figure.update_xaxes(title_text="layer", tickmode="linear", tick0=0, dtick=max(1, len(x) // 12))
    return _framed(figure, len(shown), y_title, below=BELOW)


def graft_bars(
    parts: Sequence[str],
    shown: Mapping[str, Mapping[str, Curve]],
    title: str,
    *,
    y_title: str,
    breaks: Sequence[int] = (),
    subtitle: str | None = None,
) -> go.Figure:
    """Which part of the weights brings the behaviour along? A panel a direction, a bar a donor.

    Args:
        parts: the names of the parts, left to right.
        shown: per panel and donor, the share of the effect and its interval `[part]`.
        title: the question or the answer.
        y_title: what is drawn.
        breaks: numbers of the parts in front of which a line is drawn.
        subtitle: one line under the title.

    Raises:
        CtlensError: no panel, no part, or an array that is not one number a part.
    """
    require_some("panels", shown)
    require_some("parts", parts)
    figure, x = panels(list(shown), height=HEIGHT, gap=GAP, side=SIDE), np.arange(len(parts))
    for (place, first, _), bars in zip(places(len(shown)), shown.values(), strict=True):
        width = BARS / len(bars)
        for number, (name, curve) in enumerate(bars.items()):
            value, low, high = (checked(f"bars {name!r}", end, len(x)) for end in curve)
            look = style(name)
            figure.add_bar(
                x=(x + (number - (len(bars) - 1) / 2) * width).tolist(),
                y=value.tolist(),
                width=width * 0.92,
                error_y=whiskers(value, low, high),
                name=look.label,
                legendgroup=name,
                showlegend=first,
                marker={"color": look.colour, "line": {"width": 0}},
                customdata=list(parts),
                hovertemplate=f"{look.label}, %{{customdata}}: %{{y:.3f}}<extra></extra>",
                **place,
            )
        for at in breaks:
            figure.add_vline(at - 0.5, line={"color": MUTED, "width": 1}, **place)
    caption = "Bars are ratios of means over pairs, whiskers their 95% intervals."
    finish(figure, title, subtitle, kind="graft_bars", caption=caption)
    figure.update_xaxes(
        tickvals=x.tolist(), ticktext=list(parts), showgrid=False, range=[-0.6, len(parts) - 0.4], tickangle=-40
    )
    return _framed(figure, len(shown), y_title, below=BELOW + 20).update_layout(barmode="overlay")


def _framed(figure: go.Figure, count: int, y_title: str, *, below: int) -> go.Figure:
    """One scale for all panels, with lines at none and all of the effect."""
    for place, first, _ in places(count):
        figure.update_yaxes(title_text=y_title if first else None, **place)
        figure.add_hline(0, line={"color": MUTED, "width": 1}, layer="below", **place)
        figure.add_hline(1, line={"color": MUTED, "dash": "dot", "width": 1.2}, layer="below", **place)
        note = {"text": "the whole effect", "showarrow": False, "font": {"size": 11, "color": MUTED}}
        figure.add_annotation(**note, x=0, xref="x domain", xanchor="left", y=1, yanchor="bottom", **place)
    figure.update_yaxes(matches="y", autorangeoptions_include=[-0.08, 1.12])
    return fit(figure, count, height=HEIGHT, gap=GAP, below=below).update_layout(width=WIDE)
