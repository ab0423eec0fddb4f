"""How weights are moved: AdamW, a learning rate that rises and falls in straight lines, and a clipped update.

The pretraining of an organism and the consistency trainings share all three. Their loops stay apart: a
consistency training works a batch off in parts, among several processes, and goes on from a checkpoint, while
pretraining puts a new optimiser in the place of the old one whenever its adapters begin anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import AdamW, Optimizer

from ctlens.core.errors import NotFinite
from ctlens.core.types import Scalar
from ctlens.models.finite import what_is_not_finite
from ctlens.models.parameters import gathered

TORCH_EPS = 1e-8


def adamw(
    parameters: Sequence[nn.Parameter], *, lr: float, weight_decay: float, relative_eps: float | None = None
) -> AdamW:
    """Makes the optimiser of a training.

    Args:
        parameters: the trained ones.
        lr: the peak of the learning rate.
        weight_decay: AdamW's own.
        relative_eps: AdamW's eps as a share of `1 / sqrt(number of trained weights)`, the typical entry
            of a gradient of norm 1; None for torch's default.
    """
    eps = TORCH_EPS
    if relative_eps is not None:
        eps = relative_eps / sum(parameter.numel() for parameter in parameters) ** 0.5
    return AdamW(parameters, lr=lr, eps=eps, weight_decay=weight_decay)


def warmup_rate(step: int, warmup: float, *, reaches_peak: bool = False) -> float:
    """Gives the learning rate of a step (from 0) of a warm-up, as a share of its peak; before step 0 it is zero.

    Args:
        step: from 0, below `warmup`.
        warmup: length of the warm-up in steps, whole or not.
        reaches_peak: the last step of the warm-up is at the peak; else the peak would be one step later.

    >>> [warmup_rate(step, 3) for step in range(3)]
    [0.25, 0.5, 0.75]
    """
    return (step + 1) / (warmup + _beyond(reaches_peak))


def linear_rate(step: int, steps: int, warmup: float, *, reaches_peak: bool = False) -> float:
    """Gives the learning rate of a step (from 0) as a share of its peak: linear warm-up, then linear decay.

    The rate would be zero at the step after the last.

    Args:
        step: from 0.
        steps: length of the training.
        warmup: length of the warm-up in steps, whole or not.
        reaches_peak: the last step of the warm-up and the first one after it are at the peak; else the
            peak lies between them, and no step is at it.

    >>> [round(linear_rate(step, 4, 2), 2) for step in range(4)]
    [0.33, 0.67, 0.67, 0.33]
    >>> [linear_rate(step, 4, 2, reaches_peak=True) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup:
        return warmup_rate(step, warmup, reaches_peak=reaches_peak)
    return (steps - step) / (steps - warmup + _beyond(reaches_peak))


def _beyond(reaches_peak: bool) -> int:
    """Gives how many steps the peak lies beyond the end of a ramp."""
    return 0 if reaches_peak else 1


def clipped_update(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], clip: float, *, check: bool = True
) -> Scalar:
    """Scales the gradient down to the norm `clip` where it is longer, takes a step, and returns the norm before.

    Args:
        optimizer: of the parameters.
        parameters: the trained ones.
        clip: the longest norm.
        check: read the norm before the step, for which a GPU is waited for; else the caller reads it in time.

    Raises:
        NotFinite: the gradient is, so that a step would put NaN into the weights.
    """
    norm = gathered(nn.utils.clip_grad_norm_(parameters, clip))
    if check and not norm.isfinite():
        value = what_is_not_finite(norm)
        raise NotFinite(f"the norm of the gradient is {value}: lower lr or the weights of the losses.")
    optimizer.step()
    return norm
