"""The clean targets: the reference runs once per pair, and its activations come back in the shape of any batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ctlens.core.files import digest_of
from ctlens.core.types import Activations, CleanLogits, LensModel
from ctlens.data.batch import EncodedPair, EncodedPairs, PairBatch, collate, moved
from ctlens.losses.base import OUTPUT
from ctlens.models.hooks import run_capturing
from ctlens.models.parameters import fingerprint
from ctlens.models.sharding import in_step
from ctlens.training.stores import EVERY, InMemory, OnDisk, Store

PATTERN = "hook_pattern"


class Fetch(Protocol):
    """A Fetch gives the clean activation at a hook point in the shape of a batch, of a pattern also some heads."""

    def __call__(self, name: str, heads: slice = ..., /) -> Tensor: ...


class CleanTargets:
    """CleanTargets keeps the reference's clean side of every pair at the positions that losses read.

    The reference always sees a pair in one fixed batch, its home. Rounding depends on what else is in a
    batch, so this makes a pair's target equal to the last bit, at whichever step it is first needed.

    Args:
        reference: the model before training, in eval mode whenever `of` or `fetch` is called.
        pairs: the encoded pairs, with their answers.
        homes: the batches in which the reference sees the rows, as row numbers; every row is in one.
        names: full names of the hook points to keep.
        logits: keep the logits too.
        cache: False keeps nothing and runs the reference on every batch.
        folder: keeps the targets on disk, for this training and the next with the same reference and pairs;
            None keeps them in memory.
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
        folder: Path | None = None,
    ) -> None:
        self.reference = reference
        self.pairs = pairs
        self.homes = homes
        self.cache = cache
        self.names = list(names)
        self.logits = logits
        self._home = {row: number for number, rows in enumerate(homes) for row in rows}
        self._positions = [torch.tensor(read_positions(row)) for row in pairs.rows]
        needed = cache and folder is not None and (self.names or logits)
        self._store: Store = OnDisk(folder / self._name()) if needed and folder else InMemory()

    def _name(self) -> str:
        """Names the folder by a digest of all that these targets depend on."""
        rows = [
            (row.clean.ids, row.clean_answer, positions.tolist())
            for row, positions in zip(self.pairs.rows, self._positions, strict=True)
        ]
        kind = [fingerprint(self.reference), str(next(self.reference.parameters()).dtype), self.names, self.logits]
        return f"targets-{digest_of([kind, rows, list(map(list, self.homes))])}"

    def of(self, rows: Sequence[int], batch: PairBatch, names: Iterable[str]) -> tuple[Activations, CleanLogits | None]:
        """Returns the activations and logits on the clean side of a batch.

        With the cache, positions that no loss reads are zero.

        Args:
            rows: the row numbers of the batch.
            batch: the same rows, collated.
            names: the hook points to return.
        """
        fetch = self.fetch(rows, batch)
        return {name: fetch(name) for name in names}, fetch(OUTPUT) if self.logits else None

    def fetch(self, rows: Sequence[int], batch: PairBatch) -> Fetch:
        """Returns a function that gives the activation of a batch at one hook point, as often as it is called."""
        if not self.cache:
            return fetch_from(self._seen(batch))
        with in_step(self.reference):
            for home in dict.fromkeys(self._home[row] for row in rows if row not in self._store):
                self._compute(home)
        return partial(self._restored, rows=rows, batch=batch)

    def _seen(self, batch: PairBatch) -> Activations:
        clean = batch.clean
        logits, states = run_capturing(
            self.reference, clean.tokens, self.names, grad=False, mask=clean.needed_mask, logits=self.logits
        )
        return {**states, OUTPUT: logits} if self.logits else states

    def _compute(self, home: int) -> None:
        rows = self.homes[home]
        batch = collate([self.pairs.rows[row] for row in rows])
        seen = self._seen(batch.to(next(self.reference.parameters()).device))
        for number, row in enumerate(rows):
            length = len(self.pairs.rows[row].clean.ids + self.pairs.rows[row].clean_answer)
            values = {name: _by_position(name, value)[number][self._positions[row]] for name, value in seen.items()}
            cut = {name: value[..., :length] if name.endswith(PATTERN) else value for name, value in values.items()}
            self._store.put(row, {name: value.cpu() for name, value in cut.items()})

    def _restored(self, name: str, heads: slice = EVERY, *, rows: Sequence[int], batch: PairBatch) -> Tensor:
        device = batch.clean.tokens.device
        width = batch.clean.tokens.shape[1]
        kept = [self._store.get(row, name, heads) for row in rows]
        if name.endswith(PATTERN):
            kept = [torch.nn.functional.pad(value, (0, width - value.shape[-1])) for value in kept]
        values = moved(torch.cat(kept), device)
        empty = values.new_zeros(len(rows) * width, *values.shape[1:])
        filled = empty.index_copy(0, moved(self._cells(rows, batch), device), values)
        return _by_position(name, filled.unflatten(0, (len(rows), width)))

    def _cells(self, rows: Sequence[int], batch: PairBatch) -> Tensor:
        """Finds the indices of the rows' kept positions in a batch of these rows, counted through all its tokens."""
        width = batch.clean.tokens.shape[1]
        return torch.cat([number * width + self._positions[row] for number, row in enumerate(rows)])


def fetch_from(states: Activations) -> Fetch:
    """Returns a function that gives these activations, whole or at some heads."""

    def fetch(name: str, heads: slice = EVERY) -> Tensor:
        return states[name] if heads == EVERY else states[name][:, heads]

    return fetch


def read_positions(row: EncodedPair) -> list[int]:
    """Lists the positions on the clean side that losses read: the aligned ones, and from the prompt's last token on."""
    aligned = {position for alignment in row.alignments.values() for position in alignment.clean}
    end = len(row.clean.ids)
    return sorted(aligned | set(range(end - 1, end + len(row.clean_answer))))


def _by_position(name: str, value: Tensor) -> Tensor:
    """Puts positions on the second axis, where patterns have heads; applied twice it changes nothing."""
    return value.transpose(1, 2) if name.endswith(PATTERN) else value
