"""Training in several processes: each takes its share of every batch, and HuggingFace accelerate sums the gradients.

`accelerate launch -m ctlens train ...` starts them, or torchrun. Every process takes the same steps with the same
numbers, and has the whole model or, of a sharded one (`ctlens.models.sharding`), its slices. Wrappers around a whole
model that average gradients by themselves expect a loss on its output, which a loss on activations is not. So the
gradients of whole weights are summed here, after the backward passes; those of slices have been.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ctlens.core.errors import CtlensError
from ctlens.training.order import parts

SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


class Processes:
    """Processes is this process alone; `Accelerated` is one of several.

    Attributes:
        count: number of processes.
        index: number of this process, from 0.
    """

    count = 1
    index = 0

    @property
    def is_main(self) -> bool:
        """True if this process is the one that writes and prints."""
        return self.index == 0

    def share(self, rows: Sequence[int]) -> list[int]:
        """Takes this process's part of the rows; all parts have nearly the same length.

        Raises:
            CtlensError: there are fewer rows than processes.
        """
        if len(rows) < self.count:
            raise CtlensError(f"{len(rows)} pairs are too few for {self.count} processes: raise batch_size.")
        return parts(rows, self.count)[self.index]

    def require_equal_parts(self, n_rows: int, n_parts: int) -> None:
        """Refuses a batch of which one process would have more parts than another, see `ctlens.models.sharding`."""
        fewest = n_rows // self.count
        if n_rows % self.count and fewest < n_parts:
            raise CtlensError(
                f"{n_rows} prompts or pairs give {self.count} processes unequal numbers of {n_parts} parts, and a "
                f"sharded model needs equal ones: take a batch_size that is a multiple of {2 * self.count}."
            )

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Makes the gradient of each parameter the sum over all processes."""

    def sum_numbers(self, numbers: Float[Tensor, " number"]) -> Float[Tensor, " number"]:
        """Sums numbers over all processes."""
        return numbers

    def wait(self) -> None:
        """Waits until all processes have come to this line."""


class Accelerated(Processes):
    """Accelerated is one of several processes that accelerate started."""

    def __init__(self) -> None:
        from accelerate import PartialState

        for name in SHARDED:
            if os.environ.get(name, "").lower() == "true":
                raise CtlensError(
                    f"{name} asks accelerate to split the weights, which ctlens does itself: launch without it, and "
                    "give --shard."
                )
        self._state = PartialState(cpu=not torch.cuda.is_available())
        self.count, self.index = self._state.num_processes, self._state.process_index

    @property
    def device(self) -> torch.device:
        """The device is where this process's model belongs."""
        return torch.device(self._state.device)  # type: ignore[arg-type]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Makes the gradient of each parameter the sum over all processes."""
        from accelerate.utils import reduce

        for parameter in parameters:
            if isinstance(parameter, DTensor):
                continue  # of a sharded model, whose backward pass has summed it
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = reduce(gradient, "sum")  # type: ignore[assignment]

    def sum_numbers(self, numbers: Float[Tensor, " number"]) -> Float[Tensor, " number"]:
        """Sums numbers over all processes, in the order of the processes on each of them."""
        from accelerate.utils import gather

        first, *rest = cast(Tensor, gather(numbers[None]))
        return sum(rest, start=first)

    def wait(self) -> None:
        """Waits until all processes have come to this line."""
        self._state.wait_for_everyone()


@lru_cache(maxsize=1)
def processes() -> Processes:
    """Returns the processes that this one was started with.

    Raises:
        CtlensError: accelerate started them to split the model's weights.
    """
    return Accelerated() if is_launched() else Processes()


def is_launched() -> bool:
    """Tells whether accelerate started several processes together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def settle(device: Any) -> Any:
    """Chooses the device of this process: the one asked for, unless accelerate gives each process its own."""
    given = processes()
    return given.device if isinstance(given, Accelerated) else device
