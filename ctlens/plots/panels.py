"""Small multiples: panels of one size, three to a row, each under its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

Place = dict[str, Any]
"""Row and column of a panel, as plotly's keywords."""

COLUMNS = 3
NAME_HEIGHT = 26


def panels(names: Sequence[str], *, height: int, gap: int, side: float) -> go.Figure:
    """An empty panel per name, row by row.

    Args:
        names: what is written over each panel.
        height: of one panel, in pixels.
        gap: between two rows of panels, in pixels.
        side: between two columns, as a share of the width.
    """
    rows, columns = -(-len(names) // COLUMNS), min(COLUMNS, len(names))
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=names,
        horizontal_spacing=side,
        vertical_spacing=gap / _drawn(rows, height, gap),
        specs=[
            [{} if row * COLUMNS + column < len(names) else None for column in range(columns)] for row in range(rows)
        ],
    )
    figure.update_annotations(font_size=14, yshift=2)
    return figure


def places(count: int) -> Iterator[tuple[Place, bool, bool]]:
    """Per panel: its row and column for plotly, whether it is the first of its row and the last of its column."""
    for number in range(count):
        row, column = divmod(number, COLUMNS)
        yield {"row": row + 1, "col": column + 1}, column == 0, number + COLUMNS >= count


def fit(figure: go.Figure, count: int, *, height: int, gap: int, below: int) -> go.Figure:
    """Gives a finished figure of `count` panels its height, and lifts the legend over the names of the panels.

    Args:
        figure: from `panels`, after `finish`.
        count: how many panels it has.
        height: as given to `panels`.
        gap: as given to `panels`.
        below: room for the tick labels under the lowest panels, in pixels.
    """
    figure.for_each_yaxis(_free_of_itself)
    drawn = _drawn(-(-count // COLUMNS), height, gap)
    top = figure.layout.margin.t + NAME_HEIGHT
    return figure.update_layout(
        height=drawn + top + below, margin={"t": top, "b": below}, legend_y=1 + NAME_HEIGHT / drawn
    )


def _free_of_itself(axis: Any) -> None:
    """The first axis of a common scale must not match itself: the browser warns of it."""
    if axis.matches == axis.plotly_name.replace("axis", ""):
        axis.matches = None


def _drawn(rows: int, height: int, gap: int) -> int:
    return rows * height + (rows - 1) * gap
