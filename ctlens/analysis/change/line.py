"""The straight line through the weights of a base and of a trained model, and the models on it.

At the amount `a` the weights are `(1 - a) base + a trained`: 0 is the base and 1 the trained model, to the last digit.
Below 0 the training is reversed, above 1 amplified.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from torch import Tensor

from ctlens.analysis.base.forward import require_comparable
from ctlens.core.arguments import require_types
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel, widened
from ctlens.models.lora import merged_copy
from ctlens.models.parameters import present_parameters, saved_tensors, state_buffers
from ctlens.models.weights import copy_weights


@dataclass(frozen=True)
class WeightLine:
    """WeightLine is the models at some amounts on the line through two models' weights.

    Attributes:
        base: the model before training, in eval mode. Neither model is changed.
        trained: the model after training. Adapters count as the weights that they add up to.
        at: the amounts, in rising order.

    Raises:
        CtlensError: the models do not compare or are in training mode, or the amounts do not rise.
    """

    base: LensModel = field(repr=False)
    trained: LensModel = field(repr=False)
    at: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", tuple(self.at))
        require_types(self)
        require_comparable(self.base, self.trained)
        rises = all(before < after for before, after in pairwise(self.at))
        if not self.at or not np.isfinite(self.at).all() or not rises:
            raise CtlensError(f"at is {list(self.at)}: give at least one number, and numbers that rise.")

    def models(self) -> Iterator[LensModel]:
        """Yields the model of each amount: one model, whose weights change before it is yielded again.

        Raises:
            CtlensError: the models keep their weights under different names or in different shapes.
        """
        mixed = merged_copy(self.base)
        targets = {name: value.data for name, value in present_parameters(mixed).items()} | state_buffers(mixed)
        here = saved_tensors(self.base)
        there = saved_tensors(self.trained)
        copy_weights(targets, there)  # refuses a model whose weights have other names or shapes
        for amount in self.at:
            copy_weights(targets, {name: _mix(here[name], there[name], amount) for name in targets})
            yield mixed


def _mix(here: Tensor, there: Tensor, amount: float) -> Tensor:
    """The weight at an amount of the way; at 0 and at 1 it is that of the model, bit for bit."""
    return (1 - amount) * widened(here) + amount * widened(there)
