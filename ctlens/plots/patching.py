"""Grids of patches: how much each changes the answer, by layers or heads and positions, and by layers and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.kinds import add_kind_legend, kind_ticks
from ctlens.plots.panels import fit_stacked, stacked_panels
from ctlens.plots.theme import LEGEND_ROW, MUTED, RAMP, finish, label, literal

# Sizes in pixels, chosen by eye.
_ROW_HEIGHT = 22
_LEAST_HEIGHT = 160  # below it a colour bar has no room for its title
_LETTER = 7  # down the page, that a letter of a slanted label takes
_UNDER = 56  # under a grid, besides slanted labels
_NAME = 30  # over a lower grid, for its name
_BAR_ROOM = 96  # right of the grid
_WRITTEN_ROWS = 40  # of more rows, only every second, third... is named

_CAPTION = "Red raises the number, blue lowers it, white is no change."


class PatchedTokens(NamedTuple):
    """A grid for `patched_positions`.

    Attributes:
        changes: the change by a patch `[row, position]`; NaN where not measured, drawn empty.
        tokens: of each position, the token, `""` where prompts differ.
        kinds: of each position, the kind of its token, `""` where prompts differ; empty where kinds are not told apart.
    """

    changes: ArrayLike
    tokens: Sequence[str]
    kinds: Sequence[str] = ()


def patched_positions(
    grids: Mapping[str, PatchedTokens],
    rows: Sequence[str],
    title: str,
    *,
    unit: str,
    subtitle: str | None = None,
) -> go.Figure:
    """At which position of which layer does a patch change the answer? Grids under each other have one scale.

    Positions count from the end, so that the last token of all prompts is one column; a token that is the same in all
    of them is written under its column, and may stand under several. Where only its kind is the same, that is.

    Args:
        grids: by name; the name of a single one is not written.
        rows: the layers or heads of every grid, from top to bottom.
        title: the question or the answer.
        unit: what a change counts.
        subtitle: one line under the title.

    Raises:
        CtlensError: there is no grid, or one does not fit its labels or is empty.
    """
    require_some("grids", grids)
    values = {name: checked(_named(name), grid.changes, len(rows), len(grid.tokens)) for name, grid in grids.items()}
    words = {name: _columns(grid) for name, grid in grids.items()}
    below = _UNDER + _LETTER * max(len(word) for columns in words.values() for word in columns)
    height = max(_LEAST_HEIGHT, _ROW_HEIGHT * len(rows))
    figure = _scaled(stacked_panels(_panel_names(grids), [height] * len(grids), below + _NAME), values, unit)
    for number, (name, grid) in enumerate(grids.items(), start=1):
        ends = range(-len(grid.tokens), 0)
        drawn = [literal(word) for word in words[name]]
        names = [[f"{row}, {word} ({end})" for word, end in zip(drawn, ends, strict=True)] for row in rows]
        figure.add_trace(_heatmap(values[name], names), row=number, col=1)
    caption = f"A column is a token, counted from the end. {_CAPTION}"
    finish(figure, title, subtitle, kind="patched_positions", caption=caption)
    for number, (name, grid) in enumerate(grids.items(), start=1):
        ticks = {"tickvals": list(range(len(grid.tokens))), "ticktext": kind_ticks(words[name], grid.kinds)}
        figure.update_xaxes(**ticks, tickangle=-60, row=number, col=1)
    step = max(1, len(rows) // _WRITTEN_ROWS)
    shown = list(range(0, len(rows), step))
    figure.update_yaxes(tickvals=shown, ticktext=[rows[row] for row in shown], autorange="reversed")
    add_kind_legend(figure, [kind for grid in grids.values() for kind in grid.kinds])
    figure.update_xaxes(title_text="position", row=len(grids), col=1)
    return _sized(figure, height, len(grids), below)


def _columns(grid: PatchedTokens) -> list[str]:
    """What is written under each column: its token, else its number from the end."""
    return [token.strip() or str(end) for token, end in zip(grid.tokens, range(-len(grid.tokens), 0), strict=True)]


def first_order(
    exact: ArrayLike, approximate: ArrayLike, title: str, *, unit: str, subtitle: str | None = None
) -> go.Figure:
    """Is the first-order change of a patch its exact change? One point per patch.

    Args:
        exact: the change by each patch.
        approximate: the same by the gradient.
        title: the question or the answer.
        unit: what a change counts.
        subtitle: one line under the title.

    Raises:
        CtlensError: there are no patches, or not as many of both.
    """
    x = checked("exact", exact, np.size(exact))
    y = checked("approximate", approximate, np.size(exact))
    ends = [float(min(x.min(), y.min())), float(max(x.max(), y.max()))]
    figure = go.Figure()
    figure.add_scatter(x=ends, y=ends, mode="lines", line={"color": MUTED, "dash": "dot"}, hoverinfo="skip")
    figure.add_scatter(x=x.tolist(), y=y.tolist(), mode="markers", marker={"size": 6, "color": RAMP[0]})
    titles = {"x_title": f"exact {unit}", "y_title": f"first-order {unit}"}
    caption = "A point is a patch, the mean over pairs; on the dotted line both are equal."
    finish(figure, title, subtitle, **titles, kind="first_order", caption=caption)
    return figure.update_layout(showlegend=False, width=620, height=560)  # about square


def patched_heads(
    grids: Mapping[str, ArrayLike],
    layers: Sequence[int],
    title: str,
    *,
    unit: str,
    subtitle: str | None = None,
    mlps: bool = False,
) -> go.Figure:
    """Which heads, and MLPs beside them, change the answer when they are patched? Grids have one scale.

    Args:
        grids: by name, the change by a patch `[layer, head]`; NaN where not measured, drawn empty. The name of a single
            one is not written.
        layers: the number of each layer.
        title: the question or the answer.
        unit: what a change counts.
        subtitle: one line under the title.
        mlps: whether the last column is that of the MLPs.

    Raises:
        CtlensError: there is no grid, or one does not fit its labels or is empty.
    """
    require_some("grids", grids)
    columns = (*np.shape(next(iter(grids.values()))), 0, 0)[1]
    heads = columns - mlps
    values = {name: checked(_named(name), grid, len(layers), columns) for name, grid in grids.items()}
    kinds = [*(f"H{head}" for head in range(heads)), *([" MLP"] if mlps else [])]
    height = max(_LEAST_HEIGHT, _ROW_HEIGHT * len(layers))
    figure = _scaled(stacked_panels(_panel_names(grids), [height] * len(grids), _UNDER + _NAME), values, unit)
    for number, grid in enumerate(values.values(), start=1):
        names = [[f"L{layer}{kind}" for kind in kinds] for layer in layers]
        figure.add_trace(_heatmap(grid, names), row=number, col=1)
    finish(figure, title, subtitle, x_title="head", kind="patched_heads", caption=_CAPTION)
    ticks = {"tickvals": list(range(len(layers))), "ticktext": [str(layer) for layer in layers]}
    figure.update_yaxes(**ticks, autorange="reversed", title_text="layer")
    shown = [*range(0, heads, max(1, heads // 16)), *range(heads, columns)]
    figure.update_xaxes(tickvals=shown, ticktext=[kinds[number].strip(" H") for number in shown])
    return _sized(figure, height, len(grids), _UNDER)


def _named(name: str) -> str:
    return f"grid {name!r}" if name else "changes"


def _panel_names(grids: Mapping[str, object]) -> list[str]:
    """The names that stand over the panels; a single one has none."""
    return [label(name) for name in grids] if len(grids) > 1 else [""]


def _scaled(figure: go.Figure, values: Mapping[str, np.ndarray], unit: str) -> go.Figure:
    """Gives a figure one scale for all its grids, centred on 0."""
    span = max(float(np.nanmax(np.abs(grid), initial=0)) for grid in values.values()) or 1.0
    words = {"text": unit, "side": "right", "font": {"size": 11}}
    bar = {"title": words, "thickness": 10, "outlinewidth": 0}
    return figure.update_layout(coloraxis={"colorscale": "RdBu_r", "cmin": -span, "cmax": span, "colorbar": bar})


def _heatmap(grid: np.ndarray, names: list[list[str]]) -> go.Heatmap:
    """The grid with a name under the pointer for each cell."""
    return go.Heatmap(
        z=grid.tolist(),
        text=names,
        hovertemplate="%{text}: %{z:.3g}<extra></extra>",
        hoverongaps=False,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )


def _sized(figure: go.Figure, height: int, n_panels: int, below: int) -> go.Figure:
    """Gives panels of one height their sizes, with room for their labels and the colour bar."""
    figure.update_xaxes(showgrid=False, showline=False, ticks="")
    figure.update_yaxes(showgrid=False, showline=False, ticks="")
    if len(tuple(figure.select_traces())) == n_panels:
        figure.update_layout(margin_t=figure.layout.margin.t - LEGEND_ROW)  # there is no legend
    return fit_stacked(figure, height * n_panels, n_panels, below=below, gap=below + _NAME, margin_r=_BAR_ROOM)
