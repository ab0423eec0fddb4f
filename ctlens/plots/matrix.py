"""Matrices of trainings by evaluations: which threats, or which losses, change along with the trained one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.intervals import IntervalGrid, Intervals, checked_intervals
from ctlens.plots.panels import PANELS_PER_ROW, PanelLayout, Subplot, fit_panels, panel_grid, subplots
from ctlens.plots.theme import INK, LEGEND_ROW, cell_text, drawn_for, finish, label

# The darkest of RdBu would hide the dark text.
_CHANGE_COLOURS = sample_colorscale("RdBu_r", np.linspace(0.24, 0.76, 9).tolist())
_LEAST_SPAN = 0.2  # the least difference of rates that has the strongest colour, so that noise stays pale
_LARGEST_POWER = 4  # a factor of 16 has the strongest colour

# Sizes in pixels, chosen by eye.
_ROW_HEIGHT = 47  # two lines of text
_GAP = 44  # between two rows of matrices
_BELOW_SLANTED = 104  # under the matrices, for slanted names of columns
_BELOW_LEVEL = 64  # under the matrix, for level ones
_LEAST_HEIGHT = 140  # below it a colour bar has no room for its title


def cross_threat(
    trained: Sequence[str],
    evaluated: Sequence[str],
    panels: Mapping[str, IntervalGrid],
    clear: Mapping[str, ArrayLike],
    title: str,
    *,
    subtitle: str | None = None,
) -> go.Figure:
    """Does training against one threat change the others?

    One matrix per method, all on one scale; a cell whose row and column are the same threat is outlined.

    Args:
        trained: the threats trained on, from top to bottom.
        evaluated: the threats evaluated on, left to right.
        panels: per method, by how much the bad rate differs from the control's (-1 to 1) and its interval
            `[trained, evaluated]`; NaN where not measured, drawn empty.
        clear: per method, whether the difference is clear of 0 `[trained, evaluated]`; those are bold.
        title: the question or the answer.
        subtitle: one line under the title.

    Raises:
        CtlensError: no method, no threat, or an array of another shape.
    """
    require_some("panels", panels)
    require_some("trained", trained)
    columns = min(PANELS_PER_ROW, len(panels))
    layout = PanelLayout(_ROW_HEIGHT * len(trained), gap=_GAP, below=_BELOW_SLANTED, side=0.26 / columns)
    figure = panel_grid([label(method) for method in panels], layout)
    names = [[f"trained on {row}, evaluated on {column}" for column in evaluated] for row in trained]
    span = _LEAST_SPAN
    for subplot, (method, panel) in zip(subplots(len(panels)), panels.items(), strict=True):
        numbers = checked_intervals(f"panel {method!r}", panel, len(trained), len(evaluated))
        bold = checked(f"clear of {method!r}", clear[method], len(trained), len(evaluated)) > 0
        span = float(np.nanmax([span, *np.abs(numbers.value).ravel()]))
        ends = "[%{customdata[2]:+.1%}, %{customdata[3]:+.1%}]"
        hover = f"{label(method)}, %{{customdata[0]}}: %{{z:+.1%}} {ends}<extra></extra>"
        matrix = _matrix(numbers, names, hover, _difference, bold)
        figure.add_trace(matrix.update(meta=drawn_for(method)), **subplot.at)
    caption = (
        "Cells are points of bad rate above the control's, a paired difference; bold: clear of 0 where intervals hold "
        "for all cells on other threats at once; outlined: the threat trained on."
    )
    finish(figure, title, subtitle, kind="cross_threat", caption=caption)
    for subplot in subplots(len(panels)):
        _name_cells(figure, subplot, trained, evaluated)
        if subplot.lowest:
            figure.update_xaxes(title_text="evaluated on", **subplot.at)
        if subplot.leftmost:
            figure.update_yaxes(title_text="trained on", **subplot.at)
    words = {"text": "bad rate, less the control's", "side": "right", "font": {"size": 13}}
    bar = {"title": words, "tickformat": "+.0%", "thickness": 12, "len": 0.8, "outlinewidth": 0}
    figure.update_layout(coloraxis={"colorscale": _CHANGE_COLOURS, "cmin": -span, "cmax": span, "colorbar": bar})
    figure.update_layout(width=max(880, 400 * columns))
    return fit_panels(figure, len(panels), layout)


def cross_loss_matrix(
    trained: Sequence[str], measured: Sequence[str], panel: IntervalGrid, title: str, *, subtitle: str | None = None
) -> go.Figure:
    """Does training with one loss lower the others?

    The colour is the logarithm of the relative value, white at no change; a cell whose row and column
    are the same loss is outlined.

    Args:
        trained: the losses that the models were trained with, from top to bottom.
        measured: the losses they were measured by, left to right.
        panel: the value after training as a multiple of that before it, and its interval,
            `[trained, measured]`; NaN where not measured, drawn empty.
        title: the question or the answer.
        subtitle: one line under the title.

    Raises:
        CtlensError: no model, no loss, or an array of another shape.
    """
    rows = [label(name) for name in trained]
    columns = [label(name) for name in measured]
    numbers = checked_intervals("panel 'values'", panel, len(rows), len(columns))
    with np.errstate(divide="ignore"):
        powers = np.log2(numbers.value)
    span = float(np.clip(np.abs(powers[np.isfinite(powers)]).max(initial=1), 1, _LARGEST_POWER))
    figure = make_subplots()
    only = Subplot({"row": 1, "col": 1}, leftmost=True, lowest=True)
    names = [[f"trained with {row}, measured by {column}" for column in columns] for row in rows]
    hover = "%{customdata[0]}: %{customdata[1]:.3g} times the value before training<extra></extra>"
    plain = np.zeros(numbers.value.shape, dtype=bool)
    matrix = _matrix(numbers, names, hover, _multiple, plain).update(z=np.clip(powers, -span, span).tolist())
    figure.add_trace(matrix, **only.at)
    caption = (
        "Cells are losses as multiples of their value before training, with 95% intervals; 1 is no change, "
        "the colour is logarithmic; outlined: measured by the loss trained with."
    )
    finish(figure, title, subtitle, x_title="measured by", y_title="trained with", kind="cross_loss", caption=caption)
    _name_cells(figure, only, rows, columns)
    figure.update_xaxes(tickangle=0)
    words = {"text": "times before training", "side": "right", "font": {"size": 13}}
    bar = {"title": words, "thickness": 12, "len": 1, "outlinewidth": 0, **_power_ticks(span)}
    figure.update_layout(coloraxis={"colorscale": _CHANGE_COLOURS, "cmin": -span, "cmax": span, "colorbar": bar})
    above = figure.layout.margin.t - LEGEND_ROW + _GAP // 3  # there is no legend
    height = above + max(_ROW_HEIGHT * len(rows), _LEAST_HEIGHT) + _BELOW_LEVEL
    width = max(720, 300 + 110 * len(columns))
    return figure.update_layout(width=width, height=height, margin={"t": above, "b": _BELOW_LEVEL})


def _power_ticks(span: float) -> dict[str, Any]:
    """Ticks of a colour bar of powers of 2 at 1/16 to 16, every second one where the bar is long."""
    step = 2 if span > 2 else 1
    powers = [power for power in range(-_LARGEST_POWER, _LARGEST_POWER + 1) if abs(power) <= span and power % step == 0]
    return {"tickvals": powers, "ticktext": [f"{2.0**power:g}" for power in powers]}


def _matrix(
    numbers: Intervals,
    names: Sequence[Sequence[str]],
    hover: str,
    written: Callable[[float, float, float], str],
    bold: np.ndarray,
) -> go.Heatmap:
    """A matrix whose cells are `written` from value and interval; the hover text knows name, value, low, high."""
    cells = np.stack(numbers, axis=-1)  # [row, column, 3]
    texts = [["" if np.isnan(cell[0]) else written(*cell) for cell in row] for row in cells]
    texts = [
        [f"<b>{text}</b>" if strong else text for text, strong in zip(row, of_row, strict=True)]
        for row, of_row in zip(texts, bold, strict=True)
    ]
    known = [
        [(name, *cell) for name, cell in zip(row_names, row, strict=True)]
        for row_names, row in zip(names, cells.tolist(), strict=True)
    ]
    return go.Heatmap(
        z=numbers.value.tolist(),
        text=texts,
        texttemplate="%{text}",
        textfont={"size": 13},
        customdata=known,
        hovertemplate=hover,
        hoverongaps=False,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )


def _difference(value: float, low: float, high: float) -> str:
    """The text of a cell with a difference of rates, in points with its sign; there is no room for its interval.

    >>> _difference(0.123, 0.1, 0.2), _difference(-0.5, -0.6, -0.4), _difference(-0.001, 0.0, 0.0)
    ('+12', '−50', '0')
    """
    points = round(100 * value)
    return f"{points:+d}".replace("-", "−") if points else "0"


def _multiple(value: float, low: float, high: float) -> str:
    """The text of a cell with a multiple; an unknown interval is left out."""
    return cell_text(_short(value), "" if np.isnan(low + high) else f"{_short(low)}–{_short(high)}", INK)


def _short(value: float) -> str:
    """A multiple in few characters.

    >>> [_short(value) for value in (0.0123, 0.5, 23.4)]
    ['0.012', '0.50', '23']
    """
    if value < 0.1:
        return f"{value:.2g}"
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.0f}"


def _name_cells(figure: go.Figure, subplot: Subplot, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Names the rows and columns of one matrix, after `finish`, and outlines the cells where they are the same."""
    plain = {"tickmode": "array", "showgrid": False, "showline": False, "ticks": "", "tickfont": {"size": 12}}
    across = {"tickvals": list(range(len(columns))), "ticktext": list(columns), "tickangle": -40}
    figure.update_xaxes(**plain, **across, showticklabels=subplot.lowest, **subplot.at)
    down = {"tickvals": list(range(len(rows))), "ticktext": list(rows), "automargin": True, "ticklabelstandoff": 4}
    figure.update_yaxes(**plain, **down, range=[len(rows) - 0.5, -0.5], **subplot.at)
    for row, name in enumerate(rows):
        if name in columns:
            column = columns.index(name)
            edges = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5}
            figure.add_shape(type="rect", **edges, line={"color": INK, "width": 2}, **subplot.at)
