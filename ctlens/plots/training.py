"""Losses over the steps of a training, and rates beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.colors import sample_colorscale

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.curves import draw_line
from ctlens.plots.panels import PanelLayout, fit_panels, panel_grid
from ctlens.plots.rates import PERCENT
from ctlens.plots.theme import finish, ordered, style

# Both ends of Viridis are cut off: one would vanish on a dark page, the other on a white one.
_DEPTH_COLOURS = sample_colorscale("Viridis", np.linspace(0.15, 0.85, 9).tolist())
_LISTED_HOOKS = 6  # of more hooks, the legend names the first and the last
_PROGRESS_LAYOUT = PanelLayout(height=300, gap=0, below=54, side=0.14)
_LEAST_LOSS = 1e-3  # to which an axis of losses reaches at least, so that a loss of mere rounding does not fill it


def history(
    steps: Sequence[int], curves: Mapping[str, ArrayLike], title: str, *, subtitle: str | None = None
) -> go.Figure:
    """Did training converge? One line per loss, on a log axis when all values are positive.

    Args:
        steps: the recorded training steps.
        curves: per loss, its value `[step]`, NaN at steps that have none.
        title: the question or the answer.
        subtitle: one line under the title.

    Raises:
        CtlensError: no loss, no step, or an array that is not one number per step.
    """
    values = _per_step(steps, curves)
    figure = _lines(go.Figure(), steps, values)
    return _losses(figure, values, title, subtitle, "history", "Each line is one loss, times its weight.")


def progress(
    curves: Mapping[str, ArrayLike],
    rates: Mapping[str, tuple[Sequence[int], ArrayLike]],
    total: int,
    title: str,
    *,
    subtitle: str | None = None,
) -> go.Figure:
    """How does a training go that is not over yet? The losses so far, and beside them the rates.

    The axis of the steps reaches to the end of the training from the start, so that the picture
    stands still while it fills.

    Args:
        curves: per loss, its value at every step from 1 on, NaN at steps that have none; empty before the first.
        rates: per rate, the steps at which it was evaluated, and its values `[evaluation]`, 0 to 1; no rate, no panel.
        total: steps of the whole training.
        title: the question or the answer.
        subtitle: one line under the title.

    Raises:
        CtlensError: losses of different lengths, or an array that is not one number per evaluation.
    """
    steps = range(1, 1 + max((np.size(losses) for losses in curves.values()), default=0))
    values = _per_step(steps, curves) if curves else {}
    names = ["losses", "rates"] if rates else ["losses"]
    figure = panel_grid(names, _PROGRESS_LAYOUT)
    _lines(figure, steps, values, row=1, col=1)
    looks = ordered(list(rates))
    for name, (evaluated, found) in rates.items():
        rate = checked(f"rate {name!r}", found, len(evaluated)) if len(evaluated) else np.empty(0)
        # Markers at rates of 0 and 1 may stand out of the frame.
        draw_line(figure, name, np.asarray(evaluated), rate, look=looks[name], cliponaxis=False, row=1, col=2)
    figure.add_scatter(x=[None], y=[None], showlegend=False, row=1, col=1)  # an empty panel has no axes
    _losses(figure, values, title, subtitle, "progress", "Losses are weighted; step 0 is before training.")
    figure.update_xaxes(range=[0, total], title_text="training step")
    if rates:
        figure.update_yaxes(**PERCENT, title_text="share of answers", row=1, col=2)
    return fit_panels(figure, len(names), _PROGRESS_LAYOUT)


def hook_history(
    steps: Sequence[int], curves: Mapping[str, ArrayLike], title: str, *, subtitle: str | None = None
) -> go.Figure:
    """At which depth does one loss fall? One line per site, shaded from first to last.

    Args:
        steps: the recorded training steps.
        curves: per hook name, in the order of the model's forward pass, the loss there `[step]`.
        title: the question or the answer.
        subtitle: one line under the title.

    Raises:
        CtlensError: no hook, no step, or an array that is not one number per step.
    """
    values = _per_step(steps, curves)
    last = len(values) - 1
    figure = go.Figure()
    for depth, (name, losses) in enumerate(values.items()):
        line = {"color": sample_colorscale(_DEPTH_COLOURS, [depth / max(last, 1)])[0], "width": 2}
        listed = last < _LISTED_HOOKS or depth in (0, last)
        figure.add_scatter(x=list(steps), y=losses.tolist(), mode="lines", name=name, line=line, showlegend=listed)
    return _losses(figure, values, title, subtitle, "hook_history", "Lines go from dark (first hook) to light (last).")


def _per_step(steps: Sequence[int], curves: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    require_some("steps", steps)
    require_some("curves", curves)
    return {name: checked(f"loss {name!r}", losses, len(steps)) for name, losses in curves.items()}


def _lines(figure: go.Figure, steps: Sequence[int], values: Mapping[str, np.ndarray], **at: int) -> go.Figure:
    """Adds a line per loss."""
    for name, losses in values.items():
        look = style(name)
        line = {"color": look.colour, "dash": look.dash, "width": 2.2}
        alone = len(losses) == 1 or np.isnan(losses).any()  # a number between two gaps has no line to be seen by
        mode = "lines+markers" if alone else "lines"
        figure.add_scatter(x=list(steps), y=losses.tolist(), mode=mode, name=look.label, line=line, **at)
    return figure


def _losses(
    figure: go.Figure, values: dict[str, np.ndarray], title: str, subtitle: str | None, kind: str, caption: str
) -> go.Figure:
    """The layout, with a log axis for the losses where all of them are positive."""
    everything = np.concatenate([*values.values(), np.empty(0)])
    lowest = float(np.nanmin(everything)) if everything.size else 0.0
    if lowest > 0:
        y_title = "loss (log scale)"
        ticks = _log_ticks(lowest, float(np.nanmax(everything)))
        axis: dict[str, Any] = {"type": "log", "tickvals": ticks, "tickformat": "~g"}
    else:
        y_title = "loss"
        axis = {"autorangeoptions": {"include": [0, _LEAST_LOSS]}}
    finish(figure, title, subtitle, x_title="training step", y_title=y_title, kind=kind, caption=caption)
    return figure.update_layout(yaxis=axis)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 in every decade from `low` to `high`; powers of ten alone over more than three decades."""
    first = int(np.floor(np.log10(low)))
    last = int(np.ceil(np.log10(high)))
    digits = (1, 2, 5) if last - first <= 3 else (1,)
    return [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in digits]
