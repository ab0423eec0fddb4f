"""More than one process: each works off its share of every batch, and gradients are summed by HuggingFace accelerate.

Started by `accelerate launch -m ctlens train ...`, every process has the whole model and takes the same steps
with the same numbers. Losses on activations do not suit the wrappers that average gradients by themselves, which
expect a loss on a module's output: here the gradients of the trained weights are summed once they are all there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ctlens.core.errors import CtlensError
from ctlens.training.order import parts
from ctlens.training.step import Seen

SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


class Processes:
    """Processes is this process alone, with nobody to share with.

    Attributes:
        count: how many there are.
        index: which one this is.
    """

    count = 1
    index = 0

    @property
    def is_main(self) -> bool:
        """True if this process is the one that writes and prints."""
        return self.index == 0

    def share(self, rows: Sequence[int]) -> list[int]:
        """Takes this process's part of the rows, nearly as many as any other's.

        Raises:
            CtlensError: there are fewer rows than processes.
        """
        if len(rows) < self.count:
            raise CtlensError(f"{len(rows)} pairs cannot be shared by {self.count} processes: raise batch_size.")
        return parts(rows, self.count)[self.index]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Makes the gradient of each parameter the sum over all processes."""

    def sum_seen(self, seen: Seen) -> Seen:
        """What all processes have seen together."""
        return seen

    def wait(self) -> None:
        """Until all are here."""


class Accelerated(Processes):
    """Accelerated is one of several processes that accelerate started."""

    def __init__(self) -> None:
        from accelerate import PartialState

        for name in SHARDED:
            if os.environ.get(name, "").lower() == "true":
                raise CtlensError("ctlens shares batches and does not split weights: launch it plainly data parallel.")
        self._state = PartialState(cpu=not torch.cuda.is_available())
        self.count, self.index = self._state.num_processes, self._state.process_index

    @property
    def device(self) -> torch.device:
        """This process's model belongs on this device."""
        return torch.device(self._state.device)  # type: ignore[arg-type]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Makes the gradient of each parameter the sum over all processes."""
        from accelerate.utils import reduce

        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = reduce(gradient, "sum")  # type: ignore[assignment]

    def sum_seen(self, seen: Seen) -> Seen:
        """What all processes have seen together."""
        from accelerate.utils import gather_object

        total = Seen()
        for part in gather_object([seen.to("cpu")]):
            total.include(part)
        return total

    def wait(self) -> None:
        """Until all are here."""
        self._state.wait_for_everyone()


@lru_cache(maxsize=1)
def processes() -> Processes:
    """Returns the processes that this one was started with.

    Raises:
        CtlensError: they were started to split the model's weights.
    """
    return Accelerated() if is_launched() else Processes()


def is_launched() -> bool:
    """Tells whether several processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def settle(device: Any) -> Any:
    """Chooses the device of this process: the one asked for, unless accelerate gives each process its own."""
    given = processes()
    return given.device if isinstance(given, Accelerated) else device
