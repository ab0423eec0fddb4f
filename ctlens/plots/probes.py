"""Probe scores by layer: fitted anew and carried over from the base, against chance and shuffled labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import checked
from ctlens.plots.curves import Curve, banded
from ctlens.plots.theme import MUTED, finish, style

CARRIED = "fitted on the base"


def probe_curves(
    layers: Sequence[int],
    refitted: Mapping[str, Curve],
    carried: Mapping[str, Curve],
    title: str,
    *,
    chance: float,
    shuffled: tuple[ArrayLike, ArrayLike],
    subtitle: str | None = None,
) -> go.Figure:
    """What can be read from each model, and does the base's probe still read it?

    Args:
        layers: the number of each layer.
        refitted: per model, the score of its own probe and its interval `[layer]`.
        carried: the same for the base's probe, read on other models.
        title: the question or the answer.
        chance: the score of guessing.
        shuffled: the ends of the range of probes fitted on shuffled labels, `[layer]`.
        subtitle: one line under the title.

    Raises:
        CtlensError: no curve, no layer, or a curve that is not one number a layer.
    """
    low, high = (checked("shuffled labels", end, len(layers)) for end in shuffled)
    x = np.asarray(layers)
    figure = go.Figure(
        go.Scatter(
            x=[*x.tolist(), *x[::-1].tolist()],
            y=[*high.tolist(), *low[::-1].tolist()],
            fill="toself",
            fillcolor="rgba(128, 128, 128, 0.15)",
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            name="shuffled labels",
        )
    )
    figure.add_traces(banded("layers", x, refitted).update_traces(line_dash="solid").data)
    for name, curve in carried.items():
        _whiskered(figure, x, name, curve)
    if carried:
        line = {"color": MUTED, "dash": "dash", "width": 2.2}
        figure.add_scatter(x=[None], y=[None], mode="lines", line=line, name=f"dashed: {CARRIED}")
    figure.add_hline(chance, line={"color": MUTED, "dash": "dot", "width": 1.2})
    words = {"text": f"chance {chance:.3g}", "x": 0, "xref": "paper", "xanchor": "left", "font_size": 11}
    figure.add_annotation(**words, y=chance, yanchor="bottom", showarrow=False)
    caption = (
        "Lines are balanced accuracies, bands and whiskers their 95% intervals over groups. Solid: the probe was "
        f"fitted on the model that it reads; dashed: {CARRIED}. Grey: fitted on shuffled labels. Layer 0 is the first."
    )
    y_title = "balanced accuracy"
    finish(figure, title, subtitle, x_title="layer", y_title=y_title, kind="probe_curves", caption=caption)
    figure.update_yaxes(range=[-0.02, 1.04])
    return figure.update_xaxes(tickmode="array", tickvals=list(layers)[:: max(1, len(layers) // 12)])


def _whiskered(figure: go.Figure, x: np.ndarray, name: str, curve: Curve) -> None:
    """A dashed line with its interval as whiskers: bands of two lines a model would hide each other."""
    value, low, high = (checked(f"curve {name!r}", array, len(x)) for array in curve)
    look = style(name)
    figure.add_scatter(
        x=x.tolist(),
        y=value.tolist(),
        error_y={"array": high - value, "arrayminus": value - low, "thickness": 1, "width": 3},
        mode="lines+markers",
        name=f"{look.label}, {CARRIED}",
        legendgroup=name,
        showlegend=False,
        line={"color": look.colour, "dash": "dash", "width": 2.2},
        marker={"color": look.colour, "symbol": "circle-open", "size": 8},
    )
