"""Effects that one model's activations or weights bring to another: one panel per direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from ctlens.plots.arrays import require_some
from ctlens.plots.curves import draw_curve, layer_ticks
from ctlens.plots.intervals import Curve, checked_intervals, side_by_side, whiskers
from ctlens.plots.panels import PanelLayout, Subplot, fit_panels, panel_grid, subplots
from ctlens.plots.theme import MUTED, finish, style

_LAYOUT = PanelLayout(height=260, gap=60, below=54, side=0.07)
_BARS_LAYOUT = _LAYOUT._replace(below=74)  # the names of the parts are slanted
_WIDTH = 1100  # pixels, chosen by eye
_BARS_SPREAD = 0.8  # of the step from part to part that its bars fill; chosen by eye


def exchange_curves(
    layers: Sequence[int],
    shown: Mapping[str, Mapping[str, Curve]],
    title: str,
    *,
    y_title: str,
    adds_up: bool = False,
    subtitle: str | None = None,
) -> go.Figure:
    """At which layer does one model's activation bring its behaviour along? One panel per direction, a line per source.

    Args:
        layers: the number of each layer.
        shown: per panel and source, the share of the effect and its interval `[layer]`.
        title: the question or the answer.
        y_title: the quantity with its unit.
        adds_up: whether a share is what its layer adds to those in front of it, so that all together are the whole.
        subtitle: one line under the title.

    Raises:
        CtlensError: no panel, no layer, or an array that is not one number per layer.
    """
    require_some("panels", shown)
    require_some("layers", layers)
    figure = panel_grid(list(shown), _LAYOUT)
    x = np.asarray(layers)
    for subplot, curves in zip(subplots(len(shown)), shown.values(), strict=True):
        for name, curve in curves.items():
            numbers = checked_intervals(f"curve {name!r}", curve, len(x))
            draw_curve(figure, name, x, numbers, listed=subplot.leftmost, **subplot.at)
    caption = "Lines are ratios of means over pairs, bands their 95% intervals. Layer 0 is the first layer."
    if adds_up:
        caption += " A line adds up to what the last layer's stream brings. Below 0, the layer undoes it, or other "
        caption += "tokens carry it on."
    finish(figure, title, subtitle, kind="exchange_curves", caption=caption)
    figure.update_xaxes(title_text="layer", **layer_ticks(len(x)))
    return _with_levels(figure, len(shown), y_title, _LAYOUT, whole=not adds_up)


def graft_bars(
    groups: Sequence[Sequence[str]],
    shown: Mapping[str, Mapping[str, Curve]],
    title: str,
    *,
    y_title: str,
    subtitle: str | None = None,
) -> go.Figure:
    """Which part of the weights brings the behaviour along? One panel per direction, a bar per source.

    Args:
        groups: the names of the parts, left to right, in groups with a line between them.
        shown: per panel and source, the share of the effect and its interval `[part]`, over all groups.
        title: the question or the answer.
        y_title: the quantity with its unit.
        subtitle: one line under the title.

    Raises:
        CtlensError: no panel, no part, or an array that is not one number per part.
    """
    parts = [part for group in groups for part in group]
    ends = np.cumsum([len(group) for group in groups if group])
    require_some("panels", shown)
    require_some("parts", parts)
    figure = panel_grid(list(shown), _BARS_LAYOUT)
    for subplot, bars in zip(subplots(len(shown)), shown.values(), strict=True):
        _draw_bars(figure, parts, bars, subplot)
        for end in ends[:-1].tolist():
            figure.add_vline(end - 0.5, line={"color": MUTED, "width": 1}, **subplot.at)
    caption = "Bars are ratios of means over pairs, whiskers their 95% intervals."
    finish(figure, title, subtitle, kind="graft_bars", caption=caption)
    ticks = {"tickvals": list(range(len(parts))), "ticktext": list(parts), "tickangle": -40}
    figure.update_xaxes(**ticks, showgrid=False, range=[-0.6, len(parts) - 0.4])
    return _with_levels(figure, len(shown), y_title, _BARS_LAYOUT, whole=True).update_layout(barmode="overlay")


def _draw_bars(figure: go.Figure, parts: Sequence[str], bars: Mapping[str, Curve], subplot: Subplot) -> None:
    """The bars of one panel; those of one part stand side by side."""
    step = _BARS_SPREAD / len(bars)
    for offset, (name, curve) in zip(side_by_side(len(bars)) * step, bars.items(), strict=True):
        numbers = checked_intervals(f"bars {name!r}", curve, len(parts))
        look = style(name)
        figure.add_bar(
            x=(np.arange(len(parts)) + offset).tolist(),
            y=numbers.value.tolist(),
            width=step * 0.92,  # a sliver of white between neighbours
            error_y=whiskers(numbers),
            name=look.label,
            legendgroup=name,
            showlegend=subplot.leftmost,
            marker={"color": look.colour, "line": {"width": 0}},
            customdata=list(parts),
            hovertemplate=f"{look.label}, %{{customdata}}: %{{y:.3f}}<extra></extra>",
            **subplot.at,
        )


def _with_levels(figure: go.Figure, n_panels: int, y_title: str, layout: PanelLayout, *, whole: bool) -> go.Figure:
    """Puts all panels on one scale, with a line at none of the effect and, where it is meant, one at all of it."""
    for subplot in subplots(n_panels):
        figure.update_yaxes(title_text=y_title if subplot.leftmost else None, **subplot.at)
        figure.add_hline(0, line={"color": MUTED, "width": 1}, layer="below", **subplot.at)
        if not whole:
            continue
        figure.add_hline(1, line={"color": MUTED, "dash": "dot", "width": 1.2}, layer="below", **subplot.at)
        note = {"text": "the whole effect", "showarrow": False, "font": {"size": 11, "color": MUTED}}
        figure.add_annotation(**note, x=0, xref="x domain", xanchor="left", y=1, yanchor="bottom", **subplot.at)
    # The axis shows none and all of the effect, with air for the words, even where every share is small.
    figure.update_yaxes(matches="y", autorangeoptions_include=[-0.08, 1.12] if whole else [0.0])
    return fit_panels(figure, n_panels, layout).update_layout(width=_WIDTH)
