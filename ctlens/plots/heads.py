"""Which attention heads changed."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from ctlens.plots.arrays import checked
from ctlens.plots.theme import finish

WRITTEN_CELLS = 36
PANELS = ((0.0, 0.28), (0.31, 0.59), (0.7, 0.98))
PANEL_NAMES = ("before training", "after training", "after minus before")


def attention_heads(before: ArrayLike, after: ArrayLike, title: str, *, subtitle: str | None = None) -> go.Figure:
    """Which heads stopped reading the wrapper, and which read it more?

    Before and after share one scale from 0; the difference has its own, centred on 0.

    Args:
        before: attention mass on the wrapper `[layer, head]`, 0 to 1, before training.
        after: the same after training.
        title: the question or the answer.
        subtitle: one line under the title.

    Raises:
        CtlensError: the two are not the same `[layer, head]`, or are empty.
    """
    layers, heads = (*np.shape(before), 0, 0)[:2]
    first, second = checked("before", before, layers, heads), checked("after", after, layers, heads)
    change = second - first
    figure = make_subplots(cols=3, shared_yaxes=True)
    for column, mass in enumerate((first, second, change), start=1):
        figure.add_trace(_panel(mass, "coloraxis2" if column == 3 else "coloraxis"), row=1, col=column)
        figure.update_xaxes(domain=PANELS[column - 1], row=1, col=column)
        place = {"x": sum(PANELS[column - 1]) / 2, "xanchor": "center", "y": 1.0, "yanchor": "bottom"}
        figure.add_annotation(text=PANEL_NAMES[column - 1], xref="paper", yref="paper", showarrow=False, **place)
    caption = "Cells are heads (L0H1 is layer 0, head 1); each is the mean attention mass on the wrapper's tokens."
    finish(figure, title, subtitle, x_title="head", y_title="layer", kind="attention_heads", caption=caption)
    top, span = float(max(first.max(), second.max())), float(np.abs(change).max())
    figure.update_layout(
        coloraxis=_scale("Purples", 0.0, top or 1.0, x=0.6),
        coloraxis2=_scale("RdBu_r", -(span or 1.0), span or 1.0, x=0.99),
    )
    plain = {"tickmode": "linear", "tick0": 0, "showgrid": False, "showline": False, "ticks": ""}
    figure.update_xaxes(**plain, dtick=max(1, heads // 8))
    return figure.update_yaxes(**plain, dtick=max(1, layers // 12), autorange="reversed")


def _panel(mass: np.ndarray, coloraxis: str) -> go.Heatmap:
    layers, heads = mass.shape
    return go.Heatmap(
        z=mass.tolist(),
        text=[[f"L{layer}H{head}" for head in range(heads)] for layer in range(layers)],
        texttemplate="%{text}<br>%{z:.2f}" if mass.size <= WRITTEN_CELLS else None,
        textfont={"size": 10},
        hovertemplate="%{text}: %{z:.3f}<extra></extra>",
        coloraxis=coloraxis,
        xgap=1,
        ygap=1,
    )


def _scale(colours: str, low: float, high: float, *, x: float) -> dict[str, object]:
    bar = {"x": x, "xanchor": "left", "thickness": 10, "outlinewidth": 0, "tickfont": {"size": 11}}
    return {"colorscale": colours, "cmin": low, "cmax": high, "colorbar": bar}
