"""A first look at patching: every patch of every site by its gradient, one backward pass a batch for all of them.

The effect of putting the source's activation `s` in place of the target's `t` is taken as linear:
`value = target + <gradient, s - t>`, the gradient of the metric at the target run (attribution patching,
Nanda 2023; Syed et al. 2023, arXiv 2310.10348). A patch that goes far is not small, and a saturated softmax
has no gradient: ranks hold better than sizes. `attribution_agreement` says how far both hold, beside an
exact sweep of the same sites, which on small models is cheap.

Why not TransformerLens's `attribution_patch`: it runs on bridges only, averages over pairs, so that no metric
knows its pair's answers, and asks both prompts for one length. Here positions follow the alignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ctlens import plots
from ctlens.analysis.base.forward import require_eval
from ctlens.analysis.base.metrics import Metric, UserMetric, measured, named_metrics
from ctlens.analysis.base.result import Result
from ctlens.analysis.patching.hooked import WITH_HEADS, write_of
from ctlens.analysis.patching.jobs import PatchBatch, PatchPair, collate_patches, jobs, prepare
from ctlens.analysis.patching.patch import column_tokens, joined
from ctlens.analysis.patching.result import Patching
from ctlens.analysis.patching.sweep import Swept, fitting, require_sites
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.types import Activations, HookFunction, LensModel, Logits
from ctlens.data.pairs import Pair
from ctlens.models.hooks import Layers, capture, editing, resolve, run, select_layers
from ctlens.plots import Figure

PATH = "gradient"
TOP = 10


@dataclass(frozen=True)
class AttributionAgreement(Result):
    """How far first-order values are those of an exact sweep; of the changes from the unpatched run.

    Attributes:
        approximate, exact: the mean change over pairs of every cell, one number a cell that some pair has.
        by_pair: the Pearson correlation over cells of each pair; NaN where nothing changes.
        metric: what was measured.
        site: the hook point.
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
        """Of the line through 0 from exact to first-order changes: below 1, these are too small."""
        return float(self.approximate @ self.exact / (self.exact @ self.exact))

    @property
    def top(self) -> int:
        """How many of the ten largest exact changes are among the ten largest first-order ones."""
        largest = [set(np.argsort(-np.abs(values))[:TOP].tolist()) for values in (self.approximate, self.exact)]
        return len(largest[0] & largest[1])

    def to_dataframe(self) -> pd.DataFrame:
        """One row: the correlation of the means, the mean of the pairs' own, the overlap of the top ten, the slope."""
        known = self.by_pair[~np.isnan(self.by_pair)]
        by_pair = known.mean() if len(known) else np.nan
        row = (self.site, self.metric, self.pearson, by_pair, self.top, self.slope, len(self.exact), len(self.by_pair))
        columns = ["site", "metric", "pearson", "pearson_by_pair", "top_10", "slope", "cells", "pairs"]
        return pd.DataFrame([row], columns=columns)

    def figure(self) -> Figure:
        """The first-order change of every cell over its exact change."""
        found = f"r = {self.pearson:.2f}, slope {self.slope:.2f}, {self.top} of the largest {TOP} in common"
        return plots.first_order(
            self.exact,
            self.approximate,
            "Does the gradient say what a patch does?",
            unit=f"change of {self.metric}",
            subtitle=f"{self.site}, {len(self.by_pair)} pairs; {found}",
        )


def attribution_agreement(approximate: Patching, exact: Patching, metric: str | None = None) -> AttributionAgreement:
    """How far a first-order sweep agrees with the exact one of the same pairs and sites.

    Args:
        approximate: from `attribution_patch`.
        exact: from `patch`, with the same options.
        metric: by default the first.

    Raises:
        CtlensError: they are not sweeps of the same thing, or the metric was not measured in both.
    """
    metric = exact.metrics[0] if metric is None else metric
    named = ("site", "direction", "positions", "window", "layers")
    differing = [name for name in named if getattr(approximate, name) != getattr(exact, name)]
    if differing or approximate.values.shape[1:] != exact.values.shape[1:]:
        what = differing[0] if differing else "pairs"
        raise CtlensError(f"the two sweeps differ in {what}: run both on the same pairs with the same options.")
    first, second = (_changes(result, metric) for result in (approximate, exact))
    by_pair = [
        correlation(*(values[~np.isnan(values)] for values in both)) for both in zip(first.T, second.T, strict=True)
    ]
    some = ~np.isnan(second).all(-1)
    here, there = (np.nanmean(values[some], -1) for values in (first, second))
    return AttributionAgreement(here, there, np.array(by_pair), metric, exact.site)


def _changes(result: Patching, metric: str) -> Float[np.ndarray, "cell pair"]:
    if metric not in result.metrics:
        raise unknown("measured metric", metric, result.metrics)
    row = result.metrics.index(metric)
    return (result.values[row] - result.target[row]).reshape(-1, result.values.shape[-1])


def correlation(here: Float[np.ndarray, " cell"], there: Float[np.ndarray, " cell"]) -> float:
    """Pearson's; NaN where either is the same everywhere.

    >>> correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])), correlation(np.zeros(2), np.ones(2))
    (1.0, nan)
    """
    if not here.size or np.ptp(here) == 0 or np.ptp(there) == 0:
        return np.nan
    return round(float(np.corrcoef(here, there)[0, 1]), 12)


