"""Attention heads, and other components, as grids of layers by heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.panels import PANELS_PER_ROW, PanelLayout, fit_panels, panel_grid, subplots
from ctlens.plots.theme import drawn_for, finish, label

_WRITTEN_CELLS = 36  # numbers are written into grids of at most so many cells: 6 layers of 6 heads
_LEAST_CHANGE = 0.02  # of the largest value, at which the scale of the changes ends: rounding must not fill it
# Per panel of `attention_heads`: its name, and the share of the width that it fills. A colour bar stands right of the
# second panel, whose scale the first shares, and right of the third.
_BEFORE_AND_AFTER = (
    ("before training", (0.0, 0.28)),
    ("after training", (0.31, 0.59)),
    ("after minus before", (0.7, 0.98)),
)

# Sizes of `component_grids` in pixels, chosen by eye.
_CELL_HEIGHT = 34
_CELL_WIDTH = 52
_LEAST_HEIGHT = 140  # below it a colour bar has no room for its title
_BAR_ROOM = 96  # right of the panels
_LABELS_ROOM = 68  # left of the panels, for the names of the layers


def attention_heads(
    before: ArrayLike,
    after: ArrayLike,
    title: str,
    *,
    what: str = "attention mass on the wrapper",
    subtitle: str | None = None,
) -> go.Figure:
    """Which heads stopped reading the wrapper, and which read it more? It draws any other quantity of a head as well.

    Before and after share one scale from 0; the difference has its own, centred on 0 and never so fine that
    a change in the last digits looks large.

    Args:
        before: the quantity `[layer, head]`, not negative, before training.
        after: the same after training.
        title: the question or the answer.
        what: the quantity in words, with its unit.
        subtitle: one line under the title.

    Raises:
        CtlensError: the two are not the same `[layer, head]`, or are empty.
    """
    layers, heads = (*np.shape(before), 0, 0)[:2]
    first = checked("before", before, layers, heads)
    second = checked("after", after, layers, heads)
    change = second - first
    figure = make_subplots(cols=3, shared_yaxes=True)
    names = [[f"L{layer}H{head}" for head in range(heads)] for layer in range(layers)]
    for column, (values, coloraxis) in enumerate(
        ((first, "coloraxis"), (second, "coloraxis"), (change, "coloraxis2")), start=1
    ):
        name, domain = _BEFORE_AND_AFTER[column - 1]
        figure.add_trace(_grid(values, coloraxis, names), row=1, col=column)
        figure.update_xaxes(domain=domain, row=1, col=column)
        over = {"x": sum(domain) / 2, "xanchor": "center", "y": 1.0, "yanchor": "bottom"}
        figure.add_annotation(text=name, xref="paper", yref="paper", showarrow=False, **over)
    caption = f"Cells are heads (L0H1 is layer 0, head 1); each is the mean {what}."
    finish(figure, title, subtitle, x_title="head", y_title="layer", kind="attention_heads", caption=caption)
    top = float(max(first.max(), second.max()))
    span = max(float(np.abs(change).max()), _LEAST_CHANGE * top)
    figure.update_layout(
        coloraxis=_scale("Purples", 0.0, top or 1.0, x=0.6),
        coloraxis2=_scale("RdBu_r", -(span or 1.0), span or 1.0, x=0.99),
    )
    plain = {"tickmode": "linear", "tick0": 0, "showgrid": False, "showline": False, "ticks": ""}
    figure.update_xaxes(**plain, dtick=max(1, heads // 8))
    return figure.update_yaxes(**plain, dtick=max(1, layers // 12), autorange="reversed")


def _grid(values: np.ndarray, coloraxis: str, names: list[list[str]]) -> go.Heatmap:
    """Draws one grid `[layer, column]`; the numbers of a small one are written into its cells."""
    return go.Heatmap(
        z=values.tolist(),
        text=names,
        texttemplate="%{text}<br>%{z:.2f}" if values.size <= _WRITTEN_CELLS else None,
        textfont={"size": 10},
        hovertemplate="%{text}: %{z:.3f}<extra></extra>",
        coloraxis=coloraxis,
        xgap=1,
        ygap=1,
    )


def _scale(colours: str, low: float, high: float, *, x: float, **bar: object) -> dict[str, object]:
    bar |= {"x": x, "xanchor": "left", "thickness": 10, "outlinewidth": 0, "tickfont": {"size": 11}}
    return {"colorscale": colours, "cmin": low, "cmax": high, "colorbar": bar}


def component_grids(
    grids: Mapping[str, ArrayLike], columns: Sequence[str], title: str, *, unit: str, subtitle: str | None = None
) -> go.Figure:
    """Which components of which layer push which way? One panel per model, all on one scale centred on 0.

    Args:
        grids: per model, a number for every component `[layer, column]`.
        columns: the components of a layer, for example its heads and its MLP.
        title: the question or the answer.
        unit: what a number counts.
        subtitle: one line under the title.

    Raises:
        CtlensError: no model, or a grid of another shape.
    """
    require_some("grids", grids)
    layers = len(np.asarray(next(iter(grids.values()))))
    values = {name: checked(f"grid {name!r}", grid, layers, len(columns)) for name, grid in grids.items()}
    layout = PanelLayout(height=max(_LEAST_HEIGHT, _CELL_HEIGHT * layers), gap=54, below=60, side=0.05)
    figure = panel_grid([label(name) for name in grids], layout)
    span = max(float(np.abs(grid).max()) for grid in values.values()) or 1.0
    names = [[f"L{layer}{column}" for column in columns] for layer in range(layers)]
    for (model, grid), subplot in zip(values.items(), subplots(len(grids)), strict=True):
        figure.add_trace(_grid(grid, "coloraxis", names).update(meta=drawn_for(model)), **subplot.at)
    caption = "Rows are layers, columns their heads and MLP; red is for, blue against, white is nothing."
    finish(figure, title, subtitle, kind="component_grids", caption=caption)
    bar = {"title": {"text": unit, "side": "right"}}
    figure.update_layout(coloraxis=_scale("RdBu_r", -span, span, x=1.01, **bar))
    plain = {"showgrid": False, "showline": False, "ticks": ""}
    figure.update_xaxes(**plain, tickvals=list(range(len(columns))), ticktext=list(columns))
    figure.update_yaxes(**plain, tickmode="linear", tick0=0, dtick=max(1, layers // 12), autorange="reversed")
    for subplot in subplots(len(grids)):
        figure.update_yaxes(title_text="layer" if subplot.leftmost else None, **subplot.at)
    fit_panels(figure, len(grids), layout)
    panels = _CELL_WIDTH * len(columns) * min(PANELS_PER_ROW, len(grids))
    return figure.update_layout(margin_r=_BAR_ROOM, width=max(700, _LABELS_ROOM + panels + _BAR_ROOM))
