"""Probe scores by layer: fitted anew and carried over from the base, against chance and shuffled labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go

from ctlens.plots.curves import banded, draw_line
from ctlens.plots.intervals import Curve, NullBand, checked_intervals, draw_null, whiskers
from ctlens.plots.theme import MUTED, finish, style

_CARRIED = "fitted on the base"


def probe_curves(
    layers: Sequence[int],
    refitted: Mapping[str, Curve],
    carried: Mapping[str, Curve],
    title: str,
    *,
    chance: float,
    shuffled: NullBand,
    subtitle: str | None = None,
) -> go.Figure:
    """Which models can a probe read, and does the probe of the base still read them?

    Args:
        layers: the number of each layer.
        refitted: per model, the score of its own probe and its interval `[layer]`.
        carried: the same for the base's probe, read on other models.
        title: the question or the answer.
        chance: the score of guessing.
        shuffled: the ends of the range of probes fitted on shuffled labels, `[layer]`.
        subtitle: one line under the title.

    Raises:
        CtlensError: no curve, no layer, or a curve that is not one number per layer.
    """
    x = np.asarray(layers)
    figure = go.Figure()
    draw_null(figure, x, shuffled, "shuffled labels", listed=True)
    figure.add_traces(banded("layers", x, refitted).update_traces(line_dash="solid").data)
    for name, curve in carried.items():
        _draw_carried(figure, x, name, curve)
    if carried:
        line = {"color": MUTED, "dash": "dash", "width": 2.2}
        figure.add_scatter(x=[None], y=[None], mode="lines", line=line, name=f"dashed: {_CARRIED}")
    _mark_chance(figure, chance)
    caption = (
        "Lines are balanced accuracies, bands and whiskers their 95% intervals over groups. Solid: the probe was "
        f"fitted on the model that it reads; dashed: {_CARRIED}. Grey: fitted on shuffled labels. Layer 0 is the first."
    )
    y_title = "balanced accuracy"
    finish(figure, title, subtitle, x_title="layer", y_title=y_title, kind="probe_curves", caption=caption)
    figure.update_yaxes(range=[-0.02, 1.04])
    return figure.update_xaxes(tickmode="array", tickvals=list(layers)[:: max(1, len(layers) // 12)])


def _draw_carried(figure: go.Figure, x: np.ndarray, name: str, curve: Curve) -> None:
    """A dashed line with whiskers: with two lines per model, bands would hide each other."""
    numbers = checked_intervals(f"curve {name!r}", curve, len(x))
    own = style(name)
    look = replace(own, label=f"{own.label}, {_CARRIED}", dash="dash", symbol="circle-open")
    error_y = whiskers(numbers, slim=True)
    draw_line(figure, name, x, numbers.value, look=look, listed=False, error_y=error_y)


def _mark_chance(figure: go.Figure, chance: float) -> None:
    """A dotted line at the score of guessing, with its words."""
    figure.add_hline(chance, line={"color": MUTED, "dash": "dot", "width": 1.2})
    words = {"text": f"chance {chance:.3g}", "x": 0, "xref": "paper", "xanchor": "left", "font_size": 11}
    figure.add_annotation(**words, y=chance, yanchor="bottom", showarrow=False)
