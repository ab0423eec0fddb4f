"""Pretraining by low-rank updates that are merged and begun anew, so that their sum may have a high rank.

ReLoRA (Lialin et al. 2023, arXiv 2307.05695): after a warm start in which all weights are trained, the
adapted weights stand still and adapters are trained beside them; every so many steps the adapters are
merged into the weights and new ones put in their place, with the optimiser's memory of the old ones
gone and a short new warm-up of the learning rate. What has no adapter (embedding, norms, unembedding)
is trained as it is throughout, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.models.lora import LoRA, add_adapters, has_adapters, merge_adapters
from ctlens.models.matrices import MATRICES, slots
from ctlens.models.optimisation import warmup_rate
from ctlens.models.parameters import present_parameters


@dataclass(frozen=True)
class ReLoRA:
    """When adapters begin and are begun anew.

    Attributes:
        lora: rank, scale and matrices; by default every matrix of a block.
        warm_start: share of the steps at full rank before the first adapters, from 0 to below 1.
        every: steps from one start of the adapters to the next; as many as there are steps is LoRA without restarts.
        rewarm: share of those steps in which the learning rate rises again, 0 to 1.
    """

    lora: LoRA = LoRA(target_modules=MATRICES)
    warm_start: float = 0.25
    every: int = 150
    rewarm: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.warm_start < 1:
            raise CtlensError(f"warm_start is a share of the steps, from 0 to below 1, not {self.warm_start}.")
        if self.every < 1:
            raise CtlensError(f"adapters are begun anew every 1 step or more, not every {self.every}.")
        if not 0 <= self.rewarm <= 1:
            raise CtlensError(f"rewarm is a share of the steps between two starts, 0 to 1, not {self.rewarm}.")

    def since_start(self, step: int, steps: int) -> int | None:
        """Steps since adapters were last begun, 0 where they begin now; None while all weights are trained.

        >>> [ReLoRA(warm_start=0.5, every=3).since_start(step, 10) for step in range(4, 10)]
        [None, 0, 1, 2, 0, 1]
        """
        trained = step - int(self.warm_start * steps)
        return trained % self.every if trained >= 0 else None

    def lr_factor(self, step: int, steps: int) -> float:
        """The factor that makes a schedule jagged: a linear rise to 1 after every start of adapters.

        >>> jagged = ReLoRA(warm_start=0.5, every=3, rewarm=0.4)
        >>> [round(jagged.lr_factor(step, 10), 2) for step in range(4, 10)]
        [1.0, 0.45, 0.91, 1.0, 0.45, 0.91]
        """
        since = self.since_start(step, steps)
        warm = self.rewarm * self.every
        return 1.0 if since is None or since >= warm else warmup_rate(since, warm)


def begin_adapters(model: LensModel, lora: LoRA, seed: int) -> list[nn.Parameter]:
    """Merges the adapters that are there and adds new ones; what the model computes does not change.

    Args:
        model: changed in place.
        lora: rank, scale and sites of the new adapters.
        seed: of their random half.

    Returns:
        What is trainable: the adapters, and all weights that have none.

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
    """A new optimiser with what the old one remembers of the parameters they share.

    New adapters have none: their moments start at zero. The paper prunes 99 percent of them by
    magnitude instead; no entry of the old moments belongs to an entry of the new adapters.
    """
    for group in fresh.param_groups:
        for parameter in group["params"]:
            if parameter in old.state:
                fresh.state[parameter] = old.state[parameter]
    return fresh
