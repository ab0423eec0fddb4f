"""The early end of a training: it measures its behaviour every few steps and ends at a given effect."""

from __future__ import annotations

from ctlens.core.types import LensModel
from ctlens.evaluation import evaluate
from ctlens.training.config import Until
from ctlens.training.history import History


def look(until: Until, model: LensModel, history: History) -> bool:
    """Measures the behaviour, and tells whether the training has reached its end.

    Args:
        until: the behaviour at which it ends.
        model: the trained model, in eval mode.
        history: receives the rate, unless it has the rate of this step.

    Raises:
        CtlensError: the threat has no such rate on wrapped prompts.
    """
    if not history.has(len(history), until.metric):
        found = evaluate(model, [until.threat], split=until.split, n_prompts=until.n_prompts, progress=False)
        history.add(len(history), {until.metric: found.rate(until.metric, "wrapped")})
    return reached(until, history)


def reached(until: Until, history: History) -> bool:
    """Tells whether the last measured rate is low enough."""
    return any(rate < until.below for rate in history.series(until.metric)[-1:])
