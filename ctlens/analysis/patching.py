"""Activation patching on clean and wrapped pairs: where does an activation decide the answer?

One activation of one run (the source) is put into another run (the target), and the answer is read
again. Positions follow the alignment, so prompts of different lengths exchange the same token.

Why it is fast. A patch of one vector replaces one row of one residual stream, `(layer, position)`:
of `resid_pre` the row itself; of `attn_out`, `mlp_out` and a head's `z` the row behind the block, with
the MLP computed for that row alone. Rows in front of it stay as they are in the target run, so their
keys and values are taken from there; the layers behind it are computed from that row to the end; the
last layer for the last row alone. Patches of one layer at neighbouring positions share a batch. It is
exact: only products whose factors changed are computed again. A model it does not know, or for
which its own logits are not the model's, goes the general way: whole forward passes with many
patches stacked on the batch axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ctlens.analysis.forward import require_eval
from ctlens.analysis.patching_blocks import Block, read_blocks
from ctlens.analysis.patching_engine import SITES, Suffix, needed
from ctlens.analysis.patching_hooks import WITH_HEADS, Hooked
from ctlens.analysis.patching_jobs import PatchBatch, PatchPair, collate, jobs, prepare
from ctlens.analysis.patching_metrics import Metric, UserMetric, measured, named_metrics
from ctlens.analysis.patching_result import Patching
from ctlens.errors import CtlensError, unknown
from ctlens.hooks import SHORTHANDS, Layers, capture, resolve, select_layers
from ctlens.pairs import Pair
from ctlens.types import Activations, LensModel

MEMORY = 2**28
"""Bytes that one forward pass, or the activations held of one group of pairs, take by default."""


def patch(
    model: LensModel,
    pairs: Sequence[Pair],
    *,
    site: str,
    direction: str,
    positions: str = "each",
    window: str = "shared",
    layers: Layers = "all",
    metrics: Sequence[str | UserMetric] = ("logit_diff",),
    skip_unchanged: bool = True,
    max_batch: int | None = None,
    progress: bool = True,
) -> Patching:
    """Every patch of one site, over layers, positions and heads, for every pair.

    >>> import ctlens as ct
    >>> pairs = ct.threats.get("sycophancy").pairs(4, split="heldout")
    >>> model = ct.load_organism()
    >>> options = {"site": "resid_post", "direction": "denoising", "positions": "last", "progress": False}
    >>> found = ct.analysis.patch(model, pairs, **options)
    >>> found.values.shape
    (1, 4, 1, 4)
    >>> [round(share, 3) for share in found.normalised()["value"]][-1]  # the last layer's last row is the answer
    1.0

    Args:
        model: in eval mode.
        pairs: with good and bad answers.
        site: what is patched, one of `ctlens.hooks.SHORTHANDS`: a vector a token, or for `"z"` and
            `"pattern"` one head at a time. Attention rows are moved to the keys of the target; what
            the source attends to without a twin there is lost.
        direction: `"denoising"`, the clean run's activations into the wrapped run, or `"noising"`,
            the reverse.
        positions: `"each"` aligned token by itself, or a span at once: `"last"`, the last token,
            `"content"`, the aligned tokens in front of it, or `"all"` aligned tokens.
        window: which tokens are aligned, see `ctlens.alignment.align`; or `"position"`, every token
            with the one of the same number, whatever it is, in prompts of equal length.
        layers: which ones, see `ctlens.hooks.select_layers`.
        metrics: any of `"logit_diff"` (good minus bad), `"probability"` (of the good token) and
            `"kl"` (of the patched run from the source run, in nats), and functions of the last
            token's logits `[row, d_vocab]` and their `ContrastBatch` that give one number a row.
        skip_unchanged: take the target run's values where source and target are the same up to
            the patched token, so that the patch changes nothing.
        max_batch: patches, and pairs, held at once; by default as many as fit `MEMORY`.
        progress: show a progress bar.

    Raises:
        CtlensError: the model is in training mode, an option is unknown, or a pair does not align,
            has no answers, or no token to patch.
    """
    require_eval(model)
    measures = named_metrics(metrics)
    prepared = prepare(model, pairs, direction, positions, window)
    sweep = sweep_of(model, prepared, site, layers, measures, max_batch, skip_unchanged=skip_unchanged)
    groups = sweep.groups(prepared)
    total = sum(sweep.patches(group) for group in groups)
    with tqdm(total=total, desc="patches", disable=not progress, leave=False) as bar:
        chunks = [_patched(sweep, group, bar) for group in groups]
    values, target, source, paths = zip(*chunks, strict=True)
    return Patching(
        np.concatenate(values, -1),
        np.concatenate(target, -1),
        np.concatenate(source, -1),
        tuple(measures),
        sweep.layers,
        tuple(_tokens(model, prepared)) if positions == "each" else ("",),
        site,
        direction,
        positions,
        window,
        " and ".join(sorted(set(paths))),
    )


@dataclass(frozen=True)
class Recorded:
    """What a sweep needs of a run of a batch's prompts.

    Attributes:
        last: the logits at each prompt's last token, `[pair, d_vocab]`.
        states: activations by hook name, those of `Sweep.needed`.
    """

    last: Tensor
    states: Activations


@dataclass(frozen=True)
class Sweep:
    """Every patch of one site into the runs of one model, wherever the activations come from: what is the same for
    every group of pairs.
    """

    model: LensModel
    site: str
    layers: tuple[int, ...]
    metrics: dict[str, Metric]
    skip_unchanged: bool
    max_batch: int
    blocks: list[Block] | None

    @property
    def heads(self) -> int:
        """How many patches there are of one place at one layer."""
        return self.model.cfg.n_heads if self.site in WITH_HEADS else 1

    @property
    def needed(self) -> list[str]:
        """The hook names that are patched, and those that the fast way needs."""
        held = sum(needed(self.site, len(self.blocks)).values(), []) if self.blocks else []
        return [*resolve(self.model, self.site, self.layers), *held]

    def groups(self, prepared: Sequence[PatchPair]) -> list[Sequence[PatchPair]]:
        """Pairs whose activations are held at once."""
        return [prepared[start : start + self.max_batch] for start in range(0, len(prepared), self.max_batch)]

    def patches(self, group: Sequence[PatchPair]) -> int:
        """How many there are."""
        return len(self.layers) * self.heads * int(self._places(group).sum())

    @torch.no_grad()
    def values(
        self, group: Sequence[PatchPair], batch: PatchBatch, source: Recorded, target: Recorded, bar: tqdm
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        """Values with their pairs last, the baselines of target and source, and the path.

        Args:
            group: the pairs of the batch.
            batch: from `collate`.
            source: of the batch's source prompts, by this model or another one.
            target: of its target prompts, by this model.
            bar: moved on by every patch.
        """
        device = batch.target.last.device
        path = self._path(batch, source, target)
        unpatched, whole = (
            measured(self.metrics, run.last, rows, source.last).cpu().numpy()
            for run, rows in ((target, batch.target), (source, batch.source))
        )
        todo = jobs(self._places(group), len(self.layers), self.heads, device)
        exists = np.array([pair.places() for pair in group]).T
        shape = (len(self.metrics), len(self.layers), self.heads, *exists.shape)
        values = np.where(exists, unpatched[:, None, None, None], np.nan) * np.ones(shape)
        for numbers, last in path(todo, self.max_batch):
            done = todo.take(numbers)
            found = measured(self.metrics, last, batch.target_of(done.pair), source.last[done.pair])
            place = (part.cpu().numpy() for part in (done.layer, done.head, done.column, done.pair))
            values[(slice(None), *place)] = found.cpu().numpy()
            bar.update(len(numbers))
        return values if self.site in WITH_HEADS else values[:, :, 0], unpatched, whole, path.name

    def _places(self, group: Sequence[PatchPair]) -> np.ndarray:
        return np.array([pair.places(skip_unchanged=self.skip_unchanged) for pair in group])

    def _path(self, batch: PatchBatch, source: Recorded, target: Recorded) -> Suffix | Hooked:
        """The fast way if its logits are the model's, else the general one."""
        if self.blocks:
            fast = Suffix(self.model, self.blocks, batch, self.site, self.layers, source.states, target.states)
            if fast.agrees(target.last):
                return fast
        return Hooked(self.model, batch, self.site, resolve(self.model, self.site, self.layers), source.states)


