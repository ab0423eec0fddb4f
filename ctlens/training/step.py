"""The numbers of one step: gathered over its parts on the model's device, and read from there when they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite, isnan

import torch
from torch import Tensor

from ctlens.core.errors import NotFinite
from ctlens.core.types import Scalar
from ctlens.losses import LossValue

TRACKED = "tracked/"
_PASSES = "passes that are not finite"


@dataclass
class Seen:
    """Seen sums the numbers of a step over its parts, on the model's device.

    Attributes:
        sums: by the name of a loss and a hook point: weighted losses and retention, and unweighted tracked losses,
            without a hook point; at each hook point the unweighted loss.
    """

    sums: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def add(self, name: str, value: LossValue, share: float) -> None:
        """Adds a loss on a part that holds this share of the pairs."""
        self._add(name, "", share * value.total)
        for hook, at_hook in value.by_hook.items():
            self._add(name, hook, share * at_hook)

    def add_retention(self, term: Scalar) -> None:
        """Adds a part of the retention term."""
        self._add("retention", "", term)

    def add_passes(self, finite: Sequence[Tensor]) -> None:
        """Counts the forward passes that were not finite, see `ctlens.models.finite.read_later`."""
        if finite:
            self._add(_PASSES, _PASSES, (~torch.stack(list(finite))).sum().float())

    def _add(self, name: str, hook: str, value: Tensor) -> None:
        earlier = self.sums.get((name, hook))
        self.sums[name, hook] = value.detach() if earlier is None else earlier + value.detach()

    def summed(self, over: Callable[[Tensor], Tensor]) -> Seen:
        """The sums over all processes, where `over` sums a tensor; each process has the same names."""
        if not self.sums:
            return self
        return Seen(dict(zip(self.sums, over(torch.stack(list(self.sums.values()))).unbind(), strict=True)))

    @property
    def total(self) -> Scalar:
        """The total is the sum of the weighted losses and the retention term."""
        losses = [value for (name, hook), value in self.sums.items() if not hook and not name.startswith(TRACKED)]
        return torch.stack(losses).sum() if losses else torch.zeros(())


class Step:
    """Step holds the numbers of one step, measured before its update.

    They are on the model's device until somebody reads one of them; on a GPU the first reading waits for it.

    Args:
        index: number of the step, from 1.
        lr: learning rate of the update.
        seen: the sums of all processes.
        grad_norm: norm of the gradient before clipping.
    """

    def __init__(self, index: int, lr: float, seen: Seen, grad_norm: Scalar) -> None:
        self.index = index
        self.lr = lr
        values = {**seen.sums, ("total", ""): seen.total, ("grad_norm", ""): grad_norm}
        device = next(iter(values.values())).device
        self._names = list(values)
        self._values = torch.stack([value.to(device) for value in values.values()])

    @cached_property
    def _numbers(self) -> dict[tuple[str, str], float]:
        return dict(zip(self._names, self._values.tolist(), strict=True))

    @property
    def is_read(self) -> bool:
        """True once the numbers have been read."""
        return "_numbers" in vars(self)

    @property
    def losses(self) -> Mapping[str, float]:
        """The weighted value of each active loss, of `retention` and of their sum, `total`."""
        return {
            name: value
            for (name, hook), value in self._numbers.items()
            if not hook and not name.startswith(TRACKED) and name != "grad_norm"
        }

    @property
    def tracked(self) -> Mapping[str, float]:
        """The unweighted value of each tracked loss, by `tracked/` and its name."""
        return {name: value for (name, hook), value in self._numbers.items() if not hook and name.startswith(TRACKED)}

    @property
    def by_hook(self) -> Mapping[str, Mapping[str, float]]:
        """The unweighted value of each loss, also each tracked loss, at each hook point."""
        found: dict[str, dict[str, float]] = {}
        for (name, hook), value in self._numbers.items():
            if hook and name != _PASSES:
                found.setdefault(name, {})[hook] = value
        return found

    @property
    def grad_norm(self) -> float:
        """The norm of the gradient before clipping."""
        return self._numbers["grad_norm", ""]

    def require_finite(self) -> None:
        """Raises a `NotFinite` with the number of the step if a pass, the loss or the gradient was not finite."""
        with at_step(self.index):
            self._require_finite()

    def _require_finite(self) -> None:
        if self._numbers.get((_PASSES, _PASSES)):
            raise NotFinite(
                "the model computes nan or infinity: lower lr or the weights of the losses, or read the numbers of "
                "every step (log_every=1), which says where it comes from."
            )
        require_finite_loss(self.losses["total"])
        if not isfinite(self.grad_norm):
            raise NotFinite(
                f"the norm of the gradient is {_in_words(self.grad_norm)}: lower lr or the weights of the losses."
            )


def require_finite_loss(total: float) -> None:
    """Raises a `NotFinite` unless the loss is finite."""
    if not isfinite(total):
        raise NotFinite(
            f"the loss is {_in_words(total)}, and the model's own numbers are finite: lower lr or the weights of the "
            "losses."
        )


def read_together(steps: Sequence[Step]) -> None:
    """Reads the numbers of several steps with one copy from the device."""
    unread = [step for step in steps if not step.is_read]
    if not unread:
        return
    values = torch.cat([step._values for step in unread]).tolist()
    for step in unread:
        count = len(step._names)
        step._numbers = dict(zip(step._names, values[:count], strict=True))
        values = values[count:]


@contextmanager
def at_step(index: int) -> Iterator[None]:
    """Adds the number of the step to the refusal of a number that is not finite."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(f"at step {index} {error}") from None


def _in_words(value: float) -> str:
    return "nan" if isnan(value) else "infinity"
