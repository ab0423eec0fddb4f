"""Losses that are computed layer by layer during the forward pass, and blocks that run again instead of being kept.

At a real model's size the activations of all layers, their targets and a distance's intermediate values take
more memory than the model. Here a loss is computed inside the hook of its layer, and only its value per pair
stays. For the gradient it is computed again from the activation, which autograd keeps anyway, and from
the target, which is fetched again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctlens.core.types import LensModel, PerRow
from ctlens.data.batch import PairBatch
from ctlens.losses import Forwards, Loss
from ctlens.losses.base import InternalLoss
from ctlens.models.sharding import gather
from ctlens.training.stores import EVERY
from ctlens.training.targets import Fetch

IN_FORCE: ContextVar[Layerwise | None] = ContextVar("IN_FORCE", default=None)


def is_layerwise(loss: Loss) -> bool:
    """Tells whether the loss at a hook point depends only on the activations there."""
    return isinstance(loss, InternalLoss)


class Layerwise:
    """Layerwise computes losses at their hook points during the forward pass.

    Args:
        losses: layerwise losses (see `is_layerwise`) with their hook points, each by a key.
        batch: the pairs.
        fetch: for each clean side (see `ctlens.losses.base.CLEAN_SIDES`), the function that gets its activations.
        subspaces: of each loss, by its key, the bases that it asked for by hook point.
        grad: keep the graph.

    Attributes:
        values: the loss of each pair, by the key of the loss and then by hook point.
    """

    def __init__(
        self,
        losses: Mapping[str, tuple[Loss, Sequence[str]]],
        batch: PairBatch,
        fetch: dict[str, Fetch],
        subspaces: Mapping[str, Mapping[str, Tensor]],
        *,
        grad: bool,
    ) -> None:
        self.losses = losses
        self.batch = batch
        self.fetch = fetch
        self.subspaces = subspaces
        self.grad = grad
        self.values: dict[str, dict[str, PerRow]] = {key: {} for key in losses}

    def visits(self) -> dict[str, Callable[[Tensor], None]]:
        """Makes the functions that get the activation at each hook point, see `ctlens.models.hooks.visiting`."""
        return {name: partial(self._visit, name) for _, names in self.losses.values() for name in names}

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Activates the losses only for the passes inside the block and for their recomputation."""
        with _set(self):
            yield

    def _visit(self, name: str, activation: Tensor) -> None:
        if IN_FORCE.get() is not self:
            return
        for key, (_, names) in self.losses.items():
            if name in names:
                value = self._at_layer(key, name, activation)
                self.values[key].setdefault(
                    name, value
                )  # a block that runs again must not replace it: its value would keep activations

    def _at_layer(self, key: str, name: str, activation: Tensor) -> PerRow:
        """Computes one layer's loss, head by head if it is a mean over heads: patterns are the largest activations."""
        if not self.losses[key][0].mean_over_heads:
            return self._value(key, name, EVERY, activation)
        heads = [slice(head, head + 1) for head in range(activation.shape[1])]
        parts = activation.split(1, dim=1)
        values = [self._value(key, name, head, part) for head, part in zip(heads, parts, strict=True)]
        return torch.stack(values).mean(0)

    def _value(self, key: str, name: str, heads: slice, activation: Tensor) -> PerRow:
        work = partial(self._worked_out, key, name, heads)
        if not self.grad:
            return work(activation)
        return cast(PerRow, checkpoint(work, activation, use_reentrant=False, preserve_rng_state=False))

    def _worked_out(self, key: str, name: str, heads: slice, activation: Tensor) -> PerRow:
        loss, _ = self.losses[key]
        clean = {name: self.fetch[loss.clean_side](name, heads)} if loss.needs_clean_activations else {}
        no_logits = activation.new_empty(len(activation), 0, 0)
        seen = Forwards(self.batch, clean, {name: activation}, no_logits, subspaces=self.subspaces.get(key, {}))
        return loss.row_values(seen, [name])[name]


def _again(block: nn.Module, forward: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """Runs a block under checkpointing, which recomputes it; the same losses must be active then as now."""
    layerwise = IN_FORCE.get()

    def work(*given: Any, **options: Any) -> Any:
        gather(block)  # the gradient of a loss inside of it may come before that of its output, which gathers it
        with _set(layerwise):
            return forward(*given, **options)

    return checkpoint(work, *given, use_reentrant=False, **options)


@contextmanager
def _set(layerwise: Layerwise | None) -> Iterator[None]:
    token = IN_FORCE.set(layerwise)
    try:
        yield
    finally:
        IN_FORCE.reset(token)


@contextmanager
def blocks_again(model: LensModel) -> Iterator[None]:
    """Keeps no activation within the model's blocks: a backward pass runs each block again.

    Hooks that are on in the forward pass must still be on in the backward pass, because they are run again too.
    """
    blocks = list(cast(Any, model).blocks)
    try:
        for block in blocks:
            # A bridge passes an assignment on to the layer that it wraps, so the attribute is set in the dictionary.
            block.__dict__["forward"] = partial(_again, block, block.forward)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
