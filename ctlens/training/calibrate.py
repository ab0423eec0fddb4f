"""The first batch is measured once, before any step, so that losses and layers of different scales start alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from ctlens.core.errors import CtlensError
from ctlens.losses import LossValue
from ctlens.training.config import TrainConfig
from ctlens.training.passes import Passes, Term


@dataclass(frozen=True)
class Calibration:
    """Calibration is what the first batch said of each loss, before any update.

    Attributes:
        gaps: the unweighted value at each hook point, of losses whose layers count relative to it.
        gradient_norms: the norm of the gradient at the weight that was asked for, where weights were
            calibrated; the weights given instead are those of the run's losses.
    """

    gaps: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    gradient_norms: Mapping[str, float] = field(default_factory=dict)


def calibrate(
    terms: Mapping[str, Term],
    passes: Passes,
    rows: Sequence[int],
    parameters: Sequence[torch.nn.Parameter],
    config: TrainConfig,
) -> tuple[dict[str, Term], Calibration]:
    """Sets the weights of the losses and the factors of their hook points by what the first rows show.

    Args:
        terms: the losses as given, by name.
        passes: of the training, before its first step.
        rows: numbers of the pairs to measure on.
        parameters: those that are trained.
        config: asks for equal gradient norms by `calibrate`.

    Raises:
        CtlensError: a layer's gap, or a loss's gradient, is zero or not finite before training.
    """
    relative = [name for name, term in terms.items() if term.loss.relative_to_gap]
    calibrated = dict(terms)
    if not relative and not config.calibrate:
        return calibrated, Calibration()
    gaps: dict[str, Mapping[str, float]] = {}
    norms: dict[str, float] = {}
    with torch.enable_grad(), passes.open() as forwards:
        seen = forwards.seen(rows, terms, step=0, grad=True)
        for name in relative:
            by_hook = terms[name].loss.measure(seen[name], terms[name].factors).by_hook
            gaps[name] = {hook_name: float(value) for hook_name, value in by_hook.items()}
            calibrated[name] = _over_gaps(terms[name], gaps[name])
        if config.calibrate:
            values = {name: term.loss.compute(seen[name], term.factors) for name, term in calibrated.items()}
            norms = {name: _gradient_norm(value, parameters) for name, value in values.items()}
            calibrated = {name: _with_norm(term, norms[name], config.calibrate) for name, term in calibrated.items()}
    return calibrated, Calibration(gaps, norms)


def _over_gaps(term: Term, gaps: Mapping[str, float]) -> Term:
    """Divides every hook point's factor by its value before training, so that every layer starts at its factor."""
    for hook_name, gap in gaps.items():
        if not 0 < gap < float("inf"):
            raise CtlensError(f"{term.loss.name} is {gap:g} at {hook_name} before training: leave that layer out.")
    return replace(term, factors={hook_name: factor / gaps[hook_name] for hook_name, factor in term.factors.items()})


def _gradient_norm(value: LossValue, parameters: Sequence[torch.nn.Parameter]) -> float:
    gradients = torch.autograd.grad(value.total, list(parameters), retain_graph=True, allow_unused=True)
    squares = [gradient.square().sum() for gradient in gradients if gradient is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _with_norm(term: Term, norm: float, target: float) -> Term:
    """Gives the loss the weight at which its gradient has the norm `target`."""
    if not 0 < norm < float("inf"):
        raise CtlensError(f"{term.loss.name} cannot be calibrated: its gradient has the norm {norm:g} before training.")
    return replace(term, loss=replace(cast(Any, term.loss), weight=term.loss.weight * target / norm))
