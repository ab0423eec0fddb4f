"""What the reference does on the clean prompts: worked out once a pair, and given back in the shape of any batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ctlens.batch import EncodedPair, EncodedPairs, PairBatch, collate
from ctlens.hooks import capture
from ctlens.losses.base import OUTPUT
from ctlens.types import Activations, CleanLogits, LensModel

PATTERN = "hook_pattern"


class CleanTargets:
    """The reference's clean side of every pair at the positions that losses read, kept on the CPU.

    A pair's target is always computed among the same batch-mates, its home, so that its floats do
    not depend on the step at which it is first needed.

    Args:
        reference: in eval mode whenever `of` is called.
        pairs: encoded, with their answers.
        homes: row numbers in the batches that the reference sees, every row once.
        names: full names of the hook points to keep.
        logits: keep the logits too.
        cache: False keeps nothing, and runs the reference on every batch asked for.
    """

    def __init__(
        self,
        reference: LensModel,
        pairs: EncodedPairs,
        homes: Sequence[Sequence[int]],
        names: Iterable[str],
        *,
        logits: bool,
        cache: bool = True,
    ) -> None:
        self.reference, self.pairs, self.homes, self.cache = reference, pairs, homes, cache
        self.names, self.logits = list(names), logits
        self._home = {row: number for number, rows in enumerate(homes) for row in rows}
        self._positions = [torch.tensor(read_positions(row)) for row in pairs.rows]
        sizes = torch.tensor([len(positions) for positions in self._positions])
        self._places = list(torch.arange(int(sizes.sum())).split(sizes.tolist()))
        self._longest = max(len(row.clean.ids + row.clean_answer) for row in pairs.rows)
        self._kept: Activations = {}
        self._known: set[int] = set()

    def of(self, rows: Sequence[int], batch: PairBatch) -> tuple[Activations, CleanLogits | None]:
        """The activations and logits on the clean side of a batch; with the cache, zero where no loss reads.

        Args:
            rows: the row numbers of the batch.
            batch: the same rows, collated.
        """
        if not self.cache:
            return self._seen(batch)
        for home in dict.fromkeys(self._home[row] for row in rows if row not in self._known):
            self._compute(home)
        places = torch.cat([self._places[row] for row in rows])
        restored = {name: self._restored(name, rows, places, batch) for name in self._kept}
        return restored, restored.pop(OUTPUT, None)

    def _seen(self, batch: PairBatch) -> tuple[Activations, CleanLogits | None]:
        clean = batch.clean
        logits, states = capture(self.reference, clean.tokens, self.names, grad=False, mask=clean.needed_mask)
        return states, logits if self.logits else None

    def _compute(self, home: int) -> None:
        rows = self.homes[home]
        batch = collate([self.pairs.rows[row] for row in rows])
        states, logits = self._seen(batch.to(next(self.reference.parameters()).device))
        places, cells = torch.cat([self._places[row] for row in rows]), self._cells(rows, batch)
        for name, value in {**states, **({OUTPUT: logits} if logits is not None else {})}.items():
            values = _by_position(name, value).flatten(0, 1)[cells.to(value.device)].cpu()
            if name.endswith(PATTERN):
                values = torch.nn.functional.pad(values, (0, self._longest - values.shape[-1]))
            if name not in self._kept:
                self._kept[name] = values.new_empty(sum(map(len, self._places)), *values.shape[1:])
            self._kept[name][places] = values
        self._known.update(rows)

    def _restored(self, name: str, rows: Sequence[int], places: Tensor, batch: PairBatch) -> Tensor:
        device, width = batch.clean.tokens.device, batch.clean.tokens.shape[1]
        values = self._kept[name][places]
        values = (values[..., :width] if name.endswith(PATTERN) else values).to(device)
        empty = values.new_zeros(len(rows) * width, *values.shape[1:])
        filled = empty.index_copy(0, self._cells(rows, batch).to(device), values)
        return _by_position(name, filled.unflatten(0, (len(rows), width)))

    def _cells(self, rows: Sequence[int], batch: PairBatch) -> Tensor:
        """Where the kept positions of these rows are in a batch of them, counted through all its tokens."""
        width = batch.clean.tokens.shape[1]
        return torch.cat([number * width + self._positions[row] for number, row in enumerate(rows)])


def read_positions(row: EncodedPair) -> list[int]:
    """Positions on the clean side that losses read: the aligned ones, and from the prompt's last token on."""
    aligned = {position for alignment in row.alignments.values() for position in alignment.clean}
    end = len(row.clean.ids)
    return sorted(aligned | set(range(end - 1, end + len(row.clean_answer))))


def _by_position(name: str, value: Tensor) -> Tensor:
    """Positions on the second axis, where patterns have heads; the same function leads back."""
    return value.transpose(1, 2) if name.endswith(PATTERN) else value
