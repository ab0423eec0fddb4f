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
    terms: Sequence[Term],
    passes: Passes,
    rows: Sequence[int],
    parameters: Sequence[torch.nn.Parameter],
    config: TrainConfig,
) -> tuple[list[Term], Calibration]:
    """Sets the weights of the losses and the factors of their hook points by what the first rows show.

    Args:
        terms: the losses as given.
        passes: of the training, before its first step.
        rows: numbers of the pairs to measure on.
        parameters: those that are trained.
        config: asks for equal gradient norms by `calibrate`.

    Raises:
        CtlensError: a layer's gap, or a loss's gradient, is zero or not finite before training.
    """
    terms, relative = list(terms), [term.loss.relative_to_gap for term in terms]
    if not any(relative) and not config.calibrate:
        return terms, Calibration()
    gaps: dict[str, Mapping[str, float]] = {}
    with torch.enable_grad():
        seen = passes.seen(rows, terms, step=0, grad=True)
        for number, (term, forwards) in enumerate(zip(terms, seen, strict=True)):
            if relative[number]:
                at_hooks = term.loss.measure(forwards, term.factors).by_hook
                gaps[term.loss.name] = {name: float(value) for name, value in at_hooks.items()}
                terms[number] = _over_gaps(term, gaps[term.loss.name])
        if not config.calibrate:
            return terms, Calibration(gaps)
        values = [term.loss.compute(forwards, term.factors) for term, forwards in zip(terms, seen, strict=True)]
        norms = [_gradient_norm(value, parameters) for value in values]
    calibrated = [_with_norm(term, norm, config.calibrate) for term, norm in zip(terms, norms, strict=True)]
    return calibrated, Calibration(gaps, {term.loss.name: norm for term, norm in zip(terms, norms, strict=True)})


def _over_gaps(term: Term, gaps: Mapping[str, float]) -> Term:
    """Divides every hook point's factor by its value before training, so that every layer starts at its factor."""
    for hook_point, gap in gaps.items():
        if not 0 < gap < float("inf"):
            raise CtlensError(f"{term.loss.name} is {gap:g} at {hook_point} before training: leave that layer out.")
    return replace(term, factors={hook_point: factor / gaps[hook_point] for hook_point, factor in term.factors.items()})


def _gradient_norm(value: LossValue, parameters: Sequence[torch.nn.Parameter]) -> float:
    gradients = torch.autograd.grad(value.total, list(parameters), retain_graph=True, allow_unused=True)
    squares = [gradient.square().sum() for gradient in gradients if gradient is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _with_norm(term: Term, norm: float, target: float) -> Term:
    """Gives the loss the weight at which its gradient has the norm `target`."""
    if not 0 < norm < float("inf"):
        raise CtlensError(f"{term.loss.name} cannot be calibrated: its gradient has the norm {norm:g} before training.")
    return replace(term, loss=replace(cast(Any, term.loss), weight=term.loss.weight * target / norm))
