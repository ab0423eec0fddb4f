"""Which attention heads changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from ctlens.plots import panels as multiples
from ctlens.plots.arrays import checked, require_some
from ctlens.plots.theme import drawn_for, finish, label

WRITTEN_CELLS = 36
LEAST_CHANGE = 0.02  # of the largest value: less is not to fill the scale of the changes
GRID_CELL, GRID_GAP, GRID_BELOW = 34, 54, 60
PANELS = ((0.0, 0.28), (0.31, 0.59), (0.7, 0.98))
PANEL_NAMES = ("before training", "after training", "after minus before")


def attention_heads(
    before: ArrayLike,
    after: ArrayLike,
    title: str,
    *,
    what: str = "attention mass on the wrapper",
    subtitle: str | None = None,
) -> go.Figure:
    """Which heads stopped reading the wrapper, and which read it more? The same of any quantity of a head.

    Before and after share one scale from 0; the difference has its own, centred on 0 and never so fine that
    a change in the last digits looks like one.

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
    first, second = checked("before", before, layers, heads), checked("after", after, layers, heads)
    change = second - first
    figure = make_subplots(cols=3, shared_yaxes=True)
    for column, mass in enumerate((first, second, change), start=1):
        names = [[f"L{layer}H{head}" for head in range(heads)] for layer in range(layers)]
        figure.add_trace(_panel(mass, "coloraxis2" if column == 3 else "coloraxis", names), row=1, col=column)
        figure.update_xaxes(domain=PANELS[column - 1], row=1, col=column)
        place = {"x": sum(PANELS[column - 1]) / 2, "xanchor": "center", "y": 1.0, "yanchor": "bottom"}
        figure.add_annotation(text=PANEL_NAMES[column - 1], xref="paper", yref="paper", showarrow=False, **place)
    caption = f"Cells are heads (L0H1 is layer 0, head 1); each is the mean {what}."
    finish(figure, title, subtitle, x_title="head", y_title="layer", kind="attention_heads", caption=caption)
    top = float(max(first.max(), second.max()))
    span = max(float(np.abs(change).max()), LEAST_CHANGE * top)
    figure.update_layout(
        coloraxis=_scale("Purples", 0.0, top or 1.0, x=0.6),
        coloraxis2=_scale("RdBu_r", -(span or 1.0), span or 1.0, x=0.99),
    )
    plain = {"tickmode": "linear", "tick0": 0, "showgrid": False, "showline": False, "ticks": ""}
    figure.update_xaxes(**plain, dtick=max(1, heads // 8))
    return figure.update_yaxes(**plain, dtick=max(1, layers // 12), autorange="reversed")


def _panel(mass: np.ndarray, coloraxis: str, names: list[list[str]]) -> go.Heatmap:
    return go.Heatmap(
        z=mass.tolist(),
        text=names,
        texttemplate="%{text}<br>%{z:.2f}" if mass.size <= WRITTEN_CELLS else None,
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
    """Which components of which layer push which way? A panel a model, all on one scale centred on 0.

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
    checked_grids = {name: checked(f"grid {name!r}", grid, layers, len(columns)) for name, grid in grids.items()}
    size = {"height": max(140, GRID_CELL * layers), "gap": GRID_GAP}
    figure = multiples.panels([label(name) for name in grids], **size, side=0.05)
    span = max(float(np.abs(grid).max()) for grid in checked_grids.values()) or 1.0
    for (model, grid), (place, _, _) in zip(checked_grids.items(), multiples.places(len(grids)), strict=True):
        names = [[f"L{layer}{column}" for column in columns] for layer in range(layers)]
        figure.add_trace(_panel(grid, "coloraxis", names).update(meta=drawn_for(model)), **place)
    caption = "Rows are layers, columns their heads and MLP; red is for, blue against, white is nothing."
    finish(figure, title, subtitle, kind="component_grids", caption=caption)
    bar = {"title": {"text": unit, "side": "right"}}
    figure.update_layout(coloraxis=_scale("RdBu_r", -span, span, x=1.01, **bar))
    plain = {"showgrid": False, "showline": False, "ticks": ""}
    figure.update_xaxes(**plain, tickvals=list(range(len(columns))), ticktext=list(columns))
    figure.update_yaxes(**plain, tickmode="linear", tick0=0, dtick=max(1, layers // 12), autorange="reversed")
    for place, first, _ in multiples.places(len(grids)):
        figure.update_yaxes(title_text="layer" if first else None, **place)
    multiples.fit(figure, len(grids), **size, below=GRID_BELOW)
    return figure.update_layout(
        margin_r=96, width=max(700, 164 + 52 * len(columns) * min(multiples.COLUMNS, len(grids)))
    )
