"""The fast way to patch: it computes one changed row and only what that row changes behind it.

`ctlens.analysis.patching.patch` tells the idea. Everything here belongs to one batch of pairs. The target runs'
residual streams, queries, keys and values are held for every layer, `[pair, ...]` each, once for all sites. A job is a
row of the stream in front of some layer, whatever its site, so jobs of several sites share their batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ctlens.analysis.patching.blocks import Block, Linear, read_unembedding
from ctlens.analysis.patching.hooked import patch_positions
from ctlens.analysis.patching.jobs import Found, JobNumbers, JobPositions, Jobs, PatchBatch, chunks
from ctlens.core.types import Activations, LensModel
from ctlens.models.hooks import SHORTHANDS

SUFFIX_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")
LARGEST = 2**19
"""The most numbers in a batch's largest tensor, 2 MiB in float32: the system clears larger memory at every use."""
ENOUGH_ROWS = 384
"""A batch with fewer rows takes jobs of later first rows too, see `chunks`: a larger product is worth wasted rows."""
_TOLERANCE = 1e-4  # between float32 numbers computed in two orders; chosen by eye

JobRows = Float[Tensor, "job width d_model"]
SpanRows = Float[Tensor, "job span d_model"]
AnyRows = Float[Tensor, "_ _ _"]
LastRows = Float[Tensor, "job d_model"]
JobLogits = Float[Tensor, "job d_vocab"]


def needed(sites: Sequence[str], n_layers: int) -> list[str]:
    """The hook names of the target run's activations that the fast way reads."""
    read_for = {"mlp_out": ("attn_out",), "z": ("attn_out", "z")}
    read = dict.fromkeys(("resid_pre", *(name for site in sites for name in read_for.get(site, ()))))
    names = [SHORTHANDS[name].format(layer=layer) for name in read for layer in range(n_layers)]
    return [*names, SHORTHANDS["resid_post"].format(layer=n_layers - 1)]


class Held(NamedTuple):
    """The target runs' queries, and their keys and values side by side, `[pair, pos, _]` each."""

    q: Tensor
    kv: Tensor


@dataclass(frozen=True)
class SuffixRows:
    """The rows of the stream that a batch of jobs computes together, from the first row that any of the jobs changes.

    Two jobs that change one row each, at positions 3 and 4, in prompts of 8 and 7 tokens:

        position    0  1  2    3  4  5  6  7
        job 0       .  .  .  | X  o  o  o  L |     there [3]   local [0]   last 7
        job 1       .  .  .  | o  X  o  L  - |     there [4]   local [1]   last 6
                             ^ first         ^ stop

        .  in front of every patch: keys and values are those held of the target run
        X  the changed row, which is the job's input
        o  computed because a batch has one first row, or because the row sees the changed one
        L  the job's last row, off which the answer is read
        -  padding, which no row in front of it sees

    The span is `first` to `stop`; `local` counts from its beginning, `there` and `last` from the prompt's.

    Attributes:
        pairs: per job, its pair's row in the batch.
        there: per job, the positions of its changed rows.
        last: per job, the position that predicts the answer.
        first: the span's first position.
        stop: the position behind the span's last.
    """

    pairs: JobNumbers
    there: JobPositions
    last: JobNumbers
    first: int
    stop: int

    @classmethod
    def of(cls, pairs: JobNumbers, there: JobPositions, last: JobNumbers) -> SuffixRows:
        """The smallest span that holds every changed and every last row."""
        return cls(pairs, there, last, int(there.min()), int(last.max()) + 1)

    @property
    def span(self) -> slice:
        """The positions that are computed."""
        return slice(self.first, self.stop)

    @property
    def local(self) -> JobPositions:
        """The changed rows, counted within the span."""
        return self.there - self.first

    def last_of(self, x: SpanRows) -> LastRows:
        """The last row of every job, out of the rows of the span."""
        return x[torch.arange(len(self.pairs), device=self.pairs.device), self.last - self.first]


