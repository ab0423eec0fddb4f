"""The order of pairs: the seed and the step decide which pairs a step sees, so a resumed training sees the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ctlens.core.config import generator
from ctlens.training.config import TrainConfig


def batches(units: Sequence[Sequence[int]], config: TrainConfig) -> Iterator[list[int]]:
    """Yields endless batches of row numbers; every epoch shuffles the units (rows that stay together) anew."""
    draw = generator(config.seed, "batches")
    count = sum(map(len, units))
    size = min(config.batch_size, count)
    while True:
        order = _order(units, draw)
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))


def homes(units: Sequence[Sequence[int]], config: TrainConfig) -> list[list[int]]:
    """Lists the batches (or parts of batches) in which the reference sees the rows, each row once.

    They are the batches of the first epoch and the rows that it leaves over. Because they are fixed, a row's
    target is the same to the last bit at whichever step it is computed.
    """
    order = _order(units, generator(config.seed, "batches"))
    chunks = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
    return [part for chunk in chunks for part in parts(chunk, config.accumulate)]


def _order(units: Sequence[Sequence[int]], draw: torch.Generator) -> list[int]:
    return [row for unit in torch.randperm(len(units), generator=draw).tolist() for row in units[unit]]


def parts(rows: Sequence[int], n_parts: int) -> list[list[int]]:
    """Splits the rows into at most `n_parts` parts of nearly equal length.

    >>> parts([4, 7, 1, 3, 8], 3)
    [[4, 7], [1, 3], [8]]
    """
    return [part.tolist() for part in torch.tensor(rows).tensor_split(n_parts) if len(part)]
