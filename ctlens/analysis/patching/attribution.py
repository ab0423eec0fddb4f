"""Attribution patching: every patch of every site to first order, with one backward pass per batch for all of them.

The effect of putting the source's activation `s` in place of the target's `t` is taken as linear:
`value = target + <gradient, s - t>`, with the gradient of the metric at the target run (attribution patching,
Nanda 2023; Syed et al. 2023, arXiv 2310.10348). A patch that goes far is not small, and a saturated softmax
has no gradient: ranks hold better than sizes. `attribution_agreement` says how far both hold, beside an
exact sweep of the same sites, which is cheap on small models.

TransformerLens's `attribution_patch` does not serve here: it runs on bridges only, it averages over pairs, so that no
metric knows its pair's answers, and it asks both prompts for one length. Here positions follow the alignment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ctlens import plots
from ctlens.analysis.base.forward import require_eval
from ctlens.analysis.base.metrics import Metric, UserMetric, measured, named_metrics
from ctlens.analysis.base.result import Result
from ctlens.analysis.patching.hooked import WITH_HEADS, write_of
from ctlens.analysis.patching.jobs import PatchBatch, PatchPair, jobs, patch_batch, patch_pairs
from ctlens.analysis.patching.patch import column_labels, joined, sweep_labels
from ctlens.analysis.patching.result import GRADIENT, Patching
from ctlens.analysis.patching.sweep import AskedSite, Swept, asked_sites, fitting
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.progress import progress_bar
from ctlens.core.public import public
from ctlens.core.types import Activations, HookFunction, LensModel, Logits
from ctlens.data.inputs import Pairs
from ctlens.models.hooks import Layers, editing, resolve, run, run_capturing
from ctlens.plots import Figure

_TOP = 10  # sites in common: as many as are read at a glance, not tuned


@dataclass(frozen=True)
class AttributionAgreement(Result):
    """The result of `attribution_agreement`: how far first-order changes of a metric agree with the exact changes.

    Attributes:
        approximate, exact: per cell that some pair has, the mean change over pairs.
        by_pair: per pair, the Pearson correlation over cells; NaN where nothing changes.
        metric: of which the change is.
        site: the hook point that was patched.
    """

    approximate: Float[np.ndarray, " cell"]
    exact: Float[np.ndarray, " cell"]
    by_pair: Float[np.ndarray, " pair"]
    metric: str
    site: str

    @property
    def pearson(self) -> float:
        """The correlation of the mean changes over cells."""
        return correlation(self.approximate, self.exact)

    @property
    def slope(self) -> float:
        """The slope of the line through 0 from exact to first-order changes; below 1, the latter are too small."""
        return float(self.approximate @ self.exact / (self.exact @ self.exact))

    @property
    def top(self) -> int:
        """The number of the ten largest exact changes that are among the ten largest first-order changes."""
        approximate = np.argsort(-np.abs(self.approximate))[:_TOP]
        exact = np.argsort(-np.abs(self.exact))[:_TOP]
        return len(set(approximate.tolist()) & set(exact.tolist()))

    def to_dataframe(self) -> pd.DataFrame:
        """One row: the correlation of the means, the mean of the pairs' own, the overlap of the top ten, the slope."""
        known = self.by_pair[~np.isnan(self.by_pair)]
        row = {
            "site": self.site,
            "metric": self.metric,
            "pearson": self.pearson,
            "pearson_by_pair": known.mean() if len(known) else np.nan,
            "top_10": self.top,
            "slope": self.slope,
            "n_cells": len(self.exact),
            "n_pairs": len(self.by_pair),
        }
        return pd.DataFrame([row])

    def figure(self) -> Figure:
        """A scatter: the first-order change of every cell over its exact change."""
        found = f"r = {self.pearson:.2f}, slope {self.slope:.2f}, {self.top} of the largest {_TOP} in common"
        return plots.first_order(
            self.exact,
            self.approximate,
            "Does the gradient say what a patch does?",
            unit=f"change of {self.metric}",
            subtitle=f"{self.site}, {len(self.by_pair)} pairs; {found}",
        )


