"""Schedules of the learning rate: our own linear schedule, or any schedule of torch by the name of its class."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import AdamW, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler, SequentialLR

from ctlens.core.errors import CtlensError, unknown
from ctlens.models.optimisation import linear_rate, warmup_rate

LINEAR = "linear"


def make_schedule(
    optimizer: Optimizer, name: str, options: Mapping[str, Any], steps: int, warmup: float
) -> LRScheduler:
    """Makes the schedule of an optimiser before its first step.

    Args:
        optimizer: the optimiser, at its peak learning rate.
        name: `"linear"`, or a class of `torch.optim.lr_scheduler`.
        options: options of that class.
        steps: number of steps of the training.
        warmup: share of the steps that warm up; a schedule of torch begins after them.

    Raises:
        CtlensError: torch has no such schedule, the schedule needs a metric to watch, or it refuses the options.
    """
    if name == LINEAR:
        if options:
            raise CtlensError(f"the linear schedule has no option {next(iter(options))!r}: leave it out.")
        return LambdaLR(optimizer, lambda step: linear_rate(step, steps, warmup * steps))
    kind = _torch_schedule(name)
    warm = round(warmup * steps)
    rising = LinearLR(optimizer, start_factor=warmup_rate(0, warm), total_iters=warm) if warm else None
    try:
        after = kind(optimizer, **options)
    except (TypeError, ValueError, AttributeError) as error:
        given = ", ".join(f"{key}={value}" for key, value in options.items()) or "no options"
        reason = str(error).replace(f"{name}.__init__() ", "")
        raise CtlensError(
            f"the schedule {name} does not work with {given}: {reason}; set its options in schedule_options."
        ) from None
    return SequentialLR(optimizer, [rising, after], milestones=[warm]) if rising else after


def require_schedule(name: str, options: Mapping[str, Any], steps: int, warmup: float) -> None:
    """Raises the errors of `make_schedule`, on an optimiser made for that."""
    make_schedule(AdamW([torch.zeros(1, requires_grad=True)]), name, options, steps, warmup)


def fast_forward(schedule: LRScheduler, steps: int) -> None:
    """Takes a new schedule forward by this many steps, by the same arithmetic as a training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects the optimiser's steps between the schedule's
        for _ in range(steps):
            schedule.step()


def _torch_schedule(name: str) -> type[LRScheduler]:
    known = {
        kind: found
        for kind, found in vars(lr_scheduler).items()
        if inspect.isclass(found) and issubclass(found, LRScheduler) and not kind.startswith("_")
    }
    if name == "ReduceLROnPlateau":
        raise CtlensError(
            "the schedule ReduceLROnPlateau needs a metric to watch: choose a schedule that depends only on the step."
        )
    if name not in known:
        raise unknown("learning-rate schedule", name, [LINEAR, *known])
    return known[name]
