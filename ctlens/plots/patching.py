"""Grids of patches: how much each changes the answer, by layers or heads and positions, and by layers and heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import checked
from ctlens.plots.theme import MUTED, RAMP, finish, literal

# Sizes in pixels, chosen by eye.
_ROW_HEIGHT = 22
_LEAST_HEIGHT = 160  # below it a colour bar has no room for its title
_LETTER = 7  # down the page, that a letter of a slanted label takes
_UNDER = 56  # under the grid, besides slanted labels
_BAR_ROOM = 96  # right of the grid
_WRITTEN_ROWS = 40  # of more rows, only every second, third... is named

_CAPTION = "Red raises the number, blue lowers it, white is no change."


def patched_positions(
    changes: ArrayLike,
    rows: Sequence[str],
    tokens: Sequence[str],
    title: str,
    *,
    unit: str,
    subtitle: str | None = None,
) -> go.Figure:
    """At which position of which layer does a patch change the answer?

    Positions count from the end, so that the last token of all prompts is one column; a token that
    is the same in all of them is written under its column, and may stand under several.

    Args:
        changes: the change by a patch `[row, position]`; NaN where not measured, drawn empty.
        rows: the layers or heads, from top to bottom.
        tokens: of each position, the token, `""` where prompts differ.
        title: the question or the answer.
        unit: what a change counts.
        subtitle: one line under the title.

    Raises:
        CtlensError: the grid does not fit its labels, or is empty.
    """
    grid = checked("changes", changes, len(rows), len(tokens))
    ends = list(range(-len(tokens), 0))
    words = [token.strip() or str(end) for token, end in zip(tokens, ends, strict=True)]
    drawn = [literal(word) for word in words]
    names = [[f"{row}, {word} ({end})" for word, end in zip(drawn, ends, strict=True)] for row in rows]
    figure = _heatmap(grid, names, unit)
    caption = f"A column is a token, counted from the end. {_CAPTION}"
    finish(figure, title, subtitle, x_title="position", kind="patched_positions", caption=caption)
    step = max(1, len(rows) // _WRITTEN_ROWS)
    shown = list(range(0, len(rows), step))
    figure.update_yaxes(tickvals=shown, ticktext=[rows[row] for row in shown], autorange="reversed")
    figure.update_xaxes(tickvals=list(range(len(tokens))), ticktext=drawn, tickangle=-60)
    return _sized(figure, len(rows), _UNDER + _LETTER * max(map(len, words)))


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
    changes: ArrayLike,
    layers: Sequence[int],
    title: str,
    *,
    unit: str,
    subtitle: str | None = None,
    mlps: bool = False,
) -> go.Figure:
    """Which heads, and MLPs beside them, change the answer when they are patched?

    Args:
        changes: the change by a patch `[layer, head]`; NaN where not measured, drawn empty.
        layers: the number of each layer.
        title: the question or the answer.
        unit: what a change counts.
        subtitle: one line under the title.
        mlps: whether the last column is that of the MLPs.

    Raises:
        CtlensError: the grid does not fit its labels, or is empty.
    """
    columns = (*np.shape(changes), 0, 0)[1]
    heads = columns - mlps
    grid = checked("changes", changes, len(layers), columns)
    kinds = [*(f"H{head}" for head in range(heads)), *([" MLP"] if mlps else [])]
    figure = _heatmap(grid, [[f"L{layer}{kind}" for kind in kinds] for layer in layers], unit)
    finish(figure, title, subtitle, x_title="head", y_title="layer", kind="patched_heads", caption=_CAPTION)
    figure.update_yaxes(tickvals=list(range(len(layers))), ticktext=[str(layer) for layer in layers])
    shown = [*range(0, heads, max(1, heads // 16)), *range(heads, columns)]
    figure.update_xaxes(tickvals=shown, ticktext=[kinds[number].strip(" H") for number in shown])
    return _sized(figure.update_yaxes(autorange="reversed"), len(layers), _UNDER)


def _heatmap(grid: np.ndarray, names: list[list[str]], unit: str) -> go.Figure:
    """The grid with a name under the pointer for each cell, on a scale centred on 0."""
    span = float(np.nanmax(np.abs(grid), initial=0)) or 1.0
    trace = go.Heatmap(
        z=grid.tolist(),
        text=names,
        hovertemplate="%{text}: %{z:.3g}<extra></extra>",
        hoverongaps=False,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )
    words = {"text": unit.replace(", ", ",<br>"), "side": "right", "font": {"size": 12}}
    bar = {"title": words, "thickness": 10, "outlinewidth": 0}
    return go.Figure(trace).update_layout(
        coloraxis={"colorscale": "RdBu_r", "cmin": -span, "cmax": span, "colorbar": bar}
    )


def _sized(figure: go.Figure, rows: int, below: int) -> go.Figure:
    """Gives a grid its height, with room for its labels and its colour bar."""
    figure.update_xaxes(showgrid=False, showline=False, ticks="")
    figure.update_yaxes(showgrid=False, showline=False, ticks="")
    drawn = max(_LEAST_HEIGHT, _ROW_HEIGHT * rows)
    return figure.update_layout(height=drawn + figure.layout.margin.t + below, margin_r=_BAR_ROOM, margin_b=below)