@public
def attribution_agreement(approximate: Patching, exact: Patching, metric: str | None = None) -> AttributionAgreement:
    """Measures how far a first-order sweep agrees with the exact sweep of the same pairs and site.

    Args:
        approximate: from `attribution_patch`.
        exact: from `patch`, with the same options.
        metric: by default the first one of the exact sweep.

    Raises:
        CtlensError: the sweeps differ in their pairs or options, or the metric was not measured in both.
    """
    if approximate.path != GRADIENT or exact.path == GRADIENT:
        raise CtlensError("give the sweep of attribution_patch first, and then that of patch.")
    metric = exact.metrics[0] if metric is None else metric
    options = ("site", "direction", "positions", "window", "layers")
    differing = [name for name in options if getattr(approximate, name) != getattr(exact, name)]
    if approximate.values.shape[1:] != exact.values.shape[1:]:
        differing.append("pairs")
    if differing:
        raise CtlensError(f"the two sweeps differ in {differing[0]}: run both on the same pairs with the same options.")
    first_order = _changes(approximate, metric)
    in_full = _changes(exact, metric)
    by_pair = []
    for one, other in zip(first_order.T, in_full.T, strict=True):
        by_pair.append(correlation(one[~np.isnan(one)], other[~np.isnan(other)]))
    some = ~np.isnan(in_full).all(-1)
    return AttributionAgreement(
        approximate=np.nanmean(first_order[some], -1),
        exact=np.nanmean(in_full[some], -1),
        by_pair=np.array(by_pair),
        metric=metric,
        site=exact.site,
    )


def _changes(result: Patching, metric: str) -> Float[np.ndarray, "cell pair"]:
    """The change of a metric from the unpatched run, by every patch."""
    if metric not in result.metrics:
        raise unknown("measured metric", metric, result.metrics)
    row = result.metrics.index(metric)
    return (result.values[row] - result.target[row]).reshape(-1, result.values.shape[-1])


def correlation(here: Float[np.ndarray, " cell"], there: Float[np.ndarray, " cell"]) -> float:
    """Pearson's correlation; NaN where either series is constant.

    >>> correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])), correlation(np.zeros(2), np.ones(2))
    (1.0, nan)
    """
    if not here.size or np.ptp(here) == 0 or np.ptp(there) == 0:
        return np.nan
    return round(float(np.corrcoef(here, there)[0, 1]), 12)


