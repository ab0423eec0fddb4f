"""The table of a figure's numbers, for a reader who redraws it elsewhere."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import plotly.graph_objects as go

from ctlens.plots.kinds import without_kind

TABLE_COLUMNS = ("panel", "series", "x", "y", "z", "low", "high", "text")
_DRAWN = ("scatter", "heatmap")
_Row = dict[str, object]


def csv_text(figure: go.Figure) -> str:
    """The rows of a figure as CSV, `panel, series, x, y, z, low, high, text`; empty where something has no value."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(TABLE_COLUMNS)
    table.writerows([row.get(column, "") for column in TABLE_COLUMNS] for row in table_rows(figure))
    return text.getvalue()


def table_rows(figure: go.Figure) -> Iterator[_Row]:
    """One row per mark, point of a line, or cell: its panel and series, its x and y, and the ends of its interval.

    An x or y is the label of the axis where the axis has labels. A band without a name belongs to the line
    after it, whose interval it is; a band with a name has rows of its own, without a y.
    """
    panels = _panels(figure)
    band: dict[Any, tuple[float, float]] = {}
    for trace in cast(tuple[Any, ...], figure.data):
        if trace.type not in _DRAWN:
            continue
        x_labels = _labels(figure, trace.xaxis, "x")
        y_labels = _labels(figure, trace.yaxis, "y")
        common = {"panel": panels.get(trace.xaxis or "x", ""), "series": trace.name or ""}
        if trace.type == "heatmap":
            found = _cells(trace, x_labels, y_labels)
        elif trace.fill != "toself":
            found = _points(trace, x_labels, band)
            band = {}
        elif trace.name:
            found = ({"x": _labelled(x, x_labels), "low": low, "high": high} for x, (low, high) in _band(trace).items())
        else:
            found = ()
            band = _band(trace)
        yield from ({**common, **row} for row in found)


def _panels(figure: go.Figure) -> dict[str, str]:
    """The words over each panel, by the name of the panel's horizontal axis."""
    words = [
        note for note in figure.layout.annotations if note.xref == note.yref == "paper" and note.yanchor == "bottom"
    ]
    found = {}
    for axis in figure.select_xaxes():
        across = axis.domain
        up = figure.layout[f"yaxis{(axis.anchor or 'y').removeprefix('y')}"].domain
        over = [
            note.text
            for note in words
            if across and across[0] <= note.x <= across[1] and abs(note.y - (up or (0, 1))[1]) < 1e-6
        ]
        found[f"x{axis.plotly_name.removeprefix('xaxis')}"] = _plain(over[0]) if over else ""
    return found


def _labels(figure: go.Figure, axis: str | None, kind: str) -> dict[int, str]:
    """The labels of an axis by their whole numbers; an axis that counts has none, for 1.5 means something there."""
    layout = figure.layout[f"{kind}axis{(axis or kind).removeprefix(kind)}"]
    numbers, texts = layout.tickvals, layout.ticktext
    if texts is None or not len(numbers) or list(numbers) != list(range(numbers[0], numbers[0] + len(numbers))):
        return {}
    return {number: _plain(without_kind(text)) for number, text in zip(numbers, texts, strict=True)}


def _plain(text: str) -> str:
    """The words of a text without its markup, and as they are read."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def _labelled(value: Any, labels: dict[int, str]) -> Any:
    """The label nearest to a value, because markers stand side by side around their label; a value without labels."""
    return labels.get(round(value), value) if labels else value


def _cells(trace: Any, x_labels: dict[int, str], y_labels: dict[int, str]) -> Iterator[_Row]:
    """The cells of a heatmap that have a number."""
    for (row, column), value in np.ndenumerate(np.asarray(trace.z, dtype=float)):
        text = "" if trace.text is None else _plain(str(trace.text[row][column]))
        if np.isfinite(value):
            yield {"x": _labelled(column, x_labels), "y": _labelled(row, y_labels), "z": value, "text": text}


def _band(trace: Any) -> dict[Any, tuple[float, float]]:
    """The lower and upper end of a band by x; its outline runs along the upper ends and back along the lower ones."""
    half = len(trace.x) // 2
    ends = zip(trace.y[half:][::-1], trace.y[:half], strict=True)
    return dict(zip(trace.x[:half], ends, strict=True))


def _points(trace: Any, labels: dict[int, str], band: dict[Any, tuple[float, float]]) -> Iterator[_Row]:
    """The points of a line, with the intervals of its band or its whiskers, and their names under the pointer."""
    bars = trace.error_y
    texts = trace.text if trace.customdata is None or not isinstance(trace.customdata[0], str) else trace.customdata
    for number, (x, y) in enumerate(zip(trace.x, trace.y, strict=True)):
        if y is None or not np.isfinite(y):
            continue
        row: _Row = {"x": _labelled(x, labels), "y": y}
        if x in band:
            row["low"], row["high"] = band[x]
        elif bars.array is not None:
            row["low"] = _without_rounding(y - bars.arrayminus[number])
            row["high"] = _without_rounding(y + bars.array[number])
        if isinstance(texts, Sequence) and isinstance(texts[number], str):
            row["text"] = _plain(texts[number])
        yield row


def _without_rounding(end: float) -> float:
    """The end of an interval as it was before a subtraction gave its whisker: 0.3, not 0.30000000000000004."""
    return float(f"{end:.12g}")
