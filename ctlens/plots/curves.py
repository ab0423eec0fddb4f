"""One curve with its band per method, against the amount of training or against depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.core.errors import CtlensError
from ctlens.plots.arrays import checked, require_some
from ctlens.plots.rates import PERCENT
from ctlens.plots.theme import MUTED, Style, finish, style

Curve = tuple[ArrayLike, ArrayLike, ArrayLike]
"""Value, lower end and upper end of the interval, each `[dose]` or `[layer]`."""


def dose_response(
    doses: Sequence[int],
    curves: Mapping[str, Curve],
    title: str,
    *,
    subtitle: str | None = None,
    x_title: str = "training steps",
    y_title: str = "bad rate, wrapped prompts",
    log_x: bool = False,
) -> go.Figure:
    """How much training does it take until the behaviour changes?

    Args:
        doses: the amounts of training after which the model was evaluated, for example steps or pairs.
        curves: per method, the rate and its interval `[dose]`, 0 to 1; NaN where not measured.
        title: the question or the answer.
        subtitle: one line under the title.
        x_title: what a dose counts.
        y_title: what the rate counts.
        log_x: whether equal distances mean equal factors, for doses that double; every dose is a tick.

    Raises:
        CtlensError: no curve, no dose, an array that is not one number per dose, or a dose of 0 with `log_x`.
    """
    if log_x and min(doses, default=1) <= 0:
        raise CtlensError("a dose of 0 has no place on a logarithmic axis: leave it out, or set log_x=False.")
    figure = banded("doses", np.asarray(doses), curves)
    notes = ["Lines are rates, bands their 95% intervals"]
    notes += ["0 is before training"] * (0 in doses)
    notes += ["the horizontal axis is logarithmic"] * log_x
    caption = "; ".join(notes) + "."
    finish(figure, title, subtitle, x_title=x_title, y_title=y_title, kind="dose_response", caption=caption)
    if log_x:
        figure.update_xaxes(type="log", tickvals=list(doses), ticktext=[str(dose) for dose in doses])
    return figure.update_yaxes(**PERCENT)


def layer_curves(
    curves: Mapping[str, Curve],
    title: str,
    *,
    y_title: str,
    layers: Sequence[int] | None = None,
    reference_lines: Mapping[str, float] | None = None,
    subtitle: str | None = None,
) -> go.Figure:
    """At which depth does a quantity change, and for which method?

    Args:
        curves: per method, the mean and its interval `[layer]`.
        title: the question or the answer.
        y_title: the quantity with its unit.
        layers: the number of each layer; from 0 if not given.
        reference_lines: values with a meaning, by the words to write on them.
        subtitle: one line under the title.

    Raises:
        CtlensError: no curve, no layer, or curves of different length.
    """
    require_some("curves", curves)
    x = np.arange(np.size(next(iter(curves.values()))[0])) if layers is None else np.asarray(layers)
    figure = banded("layers", x, curves)
    for words, value in (reference_lines or {}).items():
        figure.add_hline(value, line={"color": MUTED, "dash": "dot", "width": 1.2})
        figure.add_annotation(
            text=words, x=0, xref="paper", xanchor="left", y=value, yanchor="bottom", showarrow=False, font_size=11
        )
    caption = "Lines are means, bands their intervals. Layer 0 is the first layer."
    finish(figure, title, subtitle, x_title="layer", y_title=y_title, kind="layer_curves", caption=caption)
    figure.update_yaxes(autorangeoptions_include=_padded(list((reference_lines or {}).values())))
    return figure.update_xaxes(tickmode="linear", tick0=0, dtick=max(1, len(x) // 12))


def _padded(values: list[float]) -> list[float]:
    margin = 0.08 * (max(values, default=0) - min(values, default=0))
    return [edge for value in values for edge in (value - margin, value + margin)]


def banded(axis: str, x: np.ndarray, curves: Mapping[str, Curve]) -> go.Figure:
    """A line with its band per name, in its style; `axis` says what `x` holds where that is empty."""
    require_some("curves", curves)
    require_some(axis, x)
    figure = go.Figure()
    for name, curve in curves.items():
        value, low, high = (checked(f"curve {name!r}", array, len(x)) for array in curve)
        draw_band(figure, name, x, low, high)
        draw_line(figure, name, x, value)
    return figure


def draw_band(figure: go.Figure, name: str, x: np.ndarray, low: np.ndarray, high: np.ndarray, **place: Any) -> None:
    """The interval of a curve, in the colour of its method; what is NaN is left out."""
    known = np.isfinite(low + high)  # a NaN would break the outline of the band
    figure.add_scatter(
        x=[*x[known].tolist(), *x[known][::-1].tolist()],
        y=[*high[known].tolist(), *low[known][::-1].tolist()],
        fill="toself",
        fillcolor=style(name).shade(0.14),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        legendgroup=name,
        showlegend=False,
        **place,
    )


def draw_line(
    figure: go.Figure,
    name: str,
    x: np.ndarray,
    value: np.ndarray,
    *,
    size: int = 8,
    listed: bool = True,
    look: Style | None = None,
    **place: Any,
) -> None:
    """A curve in the look of its method or another; `size` of its markers in pixels, `listed` in the legend."""
    look = look or style(name)
    figure.add_scatter(
        x=x.tolist(),
        y=value.tolist(),
        mode="lines+markers",
        name=look.label,
        legendgroup=name,
        showlegend=listed,
        line={"color": look.colour, "dash": look.dash, "width": 2.2},
        marker={"color": look.colour, "symbol": look.symbol, "size": size},
        **place,
    )
