"""What training against one threat, or with one loss, does to the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from ctlens.core.labels import BASE
from ctlens.plots import panels as multiples
from ctlens.plots.arrays import checked, require_some
from ctlens.plots.theme import INK, LEGEND_ROW, drawn_for, finish, label

Panel = tuple[ArrayLike, ArrayLike, ArrayLike]
"""Value, lower end and upper end of the interval, each `[trained, evaluated]`, or `[1, evaluated]` without a threat."""

# The darkest Purples would hide the outlines.
COLOURS = sample_colorscale("Purples", np.linspace(0, 0.8, 9).tolist())
CHANGES = sample_colorscale("RdBu_r", np.linspace(0.24, 0.76, 9).tolist())  # light enough for dark text
WHITE_FROM = 0.78
LARGEST_POWER = 4  # a factor of 16 has the strongest colour
CELL, GAP, BELOW, BELOW_LEVEL = 47, 44, 104, 64
SMALLEST = 140  # a colour bar with its title needs that many pixels
NO_THREAT = "no threat"


def cross_threat(
    trained: Sequence[str],
    evaluated: Sequence[str],
    panels: Mapping[str, Panel],
    title: str,
    *,
    subtitle: str | None = None,
    metric: str = "bad rate",
) -> go.Figure:
    """Does training against one threat protect against the others?

    One matrix a method, all on one scale; a cell whose row and column are the same threat is outlined.

    Args:
        trained: the threats trained on, from top to bottom.
        evaluated: the threats evaluated on, left to right.
        panels: per method, the rate (0 to 1) and its interval `[trained, evaluated]`, or `[1, evaluated]`
            for a model that was trained on no threat; NaN where not measured, drawn empty.
        title: the question or the answer.
        subtitle: one line under the title.
        metric: what the rate counts.

    Raises:
        CtlensError: no method, no threat, or an array of another shape.
    """
    require_some("panels", panels)
    require_some("trained", trained)
    size = {"height": CELL * len(trained), "gap": GAP}
    columns = min(multiples.COLUMNS, len(panels))
    figure = multiples.panels([label(method) for method in panels], **size, side=0.26 / columns)
    spots = list(multiples.places(len(panels)))
    rows: list[list[str]] = []
    for (method, panel), (place, *_) in zip(panels.items(), spots, strict=True):
        untrained = np.shape(panel[0])[:1] == (1,) and (len(trained) > 1 or method == BASE)
        rows.append([NO_THREAT] if untrained else list(trained))
        names = [[f"trained on {row}, evaluated on {column}" for column in evaluated] for row in rows[-1]]
        hover = f"{label(method)}, %{{customdata[0]}}: {metric} %{{z:.1%}}<extra></extra>"
        matrix = _matrix(*_checked(method, panel, rows[-1], evaluated), names, hover, _rate)
        figure.add_trace(matrix.update(meta=drawn_for(method)), **place)
    caption = "Cells are rates with their 95% intervals, in percent; outlined: evaluated on the threat trained on."
    finish(figure, title, subtitle, kind="cross_threat", caption=caption)
    for names, (place, first, last) in zip(rows, spots, strict=True):
        _label(figure, place, names, evaluated, len(trained), last=last)
        if last:
            figure.update_xaxes(title_text="evaluated on", **place)
        if first:
            figure.update_yaxes(title_text="trained on", **place)
    name = {"text": metric, "side": "right", "font": {"size": 13}}
    bar = {"title": name, "tickformat": ".0%", "thickness": 12, "len": 0.6, "outlinewidth": 0}
    figure.update_layout(coloraxis={"colorscale": COLOURS, "cmin": 0, "cmax": 1, "colorbar": bar})
    figure.update_layout(width=max(880, 400 * columns))
    return multiples.fit(figure, len(panels), **size, below=BELOW)


def cross_loss(
    trained: Sequence[str], measured: Sequence[str], panel: Panel, title: str, *, subtitle: str | None = None
) -> go.Figure:
    """Does training with one loss lower the others?

    The colour is the logarithm of the relative value, white at no change; a cell whose row and column
    are the same loss is outlined.

    Args:
        trained: what the models were trained with, from top to bottom.
        measured: the losses they were measured by, left to right.
        panel: the value after training as a multiple of that before it, and its interval,
            `[trained, measured]`; NaN where not measured, drawn empty.
        title: the question or the answer.
        subtitle: one line under the title.

    Raises:
        CtlensError: no model, no loss, or an array of another shape.
    """
    rows, columns = [label(name) for name in trained], [label(name) for name in measured]
    value, low, high = _checked("values", panel, rows, columns)
    with np.errstate(divide="ignore"):
        powers = np.log2(value)
    span = float(np.clip(np.abs(powers[np.isfinite(powers)]).max(initial=1), 1, LARGEST_POWER))
    figure = make_subplots()
    place: multiples.Place = {"row": 1, "col": 1}
    names = [[f"trained with {row}, measured by {column}" for column in columns] for row in rows]
    hover = "%{customdata[0]}: %{customdata[1]:.3g} times the value before training<extra></extra>"
    matrix = _matrix(value, low, high, names, hover, _multiple)
    figure.add_trace(matrix.update(z=np.clip(powers, -span, span).tolist()), **place)
    caption = (
        "Cells are losses as multiples of their value before training, with 95% intervals; 1 is no change, "
        "the colour is logarithmic; outlined: measured by the loss trained with."
    )
    finish(figure, title, subtitle, x_title="measured by", y_title="trained with", kind="cross_loss", caption=caption)
    _label(figure, place, rows, columns, len(rows), last=True)
    figure.update_xaxes(tickangle=0)
    step = 2 if span > 2 else 1
    ticks = [power for power in range(-LARGEST_POWER, LARGEST_POWER + 1) if abs(power) <= span and power % step == 0]
    marks = {"tickvals": ticks, "ticktext": [f"{2.0**power:g}" for power in ticks]}
    name = {"text": "times before training", "side": "right", "font": {"size": 13}}
    bar = {"title": name, "thickness": 12, "len": 1, "outlinewidth": 0, **marks}
    figure.update_layout(coloraxis={"colorscale": CHANGES, "cmin": -span, "cmax": span, "colorbar": bar})
    top = figure.layout.margin.t - LEGEND_ROW + GAP // 3
    drawn = max(CELL * len(rows), SMALLEST)
    figure.update_layout(
        width=max(720, 300 + 110 * len(columns)), height=top + drawn + BELOW_LEVEL, margin={"t": top, "b": BELOW_LEVEL}
    )
    return figure


def _checked(
    name: str, panel: Panel, rows: Sequence[str], columns: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    value, low, high = (checked(f"panel {name!r}", array, len(rows), len(columns)) for array in panel)
    return value, low, high


def _matrix(
    value: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    names: Sequence[Sequence[str]],
    hover: str,
    cell: Callable[[float, float, float], str],
) -> go.Heatmap:
    """A panel with its cells written by `cell` from value and interval; the hover text knows name, value, low, high."""
    ends = zip(value, low, high, strict=True)
    texts = [["" if np.isnan(v) else cell(v, *i) for v, *i in zip(*row, strict=True)] for row in ends]
    known = zip(names, value.tolist(), low.tolist(), high.tolist(), strict=True)
    return go.Heatmap(
        z=value.tolist(),
        text=texts,
        texttemplate="%{text}",
        textfont={"size": 13},
        customdata=[list(zip(*row, strict=True)) for row in known],
        hovertemplate=hover,
        hoverongaps=False,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )


def _rate(value: float, low: float, high: float) -> str:
    """The rate and its interval, in percent; what is NaN is left out."""
    interval = "" if np.isnan(low + high) else f"{100 * low:.0f}–{100 * high:.0f}"
    return _cell(f"{value:.0%}", interval, "white" if value >= WHITE_FROM else INK)


def _multiple(value: float, low: float, high: float) -> str:
    """The multiple and its interval; what is NaN is left out."""
    return _cell(_short(value), "" if np.isnan(low + high) else f"{_short(low)}–{_short(high)}", INK)


def _short(value: float) -> str:
    """A multiple in few characters."""
    return f"{value:.2g}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _cell(value: str, interval: str, colour: str) -> str:
    """A value and, smaller, its interval."""
    return f'<span style="color: {colour}">{value}<br><span style="font-size: 10px">{interval}</span></span>'


def _label(
    figure: go.Figure,
    place: multiples.Place,
    rows: Sequence[str],
    columns: Sequence[str],
    height: int,
    *,
    last: bool,
) -> None:
    """Names the rows and columns of one panel, and outlines the cells where they are the same threat."""
    plain = {"tickmode": "array", "showgrid": False, "showline": False, "ticks": "", "tickfont": {"size": 12}}
    figure.update_xaxes(**plain, **_names(columns), tickangle=-40, showticklabels=last, **place)
    figure.update_yaxes(
        **plain, **_names(rows), automargin=True, ticklabelstandoff=4, range=[height - 0.5, -0.5], **place
    )
    for row, column in ((row, columns.index(name)) for row, name in enumerate(rows) if name in columns):
        edges = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5}
        figure.add_shape(type="rect", **edges, line={"color": INK, "width": 2}, **place)


def _names(names: Sequence[str]) -> dict[str, list]:
    return {"tickvals": list(range(len(names))), "ticktext": list(names)}
