"""Panels under their names: small multiples of one size, three to a row, and panels of any height under each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ctlens.plots.theme import literal

PANELS_PER_ROW = 3
PANEL_NAME_HEIGHT = 26  # pixels: one line of 14 px and the air around it
_STACKED_GAP = 40  # pixels between two stacked panels, for the name of the lower one
_STACKED_NAME = 24  # pixels over the first of stacked panels, for its name


class PanelLayout(NamedTuple):
    """The size of a figure's panels and the room between them.

    The sizes that the figures ask for are chosen by eye.

    Attributes:
        height: of one panel, in pixels.
        gap: between two rows of panels, in pixels; it holds tick labels of the upper and names of the lower row.
        below: under the lowest row, in pixels; it holds tick labels and the title of the horizontal axis.
        side: between two columns, as a share of the figure's width; it holds the tick labels of the right one.
    """

    height: int
    gap: int
    below: int
    side: float

    def drawn(self, n_panels: int) -> int:
        """The pixels from the top of the highest panel to the bottom of the lowest."""
        rows = _rows(n_panels)
        return rows * self.height + (rows - 1) * self.gap


class Subplot(NamedTuple):
    """The address of a panel in its figure.

    Attributes:
        at: row and column as plotly's keywords, to be passed on with `**`.
        leftmost: whether the panel is the first of its row, where the vertical axis has its title.
        lowest: whether no panel stands below, so that the horizontal axis has its title here.
    """

    at: dict[str, Any]
    leftmost: bool
    lowest: bool


def panel_grid(names: Sequence[str], layout: PanelLayout) -> go.Figure:
    """A figure of empty panels, row by row, each under its name."""
    rows = _rows(len(names))
    columns = min(PANELS_PER_ROW, len(names))
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=names,
        horizontal_spacing=layout.side,
        vertical_spacing=layout.gap / layout.drawn(len(names)),
        specs=[
            [{} if row * PANELS_PER_ROW + column < len(names) else None for column in range(columns)]
            for row in range(rows)
        ],
    )
    figure.update_annotations(font_size=14, yshift=2)
    return figure


def subplots(n_panels: int) -> Iterator[Subplot]:
    """The addresses of the panels of a `panel_grid`, row by row."""
    for number in range(n_panels):
        row, column = divmod(number, PANELS_PER_ROW)
        yield Subplot({"row": row + 1, "col": column + 1}, column == 0, number + PANELS_PER_ROW >= n_panels)


def fit_panels(figure: go.Figure, n_panels: int, layout: PanelLayout) -> go.Figure:
    """Gives a figure its height, and lifts the legend over the names of the panels.

    Args:
        figure: from `panel_grid`, after `finish`.
        n_panels: how many panels it has.
        layout: as given to `panel_grid`.
    """
    figure.for_each_yaxis(_unmatch_itself)
    drawn = layout.drawn(n_panels)
    top = figure.layout.margin.t + PANEL_NAME_HEIGHT
    return figure.update_layout(
        height=drawn + top + layout.below,
        margin={"t": top, "b": layout.below},
        legend_y=1 + PANEL_NAME_HEIGHT / drawn,
    )


def _unmatch_itself(axis: Any) -> None:
    """Frees the first axis of a common scale from matching itself, of which the browser warns."""
    if axis.matches == axis.plotly_name.replace("axis", ""):
        axis.matches = None


def _rows(n_panels: int) -> int:
    return -(-n_panels // PANELS_PER_ROW)


def stacked_panels(names: Sequence[str], heights: Sequence[int], gap: int = _STACKED_GAP) -> go.Figure:
    """A figure of empty panels under each other, each under its name.

    Args:
        names: of the panels, drawn letter by letter.
        heights: of each, in pixels.
        gap: between two, in pixels.
    """
    total = sum(heights) + gap * (len(heights) - 1)
    figure = make_subplots(
        rows=len(names),
        cols=1,
        subplot_titles=[literal(name) for name in names],
        row_heights=list(heights),
        vertical_spacing=gap / total if len(names) > 1 else 0.0,
    )
    return figure.update_annotations(font_size=13, x=0, xanchor="left")


def fit_stacked(
    figure: go.Figure, heights: int, n_panels: int, *, below: int, gap: int = _STACKED_GAP, **layout: Any
) -> go.Figure:
    """Gives a figure of stacked panels its height, and lifts its legend over the name of the first.

    Args:
        figure: from `stacked_panels`, after `finish`.
        heights: of all its panels together, in pixels.
        n_panels: how many panels it has.
        below: under the lowest panel, in pixels.
        gap: as given to `stacked_panels`.
        **layout: further settings of plotly's layout.
    """
    drawn = heights + gap * (n_panels - 1)
    above = figure.layout.margin.t + _STACKED_NAME
    return figure.update_layout(
        height=above + drawn + below, margin_t=above, margin_b=below, legend_y=1 + _STACKED_NAME / drawn, **layout
    )
