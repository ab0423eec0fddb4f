"""What a loss holds: the peak memory of a training step with it over that of the same passes without it.

Run `python benchmarks/memory.py`. Counted are the bytes of all tensors that live at once and were made in
the step, operation by operation, so that the numbers are the same on every run and machine; what an
operation needs inside itself is not seen. The table is printed and kept in `memory.csv`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from step import BARE, CONFIG, batch, losses, step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

import ctlens as ct

MEGABYTE = 2**20


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside the block that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, None] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage() not in given:
                self._count(leaf.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = None
        size = storage.nbytes()
        weakref.finalize(storage, self._forget, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, size: int) -> None:
        self.now -= size


def main() -> None:
    """Counts the peak of every loss and of the bare passes."""
    torch.set_num_threads(1)
    reference, model, pairs = ct.build(CONFIG), ct.build(CONFIG, seed=1), batch()
    peaks: dict[str, int] = {}
    for name, loss in losses().items():
        with LiveBytes() as live:
            step(reference, model, pairs, loss)
        peaks[name] = live.peak
    rows = [(name, peak / MEGABYTE, peak / peaks[BARE]) for name, peak in peaks.items()]
    table = pd.DataFrame(rows, columns=["step with", "peak_mb", "ratio"]).round(3)
    table.to_csv(Path(__file__).with_suffix(".csv"), index=False)
    tqdm.write(table.to_string(index=False))


if __name__ == "__main__":
    main()
