"""The figures of how alike methods are, between the ceiling of their seeds and the floor of the null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.curves import draw_curve, layer_ticks
from ctlens.plots.intervals import Curve, IntervalGrid, Intervals, NullBand, checked_intervals, draw_null
from ctlens.plots.panels import PANELS_PER_ROW, PanelLayout, Subplot, fit_panels, panel_grid, subplots
from ctlens.plots.theme import INK, LEGEND_ROW, MUTED, cell_text, finish, label, style

_COLOURS = sample_colorscale("RdBu_r", np.linspace(0.2, 0.8, 9).tolist())  # light enough for dark text
_CEILING = "ceiling: same method, other seed"
_RANDOM = "random directions"
_LEVEL_NAMES = 6  # longer rows of names are slanted

# Sizes of the matrix in pixels, chosen by eye.
_ROW_HEIGHT = 56
_COLUMN_WIDTH = 78
_BESIDE_PANEL = 40  # from one panel to the next
_LEAST_HEIGHT = 140  # below it a colour bar has no room for its title
_NAME_HEIGHT = 26  # over a panel, for its name
_BELOW = 62  # under the panels, for the names of their columns
_LEFT = 110  # left of the panels, for the names of their rows
_LEFT_AND_BAR = 220  # the same and, right of the panels, the colour bar

_CURVES_LAYOUT = PanelLayout(height=250, gap=64, below=54, side=0.05)


def similarity_matrix(
    methods: Sequence[str],
    panels: Mapping[str, tuple[IntervalGrid, IntervalGrid, ArrayLike]],
    title: str,
    *,
    null: str = "",
    subtitle: str | None = None,
) -> go.Figure:
    """Which methods are alike, beyond the floor?

    Numbers are corrected for the ceilings where these are known, and as measured where not; the hover text has those as
    measured. On the diagonal, outlined, are the ceilings. The null comes last, behind a line.

    Args:
        methods: labels of rows and columns.
        panels: by the positions that were compared, the raw cells, the corrected cells, and whether a cell is at
            the floor, `[method, method]`; NaN where there is no number, drawn empty.
        title: the question or the answer.
        null: the method that is the floor, if there is one.
        subtitle: one line under the title.

    Raises:
        CtlensError: no panel, no method, or an array of another shape.
    """
    require_some("panels", panels)
    order = sorted(range(len(methods)), key=lambda row: methods[row] == null)
    names = [label(methods[row]) for row in order]
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=list(panels), horizontal_spacing=0.06)
    for column, (positions, (raw, corrected, floor)) in enumerate(panels.items(), start=1):
        panel = f"panel {positions!r}"
        measured = _ordered(panel, raw, order)
        numbers = _merged(measured, _ordered(panel, corrected, order))
        at_floor = checked(panel, floor, len(order), len(order))[np.ix_(order, order)] > 0
        figure.add_trace(_heatmap(names, numbers, measured.value, at_floor), row=1, col=column)
    caption = (
        "Divided by the ceilings of the two methods, where they are known: 1 is as alike as two seeds of one method. "
        "Outlined: the ceilings. Small: 95% intervals over prompts. Grey in brackets: not above the floor."
    )
    finish(figure, title, subtitle, kind="similarity", caption=caption)
    for column in range(1, len(panels) + 1):
        subplot = Subplot({"row": 1, "col": column}, leftmost=column == 1, lowest=True)
        _frame(figure, subplot, names, has_null=null in methods)
    words = {"text": "similarity", "side": "right", "font": {"size": 13}}
    bar = {"title": words, "thickness": 12, "len": 1, "outlinewidth": 0}
    figure.update_layout(coloraxis={"colorscale": _COLOURS, "cmin": -1, "cmax": 1, "colorbar": bar})
    above = figure.layout.margin.t - LEGEND_ROW + _NAME_HEIGHT  # there is no legend
    return figure.update_layout(
        width=max(720, _LEFT_AND_BAR + len(panels) * (_COLUMN_WIDTH * len(methods) + _BESIDE_PANEL)),
        height=above + max(_ROW_HEIGHT * len(methods), _LEAST_HEIGHT) + _BELOW,
        margin={"t": above, "b": _BELOW, "l": _LEFT},
    )


def _ordered(name: str, cells: IntervalGrid, order: Sequence[int]) -> Intervals:
    """Checked cells with their rows and columns in another order."""
    numbers = checked_intervals(name, cells, len(order), len(order))
    return Intervals(*[array[np.ix_(order, order)] for array in numbers])


def _merged(raw: Intervals, corrected: Intervals) -> Intervals:
    """Corrected cells, or raw ones where a correction is not known."""
    return Intervals(*[np.where(np.isfinite(known), known, own) for own, known in zip(raw, corrected, strict=True)])


def _heatmap(names: Sequence[str], numbers: Intervals, raw: np.ndarray, at_floor: np.ndarray) -> go.Heatmap:
    cells = np.stack(numbers, axis=-1)  # [row, column, 3]
    texts = [
        [_similarity_text(*cell, at_floor=bool(floor)) for cell, floor in zip(row, floors, strict=True)]
        for row, floors in zip(cells, at_floor, strict=True)
    ]
    return go.Heatmap(
        z=numbers.value.tolist(),
        text=texts,
        texttemplate="%{text}",
        textfont={"size": 13},
        customdata=[
            [(f"{row} and {column}", value) for column, value in zip(names, values, strict=True)]
            for row, values in zip(names, raw.tolist(), strict=True)
        ],
        hovertemplate="%{customdata[0]}: %{z:.3f}, as measured %{customdata[1]:.3f}<extra></extra>",
        hoverongaps=False,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )


def _similarity_text(value: float, low: float, high: float, *, at_floor: bool) -> str:
    """The text of a cell, grey and in brackets at the floor; a number or interval that is NaN is left out."""
    if np.isnan(value):
        return ""
    interval = "" if np.isnan(low + high) else f"{_short(low)} to {_short(high)}"
    if at_floor:
        return cell_text(f"({_short(value)})", interval, MUTED)
    return cell_text(_short(value), interval, INK)


def _short(value: float) -> str:
    return f"{value:.2f}".replace("-", "\u2212")


def _frame(figure: go.Figure, subplot: Subplot, names: Sequence[str], *, has_null: bool) -> None:
    """Names rows and columns, outlines the diagonal, and draws the line in front of the null."""
    size = len(names)
    plain = {"tickmode": "array", "tickvals": list(range(size)), "ticktext": list(names), "showgrid": False}
    plain |= {"showline": False, "ticks": "", "tickfont": {"size": 12}}
    figure.update_xaxes(**plain, tickangle=0 if size <= _LEVEL_NAMES else -40, automargin=True, **subplot.at)
    named = {"automargin": True, "ticklabelstandoff": 4, "range": [size - 0.5, -0.5]}
    figure.update_yaxes(**plain, **named, showticklabels=subplot.leftmost, **subplot.at)
    for cell in range(size):
        edges = {"x0": cell - 0.5, "x1": cell + 0.5, "y0": cell - 0.5, "y1": cell + 0.5}
        figure.add_shape(type="rect", **edges, line={"color": INK, "width": 2}, **subplot.at)
    if has_null and size > 1:
        start = -0.5
        end = size - 0.5
        edge = size - 1.5
        line = {"color": INK, "width": 2, "dash": "dot"}
        figure.add_shape(type="line", x0=start, x1=end, y0=edge, y1=edge, line=line, **subplot.at)
        figure.add_shape(type="line", y0=start, y1=end, x0=edge, x1=edge, line=line, **subplot.at)


def similarity_curves(
    layers: Sequence[int],
    panels: Mapping[str, Mapping[str, Curve]],
    random: Mapping[str, NullBand],
    title: str,
    *,
    y_title: str,
    subtitle: str | None = None,
) -> go.Figure:
    """At which depth is a method like the others, and where are its ceiling and its floor?

    Args:
        layers: the numbers on the horizontal axis.
        panels: per method, its similarity to every method and its interval `[layer]`; that to
            itself is its ceiling. NaN where not known.
        random: per method, the ends of the band of random directions `[layer]`.
        title: the question or the answer.
        y_title: the quantity with its unit.
        subtitle: one line under the title.

    Raises:
        CtlensError: no panel, no layer, or an array of another shape.
    """
    require_some("panels", panels)
    require_some("layers", layers)
    figure = panel_grid([label(method) for method in panels], _CURVES_LAYOUT)
    x = np.asarray(layers, dtype=float)
    lowest = 0.0
    for subplot, (method, others) in zip(subplots(len(panels)), panels.items(), strict=True):
        draw_null(figure, x, random[method], _RANDOM, listed=True, **subplot.at)
        for other, curve in others.items():
            numbers = checked_intervals(f"curve {other!r}", curve, len(x))
            _draw_similarity(figure, subplot, x, numbers, other, is_ceiling=other == method)
            lowest = float(np.nanmin([lowest, *numbers.value]))
        figure.update_xaxes(title_text="layer" if subplot.lowest else None, **subplot.at)
        y_words = y_title if subplot.leftmost else None
        figure.update_yaxes(title_text=y_words, showticklabels=subplot.leftmost, **subplot.at)
    ranks = {name: rank for rank, name in enumerate([_RANDOM, _CEILING, *map(label, panels)], start=1)}
    named: set[str] = set()
    figure.for_each_trace(lambda trace: _name_once(trace, named, ranks))
    caption = "Lines are means over prompts and pairs of seeds, bands 95% intervals over prompts."
    finish(figure, title, subtitle, kind="similarity_curves", caption=caption)
    figure.update_xaxes(**layer_ticks(len(layers), most=8, first=layers[0]))
    # The axis shows where 0 is and, only where a similarity is clearly negative, the whole range of a similarity.
    figure.update_yaxes(range=[-0.25 if lowest > -0.25 else -1.05, 1.05], zeroline=True, zerolinecolor=MUTED)
    figure.update_layout(width=max(880, 330 * min(PANELS_PER_ROW, len(panels))))
    return fit_panels(figure, len(panels), _CURVES_LAYOUT)


def _draw_similarity(
    figure: go.Figure, subplot: Subplot, x: np.ndarray, numbers: Intervals, name: str, *, is_ceiling: bool
) -> None:
    """A method's curve with its band, or the ceiling's: dotted, without markers, in one look in all panels."""
    look = style(name)
    mode = "lines+markers"
    if is_ceiling:
        look = replace(look, label=_CEILING, colour=INK, dash="dot")
        mode = "lines"
    draw_curve(figure, look.label, x, numbers, look=look, mode=mode, **subplot.at)


def _name_once(trace: Any, named: set[str], ranks: Mapping[str, int]) -> None:
    """Shows the name of the first trace of each name, in the order of the panels."""
    trace.showlegend = bool(trace.name) and trace.name not in named
    trace.legendrank = ranks.get(trace.name, len(ranks) + 1)
    named.add(trace.name)
