"""The general way to patch: whole forward passes with many patches stacked on the batch axis, any model, any site."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ctlens.analysis.patching_jobs import Found, JobNumbers, JobPositions, Jobs, PatchBatch
from ctlens.batch import Matched
from ctlens.hooks import editing, run
from ctlens.losses.attct import lifted_rows
from ctlens.types import Activations, HookFunction, LensModel

WITH_HEADS = ("z", "pattern")
Write = Callable[[PatchBatch, Jobs, Tensor, Tensor, JobNumbers], None]
"""Puts the source's activation into given rows of the target's, in place."""


class Hooked:
    """Runs jobs with hooks at the layers of each chunk.

    Attributes:
        name: how results call this way.
    """

    name = "hooks"

    def __init__(self, model: LensModel, batch: PatchBatch, site: str, names: list[str], source: Activations) -> None:
        self.model, self.batch, self.names, self.source = model, batch, names, source
        self.write = write_of(site)

    def __call__(self, jobs: Jobs, max_batch: int) -> Found:
        """The last logits of every job, `max_batch` jobs a forward pass."""
        for start in range(0, len(jobs), max_batch):
            numbers = torch.arange(start, min(start + max_batch, len(jobs)), device=jobs.pair.device)
            chunk = jobs.take(numbers)
            rows = self.batch.target_of(chunk.pair)
            with editing(self.model, self._edits(chunk)):
                logits = run(self.model, rows.side.tokens, rows.side.needed_mask)
            yield numbers, rows.at_last(logits)

    def _edits(self, jobs: Jobs) -> dict[str, HookFunction]:
        return {self.names[layer]: partial(self._edit, jobs, layer) for layer in jobs.layer.unique().tolist()}

    def _edit(self, jobs: Jobs, layer: int, activation: Tensor) -> Tensor:
        rows = (jobs.layer == layer).nonzero()[:, 0]
        edited = activation.clone()
        self.write(self.batch, jobs.take(rows), self.source[self.names[layer]], edited, rows)
        return edited


def write_of(site: str) -> Write:
    """How a site is patched."""
    return {"z": _write_head, "pattern": _write_pattern}.get(site, _write_vectors)


def places(batch: PatchBatch, jobs: Jobs) -> tuple[JobPositions, JobPositions]:
    """The positions each job takes activations from, and those it puts them at."""
    return batch.source_at[jobs.pair, jobs.column], batch.target_at[jobs.pair, jobs.column]


def _write_vectors(batch: PatchBatch, jobs: Jobs, source: Tensor, edited: Tensor, rows: JobNumbers) -> None:
    here, there = places(batch, jobs)
    edited[rows[:, None], there] = source[jobs.pair[:, None], here]


def _write_head(batch: PatchBatch, jobs: Jobs, source: Tensor, edited: Tensor, rows: JobNumbers) -> None:
    here, there = places(batch, jobs)
    head = jobs.head[:, None]
    edited[rows[:, None], there, head] = source[jobs.pair[:, None], here, head]


def _write_pattern(batch: PatchBatch, jobs: Jobs, source: Tensor, edited: Tensor, rows: JobNumbers) -> None:
    """Rows of attention, their mass moved to the keys of the target; nothing on those without a twin."""
    here, there = places(batch, jobs)
    keys = Matched(*(part[jobs.pair] for part in (batch.keys.clean, batch.keys.wrapped, batch.keys.valid)))
    queries = Matched(here, there, torch.ones_like(here, dtype=torch.bool))
    one_head = source[jobs.pair, jobs.head][:, None], edited[rows, jobs.head][:, None]
    lifted, _ = lifted_rows(*one_head, queries, keys)
    edited[rows[:, None], jobs.head[:, None], there] = lifted[:, :, 0]
