"""How the losses went during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.colors import sample_colorscale

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.panels import fit, panels
from ctlens.plots.rates import PERCENT
from ctlens.plots.theme import finish, ordered, style

# Both ends of Viridis are cut off: one would vanish on a dark page, the other on a white one.
DEPTH = sample_colorscale("Viridis", np.linspace(0.15, 0.85, 9).tolist())
LISTED_HOOKS = 6
PANEL_HEIGHT = 300
ROUNDING = 1e-3  # a loss that is zero but for rounding is not to fill the axis


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
    """How does a training that is not over go? The losses so far, and beside them the rates.

    The axis of the steps reaches to the end of the training from the start, so that the picture
    stands still while it fills.

    Args:
        curves: per loss, its value at every step from 1 on, NaN at steps that have none; empty before the first.
        rates: per rate, the steps at which it was looked at, and its values `[look]`, 0 to 1; no rate, no panel.
        total: steps of the whole training.
        title: the question or the answer.
        subtitle: one line under the title.

    Raises:
        CtlensError: losses of different lengths, or an array that is not one number per look.
    """
    steps = range(1, 1 + max((np.size(losses) for losses in curves.values()), default=0))
    values = _per_step(steps, curves) if curves else {}
    names = ["losses", "rates"] if rates else ["losses"]
    figure = _lines(panels(names, height=PANEL_HEIGHT, gap=0, side=0.14), steps, values, row=1, col=1)
    for look, (name, (looks, seen)) in zip(ordered(list(rates)).values(), rates.items(), strict=True):
        rate = checked(f"rate {name!r}", seen, len(looks)).tolist() if len(looks) else []
        marks = {"color": look.colour, "symbol": look.symbol, "size": 8}
        line = {"color": look.colour, "dash": look.dash, "width": 2.2}
        shape = {"mode": "lines+markers", "marker": marks, "line": line, "cliponaxis": False}
        figure.add_scatter(x=list(looks), y=rate, name=name, row=1, col=2, **shape)
    figure.add_scatter(x=[None], y=[None], showlegend=False, row=1, col=1)  # an empty panel has no axes
    _losses(figure, values, title, subtitle, "progress", "Losses are weighted; step 0 is before training.")
    figure.update_xaxes(range=[0, total], title_text="training step")
    if rates:
        figure.update_yaxes(**PERCENT, title_text="share of answers", row=1, col=2)
    return fit(figure, len(names), height=PANEL_HEIGHT, gap=0, below=54)


def hook_history(
    steps: Sequence[int], curves: Mapping[str, ArrayLike], title: str, *, subtitle: str | None = None
) -> go.Figure:
    """At which depth does one loss fall? One line per hook point, shaded from first to last.

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
        line = {"color": sample_colorscale(DEPTH, [depth / max(last, 1)])[0], "width": 2}
        listed = last < LISTED_HOOKS or depth in (0, last)
        figure.add_scatter(x=list(steps), y=losses.tolist(), mode="lines", name=name, line=line, showlegend=listed)
    return _losses(figure, values, title, subtitle, "hook_history", "Lines go from dark (first hook) to light (last).")


def _per_step(steps: Sequence[int], curves: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    require_some("steps", steps)
    require_some("curves", curves)
    return {name: checked(f"loss {name!r}", losses, len(steps)) for name, losses in curves.items()}


def _lines(figure: go.Figure, steps: Sequence[int], values: Mapping[str, np.ndarray], **place: int) -> go.Figure:
    """A line per loss."""
    for name, losses in values.items():
        look = style(name)
        line = {"color": look.colour, "dash": look.dash, "width": 2.2}
        alone = len(losses) == 1 or np.isnan(losses).any()  # a number between two gaps has no line to be seen by
        mode = "lines+markers" if alone else "lines"
        figure.add_scatter(x=list(steps), y=losses.tolist(), mode=mode, name=look.label, line=line, **place)
    return figure


def _losses(
    figure: go.Figure, values: dict[str, np.ndarray], title: str, subtitle: str | None, kind: str, caption: str
) -> go.Figure:
    """The layout, with a log axis for the losses where all of them are positive."""
    everything = np.concatenate([*values.values(), np.empty(0)])
    low, high = (float(end(everything)) for end in (np.nanmin, np.nanmax)) if everything.size else (0.0, 0.0)
    scale = "loss (log scale)" if low > 0 else "loss"
    finish(figure, title, subtitle, x_title="training step", y_title=scale, kind=kind, caption=caption)
    log = {"type": "log", "tickvals": _log_ticks(low, high), "tickformat": "~g"} if low > 0 else {}
    return figure.update_layout(yaxis=log or {"autorangeoptions": {"include": [0, ROUNDING]}})


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 in every decade from `low` to `high`; powers of ten alone over more than three decades."""
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    digits = (1, 2, 5) if last - first <= 3 else (1,)
    return [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in digits]
