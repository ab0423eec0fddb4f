"""Attended to, or used: attention on chosen keys beside the change when that attention is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.curves import draw_line
from ctlens.plots.intervals import Curve, checked_intervals, whiskers
from ctlens.plots.panels import PanelLayout, fit_panels, panel_grid, subplots
from ctlens.plots.theme import MUTED, Style, finish, style

_LAYOUT = PanelLayout(height=250, gap=60, below=60, side=0.09)
_WIDTH = 1100  # pixels, chosen by eye
# How many heads per model have their names written beside them; chosen by eye.
_NAMED_BY_EFFECT = 3
_NAMED_BY_ATTENTION = 2


def knockout_layers(
    layers: Sequence[int],
    panels: Mapping[str, Mapping[str, tuple[Curve, Curve]]],
    title: str,
    *,
    y_titles: Sequence[str],
    subtitle: str | None = None,
) -> go.Figure:
    """At which layers is attention paid, and at which does it matter? One panel per quantity, one line per model.

    Args:
        layers: their numbers.
        panels: per panel and model, a curve `[layer]` of the chosen keys and one of as many random keys.
        title: the question or the answer.
        y_titles: the quantity of each panel, with its unit.
        subtitle: one line under the title.

    Raises:
        CtlensError: there is no panel or layer, or a curve does not fit the layers.
    """
    require_some("panels", panels)
    require_some("layers", layers)
    figure = panel_grid(list(panels), _LAYOUT)
    for subplot, models in zip(subplots(len(panels)), panels.values(), strict=True):
        for name, (chosen, random) in models.items():
            look = style(name)
            faint = replace(look, label=f"{look.label}, random keys", dash="dot")
            group = {"group": look.label, "model": name}
            _draw_whiskered(figure, layers, random, faint, **group, listed=False, opacity=0.45, **subplot.at)
            solid = replace(look, dash="solid")
            _draw_whiskered(figure, layers, chosen, solid, **group, listed=subplot.leftmost, opacity=1.0, **subplot.at)
    caption = "Lines are means over pairs, whiskers their 95% intervals; dotted lines cut as many random other keys."
    finish(figure, title, subtitle, x_title="layer", kind="knockout", caption=caption)
    for subplot, words in zip(subplots(len(panels)), y_titles, strict=True):
        figure.update_yaxes(title_text=words, zeroline=True, zerolinecolor=MUTED, zerolinewidth=1, **subplot.at)
    figure.update_xaxes(tickvals=list(layers))
    return fit_panels(figure, len(panels), _LAYOUT).update_layout(width=_WIDTH)


def _draw_whiskered(
    figure: go.Figure, layers: Sequence[int], curve: Curve, look: Style, *, group: str, model: str, **options: Any
) -> None:
    numbers = checked_intervals(f"curve {model!r}", curve, len(layers))
    error_y = whiskers(numbers, slim=True)
    draw_line(figure, group, np.asarray(layers), numbers.value, look=look, width=2, error_y=error_y, **options)


def knockout_heads(
    points: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    heads: Sequence[str],
    title: str,
    *,
    y_title: str,
    subtitle: str | None = None,
) -> go.Figure:
    """Which heads that attend to the keys matter? One marker per head and model, an open one where random keys are cut.

    Args:
        points: per model, attention on the keys, the effect of cutting it and that of the null, `[head]` each.
        heads: names of the heads; those with the largest effects or attention are named.
        title: the question or the answer.
        y_title: the effect, with its unit.
        subtitle: one line under the title.

    Raises:
        CtlensError: there is no model or head, or an array that is not one number per head.
    """
    require_some("points", points)
    figure = go.Figure()
    for number, (model, arrays) in enumerate(points.items()):
        # Names stand above the heads of one model and below those of the next, so that two models can be read.
        position = "top center" if number % 2 == 0 else "bottom center"
        attention, effect, null = np.stack([checked(f"points {model!r}", array, len(heads)) for array in arrays])
        _draw_heads(figure, model, heads, attention, effect, null, position)
    caption = "A marker is a head, the mean over pairs; small open circles cut as many random other keys of that head."
    finish(figure, title, subtitle, y_title=y_title, kind="knockout", caption=caption)
    figure.update_yaxes(zeroline=True, zerolinecolor=MUTED, zerolinewidth=1)
    return figure.update_xaxes(title_text="share of attention before the cut", rangemode="tozero")


def _draw_heads(
    figure: go.Figure,
    model: str,
    heads: Sequence[str],
    attention: np.ndarray,
    effect: np.ndarray,
    null: np.ndarray,
    name_position: str,
) -> None:
    """The heads of one model, over as many open circles for the null."""
    look = style(model)
    strongest = np.argsort(-np.abs(effect))[:_NAMED_BY_EFFECT]
    keenest = np.argsort(-attention)[:_NAMED_BY_ATTENTION]
    named = {*strongest.tolist(), *keenest.tolist()}
    hover = "%{customdata}: attention %{x:.2f}, change %{y:.3f}<extra></extra>"
    shared = {"x": attention.tolist(), "customdata": list(heads), "hovertemplate": hover, "legendgroup": model}
    figure.add_scatter(
        **shared,
        y=null.tolist(),
        mode="markers",
        marker={"color": look.colour, "symbol": "circle-open", "size": 6, "opacity": 0.5},
        showlegend=False,
    )
    figure.add_scatter(
        **shared,
        y=effect.tolist(),
        mode="markers+text",
        text=[head if number in named else "" for number, head in enumerate(heads)],
        textposition=name_position,
        textfont={"size": 10, "color": look.colour},
        name=look.label,
        marker={"color": look.colour, "symbol": look.symbol, "size": 9},
    )
