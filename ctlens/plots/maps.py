"""One head's attention, from every query to every key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.panels import Place
from ctlens.plots.theme import finish

CELL, LEAST_HEIGHT, LEAST_WIDTH, NAME_GAP, LABELS = 13, 150, 300, 34, 130
COLUMNS, SIDE, BARS = 2, 110, 180
DIGITS = 4


class LabelledMap(NamedTuple):
    """Numbers `[query, key]` with a label for each query and each key; labels may repeat."""

    values: ArrayLike
    queries: Sequence[str]
    keys: Sequence[str]


def attention_maps(
    maps: Mapping[str, LabelledMap],
    title: str,
    *,
    unit: str = "attention",
    difference: tuple[str, str] | None = None,
    subtitle: str | None = None,
) -> go.Figure:
    """Where does a head look, with the wrapper and without, before training and after? A panel a map, one scale.

    Tokens are told apart by their place on the axis, not by their text.

    Args:
        maps: by name, in the order of the panels.
        title: the question or the answer.
        unit: what a number counts, for the colour bars.
        difference: names of two maps with the same labels; the second minus the first is drawn too,
            on the same scale, centred on 0.
        subtitle: one line under the title.

    Raises:
        CtlensError: there is no map, one is empty or does not fit its labels, or the two do not subtract.
    """
    require_some("maps", maps)
    drawn = {
        name: LabelledMap(
            checked(f"map {name!r}", entry.values, len(entry.queries), len(entry.keys)), entry.queries, entry.keys
        )
        for name, entry in maps.items()
    }
    top = max(float(np.max(entry.values)) for entry in drawn.values()) or 1.0
    if difference:
        first, second = (drawn[name] for name in difference)
        change = checked(f"map {difference[1]!r}", second.values, *np.shape(first.values)) - np.asarray(first.values)
        drawn[" minus ".join(reversed(difference))] = LabelledMap(change, first.queries, first.keys)
    figure, size = _frame(drawn)
    for number, entry in enumerate(drawn.values()):
        place: Place = {"row": number // COLUMNS + 1, "col": number % COLUMNS + 1}
        signed = bool(difference) and number == len(drawn) - 1
        figure.add_trace(_map(np.asarray(entry.values), "coloraxis2" if signed else "coloraxis"), **place)
        figure.update_xaxes(**_labelled(entry.keys), tickangle=-90, **place)
        figure.update_yaxes(**_labelled(entry.queries), autorange="reversed", **place)
    caption = "Rows are queries, columns the keys they look at; numbers are positions, 3–9 the sum of a run of keys."
    finish(figure, title, subtitle, kind="attention_maps", caption=caption)
    figure.update_layout(
        coloraxis=_scale("Purples", 0.0, top, unit, 1 + 12 / size["width"]),
        coloraxis2=_scale("RdBu_r", -top, top, "change", 1 + 96 / size["width"]),
    )
    margin = {"t": figure.layout.margin.t + 10, "b": LABELS, "l": LABELS, "r": BARS if difference else BARS // 2}
    figure.update_annotations(font_size=13)
    return figure.update_layout(
        height=size["height"] + margin["t"] + margin["b"],
        width=size["width"] + margin["l"] + margin["r"],
        margin=margin,
    )


def _frame(maps: Mapping[str, LabelledMap]) -> tuple[go.Figure, dict[str, int]]:
    """Empty panels under their names, and the pixels that they take, so that every cell can be seen."""
    rows, columns = -(-len(maps) // COLUMNS), min(COLUMNS, len(maps))
    tall, wide = (
        [len(labels) for labels in each] for each in zip(*(entry[1:] for entry in maps.values()), strict=True)
    )
    heights = [max(LEAST_HEIGHT, CELL * max(tall[COLUMNS * row : COLUMNS * (row + 1)])) for row in range(rows)]
    height = sum(heights) + (rows - 1) * (LABELS + NAME_GAP)
    width = columns * max(LEAST_WIDTH, CELL * max(wide)) + (columns - 1) * SIDE
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=list(maps),
        row_heights=heights,
        vertical_spacing=(LABELS + NAME_GAP) / height if rows > 1 else 0.0,
        horizontal_spacing=SIDE / width,
    )
    return figure, {"height": height, "width": width}


def _map(values: np.ndarray, coloraxis: str) -> go.Heatmap:
    return go.Heatmap(
        z=values.round(DIGITS).tolist(),
        coloraxis=coloraxis,
        xgap=0.5,
        ygap=0.5,
        hovertemplate="from %{y}<br>to %{x}: %{z:.3f}<extra></extra>",
    )


def _labelled(labels: Sequence[str]) -> dict[str, object]:
    """A numeric axis with these tick texts, which the pointer shows too."""
    return {
        "tickmode": "array",
        "tickvals": list(range(len(labels))),
        "ticktext": list(labels),
        "labelalias": {str(number): name for number, name in enumerate(labels)},
        "tickfont": {"size": 9},
        "showgrid": False,
        "showline": False,
        "ticks": "",
    }


def _scale(colours: str, low: float, high: float, title: str, x: float) -> dict[str, object]:
    bar = {"title": {"text": title, "side": "right"}, "x": x, "xanchor": "left", "thickness": 10, "outlinewidth": 0}
    return {"colorscale": colours, "cmin": low, "cmax": high, "colorbar": bar}
