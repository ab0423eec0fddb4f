"""Activation patching on clean and wrapped pairs: at which layer and token does an activation decide the answer?

A patch takes one activation of one run, the source, and puts it into another run, the target; then the answer is read
again. Positions follow the alignment, so in prompts of different lengths a patch still goes from a token to the same
token.

Why it is fast. A patch of one vector replaces one row of one residual stream, `(layer, position)`. For `resid_pre` that
is the row itself; for `attn_out`, `mlp_out` and a head's `z` it is the row behind the block, with the MLP computed for
that row alone. Rows in front of it stay as they are in the target run, so their keys and values are taken from there.
The layers behind it are computed from that row to the end, the last layer for the last row alone. So a patch of any
site is a row in front of some layer, and all sites of a sweep share the two runs, the held keys and values, and their
batches; patches at neighbouring positions share a batch too. No tensor of a batch is larger than 2 MiB
(`ctlens.analysis.patching.suffix.LARGEST`): for larger ones the allocator asks the system for fresh pages and clears
them at every use. The sweep is exact, for it leaves out only products whose factors did not change.

`Suffix.agrees` checks it with two runs of the model before it is used. A model that it does not know, or whose logits
it does not reproduce, goes the general way: the model's own blocks, with many patches stacked on the batch axis
(`ctlens.analysis.patching.hooked`). `Patching.path` says which. `attribution_patch` is the first-order estimate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np

from ctlens.analysis.base.forward import require_eval
from ctlens.analysis.base.metrics import UserMetric, named_metrics
from ctlens.analysis.base.result import groups_of
from ctlens.analysis.patching.jobs import PatchPair, patch_batch, patch_pairs
from ctlens.analysis.patching.result import Patching
from ctlens.analysis.patching.sweep import AskedSite, Sweep, Swept, asked_sites, source_and_target, sweep_of
from ctlens.core.progress import ProgressBar, progress_bar
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair
from ctlens.models.hooks import Layers

_T = TypeVar("_T")


@overload
def patch(
    model: LensModel,
    pairs: Pairs,
    *,
    site: str,
    direction: str,
    positions: str = ...,
    window: str = ...,
    layers: Layers = ...,
    metrics: Sequence[str | UserMetric] = ...,
    skip_unchanged: bool = ...,
    max_batch: int | None = ...,
    progress: bool = ...,
) -> Patching: ...
@overload
def patch(
    model: LensModel,
    pairs: Pairs,
    *,
    site: list[str] | tuple[str, ...],
    direction: str,
    positions: str = ...,
    window: str = ...,
    layers: Layers = ...,
    metrics: Sequence[str | UserMetric] = ...,
    skip_unchanged: bool = ...,
    max_batch: int | None = ...,
    progress: bool = ...,
) -> dict[str, Patching]: ...
@public
def patch(
    model: LensModel,
    pairs: Pairs,
    *,
    site: str | list[str] | tuple[str, ...],
    direction: str,
    positions: str = "each",
    window: str = "shared",
    layers: Layers = "all",
    metrics: Sequence[str | UserMetric] = ("logit_diff",),
    skip_unchanged: bool = True,
    max_batch: int | None = None,
    progress: bool = True,
) -> Patching | dict[str, Patching]:
    """Activation patching: every patch of a site, over layers, positions and heads, for every pair.

    >>> import ctlens as ct
    >>> pairs = ct.threats.get("sycophancy").pairs(4, split="heldout")
    >>> model = ct.load_organism()
    >>> options = {"direction": "denoising", "positions": "last", "progress": False}
    >>> found = ct.analysis.patch(model, pairs, site="resid_post", **options)
    >>> found.values.shape  # metrics, layers, positions, pairs
    (1, 4, 1, 4)
    >>> [round(share, 3) for share in found.normalised()["value"]][-1]  # the last layer's last row is the answer
    1.0
    >>> both = ct.analysis.patch(model, pairs, site=("mlp_out", "z"), **options)  # one sweep for both
    >>> both["mlp_out"].values.shape, both["z"].values.shape  # a head of z at a time
    ((1, 4, 1, 4), (1, 4, 4, 1, 4))

    Args:
        model: in eval mode.
        pairs: with good and bad answers. `ctlens.pairs` makes them of two lists of texts.
        site: the hook point that is patched: one of `ctlens.models.hooks.SHORTHANDS`, or such a site of one layer in
            full, `"blocks.3.hook_resid_post"`; or a list or tuple of several. Those of the same layers share one sweep
            and cost less than a sweep each. A patch is one token's vector, of `"z"` and `"pattern"` that of
            one head. Attention rows are moved to the keys of the target; what the source attends to without a twin
            there is lost.
        direction: `"denoising"`, the clean run's activations into the wrapped run, or `"noising"`,
            the reverse.
        positions: `"each"` patches every aligned token by itself; the others patch several tokens at once: `"last"`
            the last token, `"content"` the aligned tokens in front of it, `"all"` all aligned tokens.
        window: which tokens are aligned, see `ctlens.data.alignment.align`; or `"position"`, every token
            with the one of the same number, whatever it is, in prompts of equal length.
        layers: which ones, see `ctlens.models.hooks.select_layers`.
        metrics: any of `"logit_diff"` (good minus bad), `"probability"` (of the good token) and
            `"kl"` (of the patched run from the source run, in nats), and functions of the last
            token's logits `[row, d_vocab]` and their `ContrastBatch` that give one number per row.
        skip_unchanged: take the target run's values where source and target are the same up to
            the patched token, so that the patch changes nothing.
        max_batch: patches, and pairs, held at once; by default as many as fit into
            `ctlens.analysis.patching.sweep.SWEEP_BYTES`.
        progress: show a progress bar.

    Returns:
        The `Patching` of the site, or where several are given a `Patching` by site.

    Raises:
        CtlensError: the model is in training mode, an option is unknown, no site is given or one twice, or a pair does
            not align, has no answers, or no token to patch.
    """
    require_eval(model)
    asked = asked_sites(model, (site,) if isinstance(site, str) else site, layers)
    measures = named_metrics(metrics)
    prepared = patch_pairs(model, pairs, direction, positions, window)
    options: dict[str, Any] = {"metrics": measures, "max_batch": max_batch, "skip_unchanged": skip_unchanged}
    sweeps = [
        sweep_of(model, prepared, [at.site for at in asked.values() if at.layers == numbers], numbers, **options)
        for numbers in dict.fromkeys(at.layers for at in asked.values())
    ]
    groups = sweeps[0].groups(prepared)
    total = sum(sweep.patches(group) for sweep in sweeps for group in groups)
    with progress_bar(total=total, desc="patches", shown=progress, leave=False) as bar:
        swept = {sweep.layers: [_patched(sweep, group, bar) for group in groups] for sweep in sweeps}
    columns = column_labels(model, prepared, positions)
    labels = sweep_labels(pairs, tuple(measures), columns, direction, positions, window)
    found = {name: joined(swept[at.layers], at.site, at, labels) for name, at in asked.items()}
    return found[site] if isinstance(site, str) else found


def sweep_labels(
    pairs: Sequence[Pair],
    metrics: tuple[str, ...],
    columns: ColumnLabels,
    direction: str,
    positions: str,
    window: str,
) -> dict[str, Any]:
    """What every `Patching` of a sweep has that is no number and not of its site."""
    named = {"metrics": metrics, **columns._asdict(), "direction": direction, "positions": positions, "window": window}
    return {**named, "groups": groups_of(pairs)}


def joined(chunks: Sequence[Swept], name: str, at: AskedSite, labels: Mapping[str, Any]) -> Patching:
    """The results of groups of pairs at one site as one, see `Patching`.

    Args:
        chunks: of each group.
        name: of the site in the chunks.
        at: the site.
        labels: from `sweep_labels`.
    """
    return Patching(
        values=np.concatenate([chunk.values[name] for chunk in chunks], -1),
        target=np.concatenate([chunk.target for chunk in chunks], -1),
        source=np.concatenate([chunk.source for chunk in chunks], -1),
        layers=at.layers,
        site=at.site,
        path=" and ".join(sorted({chunk.paths[name] for chunk in chunks})),
        **labels,
    )


def _patched(sweep: Sweep, group: Sequence[PatchPair], bar: ProgressBar) -> Swept:
    """Sweeps a group of pairs."""
    batch = patch_batch(group, next(sweep.model.parameters()).device)
    source, target = source_and_target(sweep.model, batch, sweep.needed)
    return sweep.values(group, batch, source, target, bar)


class ColumnLabels(NamedTuple):
    """The token and the kind of each column of a sweep where all pairs have the same there, else `""`."""

    tokens: tuple[str, ...]
    kinds: tuple[str, ...]


def column_labels(model: LensModel, pairs: Sequence[PatchPair], positions: str) -> ColumnLabels:
    """Finds what all pairs have at each column; nothing where several tokens are patched together."""
    if positions != "each":
        return ColumnLabels(("",), ("",))
    ids = [_common({pair.target[there] for pair, there in column}) for column in _by_column(pairs)]
    kinds = [_common({pair.kinds[there] for pair, there in column}) for column in _by_column(pairs)]
    tokens = tuple("" if token is None else model.tokenizer.decode([token]) for token in ids)
    return ColumnLabels(tokens, tuple(kind or "" for kind in kinds))


def _by_column(pairs: Sequence[PatchPair]) -> Iterator[list[tuple[PatchPair, int]]]:
    """For each column, the pairs that have it, with their position in the target run."""
    for number in range(len(pairs[0].columns)):
        yield [(pair, there) for pair in pairs for _, there in pair.columns[number]]


def _common(found: set[_T]) -> _T | None:
    """The one thing that was found, None where there are several."""
    return next(iter(found)) if len(found) == 1 else None