def attribution_patch(
    model: LensModel,
    pairs: Sequence[Pair],
    *,
    sites: Sequence[str],
    direction: str,
    positions: str = "each",
    window: str = "shared",
    layers: Layers = "all",
    metrics: Sequence[str | UserMetric] = ("logit_diff",),
    max_batch: int | None = None,
    progress: bool = True,
) -> dict[str, Patching]:
    """Every patch of several sites to first order: `Patching` by site, of every pair, with path `"gradient"`.

    >>> import ctlens as ct
    >>> pairs, model = ct.threats.get("sycophancy").pairs(4, split="heldout"), ct.load_organism()
    >>> options = {"sites": ("resid_pre", "z"), "direction": "denoising", "progress": False}
    >>> quick = ct.analysis.attribution_patch(model, pairs, **options)
    >>> exact = ct.analysis.patch_sites(model, pairs, **options)
    >>> bool(ct.analysis.attribution_agreement(quick["z"], exact["z"]).pearson > 0.5)
    True

    Args:
        model: in eval mode.
        pairs: with good and bad answers.
        sites: each once, see `ctlens.analysis.patch`, as all other options.
        direction: see `ctlens.analysis.patch`.
        positions: see `ctlens.analysis.patch`.
        window: see `ctlens.analysis.patch`.
        layers: see `ctlens.analysis.patch`.
        metrics: each one is a backward pass; a function must be differentiable.
        max_batch: pairs a pass; by default as many as fit with their graph.
        progress: show a progress bar.

    Raises:
        CtlensError: see `ctlens.analysis.patch`.
    """
    require_eval(model)
    require_sites(sites, max_batch)
    measures = named_metrics(metrics)
    prepared = prepare(model, pairs, direction, positions, window)
    numbers = select_layers(model.cfg.n_layers, layers)
    longest = max(len(ids) for pair in prepared for ids in (pair.source, pair.target))
    size = max_batch or max(1, fitting(model, longest) // model.cfg.n_layers)
    groups = [prepared[start : start + size] for start in range(0, len(prepared), size)]
    with tqdm(total=len(pairs), desc="pairs", disable=not progress, leave=False) as bar:
        chunks = []
        for group in groups:
            chunks.append(_first_order(model, group, sites, numbers, measures))
            bar.update(len(group))
    tokens = column_tokens(model, prepared) if positions == "each" else ("",)
    return joined(chunks, tuple(measures), numbers, tokens, direction, positions, window)


def _first_order(
    model: LensModel,
    group: Sequence[PatchPair],
    sites: Sequence[str],
    layers: tuple[int, ...],
    metrics: dict[str, Metric],
) -> Swept:
    """One pass of each run, and one backward pass a metric for all sites."""
    batch = collate_patches(group, next(model.parameters()).device)
    names = {site: resolve(model, site, layers) for site in sites}
    flat = sum(names.values(), [])
    logits, source = capture(model, batch.source.side.tokens, flat, grad=False)
    last_source = batch.source.at_last(logits)
    with torch.enable_grad():
        logits, target = _with_graph(model, batch, flat)
        unpatched = measured(metrics, batch.target.at_last(logits), batch.target, last_source)
        inputs = [target[name] for name in flat]
        slopes = [torch.autograd.grad(values.sum(), inputs, retain_graph=True) for values in unpatched]
    slope = {name: torch.stack(of_name) for name, of_name in zip(flat, zip(*slopes, strict=True), strict=True)}
    places, start = np.array([pair.places() for pair in group]), unpatched.detach().cpu().numpy()
    values: dict[str, np.ndarray] = {}
    for site in sites:
        moved = [_moved(site, batch, places, source[name], target[name].detach(), slope[name]) for name in names[site]]
        grid = start[:, None, None, None] + torch.stack(moved, 1).cpu().numpy()
        grid = np.where(places.T, grid, np.nan)
        values[site] = grid if site in WITH_HEADS else grid[:, :, 0]
    whole = measured(metrics, last_source, batch.source, last_source).cpu().numpy()
    return Swept(values, start, whole, dict.fromkeys(sites, PATH))


def _with_graph(model: LensModel, batch: PatchBatch, names: list[str]) -> tuple[Logits, Activations]:
    """The target run and its activations, with a graph from the embedding on, whichever parameters are frozen.

    Kept by edits that change nothing: what a hook of a bridge only shows may not be on the way of the stream.
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
    site: str, batch: PatchBatch, places: np.ndarray, source: Tensor, target: Tensor, slopes: Tensor
) -> Float[Tensor, "metric head column pair"]:
    """What every patch at one layer moves every metric by, to first order."""
    heads = {"z": 2, "pattern": 1}.get(site)
    todo = jobs(places, 1, [target.shape[heads] if heads else 1], target.device)
    patched = target.clone()
    write_of(site)(batch, todo, source, patched, todo.pair, 0)
    moved = ((patched - target) * slopes).sum(-1)
    moved = moved.unsqueeze(2) if heads is None else moved.movedim(heads + 1, 2)
    at = torch.zeros(*batch.target_at.shape[:2], target.shape[-2 if site == "pattern" else 1], device=target.device)
    return torch.einsum("mphs,pcs->mhcp", moved, at.scatter_(2, batch.target_at, 1.0))
