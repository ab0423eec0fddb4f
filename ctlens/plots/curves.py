"""One curve with its band per method, against the amount of training or against depth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ctlens.core.errors import CtlensError
from ctlens.plots.arrays import require_some
from ctlens.plots.intervals import BAND_OPACITY, Curve, Intervals, checked_intervals, draw_band
from ctlens.plots.rates import PERCENT
from ctlens.plots.theme import MUTED, Style, finish, style


def dose_curves(
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
        raise CtlensError("a logarithmic axis cannot show a dose of 0: leave it out, or set log_x=False.")
    figure = banded("doses", np.asarray(doses), curves)
    notes = ["Lines are rates, bands their 95% intervals"]
    if 0 in doses:
        notes.append("0 is before training")
    if log_x:
        notes.append("the horizontal axis is logarithmic")
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
    lines = reference_lines or {}
    for words, value in lines.items():
        figure.add_hline(value, line={"color": MUTED, "dash": "dot", "width": 1.2})
        figure.add_annotation(
            text=words, x=0, xref="paper", xanchor="left", y=value, yanchor="bottom", showarrow=False, font_size=11
        )
    caption = "Lines are means, bands their intervals. Layer 0 is the first layer."
    finish(figure, title, subtitle, x_title="layer", y_title=y_title, kind="layer_curves", caption=caption)
    figure.update_yaxes(autorangeoptions_include=_with_air(lines.values()))
    return figure.update_xaxes(**layer_ticks(len(x)))


def layer_ticks(n_layers: int, *, most: int = 12, first: int = 0) -> dict[str, Any]:
    """Plotly's settings of an axis of layers, with a tick for each, or for each second, third... of a deep model."""
    return {"tickmode": "linear", "tick0": first, "dtick": max(1, n_layers // most)}


def _with_air(values: Iterable[float]) -> list[float]:
    """Each value's neighbours below and above, 8% of their range away, so that no line lies on the frame."""
    known = list(values)
    air = 0.08 * (max(known, default=0) - min(known, default=0))
    return [edge for value in known for edge in (value - air, value + air)]


def banded(axis: str, x: np.ndarray, curves: Mapping[str, Curve]) -> go.Figure:
    """A figure of one curve with its band per method; `axis` says what `x` holds, for the error where that is empty."""
    require_some("curves", curves)
    require_some(axis, x)
    figure = go.Figure()
    for name, curve in curves.items():
        draw_curve(figure, name, x, checked_intervals(f"curve {name!r}", curve, len(x)))
    return figure


def draw_curve(
    figure: go.Figure,
    group: str,
    x: np.ndarray,
    numbers: Intervals,
    *,
    look: Style | None = None,
    size: float = 8,
    mode: str = "lines+markers",
    listed: bool = True,
    **at: Any,
) -> None:
    """A line on its band, in the panel at a row and column; the other options are those of `draw_line`."""
    look = look or style(group)
    draw_band(figure, x, numbers.low, numbers.high, colour=look.shade(BAND_OPACITY), group=group, **at)
    draw_line(figure, group, x, numbers.value, look=look, size=size, mode=mode, listed=listed, **at)


def draw_line(
    figure: go.Figure,
    group: str,
    x: np.ndarray,
    value: np.ndarray,
    *,
    look: Style | None = None,
    size: float = 8,
    width: float = 2.2,
    mode: str = "lines+markers",
    listed: bool = True,
    **options: Any,
) -> None:
    """A line with markers.

    Args:
        figure: it gets one more trace.
        group: of the legend: the method, whose look the line has unless it gets another.
        x: where the values are, `[x]`.
        value: the values, `[x]`.
        look: colour, marker, dash and name.
        size: of the markers, in pixels.
        width: of the line, in pixels.
        mode: `"lines"` for one without markers.
        listed: whether the legend names the line.
        options: row and column of the panel, and further properties of plotly's trace.
    """
    look = look or style(group)
    figure.add_scatter(
        x=x.tolist(),
        y=value.tolist(),
        mode=mode,
        name=look.label,
        legendgroup=group,
        showlegend=listed,
        line={"color": look.colour, "dash": look.dash, "width": width},
        marker={"color": look.colour, "symbol": look.symbol, "size": size},
        **options,
    )
