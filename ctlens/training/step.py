"""The numbers of one step: gathered over its parts, and then reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ctlens.core.types import Scalar
from ctlens.losses import LossValue

TRACKED = "tracked/"


@dataclass(frozen=True)
class Step:
    """Step holds the numbers of one step, measured before its update.

    Attributes:
        index: number of the step, from 1.
        losses: the weighted value of each active loss, of `retention` and of their sum, `total`.
        tracked: the unweighted value of each tracked loss, by `tracked/` and its name.
        by_hook: the unweighted value of each loss, also each tracked loss, at each hook point.
        lr: learning rate of the update.
        grad_norm: norm of the gradient before clipping.
    """

    index: int
    losses: Mapping[str, float]
    tracked: Mapping[str, float]
    by_hook: Mapping[str, Mapping[str, float]]
    lr: float
    grad_norm: float


@dataclass
class Seen:
    """Seen sums the numbers of a step over its parts, on the model's device."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    tracked: dict[str, Tensor] = field(default_factory=dict)
    by_hook: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def add(self, name: str, value: LossValue, share: float) -> None:
        """Adds a loss on a part that holds this share of the pairs."""
        _add(self.tracked if name.startswith(TRACKED) else self.losses, name, share * value.total)
        for hook, at_hook in value.by_hook.items():
            _add(self.by_hook.setdefault(name, {}), hook, share * at_hook)

    def add_retention(self, term: Scalar) -> None:
        """Adds a part of the retention term."""
        _add(self.losses, "retention", term)

    def include(self, other: Seen) -> None:
        """Adds the sums of another process."""
        for mine, theirs in ((self.losses, other.losses), (self.tracked, other.tracked)):
            for name, value in theirs.items():
                _add(mine, name, value)
        for name, values in other.by_hook.items():
            for hook, value in values.items():
                _add(self.by_hook.setdefault(name, {}), hook, value)

    def to(self, device: torch.device | str) -> Seen:
        """Copies the sums to another device."""
        by_hook = {name: _moved(values, device) for name, values in self.by_hook.items()}
        return Seen(_moved(self.losses, device), _moved(self.tracked, device), by_hook)

    @property
    def total(self) -> Scalar:
        """The total is the sum of the weighted losses and the retention term."""
        return torch.stack(list(self.losses.values())).sum() if self.losses else torch.zeros(())

    def step(self, index: int, lr: float, grad_norm: float) -> Step:
        """Reads the sums as plain numbers."""
        losses = _floats({**self.losses, "total": self.total})
        by_hook = {name: _floats(values) for name, values in self.by_hook.items()}
        return Step(index, losses, _floats(self.tracked), by_hook, lr, grad_norm)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value.detach() if name in sums else value.detach()


def _moved(sums: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in sums.items()}


def _floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) if values else {}
