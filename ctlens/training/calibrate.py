"""Calibration measures the first batch once, before any step, so that losses and layers start at comparable sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.losses import Forwards, LossValue
from ctlens.models.parameters import gathered
from ctlens.models.sharding import is_sharded
from ctlens.training.config import TrainConfig
from ctlens.training.passes import Passes, Term, backward
from ctlens.training.processes import processes


@dataclass(frozen=True)
class Calibration:
    """Calibration holds the measurements of each loss on the first batch, before any update.

    Attributes:
        gaps: for losses with `gap=True`, the unweighted value at each hook point.
        gradient_norms: if weights were calibrated, the norm of each loss's gradient at its original weight;
            the run's losses have the calibrated weights.
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
    """Sets the weights of the losses and the factors of their hook points by a measurement on the first rows.

    Args:
        terms: the losses as given, by name.
        passes: the passes of the training, before its first step.
        rows: numbers of the pairs to measure on.
        parameters: the trained weights.
        config: its `calibrate` is the gradient norm that every loss gets; None leaves the weights as they are.

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
            norms = {
                name: _gradient_norm(value, seen[name], passes.model, parameters) for name, value in values.items()
            }
            calibrated = {name: _with_norm(term, norms[name], config.calibrate) for name, term in calibrated.items()}
    return calibrated, Calibration(gaps, norms)


def _over_gaps(term: Term, gaps: Mapping[str, float]) -> Term:
    """Divides every hook point's factor by its value before training, so that every layer starts at its factor."""
    for hook_name, gap in gaps.items():
        if not 0 < gap < float("inf"):
            raise CtlensError(f"{term.loss.name} is {gap:g} at {hook_name} before training: leave that layer out.")
    return replace(term, factors={hook_name: factor / gaps[hook_name] for hook_name, factor in term.factors.items()})


def _gradient_norm(
    value: LossValue, seen: Forwards, model: LensModel, parameters: Sequence[torch.nn.Parameter]
) -> float:
    """The norm of a loss's gradient; processes that share a sharded model all have the same rows here."""
    backward(value.total / processes().count if is_sharded(model) else value.total, model, [seen], again=True)
    norm = torch.nn.utils.get_total_norm(parameter.grad for parameter in parameters if parameter.grad is not None)
    for parameter in parameters:
        parameter.grad = None
    return float(gathered(norm))


def _with_norm(term: Term, norm: float, target: float) -> Term:
    """Gives the loss the weight at which its gradient has the norm `target`."""
    if not 0 < norm < float("inf"):
        raise CtlensError(
            f"{term.loss.name} cannot be calibrated: its gradient has the norm {norm:g} before training; leave it out."
        )
    return replace(term, loss=replace(cast(Any, term.loss), weight=term.loss.weight * target / norm))
