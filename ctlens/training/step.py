"""What one step saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ctlens.losses import LossValue
from ctlens.types import Scalar

TRACKED = "tracked/"


@dataclass(frozen=True)
class Step:
    """What one step saw, before its update.

    Attributes:
        index: from 1.
        losses: the weighted value of each active loss, of `retention` and of their sum, `total`.
        tracked: the unweighted value of each tracked loss, by `tracked/` and its name.
        by_hook: the unweighted value of each loss at each hook point; of the tracked ones too.
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
    """The sums over the parts of a step, on the model's device until all of them are there."""

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

    @property
    def total(self) -> Scalar:
        """The sum of what is trained on."""
        return torch.stack(list(self.losses.values())).sum() if self.losses else torch.zeros(())

    def step(self, index: int, lr: float, grad_norm: float) -> Step:
        """The sums as plain numbers."""
        losses = _floats({**self.losses, "total": self.total})
        by_hook = {name: _floats(values) for name, values in self.by_hook.items()}
        return Step(index, losses, _floats(self.tracked), by_hook, lr, grad_norm)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value.detach() if name in sums else value.detach()


def _floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) if values else {}