class Suffix:
    """Runs jobs from their first changed row on.

    Attributes:
        name: `Patching.path` of what it computes.
    """

    name = "suffix"

    def __init__(
        self,
        model: LensModel,
        blocks: list[Block],
        batch: PatchBatch,
        sites: Sequence[str],
        layers: Sequence[int],
        source: Activations,
        target: Activations,
    ) -> None:
        self.blocks = blocks
        self.batch = batch
        self.sites = tuple(sites)
        self.layers = tuple(layers)
        self.read_out = read_unembedding(model)
        self.source = source
        self.target = target
        self.most_rows = max(1, LARGEST // blocks[0].mlp_in.weight.shape[1])
        self.stream = [target[name] for name in needed((), len(blocks))]
        length = batch.target.side.tokens.shape[1]
        self.hidden = torch.full((length, length), -torch.inf, device=batch.target.last.device).triu(1)
        self.held = [
            _held(block, x, length) for block, x in zip(blocks, self.stream, strict=False)
        ]  # the last stream has no block

    def agrees(self, expected: JobLogits) -> bool:
        """Checks that rows put where they already are give the model's own logits.

        They are put in front of the first layer, once at the first row and once in the middle of every
        prompt, so that a mistake in prefixes, masks or positions shows; and in front of the last layer, which
        is computed in another way. Then each site is patched with the run's own activations, which must give
        the run's own stream.
        """
        pairs = torch.arange(len(expected), device=expected.device)
        middle = self.batch.target.last // 2
        for start, at in ((0, torch.zeros_like(pairs)), (0, middle), (len(self.blocks) - 1, middle)):
            rows = self.stream[start][pairs, at][:, None]
            found = self.logits(self.run_from(start, pairs, at[:, None], rows))
            if not torch.allclose(found, expected, atol=_TOLERANCE, rtol=_TOLERANCE):
                return False
        layer = self.layers[0]
        zeros = torch.zeros_like(pairs)
        jobs = Jobs(site=zeros, pair=pairs, layer=zeros, column=zeros, head=zeros)
        at = middle[:, None]
        for site in self.sites:
            own = self._changed(site, layer, jobs, at, at, self.target)
            stream = self.stream[layer + (site != "resid_pre")][pairs[:, None], at]
            if not torch.allclose(own, stream, atol=_TOLERANCE, rtol=_TOLERANCE):
                return False
        return True

    def __call__(self, jobs: Jobs, max_batch: int) -> Found:
        """The last logits of every job, at most `max_batch` jobs at once.

        Several batches are unembedded in one product, because with a large vocabulary that product is most of
        the work.
        """
        done: list[JobNumbers] = []
        rows: list[LastRows] = []
        for numbers, last in self._finished(jobs, max_batch):
            if sum(map(len, done)) + len(numbers) > max_batch and done:
                yield torch.cat(done), self.logits(torch.cat(rows))
                done = []
                rows = []
            done.append(numbers)
            rows.append(last)
        if done:
            yield torch.cat(done), self.logits(torch.cat(rows))

    @torch.inference_mode()
    def logits(self, rows: LastRows) -> JobLogits:
        """The logits of rows of the last stream."""
        return self.read_out(rows)

    def _finished(self, jobs: Jobs, max_batch: int) -> Iterator[tuple[JobNumbers, LastRows]]:
        """Runs the jobs in batches, and gives the last row of the last stream of each."""
        here, there = patch_positions(self.batch, jobs)
        behind = torch.tensor([site != "resid_pre" for site in self.sites], device=here.device)
        starts = torch.tensor(self.layers, device=here.device)[jobs.layer] + behind[jobs.site]
        for start in starts.unique().tolist():
            chosen = (starts == start).nonzero()[:, 0]
            pairs = jobs.pair[chosen]
            positions = there[chosen]
            rows = self._rows(jobs.take(chosen), here[chosen], positions)
            first = positions.amin(1)
            if start >= len(self.blocks) - 1:  # computed for the last row alone, wherever the patch is
                first = torch.full_like(first, len(self.hidden) // 2)
            for part in chunks(first, len(self.hidden), max_batch, self.most_rows, ENOUGH_ROWS):
                yield chosen[part], self.run_from(start, pairs[part], positions[part], rows[part])

    @torch.inference_mode()
    def _rows(self, jobs: Jobs, here: JobPositions, there: JobPositions) -> JobRows:
        """The changed rows of the stream: in front of the job's layer for `resid_pre`, behind it for other sites."""
        rows = self.stream[0].new_empty(*there.shape, self.stream[0].shape[-1])
        kinds = jobs.site * len(self.layers) + jobs.layer
        for kind in kinds.unique().tolist():
            site = self.sites[kind // len(self.layers)]
            layer = self.layers[kind % len(self.layers)]
            for part in (kinds == kind).nonzero()[:, 0].split(max(1, self.most_rows // there.shape[1])):
                rows[part] = self._changed(site, layer, jobs.take(part), here[part], there[part], self.source)
        return rows

    def _changed(
        self, site: str, layer: int, jobs: Jobs, here: JobPositions, there: JobPositions, activations: Activations
    ) -> JobRows:
        """The changed rows of jobs of one site and layer, with activations from `activations` put in."""
        pairs = jobs.pair[:, None]
        block = self.blocks[layer]
        source = activations[SHORTHANDS[site].format(layer=layer)]
        if site == "z":
            return self._with_head(layer, source, jobs, here, there)
        new = source[pairs, here]
        if site in ("resid_pre", "resid_post"):
            return new
        if site == "resid_mid":
            return block.add_mlp(new, new)
        before = self.stream[layer][pairs, there]
        if site == "attn_out":
            return block.behind(before, new)
        return before + self._of_target("attn_out", layer)[pairs, there] + new

    def _with_head(self, layer: int, source: Tensor, jobs: Jobs, here: JobPositions, there: JobPositions) -> JobRows:
        """The stream behind the block where one head's `z` is the source's: attention changes by that head's output."""
        block = self.blocks[layer]
        pairs = jobs.pair[:, None]
        head = jobs.head[:, None]
        z = self._of_target("z", layer)
        change = torch.zeros(*there.shape, *source.shape[2:], device=source.device)
        rows = torch.arange(there.shape[0], device=pairs.device)[:, None]
        columns = torch.arange(there.shape[1], device=pairs.device)
        change[rows, columns, head] = source[pairs, here, head] - z[pairs, there, head]
        attention = self._of_target("attn_out", layer)[pairs, there]
        Linear(block.out.weight, None).add_to(attention, change.flatten(-2))
        return block.behind(self.stream[layer][pairs, there], attention)

    def _of_target(self, site: str, layer: int) -> Tensor:
        return self.target[SHORTHANDS[site].format(layer=layer)]

    @torch.inference_mode()
    def run_from(self, start: int, pairs: JobNumbers, there: JobPositions, rows: JobRows) -> LastRows:
        """Puts rows into the stream in front of layer `start`, and gives the last row behind the last block."""
        at = SuffixRows.of(pairs, there, self.batch.target.last[pairs])
        final = len(self.blocks) - 1
        x = _with(self.stream[start][:, at.span], pairs, at.local, rows)
        if start > final:
            return at.last_of(x)
        block = self.blocks[final]
        if start == final:
            return self._last_block(at, x, self._kv_with(final, at, block.keys(block.ln1(rows), at.there)))
        x = self._first_block(start, at, x, rows)
        for layer in range(start + 1, final):
            x = self._middle_block(layer, at, x)
        return self._last_block(at, x, self._kv_behind(final, at, block.keys(block.ln1(x), at.span)))

    def _first_block(self, layer: int, at: SuffixRows, x: SpanRows, rows: JobRows) -> SpanRows:
        """The patched block computes queries and keys of the changed rows, `X`, and takes all others as held."""
        block = self.blocks[layer]
        q, kv = block.queries_and_keys(block.ln1(rows), at.there)
        q = _with(self.held[layer].q[:, at.span], at.pairs, at.local, q)
        z = block.attend(q, self._kv_with(layer, at, kv), self.hidden[at.span, : at.stop])
        return block.finish(x, z)

    def _middle_block(self, layer: int, at: SuffixRows, x: SpanRows) -> SpanRows:
        """A later block computes all rows of the span and takes only the keys in front of it, `.`, as held."""
        block = self.blocks[layer]
        q, kv = block.queries_and_keys(block.ln1(x), at.span)
        z = block.attend(q, self._kv_behind(layer, at, kv), self.hidden[at.span, : at.stop])
        return block.finish(x, z)

    def _last_block(self, at: SuffixRows, x: SpanRows, kv: AnyRows) -> LastRows:
        """The last block computes each job's last row, `L`, alone, because the answer is read off nothing else."""
        block = self.blocks[-1]
        x = at.last_of(x)[:, None]
        q = block.queries(block.ln1(x), at.last[:, None])
        return block.finish(x, block.attend(q, kv, self.hidden[at.last, None, None, : at.stop]))[:, 0]

    def _kv_with(self, layer: int, at: SuffixRows, new: AnyRows) -> AnyRows:
        """The held keys and values of a layer, with new ones of the changed rows."""
        return _with(self.held[layer].kv[:, : at.stop], at.pairs, at.there, new)

    def _kv_behind(self, layer: int, at: SuffixRows, new: SpanRows) -> AnyRows:
        """The held keys and values of a layer in front of the span, and behind them new ones of all its rows."""
        return _behind(self.held[layer].kv[:, : at.first], at.pairs, new)


@torch.inference_mode()
def _held(block: Block, stream: Tensor, length: int) -> Held:
    return Held(*block.queries_and_keys(block.ln1(stream), slice(length)))


def _with(held: Tensor, pairs: JobNumbers, at: JobPositions, rows: AnyRows) -> AnyRows:
    """Copies the held rows of the pairs, with new rows at some positions."""
    found = held.index_select(0, pairs)
    found[torch.arange(len(pairs), device=pairs.device)[:, None], at] = rows
    return found


def _behind(held: Tensor, pairs: JobNumbers, rows: AnyRows) -> AnyRows:
    """Copies the held rows of the pairs and puts new rows behind them; `cat` would copy the held rows twice."""
    front = held.shape[1]
    found = rows.new_empty(len(pairs), front + rows.shape[1], rows.shape[2])
    torch.index_select(held, 0, pairs, out=found[:, :front])
    found[:, front:] = rows
    return found
