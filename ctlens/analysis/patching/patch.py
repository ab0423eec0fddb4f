"""Activation patching on clean and wrapped pairs: where does an activation decide the answer?

One activation of one run (the source) is put into another run (the target), and the answer is read
again. Positions follow the alignment, so prompts of different lengths exchange the same token.

Why it is fast. A patch of one vector replaces one row of one residual stream, `(layer, position)`:
of `resid_pre` the row itself; of `attn_out`, `mlp_out` and a head's `z` the row behind the block, with
the MLP computed for that row alone. Rows in front of it stay as they are in the target run, so their
keys and values are taken from there; the layers behind it are computed from that row to the end; the
last layer for the last row alone. Whatever its site, a patch is then a row in front of some layer, so that all
sites of a sweep (`patch_sites`) share the two runs, the held keys and values, and their batches; patches at
neighbouring positions share a batch too. No tensor of a batch is larger than 2 MiB, because larger memory is
fetched from the system and cleared at every use. It is exact: only products whose factors changed are computed again.

Two runs of the model check it before it is used (`Suffix.agrees`). A model it does not know, or whose logits are
not its own, goes the general way, the model's own blocks with many patches stacked on the batch axis
(`ctlens.analysis.patching.hooked`); `Patching.path` says which. `attribution_patch` is the first-order estimate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from ctlens.analysis.base.forward import require_eval
from ctlens.analysis.base.metrics import UserMetric, named_metrics
from ctlens.analysis.patching.jobs import PatchPair, collate_patches, prepare
from ctlens.analysis.patching.result import Patching
from ctlens.analysis.patching.sweep import Recorded, Sweep, Swept, sweep_of
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair
from ctlens.models.hooks import Layers, capture


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
        site: what is patched, one of `ctlens.models.hooks.SHORTHANDS`: a vector a token, or for `"z"` and
            `"pattern"` one head at a time. Attention rows are moved to the keys of the target; what
            the source attends to without a twin there is lost.
        direction: `"denoising"`, the clean run's activations into the wrapped run, or `"noising"`,
            the reverse.
        positions: `"each"` aligned token by itself, or a span at once: `"last"`, the last token,
            `"content"`, the aligned tokens in front of it, or `"all"` aligned tokens.
        window: which tokens are aligned, see `ctlens.data.alignment.align`; or `"position"`, every token
            with the one of the same number, whatever it is, in prompts of equal length.
        layers: which ones, see `ctlens.models.hooks.select_layers`.
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
    return patch_sites(
        model,
        pairs,
        sites=(site,),
        direction=direction,
        positions=positions,
        window=window,
        layers=layers,
        metrics=metrics,
        skip_unchanged=skip_unchanged,
        max_batch=max_batch,
        progress=progress,
    )[site]


def patch_sites(
    model: LensModel,
    pairs: Sequence[Pair],
    *,
    sites: Sequence[str],
    direction: str,
    positions: str = "each",
    window: str = "shared",
    layers: Layers = "all",
    metrics: Sequence[str | UserMetric] = ("logit_diff",),
    skip_unchanged: bool = True,
    max_batch: int | None = None,
    progress: bool = True,
) -> dict[str, Patching]:
    """Every patch of several sites in one sweep, which costs less than a sweep for each: `Patching` by site.

    >>> import ctlens as ct
    >>> pairs, model = ct.threats.get("sycophancy").pairs(2, split="heldout"), ct.load_organism()
    >>> options = {"direction": "denoising", "positions": "last", "progress": False}
    >>> found = ct.analysis.patch_sites(model, pairs, sites=("mlp_out", "z"), **options)
    >>> found["mlp_out"].values.shape, found["z"].values.shape
    ((1, 4, 1, 2), (1, 4, 4, 1, 2))

    Args:
        model: in eval mode.
        pairs: with good and bad answers.
        sites: each once, see `patch`, as all other options.
        direction: see `patch`.
        positions: see `patch`.
        window: see `patch`.
        layers: see `patch`.
        metrics: see `patch`.
        skip_unchanged: see `patch`.
        max_batch: see `patch`.
        progress: see `patch`.

    Raises:
        CtlensError: see `patch`; or a site is named twice, or none is.
    """
    require_eval(model)
    measures = named_metrics(metrics)
    prepared = prepare(model, pairs, direction, positions, window)
    sweep = sweep_of(model, prepared, sites, layers, measures, max_batch, skip_unchanged=skip_unchanged)
    groups = sweep.groups(prepared)
    total = sum(sweep.patches(group) for group in groups)
    with tqdm(total=total, desc="patches", disable=not progress, leave=False) as bar:
        chunks = [_patched(sweep, group, bar) for group in groups]
    tokens = column_tokens(model, prepared) if positions == "each" else ("",)
    return joined(chunks, tuple(measures), sweep.layers, tokens, direction, positions, window)


def joined(
    chunks: Sequence[Swept],
    metrics: tuple[str, ...],
    layers: tuple[int, ...],
    tokens: tuple[str, ...],
    direction: str,
    positions: str,
    window: str,
) -> dict[str, Patching]:
    """The results of groups of pairs as one result a site, see `Patching`."""
    target, source = (np.concatenate([getattr(chunk, end) for chunk in chunks], -1) for end in ("target", "source"))
    return {
        site: Patching(
            np.concatenate([chunk.values[site] for chunk in chunks], -1),
            target,
            source,
            metrics,
            layers,
            tokens,
            site,
            direction,
            positions,
            window,
            " and ".join(sorted({chunk.paths[site] for chunk in chunks})),
        )
        for site in chunks[0].values
    }


def _patched(sweep: Sweep, group: Sequence[PatchPair], bar: tqdm) -> Swept:
    """The patches between two runs of one model; both runs are one forward pass."""
    batch = collate_patches(group, next(sweep.model.parameters()).device)
    tokens = torch.cat([batch.source.side.tokens, batch.target.side.tokens])
    logits, found = capture(sweep.model, tokens, sweep.needed, grad=False)
    half = len(tokens) // 2
    source, target = (
        Recorded(side.at_last(logits[rows]), {name: state[rows] for name, state in found.items()})
        for side, rows in ((batch.source, slice(half)), (batch.target, slice(half, None)))
    )
    return sweep.values(group, batch, source, target, bar)


def column_tokens(model: LensModel, pairs: Sequence[PatchPair]) -> tuple[str, ...]:
    """The token of each column where all pairs have the same one, else nothing."""
    found = [[{pair.target[there] for _, there in column} for column in pair.columns] for pair in pairs]
    agreed = [set[int]().union(*column) for column in zip(*found, strict=True)]
    return tuple(model.tokenizer.decode(list(ids)) if len(ids) == 1 else "" for ids in agreed)