def sweep_of(
    model: LensModel,
    prepared: Sequence[PatchPair],
    site: str,
    layers: Layers,
    metrics: dict[str, Metric],
    max_batch: int | None,
    *,
    skip_unchanged: bool,
) -> Sweep:
    """The sweep of a site for pairs.

    Raises:
        CtlensError: the site is unknown, a layer does not exist, or `max_batch` is less than 1.
    """
    if site not in SHORTHANDS:
        raise unknown("site", site, SHORTHANDS)
    if max_batch is not None and max_batch < 1:
        raise CtlensError(f"max_batch is {max_batch}: at least 1 is needed.")
    longest = max(len(ids) for pair in prepared for ids in (pair.source, pair.target))
    numbers = select_layers(model.cfg.n_layers, layers)
    blocks = read_blocks(model, longest) if site in SITES else None
    return Sweep(model, site, numbers, metrics, skip_unchanged, max_batch or _fitting(model, longest), blocks)


def _patched(sweep: Sweep, group: Sequence[PatchPair], bar: tqdm) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """The patches between two runs of one model; both runs are one forward pass."""
    batch = collate(group, next(sweep.model.parameters()).device)
    tokens = torch.cat([batch.source.side.tokens, batch.target.side.tokens])
    logits, found = capture(sweep.model, tokens, sweep.needed, grad=False)
    half = len(tokens) // 2
    source, target = (
        Recorded(side.at_last(logits[rows]), {name: state[rows] for name, state in found.items()})
        for side, rows in ((batch.source, slice(half)), (batch.target, slice(half, None)))
    )
    return sweep.values(group, batch, source, target, bar)


def _fitting(model: LensModel, length: int) -> int:
    """How many prompts of a length fit."""
    cfg = model.cfg
    held = 8 * cfg.n_layers * cfg.d_model
    passing = 10 * cfg.d_model + 3 * cfg.d_mlp + 3 * cfg.n_heads * length + 2 * cfg.d_vocab
    return max(1, MEMORY // (4 * length * (held + passing)))


def _tokens(model: LensModel, pairs: Sequence[PatchPair]) -> list[str]:
    """Of each column, the token where all pairs have the same there, else nothing."""
    found = [[{pair.target[there] for _, there in column} for column in pair.columns] for pair in pairs]
    agreed = [set[int]().union(*column) for column in zip(*found, strict=True)]
    return [model.tokenizer.decode(list(ids)) if len(ids) == 1 else "" for ids in agreed]
