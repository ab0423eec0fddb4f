"""How alike methods are, between the ceiling of their seeds and the floor of the null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from ctlens.plots import panels as multiples
from ctlens.plots.arrays import checked, require_some
from ctlens.plots.curves import Curve
from ctlens.plots.theme import INK, LEGEND_ROW, MUTED, finish, label, style

Cells: TypeAlias = tuple[ArrayLike, ArrayLike, ArrayLike]
"""Value, lower and upper end of the interval, each `[method, method]`."""

COLOURS = sample_colorscale("RdBu_r", np.linspace(0.2, 0.8, 9).tolist())  # light enough for dark text
CEILING, RANDOM = "ceiling: same method, other seed", "random directions"
RANDOM_COLOUR = "rgba(128, 128, 128, 0.22)"
CELL, SIDE, BELOW, NAME = 56, 78, 62, 26
LEVEL = 6  # longer rows of names are slanted
HEIGHT, GAP, BELOW_CURVES = 250, 64, 54


def similarity_matrix(
    methods: Sequence[str],
    panels: Mapping[str, tuple[Cells, Cells, ArrayLike]],
    title: str,
    *,
    null: str = "",
    subtitle: str | None = None,
) -> go.Figure:
    """Which methods are alike, beyond the floor?

    Below the diagonal are the numbers as they are, above it those corrected for the ceiling, where
    there are any; on the diagonal, outlined, the ceilings. The null comes last, behind a line.

    Args:
        methods: labels of rows and columns.
        panels: per place, the raw cells, the corrected cells, and whether a cell is at the floor,
            `[method, method]`; NaN where there is no number, drawn empty.
        title: the question or the answer.
        null: the method that is the floor, if there is one.
        subtitle: one line under the title.

    Raises:
        CtlensError: no panel, no method, or an array of another shape.
    """
    require_some("panels", panels)
    order = sorted(range(len(methods)), key=lambda place: methods[place] == null)
    names = [label(methods[place]) for place in order]
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=list(panels), horizontal_spacing=0.06)
    for column, (place, (raw, corrected, floor)) in enumerate(panels.items(), start=1):
        value, low, high = (_merged(*ends, order, place) for ends in zip(raw, corrected, strict=True))
        at_floor = _ordered(floor, order, place) > 0
        figure.add_trace(_heatmap(names, value, low, high, at_floor), row=1, col=column)
    caption = (
        "Below the diagonal: as measured. Above it: divided by the ceilings of the two methods, where they are known; "
        "1 is as alike as two seeds of one method. Outlined: the ceilings. Small: 95% intervals over prompts. "
        "Grey in brackets: not above the floor."
    )
    finish(figure, title, subtitle, kind="similarity", caption=caption)
    for column in range(1, len(panels) + 1):
        _frame(figure, {"row": 1, "col": column}, names, null in methods, first=column == 1)
    name = {"text": "similarity", "side": "right", "font": {"size": 13}}
    bar = {"title": name, "thickness": 12, "len": 1, "outlinewidth": 0}
    figure.update_layout(coloraxis={"colorscale": COLOURS, "cmin": -1, "cmax": 1, "colorbar": bar})
    top = figure.layout.margin.t - LEGEND_ROW + NAME
    drawn = CELL * len(methods)
    return figure.update_layout(
        width=max(720, 220 + len(panels) * (SIDE * len(methods) + 40)),
        height=top + max(drawn, 140) + BELOW,
        margin={"t": top, "b": BELOW, "l": 110},
    )


def _merged(raw: ArrayLike, corrected: ArrayLike, order: Sequence[int], place: str) -> np.ndarray:
    """Raw cells on and below the diagonal, above it corrected ones, raw where there are none."""
    below, above = _ordered(raw, order, place), _ordered(corrected, order, place)
    return np.where(np.triu(np.isfinite(above), 1), above, below)


def _ordered(cells: ArrayLike, order: Sequence[int], place: str) -> np.ndarray:
    return checked(f"panel {place!r}", cells, len(order), len(order))[np.ix_(order, order)]


def _heatmap(
    names: Sequence[str], value: np.ndarray, low: np.ndarray, high: np.ndarray, at_floor: np.ndarray
) -> go.Heatmap:
    texts = [[_cell(*cell) for cell in zip(*row, strict=True)] for row in zip(value, low, high, at_floor, strict=True)]
    return go.Heatmap(
        z=value.tolist(),
        text=texts,
        texttemplate="%{text}",
        textfont={"size": 13},
        customdata=[[f"{row} and {column}" for column in names] for row in names],
        hovertemplate="%{customdata}: %{z:.3f}<extra></extra>",
        hoverongaps=False,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )


def _cell(value: float, low: float, high: float, at_floor: bool) -> str:
    """A number and, smaller, its interval; what is NaN is left out."""
    if np.isnan(value):
        return ""
    ends = "" if np.isnan(low + high) else f"{_short(low)} to {_short(high)}"
    number = f"({_short(value)})" if at_floor else _short(value)
    colour = MUTED if at_floor else INK
    return f'<span style="color: {colour}">{number}<br><span style="font-size: 10px">{ends}</span></span>'


def _short(value: float) -> str:
    return f"{value:.2f}".replace("-", "\u2212")


def _frame(figure: go.Figure, place: multiples.Place, names: Sequence[str], has_null: bool, *, first: bool) -> None:
    """Names rows and columns, outlines the diagonal, and draws the line in front of the null."""
    size = len(names)
    plain = {"tickmode": "array", "tickvals": list(range(size)), "ticktext": list(names), "showgrid": False}
    plain |= {"showline": False, "ticks": "", "tickfont": {"size": 12}}
    figure.update_xaxes(**plain, tickangle=0 if size <= LEVEL else -40, automargin=True, **place)
    figure.update_yaxes(
        **plain, automargin=True, ticklabelstandoff=4, range=[size - 0.5, -0.5], showticklabels=first, **place
    )
    for at in range(size):
        edges = {"x0": at - 0.5, "x1": at + 0.5, "y0": at - 0.5, "y1": at + 0.5}
        figure.add_shape(type="rect", **edges, line={"color": INK, "width": 2}, **place)
    if has_null and size > 1:
        edge, whole = size - 1.5, {"from": -0.5, "to": size - 0.5}
        line = {"color": INK, "width": 2, "dash": "dot"}
        figure.add_shape(type="line", x0=whole["from"], x1=whole["to"], y0=edge, y1=edge, line=line, **place)
        figure.add_shape(type="line", y0=whole["from"], y1=whole["to"], x0=edge, x1=edge, line=line, **place)


def similarity_curves(
    layers: Sequence[int],
    panels: Mapping[str, Mapping[str, Curve]],
    random: Mapping[str, tuple[ArrayLike, ArrayLike]],
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
        y_title: what is drawn.
        subtitle: one line under the title.

    Raises:
        CtlensError: no panel, no layer, or an array of another shape.
    """
    require_some("panels", panels)
    require_some("layers", layers)
    figure = multiples.panels([label(method) for method in panels], height=HEIGHT, gap=GAP, side=0.05)
    x, lowest = np.asarray(layers, dtype=float), 0.0
    for (method, others), (place, first, last) in zip(panels.items(), multiples.places(len(panels)), strict=True):
        low, high = (checked(f"random {method!r}", end, len(x)) for end in random[method])
        _band(figure, place, x, low, high, RANDOM_COLOUR, RANDOM, name=RANDOM)
        for other, (value, low, high) in others.items():
            numbers = [checked(f"curve {other!r}", end, len(x)) for end in (value, low, high)]
            _line(figure, place, x, numbers, other, is_ceiling=other == method)
            lowest = np.nanmin([lowest, *numbers[0]])
        figure.update_xaxes(title_text="layer" if last else None, **place)
        figure.update_yaxes(title_text=y_title if first else None, showticklabels=first, **place)
    ranks = {name: rank for rank, name in enumerate([RANDOM, CEILING, *map(label, panels)], start=1)}
    named: set[str] = set()
    figure.for_each_trace(lambda trace: _name_once(trace, named, ranks))
    caption = "Lines are means over prompts and pairs of seeds, bands 95% intervals over prompts."
    finish(figure, title, subtitle, kind="similarity_curves", caption=caption)
    figure.update_xaxes(tickmode="linear", tick0=layers[0], dtick=max(1, len(layers) // 8))
    figure.update_yaxes(range=[-0.25 if lowest > -0.25 else -1.05, 1.05], zeroline=True, zerolinecolor=MUTED)
    figure.update_layout(width=max(880, 330 * min(multiples.COLUMNS, len(panels))))
    return multiples.fit(figure, len(panels), height=HEIGHT, gap=GAP, below=BELOW_CURVES)


def _line(
    figure: go.Figure,
    place: multiples.Place,
    x: np.ndarray,
    curve: Sequence[np.ndarray],
    name: str,
    *,
    is_ceiling: bool,
) -> None:
    """A method's curve with its band, or a ceiling's without markers."""
    look = replace(style(name), label=CEILING, colour=INK, dash="dot") if is_ceiling else style(name)
    value, low, high = curve
    _band(figure, place, x, low, high, look.shade(0.14), look.label)
    figure.add_scatter(
        x=x.tolist(),
        y=value.tolist(),
        mode="lines" if is_ceiling else "lines+markers",
        name=look.label,
        legendgroup=look.label,
        line={"color": look.colour, "dash": look.dash, "width": 2.2},
        marker={"color": look.colour, "symbol": look.symbol, "size": 8},
        **place,
    )


def _name_once(trace: Any, named: set[str], ranks: Mapping[str, int]) -> None:
    """Shows the name of the first trace of each name, in the order of the panels."""
    trace.showlegend = bool(trace.name) and trace.name not in named
    trace.legendrank = ranks.get(trace.name, len(ranks) + 1)
    named.add(trace.name)


def _band(
    figure: go.Figure,
    place: multiples.Place,
    x: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    colour: str,
    group: str,
    name: str = "",
) -> None:
    known = np.isfinite(low + high)  # a NaN would break the outline of the band
    figure.add_scatter(
        x=[*x[known].tolist(), *x[known][::-1].tolist()],
        y=[*high[known].tolist(), *low[known][::-1].tolist()],
        fill="toself",
        fillcolor=colour,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        name=name,
        legendgroup=group,
        **place,
    )
