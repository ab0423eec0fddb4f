"""How the losses went during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.colors import sample_colorscale

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.theme import finish, style

# Both ends of Viridis are cut off: one would vanish on a dark page, the other on a white one.
DEPTH = sample_colorscale("Viridis", np.linspace(0.15, 0.85, 9).tolist())
LISTED_HOOKS = 6


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
    figure = go.Figure()
    for name, losses in values.items():
        look = style(name)
        line = {"color": look.colour, "dash": look.dash, "width": 2.2}
        gaps = np.isnan(losses).any()  # a number between two gaps has no line to be seen by
        mode = "lines+markers" if gaps else "lines"
        figure.add_scatter(x=list(steps), y=losses.tolist(), mode=mode, name=look.label, line=line)
    return _losses(figure, values, title, subtitle, "history", "Each line is one loss, times its weight.")


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


def _losses(
    figure: go.Figure, values: dict[str, np.ndarray], title: str, subtitle: str | None, kind: str, caption: str
) -> go.Figure:
    everything = np.concatenate(list(values.values()))
    low, high = float(np.nanmin(everything)), float(np.nanmax(everything))
    scale = "loss (log scale)" if low > 0 else "loss"
    finish(figure, title, subtitle, x_title="training step", y_title=scale, kind=kind, caption=caption)
    return figure.update_yaxes(type="log", tickvals=_log_ticks(low, high), tickformat="~g") if low > 0 else figure


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 in every decade from `low` to `high`; powers of ten alone over more than three decades."""
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    digits = (1, 2, 5) if last - first <= 3 else (1,)
    return [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in digits]
