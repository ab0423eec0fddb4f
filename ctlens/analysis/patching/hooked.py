"""The general way to patch: the model's own blocks, many patches stacked on the batch axis, any model, any site.

If the model has a key-value cache, a pass begins at the first patched layer and position and takes what is in front of
both from the target run. If it has none, as on bridges, every pass runs the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ctlens.analysis.base.contrast import ContrastBatch
from ctlens.analysis.patching.jobs import Found, JobNumbers, JobPositions, Jobs, PatchBatch, chunks
from ctlens.core.types import Activations, LensModel
from ctlens.data.batch import Matched
from ctlens.losses.attct import lifted_rows, seen_keys
from ctlens.models.finite import forward
from ctlens.models.hooks import capturing, editing, resolve, run
from ctlens.models.loading import empty_cache

WITH_HEADS = ("z", "pattern")
_MOST_ROWS = 1024
"""The most tokens in a pass that begins at a position: passes with more are no faster."""
_TOLERANCE = 1e-4  # between float32 logits computed in two orders; chosen by eye
Write = Callable[[PatchBatch, Jobs, Tensor, Tensor, JobNumbers, int], None]
"""Writes the source's activations over the target's, in the given rows, which begin at the position given last."""


class Hooked:
    """Runs jobs with a hook at their layer, those of one layer together.

    Attributes:
        name: `Patching.path` of what it computes.
    """

    name = "hooks"

    def __init__(
        self, model: LensModel, batch: PatchBatch, site: str, names: list[str], source: Activations, last: Tensor
    ) -> None:
        self.model = model
        self.batch = batch
        self.names = names
        self.source = source
        self.write = write_of(site)
        self.kept = kept_of(model, batch.target, last)

    def __call__(self, jobs: Jobs, max_batch: int) -> Found:
        """The last logits of every job, at most `max_batch` jobs a forward pass."""
        first = patch_positions(self.batch, jobs)[1].amin(1) if self.kept else torch.zeros_like(jobs.pair)
        length = self.batch.target.side.tokens.shape[1]
        for index in jobs.layer.unique().tolist():
            chosen = (jobs.layer == index).nonzero()[:, 0]
            most = _MOST_ROWS if self.kept else max_batch * length
            for part in chunks(first[chosen], length, max_batch, most, most):
                numbers = chosen[part]
                yield numbers, self._last(index, jobs.take(numbers), int(first[numbers].min()))

    def _last(self, index: int, jobs: Jobs, first: int) -> Tensor:
        rows = self.batch.target_of(jobs.pair)
        name = self.names[index]
        with editing(self.model, {name: partial(self._edit, jobs, name, first)}):
            if self.kept is None:
                return rows.at_last(run(self.model, rows.side.tokens, rows.side.needed_mask))
            return self.kept.last(self.model, rows, jobs.pair, int(name.split(".")[1]), first)

    def _edit(self, jobs: Jobs, name: str, first: int, activation: Tensor) -> Tensor:
        edited = activation.clone()
        rows = torch.arange(len(jobs), device=jobs.pair.device)
        self.write(self.batch, jobs, self.source[name], edited, rows, first)
        return edited


@dataclass(frozen=True)
class Kept:
    """The states of the target runs that a pass needs to begin at a layer and a position in their middle.

    Attributes:
        entering: the residual stream in front of every layer, `[pair, pos, d_model]` each.
        cache: the keys and values of every layer.
    """

    entering: list[Tensor]
    cache: Any

    def last(self, model: LensModel, rows: ContrastBatch, pairs: JobNumbers, layer: int, first: int) -> Tensor:
        """The last logits of runs that are computed from a layer and a position on.

        Args:
            model: of the runs.
            rows: the prompts of the runs.
            pairs: the index of each run's pair in the batch.
            layer: the first layer that is computed.
            first: the first position that is computed.
        """
        length = rows.side.tokens.shape[1]
        cache = empty_cache(model, len(pairs))
        for new, old in list(zip(cache.entries, self.cache.entries, strict=True))[layer:]:
            new.past_keys = old.past_keys[:, :first].index_select(0, pairs)
            new.past_values = old.past_values[:, :first].index_select(0, pairs)
        seen = torch.ones(len(pairs), length, dtype=torch.long, device=pairs.device)
        cache.previous_attention_mask = seen[:, :first]
        begun = self.entering[layer][:, first:length].index_select(0, pairs)
        logits = forward(model, begun, start_at_layer=layer, past_kv_cache=cache, attention_mask=seen)
        return logits[torch.arange(len(pairs), device=pairs.device), rows.last - first]


def kept_of(model: LensModel, target: ContrastBatch, last: Tensor) -> Kept | None:
    """Runs the targets and keeps their states; None if the model has no cache, or passes begun in the middle go wrong.

    They go wrong if they do not reproduce `last`, the logits of the model's own whole run.
    """
    cache = empty_cache(model, len(target.last))
    if cache is None:
        return None
    names = resolve(model, "resid_pre")
    store = {}
    seen = torch.ones_like(target.side.tokens)
    with torch.no_grad(), capturing(model, names, store):
        forward(model, target.side.tokens, past_kv_cache=cache, attention_mask=seen)
    kept = Kept([store[name] for name in names], cache)
    pairs = torch.arange(len(last), device=last.device)
    middle = int(target.last.min()) // 2
    for layer in (0, len(names) - 1):
        found = kept.last(model, target, pairs, layer, middle)
        if not torch.allclose(found, last, atol=_TOLERANCE, rtol=_TOLERANCE):
            return None
    return kept


def write_of(site: str) -> Write:
    """The function that patches a site."""
    return {"z": _write_head, "pattern": _write_pattern}.get(site, _write_vectors)


def patch_positions(batch: PatchBatch, jobs: Jobs) -> tuple[JobPositions, JobPositions]:
    """The positions from which each job takes activations, and those at which it puts them."""
    return batch.source_at[jobs.pair, jobs.column], batch.target_at[jobs.pair, jobs.column]


def _write_vectors(batch: PatchBatch, jobs: Jobs, source: Tensor, edited: Tensor, rows: JobNumbers, first: int) -> None:
    here, there = patch_positions(batch, jobs)
    edited[rows[:, None], there - first] = source[jobs.pair[:, None], here]


def _write_head(batch: PatchBatch, jobs: Jobs, source: Tensor, edited: Tensor, rows: JobNumbers, first: int) -> None:
    here, there = patch_positions(batch, jobs)
    head = jobs.head[:, None]
    edited[rows[:, None], there - first, head] = source[jobs.pair[:, None], here, head]


def _write_pattern(batch: PatchBatch, jobs: Jobs, source: Tensor, edited: Tensor, rows: JobNumbers, first: int) -> None:
    """Moves the mass of attention rows to the keys of the target; a key without a twin gets none."""
    here, there = patch_positions(batch, jobs)
    keys = Matched(*(part[jobs.pair] for part in (batch.keys.clean, batch.keys.wrapped, batch.keys.valid)))
    queries = Matched(here, there, torch.ones_like(here, dtype=torch.bool))
    one_head = source[jobs.pair, jobs.head][:, None], edited[rows, jobs.head][:, None]
    begun = replace(queries, wrapped=there - first)
    lifted, _ = lifted_rows(*one_head, begun, keys, seen_keys(queries, keys))
    edited[rows[:, None], jobs.head[:, None], there - first] = lifted[:, :, 0]
