"""Pretraining by low-rank adapters that are merged and restarted, so that the sum of the updates can have a high rank.

ReLoRA (Lialin et al. 2023, arXiv 2307.05695) begins with a warm start that trains all weights. Then it freezes
the adapted weights and trains adapters beside them. Every `every` steps it merges the adapters into the
weights and starts new ones, with fresh moments in the optimiser and a short new warm-up of the learning rate.
Weights without an adapter (embedding, norms, unembedding) train at every step, as in the paper. Measured ranks
of such updates are in `benchmarks/relora.csv`: 8 without restarts, 64 with eight starts of rank 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ctlens.core.arguments import require_types
from ctlens.core.errors import CtlensError
from ctlens.core.limits import AT_LEAST_1, SHARE_OF_ALL, require
from ctlens.core.types import LensModel
from ctlens.models.lora import LoRA, add_adapters, has_adapters, merge_adapters
from ctlens.models.matrices import MATRICES, slots
from ctlens.models.optimisation import warmup_rate
from ctlens.models.parameters import present_parameters


@dataclass(frozen=True)
class ReLoRA:
    """ReLoRA holds the schedule of the adapters: when the first ones start, and when they are merged and restarted.

    The defaults of the schedule were chosen by eye.

    Attributes:
        lora: rank, scale and matrices of the adapters; by default they are on every matrix of a block.
        warm_start: share of the steps that train all weights before the first adapters, from 0 to below 1.
        every: steps from one start of the adapters to the next. With as many as the training has, it is LoRA
            without restarts.
        rewarm: share of these steps in which the learning rate rises again, 0 to 1.
    """

    lora: LoRA = LoRA(target_modules=MATRICES)
    warm_start: float = 0.25
    every: int = 150
    rewarm: float = 0.1

    def __post_init__(self) -> None:
        require_types(self)
        if not 0 <= self.warm_start < 1:
            raise CtlensError(f"warm_start is a share of the steps, from 0 to below 1, not {self.warm_start}.")
        require(AT_LEAST_1, every=self.every)
        require(SHARE_OF_ALL, rewarm=self.rewarm)

    def since_start(self, step: int, steps: int) -> int | None:
        """Counts the steps since the adapters last started, 0 if they start now; None in the warm start.

        >>> [ReLoRA(warm_start=0.5, every=3).since_start(step, 10) for step in range(4, 10)]
        [None, 0, 1, 2, 0, 1]
        """
        trained = step - int(self.warm_start * steps)
        return trained % self.every if trained >= 0 else None

    def lr_factor(self, step: int, steps: int) -> float:
        """Gives the factor of the learning rate in a step: it rises linearly to 1 after every start of adapters.

        >>> jagged = ReLoRA(warm_start=0.5, every=3, rewarm=0.4)
        >>> [round(jagged.lr_factor(step, 10), 2) for step in range(4, 10)]
        [1.0, 0.45, 0.91, 1.0, 0.45, 0.91]
        """
        since = self.since_start(step, steps)
        warm = self.rewarm * self.every
        return 1.0 if since is None or since >= warm else warmup_rate(since, warm)


def begin_adapters(model: LensModel, lora: LoRA, seed: int) -> list[nn.Parameter]:
    """Merges the adapters of a model, if it has any, and adds new ones; the model computes the same as before.

    Args:
        model: the model; it changes in place.
        lora: rank, scale and matrices of the new adapters.
        seed: decides the random half of the adapters, `A`.

    Returns:
        The trainable parameters: all weights without an adapter, and the adapters.

    Raises:
        CtlensError: as `add_adapters`.
    """
    if has_adapters(model):
        merge_adapters(model)
    added = add_adapters(model, lora, seed)
    adapted = {id(slot.weight) for slot in slots(model, lora.target_modules).values()}
    others = [value for value in present_parameters(model).values() if id(value) not in adapted]
    for parameter in others:
        parameter.requires_grad_(True)
    return [*others, *added]


def with_memory(fresh: torch.optim.Optimizer, old: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Gives a new optimiser the old one's moments of the parameters that they share.

    The moments of new adapters start at zero. The paper keeps 1 percent of the old adapters' moments, the largest,
    but no entry of the old adapters corresponds to an entry of the new ones.
    """
    for group in fresh.param_groups:
        for parameter in group["params"]:
            if parameter in old.state:
                fresh.state[parameter] = old.state[parameter]
    return fresh
