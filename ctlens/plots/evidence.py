"""What is left of a cue in each model: three measurements by layer, each with its null, and the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.interventions import draw_band
from ctlens.plots.panels import COLUMNS, Place, fit, panels, places
from ctlens.plots.rates import whiskers
from ctlens.plots.theme import MUTED, Style, drawn_for, finish, label

Measurement = tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike, ArrayLike]
"""Value, its interval's lower and upper end, lowest and highest of its null, each `[layer]`."""

WIDTH, HEIGHT, GAP, BELOW = 960, 170, 56, 54
QUESTIONS = {
    "readable": ("cue readable", "balanced accuracy"),
    "used": ("direction used", "logit difference recovered (nats)"),
    "reelicited": ("re-elicited", "logit difference lost (nats)"),
}
LOOKS = {
    "vulnerable": Style("vulnerable", "#cf4a86", "circle", "solid"),
    "reduced": Style("reduced", "#8e2f9e", "triangle-down", "solid"),
    "masked": Style("masked", "#e38d78", "square", "solid"),
    "erased": Style("erased", "#3d2c8d", "diamond", "solid"),
    "inconclusive": Style("inconclusive", "#8b929c", "x-thin-open", "solid"),
}


def evidence(
    measured: Mapping[str, Mapping[str, Measurement]],
    verdicts: Mapping[str, Sequence[str]],
    layers: Sequence[int],
    title: str,
    *,
    subtitle: str | None = None,
) -> go.Figure:
    """Is the cue still readable, is the direction used, does it re-elicit: a row a model, one scale a column.

    Args:
        measured: per model, the base first, and per measurement its curve with interval and null.
        verdicts: per model, the verdict by layer, a key of `LOOKS`.
        layers: the number of each layer.
        title: the question or the answer.
        subtitle: one line under the title.

    Raises:
        CtlensError: no model, no layer, or an array that is not one number a layer.
    """
    require_some("models", measured)
    require_some("layers", layers)
    base = next(iter(measured))
    cells = [(model, question) for model in measured for question in QUESTIONS]
    names = [f"{label(model)}: {QUESTIONS[question][0]}" for model, question in cells]
    figure = panels(names, height=HEIGHT, gap=GAP, side=0.07)
    for number, ((model, question), (place, *_)) in enumerate(zip(cells, places(len(cells)), strict=True)):
        value, low, high, *null = (
            checked(f"{question} of {model!r}", part, len(layers)) for part in measured[model][question]
        )
        draw_band(figure, place, model, layers, (null[0], null[1]), name="null", listed=not number)
        if model != base:
            _draw_base(figure, place, layers, measured[base][question][0], listed=number == COLUMNS)
        _draw(figure, place, layers, (value, low, high), verdicts[model])
        figure.update_traces(meta=drawn_for(model), **place)
    _name_verdicts(figure, verdicts)
    caption = "Lines are means over pairs, bars their 95% intervals, markers the verdict on the layer. The grey band is"
    caption += " the null: shuffled labels, or random directions of equal size; the dashed line is the base."
    finish(figure, title, subtitle, kind="evidence", caption=caption)
    for (_, question), (place, _, last) in zip(cells, places(len(cells)), strict=True):
        figure.update_xaxes(title_text="layer" if last else None, tickvals=list(layers), **place)
        column = place["col"]
        figure.update_yaxes(title_text=QUESTIONS[question][1], matches="y" if column == 1 else f"y{column}", **place)
    figure.update_yaxes(title_font_size=11)
    return fit(figure, len(cells), height=HEIGHT, gap=GAP, below=BELOW).update_layout(width=WIDTH)


def _draw_base(figure: go.Figure, place: Place, layers: Sequence[int], value: ArrayLike, *, listed: bool) -> None:
    figure.add_scatter(
        x=list(layers),
        y=np.asarray(value).tolist(),
        mode="lines",
        name="base",
        legendgroup="base",
        showlegend=listed,
        line={"color": MUTED, "dash": "dash", "width": 1.4},
        **place,
    )


def _draw(
    figure: go.Figure, place: Place, layers: Sequence[int], curve: Sequence[np.ndarray], verdicts: Sequence[str]
) -> None:
    value, low, high = curve
    looks = [LOOKS[found] for found in verdicts]
    figure.add_scatter(
        x=list(layers),
        y=value.tolist(),
        error_y=whiskers(value, low, high),
        mode="lines+markers",
        showlegend=False,
        line={"color": MUTED, "width": 1.6},
        marker={
            "color": [look.colour for look in looks],
            "symbol": [look.symbol for look in looks],
            "size": 10,
            "line": {"width": 2, "color": [look.colour for look in looks]},
        },
        text=list(verdicts),
        hovertemplate="layer %{x}: %{y:.2f} (%{text})<extra></extra>",
        **place,
    )


def _name_verdicts(figure: go.Figure, verdicts: Mapping[str, Sequence[str]]) -> None:
    """A legend entry for each verdict that occurs."""
    occurring = {found for by_layer in verdicts.values() for found in by_layer}
    for name, look in LOOKS.items():
        if name in occurring:
            marker = {
                "color": look.colour,
                "symbol": look.symbol,
                "size": 10,
                "line": {"width": 2, "color": look.colour},
            }
            figure.add_scatter(x=[None], y=[None], mode="markers", name=look.label, marker=marker)
