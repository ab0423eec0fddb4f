"""Evidence for a cue in each model: three measurements by layer, each with its null, and the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import require_some
from ctlens.plots.intervals import Intervals, checked_intervals, draw_null, whiskers
from ctlens.plots.panels import PANELS_PER_ROW, PanelLayout, fit_panels, panel_grid, subplots
from ctlens.plots.theme import MUTED, Style, drawn_for, finish, label

_LAYOUT = PanelLayout(height=170, gap=56, below=54, side=0.07)
_WIDTH = 960  # pixels, chosen by eye

# The three measurements of a model fill one row of panels: the name of the panel, and the title of its axis.
_QUESTIONS = {
    "readable": ("cue readable", "balanced accuracy"),
    "used": ("direction used", "logit difference recovered (nats)"),
    "reelicited": ("re-elicited", "logit difference lost (nats)"),
}
# Hues of the ramp that no method has, and grey where the evidence decides nothing.
VERDICT_STYLES = {
    "vulnerable": Style("vulnerable", "#cf4a86", "circle", "solid"),
    "reduced": Style("reduced", "#8e2f9e", "triangle-down", "solid"),
    "masked": Style("masked", "#e38d78", "square", "solid"),
    "elsewhere": Style("elsewhere", "#e8a13c", "triangle-up", "solid"),
    "erased": Style("erased", "#3d2c8d", "diamond", "solid"),
    "inconclusive": Style("inconclusive", "#8b929c", "x-thin-open", "solid"),
}
_OTHER_DASHES = ("dot", "dashdot", "longdash")


class Measurement(NamedTuple):
    """One measurement of one model: value, ends of its interval, lowest and highest of its null, each `[layer]`."""

    value: ArrayLike
    low: ArrayLike
    high: ArrayLike
    null_low: ArrayLike
    null_high: ArrayLike


def evidence(
    measured: Mapping[str, Mapping[str, Measurement]],
    verdicts: Mapping[str, Sequence[str]],
    layers: Sequence[int],
    title: str,
    *,
    others: Mapping[str, Mapping[str, Mapping[str, ArrayLike]]] | None = None,
    subtitle: str | None = None,
) -> go.Figure:
    """Is the cue still readable, is its direction used, does it re-elicit? One row per model, one scale per column.

    Args:
        measured: per model, the base first, its measurements `"readable"`, `"used"` and `"reelicited"`.
        verdicts: per model, the verdict by layer, a key of `VERDICT_STYLES`.
        layers: the number of each layer.
        title: the question or the answer.
        others: per model and measurement, what other ways of measuring it found, by name, `[layer]` each; thin lines.
        subtitle: one line under the title.

    Raises:
        CtlensError: no model, no layer, or an array that is not one number per layer.
    """
    require_some("models", measured)
    require_some("layers", layers)
    base = next(iter(measured))
    drawn = [(model, question) for model in measured for question in _QUESTIONS]
    names = [f"{label(model)}: {_QUESTIONS[question][0]}" for model, question in drawn]
    figure = panel_grid(names, _LAYOUT)
    x = np.asarray(layers)
    for number, ((model, question), subplot) in enumerate(zip(drawn, subplots(len(drawn)), strict=True)):
        found = measured[model][question]
        numbers = checked_intervals(f"{question} of {model!r}", found[:3], len(layers))
        draw_null(figure, x, (found.null_low, found.null_high), "null", listed=number == 0, **subplot.at)
        if model != base:
            first_with_base = number == PANELS_PER_ROW
            _draw_base(figure, layers, measured[base][question].value, listed=first_with_base, **subplot.at)
        lines = (others or {}).get(model, {}).get(question, {})
        for dash, (name, values) in zip(_OTHER_DASHES, lines.items(), strict=False):
            _draw_other(figure, layers, name, values, dash, listed=model == base, **subplot.at)
        _draw_judged(figure, layers, numbers, verdicts[model], **subplot.at)
        figure.update_traces(meta=drawn_for(model), **subplot.at)
    _name_verdicts(figure, verdicts)
    caption = (
        "Lines are means over pairs, bars their 95% intervals, markers the verdict on the layer. The grey band is "
        "the null: shuffled labels, or random directions of equal size; the dashed line is the base. Thin lines are "
        "other probes and directions."
    )
    finish(figure, title, subtitle, kind="evidence", caption=caption)
    for (_, question), subplot in zip(drawn, subplots(len(drawn)), strict=True):
        figure.update_xaxes(title_text="layer" if subplot.lowest else None, tickvals=list(layers), **subplot.at)
        column = subplot.at["col"]
        scale = "y" if column == 1 else f"y{column}"
        figure.update_yaxes(title_text=_QUESTIONS[question][1], matches=scale, **subplot.at)
    figure.update_yaxes(title_font_size=11)
    return fit_panels(figure, len(drawn), _LAYOUT).update_layout(width=_WIDTH)


def _draw_base(figure: go.Figure, layers: Sequence[int], value: ArrayLike, *, listed: bool, **at: Any) -> None:
    figure.add_scatter(
        x=list(layers),
        y=np.asarray(value).tolist(),
        mode="lines",
        name="base",
        legendgroup="base",
        showlegend=listed,
        line={"color": MUTED, "dash": "dash", "width": 1.4},
        **at,
    )


def _draw_other(
    figure: go.Figure, layers: Sequence[int], name: str, values: ArrayLike, dash: str, *, listed: bool, **at: Any
) -> None:
    """A thin line without an interval."""
    figure.add_scatter(
        x=list(layers),
        y=np.asarray(values).tolist(),
        mode="lines",
        name=name,
        legendgroup=name,
        showlegend=listed,
        line={"color": MUTED, "dash": dash, "width": 1},
        **at,
    )


def _draw_judged(
    figure: go.Figure, layers: Sequence[int], numbers: Intervals, verdicts: Sequence[str], **at: Any
) -> None:
    """A grey line whose markers say the verdicts."""
    looks = [VERDICT_STYLES[verdict] for verdict in verdicts]
    colours = [look.colour for look in looks]
    figure.add_scatter(
        x=list(layers),
        y=numbers.value.tolist(),
        error_y=whiskers(numbers),
        mode="lines+markers",
        showlegend=False,
        line={"color": MUTED, "width": 1.6},
        marker=_marker(colours, [look.symbol for look in looks]),
        text=list(verdicts),
        hovertemplate="layer %{x}: %{y:.2f} (%{text})<extra></extra>",
        **at,
    )


def _name_verdicts(figure: go.Figure, verdicts: Mapping[str, Sequence[str]]) -> None:
    """A legend entry for each verdict that occurs."""
    occurring = {verdict for by_layer in verdicts.values() for verdict in by_layer}
    for name, look in VERDICT_STYLES.items():
        if name in occurring:
            marker = _marker(look.colour, look.symbol)
            figure.add_scatter(x=[None], y=[None], mode="markers", name=look.label, marker=marker)


def _marker(colour: str | list[str], symbol: str | list[str]) -> dict[str, Any]:
    """Plotly's marker, with an outline in its own colour: the open cross of `inconclusive` is nothing but outline."""
    return {"color": colour, "symbol": symbol, "size": 10, "line": {"width": 2, "color": colour}}
