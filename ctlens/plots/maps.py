"""One head's attention, from every query to every key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.kinds import add_kind_legend, kind_ticks
from ctlens.plots.theme import LEGEND_ROW, finish, literal

_MAPS_PER_ROW = 2  # chosen by eye: a map has a label per token
_DIGITS = 4  # of a number in the file; the pointer shows three

# Sizes in pixels, chosen by eye.
_CELL = 13  # side of a cell: a tick label of 9 px fits beside it
_LEAST_HEIGHT = 150  # of a map of few queries
_LEAST_WIDTH = 300  # of a map of few keys
_LABELS_ROOM = 130  # under and left of a map, for the labels of its keys and queries
_NAME_ROOM = 34  # over a map, for its name
_BETWEEN_MAPS = 110  # between the two maps of a row, for the labels of the right one
_BAR_ROOM = 90  # for each colour bar
_BAR_OFFSET = 12  # from the maps to the first bar
_SECOND_BAR_OFFSET = 96  # from the maps to the second, that of the difference


class LabelledMap(NamedTuple):
    """Numbers `[query, key]` for `labelled_maps`.

    Attributes:
        values: the numbers.
        queries, keys: a label for each; labels may repeat.
        query_kinds, key_kinds: the kind of each token, `""` for none; empty where kinds are not told apart.
    """

    values: ArrayLike
    queries: Sequence[str]
    keys: Sequence[str]
    query_kinds: Sequence[str] = ()
    key_kinds: Sequence[str] = ()


class _Frame(NamedTuple):
    """Empty panels under their names, and the pixels that they take without their outer labels."""

    figure: go.Figure
    height: int
    width: int


def labelled_maps(
    maps: Mapping[str, LabelledMap],
    title: str,
    *,
    unit: str = "attention",
    difference: tuple[str, str] | None = None,
    subtitle: str | None = None,
) -> go.Figure:
    """Which tokens does a head look at, with the wrapper and without, before training and after? One panel per map.

    All maps have one scale. A token is known by its number on the axis, not by its text, which may repeat.

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
    drawn = {name: _checked_map(name, entry) for name, entry in maps.items()}
    top = max(float(np.max(entry.values)) for entry in drawn.values()) or 1.0
    if difference:
        drawn[f"{difference[1]} minus {difference[0]}"] = _difference(drawn, *difference)
    figure, height, width = _frame(drawn)
    for number, entry in enumerate(drawn.values()):
        row, column = divmod(number, _MAPS_PER_ROW)
        at: dict[str, Any] = {"row": row + 1, "col": column + 1}
        signed = bool(difference) and number == len(drawn) - 1
        figure.add_trace(_map(np.asarray(entry.values), "coloraxis2" if signed else "coloraxis"), **at)
        figure.update_xaxes(**_labelled(entry.keys, entry.key_kinds), tickangle=-90, **at)
        figure.update_yaxes(**_labelled(entry.queries, entry.query_kinds), autorange="reversed", **at)
    caption = "Rows are queries, columns the keys they look at; numbers are positions, 3–9 the sum of a run of keys."
    finish(figure, title, subtitle, kind="attention_maps", caption=caption)
    figure.update_layout(
        coloraxis=_scale("Purples", 0.0, top, unit, 1 + _BAR_OFFSET / width),
        coloraxis2=_scale("RdBu_r", -top, top, "change", 1 + _SECOND_BAR_OFFSET / width),
    )
    kinds = [kind for entry in drawn.values() for kind in entry.key_kinds]
    add_kind_legend(figure, kinds)
    above = figure.layout.margin.t + _NAME_ROOM - (0 if kinds else LEGEND_ROW)
    right = 2 * _BAR_ROOM if difference else _BAR_ROOM
    figure.update_annotations(font_size=13)
    return figure.update_layout(
        height=height + above + _LABELS_ROOM,
        width=width + _LABELS_ROOM + right,
        margin={"t": above, "b": _LABELS_ROOM, "l": _LABELS_ROOM, "r": right},
        legend_y=1 + _NAME_ROOM / height,
    )


def _checked_map(name: str, entry: LabelledMap) -> LabelledMap:
    values = checked(f"map {name!r}", entry.values, len(entry.queries), len(entry.keys))
    return entry._replace(values=values)


def _difference(maps: Mapping[str, LabelledMap], first: str, second: str) -> LabelledMap:
    """The second map minus the first, under the labels of the first."""
    before = np.asarray(maps[first].values)
    after = checked(f"map {second!r}", maps[second].values, *before.shape)
    return maps[first]._replace(values=after - before)


def _frame(maps: Mapping[str, LabelledMap]) -> _Frame:
    """Empty panels under their names, large enough that every cell can be seen."""
    rows = -(-len(maps) // _MAPS_PER_ROW)
    columns = min(_MAPS_PER_ROW, len(maps))
    n_queries = [len(entry.queries) for entry in maps.values()]
    most_keys = max(len(entry.keys) for entry in maps.values())
    of_rows = [n_queries[_MAPS_PER_ROW * row : _MAPS_PER_ROW * (row + 1)] for row in range(rows)]
    heights = [max(_LEAST_HEIGHT, _CELL * max(of_row)) for of_row in of_rows]
    height = sum(heights) + (rows - 1) * (_LABELS_ROOM + _NAME_ROOM)
    width = columns * max(_LEAST_WIDTH, _CELL * most_keys) + (columns - 1) * _BETWEEN_MAPS
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[literal(name) for name in maps],
        row_heights=heights,
        vertical_spacing=(_LABELS_ROOM + _NAME_ROOM) / height if rows > 1 else 0.0,
        horizontal_spacing=_BETWEEN_MAPS / width,
    )
    return _Frame(figure, height, width)


def _map(values: np.ndarray, coloraxis: str) -> go.Heatmap:
    return go.Heatmap(
        z=values.round(_DIGITS).tolist(),
        coloraxis=coloraxis,
        xgap=0.5,
        ygap=0.5,
        hovertemplate="from %{y}<br>to %{x}: %{z:.3f}<extra></extra>",
    )


def _labelled(labels: Sequence[str], kinds: Sequence[str]) -> dict[str, object]:
    """Plotly's settings of a numeric axis with these tick texts, which the pointer shows too."""
    return {
        "tickmode": "array",
        "tickvals": list(range(len(labels))),
        "ticktext": kind_ticks(labels, kinds),
        "labelalias": {str(number): literal(label) for number, label in enumerate(labels)},
        "tickfont": {"size": 9},
        "showgrid": False,
        "showline": False,
        "ticks": "",
    }


def _scale(colours: str, low: float, high: float, title: str, x: float) -> dict[str, object]:
    bar = {"title": {"text": title, "side": "right"}, "x": x, "xanchor": "left", "thickness": 10, "outlinewidth": 0}
    return {"colorscale": colours, "cmin": low, "cmax": high, "colorbar": bar}
