"""Attended to, or used: attention on some keys beside what cutting it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots import panels as multiples
from ctlens.plots.arrays import checked, require_some
from ctlens.plots.curves import Curve
from ctlens.plots.theme import MUTED, Style, finish, style

HEIGHT, GAP, BELOW, SIDE = 250, 60, 60, 0.09
NAMED_HEADS, NAMED_KEEN = 3, 2  # by effect, by attention


def knockout_layers(
    layers: Sequence[int],
    panels: Mapping[str, Mapping[str, tuple[Curve, Curve]]],
    title: str,
    *,
    y_titles: Sequence[str],
    subtitle: str | None = None,
) -> go.Figure:
    """At which layers is attention paid, and at which does it matter? A panel a quantity, a line a model.

    Args:
        layers: their numbers.
        panels: per panel and model, a curve `[layer]` of the chosen keys and one of as many random keys.
        title: the question or the answer.
        y_titles: what each panel counts, with its unit.
        subtitle: one line under the title.

    Raises:
        CtlensError: there is no panel or layer, or a curve does not fit the layers.
    """
    require_some("panels", panels)
    require_some("layers", layers)
    figure = multiples.panels(list(panels), height=HEIGHT, gap=GAP, side=SIDE)
    for (place, first, _), models in zip(multiples.places(len(panels)), panels.values(), strict=True):
        for name, (curve, null) in models.items():
            chosen, random = (
                [checked(f"curve {name!r}", part, len(layers)) for part in each] for each in (curve, null)
            )
            look = style(name)
            _line(figure, layers, random, look, dash="dot", opacity=0.45, name=f"{look.label}, random keys", **place)
            _line(figure, layers, chosen, look, dash="solid", opacity=1.0, name=look.label, legend=first, **place)
    caption = "Lines are means over pairs, whiskers their 95% intervals; dotted lines cut as many random other keys."
    finish(figure, title, subtitle, x_title="layer", kind="knockout", caption=caption)
    for (place, _, _), words in zip(multiples.places(len(panels)), y_titles, strict=True):
        figure.update_yaxes(title_text=words, zeroline=True, zerolinecolor=MUTED, zerolinewidth=1, **place)
    figure.update_xaxes(tickvals=list(layers))
    return multiples.fit(figure, len(panels), height=HEIGHT, gap=GAP, below=BELOW).update_layout(width=1100)


def _line(
    figure: go.Figure,
    layers: Sequence[int],
    curve: list[np.ndarray],
    look: Style,
    *,
    dash: str,
    opacity: float,
    name: str,
    legend: bool = False,
    **place: int,
) -> None:
    value, low, high = curve
    figure.add_scatter(
        x=list(layers),
        y=value.tolist(),
        error_y={"array": (high - value).tolist(), "arrayminus": (value - low).tolist(), "thickness": 1.2, "width": 3},
        mode="lines+markers",
        name=name,
        legendgroup=look.label,
        showlegend=legend,
        opacity=opacity,
        line={"color": look.colour, "dash": dash, "width": 2},
        marker={"color": look.colour, "symbol": look.symbol, "size": 8},
        **place,
    )


def knockout_heads(
    points: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    heads: Sequence[str],
    title: str,
    *,
    y_title: str,
    subtitle: str | None = None,
) -> go.Figure:
    """Which heads that attend to the keys matter? A marker a head and model, an open one where random keys are cut.

    Args:
        points: per model, attention on the keys, the effect of cutting it and that of the null, `[head]` each.
        heads: names of the heads; those with the largest effects or attention are named.
        title: the question or the answer.
        y_title: what an effect counts, with its unit.
        subtitle: one line under the title.

    Raises:
        CtlensError: there is no model or head, or an array that is not one number a head.
    """
    require_some("points", points)
    figure = go.Figure()
    for row, (model, arrays) in enumerate(points.items()):
        attention, effect, null = (checked(f"points {model!r}", array, len(heads)) for array in arrays)
        look = style(model)
        named = {*np.argsort(-np.abs(effect))[:NAMED_HEADS].tolist(), *np.argsort(-attention)[:NAMED_KEEN].tolist()}
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
            textposition=("top center", "bottom center")[row % 2],
            textfont={"size": 10, "color": look.colour},
            name=look.label,
            marker={"color": look.colour, "symbol": look.symbol, "size": 9},
        )
    caption = "A marker a head, the mean over pairs; small open circles cut as many random other keys of that head."
    finish(figure, title, subtitle, y_title=y_title, kind="knockout", caption=caption)
    figure.update_yaxes(zeroline=True, zerolinecolor=MUTED, zerolinewidth=1)
    return figure.update_xaxes(title_text="share of attention before the cut", rangemode="tozero")
