"""The numbers that a figure draws, as a table: what somebody who redraws it elsewhere asks for."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import plotly.graph_objects as go

COLUMNS = ("panel", "series", "x", "y", "z", "low", "high", "text")
DRAWN = ("scatter", "heatmap")
Row = dict[str, object]


def csv_text(figure: go.Figure) -> str:
    """The rows of a figure as CSV, `panel, series, x, y, z, low, high, text`; empty where something has no value."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows([row.get(column, "") for column in COLUMNS] for row in rows(figure))
    return text.getvalue()


def rows(figure: go.Figure) -> Iterator[Row]:
    """One row per mark, point of a line, or cell: where it is, what it is, and the ends of its interval.

    Places are the labels of the axis where it has some. A band that the legend does not name belongs
    to the line after it and gives that its interval; any other has rows of its own, without a height.
    """
    panels = _panels(figure)
    band: dict[Any, tuple[float, float]] = {}
    for trace in cast(tuple[Any, ...], figure.data):
        if trace.type not in DRAWN:
            continue
        x_labels, y_labels = (_labels(figure, getattr(trace, axis), axis[0]) for axis in ("xaxis", "yaxis"))
        common = {"panel": panels.get(trace.xaxis or "x", ""), "series": trace.name or ""}
        if trace.type == "heatmap":
            found = _cells(trace, x_labels, y_labels)
        elif trace.fill != "toself":
            found, band = _points(trace, x_labels, band), {}
        elif trace.name:
            found = ({"x": _place(x, x_labels), "low": low, "high": high} for x, (low, high) in _band(trace).items())
        else:
            found, band = (), _band(trace)
        yield from ({**common, **row} for row in found)


def _panels(figure: go.Figure) -> dict[str, str]:
    """By the name of its horizontal axis, the words over a panel."""
    words = [
        note for note in figure.layout.annotations if note.xref == note.yref == "paper" and note.yanchor == "bottom"
    ]
    found = {}
    for axis in figure.select_xaxes():
        across, up = axis.domain, figure.layout[f"yaxis{(axis.anchor or 'y').removeprefix('y')}"].domain
        over = [
            note.text
            for note in words
            if across and across[0] <= note.x <= across[1] and abs(note.y - (up or (0, 1))[1]) < 1e-6
        ]
        found[f"x{axis.plotly_name.removeprefix('xaxis')}"] = _plain(over[0]) if over else ""
    return found


def _labels(figure: go.Figure, axis: str | None, kind: str) -> dict[int, str]:
    """The labels of an axis by their places; none when it counts something, and a place between two has a meaning."""
    layout = figure.layout[f"{kind}axis{(axis or kind).removeprefix(kind)}"]
    places, texts = layout.tickvals, layout.ticktext
    if texts is None or not len(places) or list(places) != list(range(places[0], places[0] + len(places))):
        return {}
    return {place: _plain(text) for place, text in zip(places, texts, strict=True)}


def _plain(text: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


def _place(value: Any, labels: dict[int, str]) -> Any:
    """The label at a place, or less than half a step from it: markers of one label stand side by side."""
    return labels.get(round(value), value) if labels else value


def _cells(trace: Any, x_labels: dict[int, str], y_labels: dict[int, str]) -> Iterator[Row]:
    for (row, column), value in np.ndenumerate(np.asarray(trace.z, dtype=float)):
        text = "" if trace.text is None else _plain(str(trace.text[row][column]))
        if np.isfinite(value):
            yield {"x": _place(column, x_labels), "y": _place(row, y_labels), "z": value, "text": text}


def _band(trace: Any) -> dict[Any, tuple[float, float]]:
    """By place, the lower and upper end of an outline that runs along the upper ends and back along the lower."""
    half = len(trace.x) // 2
    ends = zip(trace.y[half:][::-1], trace.y[:half], strict=True)
    return dict(zip(trace.x[:half], ends, strict=True))


def _points(trace: Any, labels: dict[int, str], band: dict[Any, tuple[float, float]]) -> Iterator[Row]:
    bars = trace.error_y
    texts = trace.text if trace.customdata is None or not isinstance(trace.customdata[0], str) else trace.customdata
    for number, (x, y) in enumerate(zip(trace.x, trace.y, strict=True)):
        if y is None or not np.isfinite(y):
            continue
        row: Row = {"x": _place(x, labels), "y": y}
        if x in band:
            row["low"], row["high"] = band[x]
        elif bars.array is not None:
            row["low"], row["high"] = (
                float(f"{y + end:.12g}") for end in (-bars.arrayminus[number], bars.array[number])
            )
        if isinstance(texts, Sequence) and isinstance(texts[number], str):
            row["text"] = _plain(texts[number])
        yield row