@overload
def attribution_patch(
    model: LensModel,
    pairs: Pairs,
    *,
    site: str,
    direction: str,
    positions: str = ...,
    window: str = ...,
    layers: Layers = ...,
    metrics: Sequence[str | UserMetric] = ...,
    max_batch: int | None = ...,
    progress: bool = ...,
) -> Patching: ...
@overload
def attribution_patch(
    model: LensModel,
    pairs: Pairs,
    *,
    site: list[str] | tuple[str, ...],
    direction: str,
    positions: str = ...,
    window: str = ...,
    layers: Layers = ...,
    metrics: Sequence[str | UserMetric] = ...,
    max_batch: int | None = ...,
    progress: bool = ...,
) -> dict[str, Patching]: ...
@public
def attribution_patch(
    model: LensModel,
    pairs: Pairs,
    *,
    site: str | list[str] | tuple[str, ...],
    direction: str,
    positions: str = "each",
    window: str = "shared",
    layers: Layers = "all",
    metrics: Sequence[str | UserMetric] = ("logit_diff",),
    max_batch: int | None = None,
    progress: bool = True,
) -> Patching | dict[str, Patching]:
    """Attribution patching: what `patch` gives, to first order, from one backward pass for all sites and layers.

    >>> import ctlens as ct
    >>> pairs, model = ct.threats.get("sycophancy").pairs(4, split="heldout"), ct.load_organism()
    >>> options = {"site": ("resid_pre", "z"), "direction": "denoising", "progress": False}
    >>> quick = ct.analysis.attribution_patch(model, pairs, **options)
    >>> exact = ct.analysis.patch(model, pairs, **options)
    >>> bool(ct.analysis.attribution_agreement(quick["z"], exact["z"]).pearson > 0.5)
    True

    Args:
        model: in eval mode.
        pairs: with good and bad answers. `ctlens.pairs` makes them of two lists of texts.
        site: see `ctlens.analysis.patch`, as all other options.
        direction: see `ctlens.analysis.patch`.
        positions: see `ctlens.analysis.patch`.
        window: see `ctlens.analysis.patch`.
        layers: see `ctlens.analysis.patch`.
        metrics: each costs a backward pass; a function must be differentiable.
        max_batch: pairs per pass; by default as many as fit with their graph.
        progress: show a progress bar.

    Returns:
        A `Patching` with path `"gradient"`, or where several sites are given one by site.

    Raises:
        CtlensError: see `ctlens.analysis.patch`.
    """
    require_eval(model)
    asked = asked_sites(model, (site,) if isinstance(site, str) else site, layers)
    measures = named_metrics(metrics)
    prepared = patch_pairs(model, pairs, direction, positions, window)
    longest = max(len(ids) for pair in prepared for ids in (pair.source, pair.target))
    size = max_batch or max(1, fitting(model, longest) // model.cfg.n_layers)
    chunks = []
    with progress_bar(total=len(pairs), desc="pairs", shown=progress, leave=False) as bar:
        for start in range(0, len(prepared), size):
            group = prepared[start : start + size]
            chunks.append(_first_order(model, group, asked, measures))
            bar.update(len(group))
    columns = column_labels(model, prepared, positions)
    labels = sweep_labels(pairs, tuple(measures), columns, direction, positions, window)
    found = {name: joined(chunks, name, at, labels) for name, at in asked.items()}
    return found[site] if isinstance(site, str) else found


def _first_order(
    model: LensModel,
    group: Sequence[PatchPair],
    asked: Mapping[str, AskedSite],
    metrics: dict[str, Metric],
) -> Swept:
    """Runs source and target once each, and one backward pass per metric for all sites."""
    batch = patch_batch(group, next(model.parameters()).device)
    names = {name: resolve(model, at.site, at.layers) for name, at in asked.items()}
    flat = list(dict.fromkeys(sum(names.values(), [])))
    logits, source = run_capturing(model, batch.source.side.tokens, flat, grad=False)
    last_source = batch.source.at_last(logits)
    with torch.enable_grad():
        logits, target = _with_graph(model, batch, flat)
        unpatched = measured(metrics, batch.target.at_last(logits), batch.target, last_source)
        inputs = [target[name] for name in flat]
        slopes = [torch.autograd.grad(values.sum(), inputs, retain_graph=True) for values in unpatched]
    slope = {name: torch.stack(of_name) for name, of_name in zip(flat, zip(*slopes, strict=True), strict=True)}
    to_patch = np.array([pair.to_patch() for pair in group])
    start = unpatched.detach().cpu().numpy()
    values: dict[str, np.ndarray] = {}
    for given, at in asked.items():
        moved = [
            _moved(at.site, batch, to_patch, source[name], target[name].detach(), slope[name]) for name in names[given]
        ]
        grid = start[:, None, None, None] + torch.stack(moved, 1).cpu().numpy()
        grid = np.where(to_patch.T, grid, np.nan)
        values[given] = grid if at.site in WITH_HEADS else grid[:, :, 0]
    whole = measured(metrics, last_source, batch.source, last_source).cpu().numpy()
    return Swept(values, start, whole, dict.fromkeys(asked, GRADIENT))


def _with_graph(model: LensModel, batch: PatchBatch, names: list[str]) -> tuple[Logits, Activations]:
    """The target run's logits and activations, with a graph from the embedding on, whichever parameters are frozen.

    Hooks that edit, and change nothing, keep the activations: the tensor that a bridge shows to a hook that only reads
    may not be the one that the stream goes on with.
    """
    first = resolve(model, "resid_pre", 0)[0]
    kept: Activations = {}

    def keeping(name: str) -> HookFunction:
        def keep(activation: Tensor) -> Tensor:
            kept[name] = activation.detach().requires_grad_() if name == first else activation
            return kept[name]

        return keep

    with editing(model, {name: keeping(name) for name in dict.fromkeys([first, *names])}):
        return run(model, batch.target.side.tokens), kept


def _moved(
    site: str, batch: PatchBatch, to_patch: np.ndarray, source: Tensor, target: Tensor, slopes: Tensor
) -> Float[Tensor, "metric head column pair"]:
    """The change of every metric by every patch at one layer, to first order."""
    heads = {"z": 2, "pattern": 1}.get(site)
    todo = jobs(to_patch, 1, [target.shape[heads] if heads else 1], target.device)
    patched = target.clone()
    write_of(site)(batch, todo, source, patched, todo.pair, 0)
    moved = ((patched - target) * slopes).sum(-1)
    moved = moved.unsqueeze(2) if heads is None else moved.movedim(heads + 1, 2)
    at = torch.zeros(*batch.target_at.shape[:2], target.shape[-2 if site == "pattern" else 1], device=target.device)
    return torch.einsum("mphs,pcs->mhcp", moved, at.scatter_(2, batch.target_at, 1.0))
