"""The fast way to patch: one changed row, and only what it changes behind it.

See `ctlens.analysis.patching` for the idea. Everything here is of one batch of pairs: the target
run's residual streams, queries, keys and values are held for every layer, `[pair, ...]` each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ctlens.analysis.patching_blocks import Block, Norm, read_norm
from ctlens.analysis.patching_hooks import places
from ctlens.analysis.patching_jobs import Found, JobNumbers, JobPositions, Jobs, PatchBatch
from ctlens.hooks import SHORTHANDS
from ctlens.types import Activations, LensModel

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")
MOST_ROWS, ENOUGH_ROWS = 1024, 256
"""Rows in a batch: at most; and as many as make it worth computing a few rows too many in front."""
TOLERANCE = 1e-4

JobRows = Float[Tensor, "job width d_model"]
JobLogits = Float[Tensor, "job d_vocab"]


def needed(site: str, n_layers: int) -> dict[str, list[str]]:
    """The hook names of the activations that the fast way needs of the target run, by point."""
    points = {"mlp_out": ("attn_out",), "z": ("attn_out", "z")}.get(site, ())
    names = {point: [SHORTHANDS[point].format(layer=layer) for layer in range(n_layers)] for point in points}
    stream = [SHORTHANDS["resid_pre"].format(layer=layer) for layer in range(n_layers)]
    return {**names, "stream": [*stream, SHORTHANDS["resid_post"].format(layer=n_layers - 1)]}


class Suffix:
    """Runs jobs from their first changed row on.

    Attributes:
        name: how results call this way.
    """

    name = "suffix"

    def __init__(
        self,
        model: LensModel,
        blocks: list[Block],
        batch: PatchBatch,
        site: str,
        layers: Sequence[int],
        source: Activations,
        target: Activations,
    ) -> None:
        parts = cast(Any, model)
        self.blocks, self.batch, self.site, self.layers = blocks, batch, site, tuple(layers)
        self.final: Norm = read_norm(parts.ln_final, model.cfg)
        self.unembed: Tensor = parts.W_U.T
        self.unembed_bias: Tensor | None = getattr(parts, "b_U", None)
        self.source = [source[SHORTHANDS[site].format(layer=layer)] for layer in self.layers]
        names = needed(site, len(blocks))
        self.states = {point: [target[name] for name in of_point] for point, of_point in names.items()}
        self.stream = self.states["stream"]
        self.positions = torch.arange(batch.target.side.tokens.shape[1], device=batch.target.last.device)
        self.held = [block.project(stream, self.positions) for block, stream in zip(blocks, self.stream, strict=False)]

    def agrees(self, expected: JobLogits) -> bool:
        """Whether rows put where they already are give the model's own logits, from the first layer on.

        Once from the first row and once from the middle of every prompt, so that prefixes, masks and
        positions count.
        """
        pairs = torch.arange(len(expected), device=expected.device)
        for at in (torch.zeros_like(pairs), self.batch.target.last // 2):
            rows = self.stream[0][pairs, at][:, None]
            found = self._run(0, pairs, at[:, None], rows)
            if not torch.allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE):
                return False
        return True

    def __call__(self, jobs: Jobs, max_batch: int) -> Found:
        """The last logits of every job, at most `max_batch` jobs at once."""
        first = places(self.batch, jobs)[1].amin(1)
        for numbers in self._chunks(jobs.layer, first, max_batch):
            chunk = jobs.take(numbers)
            here, there = places(self.batch, chunk)
            index = int(chunk.layer[0])
            rows = self._rows(index, chunk, here, there)
            start = self.layers[index] + (self.site != "resid_pre")
            yield numbers, self._run(start, chunk.pair, there, rows)

    def _chunks(self, layer: JobNumbers, first: JobNumbers, max_batch: int) -> Iterator[JobNumbers]:
        """Jobs of one layer at one or, where these are few, neighbouring first rows."""
        if not len(layer):
            return
        length = len(self.positions)
        order = np.lexsort((first.cpu().numpy(), layer.cpu().numpy()))
        layers, firsts = layer.cpu().numpy()[order], first.cpu().numpy()[order]
        ends = np.flatnonzero(np.diff(layers) | np.diff(firsts)) + 1
        begin = 0
        for stop in [*ends.tolist(), len(order)]:
            rows = length - int(firsts[begin])
            if stop < len(order) and layers[stop] == layers[begin] and (stop - begin) * rows < ENOUGH_ROWS:
                continue
            size = min(max_batch, max(1, MOST_ROWS // rows))
            for at in range(begin, stop, size):
                yield torch.from_numpy(order[at : min(at + size, stop)]).to(layer.device)
            begin = stop

    def _rows(self, index: int, jobs: Jobs, here: JobPositions, there: JobPositions) -> JobRows:
        """The changed rows of the stream: in front of the layer for `resid_pre`, else behind it."""
        layer, pairs = self.layers[index], jobs.pair[:, None]
        block, source = self.blocks[layer], self.source[index]
        if self.site in ("resid_pre", "resid_post"):
            return source[pairs, here]
        before = self.stream[layer][pairs, there]
        if self.site == "resid_mid":
            middle = source[pairs, here]
            return middle + block.mlp(middle)
        if self.site == "attn_out":
            return block.behind(before, source[pairs, here])
        attention = self.states["attn_out"][layer][pairs, there]
        if self.site == "mlp_out":
            return before + attention + source[pairs, here]
        z, head = self.states["z"][layer], jobs.head[:, None]
        rows, columns = (torch.arange(size, device=pairs.device) for size in there.shape)
        change = torch.zeros_like(z[pairs, there])
        change[rows[:, None], columns, head] = source[pairs, here, head] - z[pairs, there, head]
        return block.behind(before, attention + F.linear(change.flatten(-2), block.out.weight))

    def _run(self, start: int, pairs: JobNumbers, there: JobPositions, rows: JobRows) -> JobLogits:
        """The last logits after rows of the stream in front of layer `start` are replaced."""
        first, last = int(there.min()), self.batch.target.last[pairs]
        length = int(last.max()) + 1
        jobs = torch.arange(len(pairs), device=pairs.device)
        x = self.stream[start][pairs, first:length]
        x[jobs[:, None], there - first] = rows
        for layer in range(start, len(self.blocks)):
            block, held = self.blocks[layer], self.held[layer]
            queries, ends = block.widths[0], layer == len(self.blocks) - 1
            if layer == start:
                qkv = held[:, :length].index_select(0, pairs)
                qkv[jobs[:, None], there] = block.project(rows, there)
                q, kv = qkv[:, first:, :queries], qkv[..., queries:]
                q = q[jobs, last - first][:, None] if ends else q
            elif ends:
                new = block.project(x, self.positions[first:length], slice(queries, None))
                q = block.project(x[jobs, last - first][:, None], last[:, None], slice(queries))
                kv = torch.cat([held[:, :first, queries:].index_select(0, pairs), new], 1)
            else:
                q, new = block.project(x, self.positions[first:length]).tensor_split((queries,), -1)
                kv = torch.cat([held[:, :first, queries:].index_select(0, pairs), new], 1)
            if ends:
                x = x[jobs, last - first][:, None]
                visible = self.positions[:length] <= last[:, None, None, None]
            else:
                visible = self.positions[:length] <= self.positions[first:length, None]
            x = block.behind(x, block.attend(q, kv, visible))
        x = x[:, 0] if start < len(self.blocks) else x[jobs, last - first]
        return F.linear(self.final(x), self.unembed, self.unembed_bias)
