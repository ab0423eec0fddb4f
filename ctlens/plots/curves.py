"""One curve with its band per method, against training steps or against depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.rates import PERCENT
from ctlens.plots.theme import MUTED, finish, style

Curve = tuple[ArrayLike, ArrayLike, ArrayLike]
"""Value, lower end and upper end of the interval, each `[step]` or `[layer]`."""


def dose_response(
    steps: Sequence[int],
    curves: Mapping[str, Curve],
    title: str,
    *,
    subtitle: str | None = None,
    y_title: str = "bad rate, wrapped prompts",
) -> go.Figure:
    """How much training does it take until the behaviour changes?

    Args:
        steps: training steps at which the model was evaluated.
        curves: per method, the rate and its interval `[step]`, 0 to 1.
        title: the question or the answer.
        subtitle: one line under the title.
        y_title: what the rate counts.

    Raises:
        CtlensError: no curve, no step, or an array that is not one number per step.
    """
    figure = _banded("steps", np.asarray(steps), curves)
    finish(
        figure,
        title,
        subtitle,
        x_title="training steps",
        y_title=y_title,
        kind="dose_response",
        caption="Lines are rates at each evaluated step, bands their 95% intervals; step 0 is before training.",
    )
    return figure.update_yaxes(**PERCENT)


def layer_curves(
    curves: Mapping[str, Curve],
    title: str,
    *,
    y_title: str,
    reference_lines: Mapping[str, float] | None = None,
    subtitle: str | None = None,
) -> go.Figure:
    """At which depth does a quantity change, and for which method?

    Args:
        curves: per method, the mean and its interval `[layer]`.
        title: the question or the answer.
        y_title: the quantity with its unit.
        reference_lines: values with a meaning, by the words to write on them.
        subtitle: one line under the title.

    Raises:
        CtlensError: no curve, no layer, or curves of different length.
    """
    require_some("curves", curves)
    layers = np.arange(np.size(next(iter(curves.values()))[0]))
    figure = _banded("layers", layers, curves)
    for words, value in (reference_lines or {}).items():
        figure.add_hline(value, line={"color": MUTED, "dash": "dot", "width": 1.2})
        figure.add_annotation(
            text=words, x=0, xref="paper", xanchor="left", y=value, yanchor="bottom", showarrow=False, font_size=11
        )
    caption = "Lines are means, bands their intervals. Layer 0 is the first layer."
    finish(figure, title, subtitle, x_title="layer", y_title=y_title, kind="layer_curves", caption=caption)
    figure.update_yaxes(autorangeoptions_include=_padded(list((reference_lines or {}).values())))
    return figure.update_xaxes(tickmode="linear", tick0=0, dtick=max(1, len(layers) // 12))


def _padded(values: list[float]) -> list[float]:
    margin = 0.08 * (max(values, default=0) - min(values, default=0))
    return [edge for value in values for edge in (value - margin, value + margin)]


def _banded(axis: str, x: np.ndarray, curves: Mapping[str, Curve]) -> go.Figure:
    require_some("curves", curves)
    require_some(axis, x)
    figure = go.Figure()
    for name, curve in curves.items():
        value, low, high = (checked(f"curve {name!r}", array, len(x)) for array in curve)
        look = style(name)
        figure.add_scatter(
            x=[*x.tolist(), *x[::-1].tolist()],
            y=[*high.tolist(), *low[::-1].tolist()],
            fill="toself",
            fillcolor=look.shade(0.14),
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            legendgroup=name,
            showlegend=False,
        )
        figure.add_scatter(
            x=x.tolist(),
            y=value.tolist(),
            mode="lines+markers",
            name=look.label,
            legendgroup=name,
            line={"color": look.colour, "dash": look.dash, "width": 2.2},
            marker={"color": look.colour, "symbol": look.symbol, "size": 8},
        )
    return figure
