"""The sweep: it hands jobs to the fast or the general way, and puts the metric of each job where it belongs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from ctlens.analysis.base.metrics import Metric, measured
from ctlens.analysis.patching.blocks import Block, read_blocks
from ctlens.analysis.patching.hooked import WITH_HEADS, Hooked
from ctlens.analysis.patching.jobs import Jobs, PatchBatch, PatchPair, jobs
from ctlens.analysis.patching.suffix import SUFFIX_SITES, Suffix, needed
from ctlens.core.errors import CtlensError
from ctlens.core.types import Activations, LensModel
from ctlens.models.finite import require_finite
from ctlens.models.hooks import SHORTHANDS, Layers, resolve, run_capturing, select_layers, site_at, unknown_site

SWEEP_BYTES = 2**28  # 256 MiB, chosen by eye
"""Bytes that one forward pass, or the activations held of one group of pairs, may take by default."""


@dataclass(frozen=True)
class Recorded:
    """One run of a batch's prompts, with what a sweep reads of it.

    Attributes:
        last: the logits at each prompt's last token, `[pair, d_vocab]`.
        states: activations by hook name, those of `Sweep.needed`.
    """

    last: Tensor
    states: Activations


def source_and_target(model: LensModel, batch: PatchBatch, names: Sequence[str]) -> tuple[Recorded, Recorded]:
    """Runs the source and the target prompts of a batch in one forward pass, and keeps activations by hook name."""
    tokens = torch.cat([batch.source.side.tokens, batch.target.side.tokens])
    logits, found = run_capturing(model, tokens, names, grad=False)
    half = len(tokens) // 2
    source_states = {name: state[:half] for name, state in found.items()}
    target_states = {name: state[half:] for name, state in found.items()}
    source = Recorded(batch.source.at_last(logits[:half]), source_states)
    return source, Recorded(batch.target.at_last(logits[half:]), target_states)


@dataclass(frozen=True)
class Swept:
    """The metrics of every patched run of a group of pairs.

    Attributes:
        values: by site, `[metric, layer, position, pair]`; for `z` and `pattern` with heads behind the layers.
        target, source: the metrics of the two runs as they are, `[metric, pair]`.
        paths: by site, the way it was computed, see `Patching.path`.
    """

    values: dict[str, np.ndarray]
    target: np.ndarray
    source: np.ndarray
    paths: dict[str, str]


@dataclass(frozen=True)
class Sweep:
    """Every patch of some sites into the runs of one model, wherever the activations come from; one for all groups.

    Attributes:
        model: whose runs are patched.
        sites, layers: where.
        metrics: of the last token's logits, by name.
        skip_unchanged: see `patch`.
        max_batch: patches, and pairs, held at once.
        blocks: of the model, for the fast way; None if they are not known or no site needs them.
    """

    model: LensModel
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    metrics: dict[str, Metric]
    skip_unchanged: bool
    max_batch: int
    blocks: list[Block] | None

    @property
    def needed(self) -> list[str]:
        """The hook names that are patched, and those that the fast way reads."""
        held = needed(self._known, len(self.blocks)) if self.blocks else []
        return [*(name for site in self.sites for name in resolve(self.model, site, self.layers)), *held]

    def groups(self, prepared: Sequence[PatchPair]) -> list[Sequence[PatchPair]]:
        """Pairs whose activations are held at once."""
        return [prepared[start : start + self.max_batch] for start in range(0, len(prepared), self.max_batch)]

    def patches(self, group: Sequence[PatchPair]) -> int:
        """The number of patches in a group."""
        return len(self.layers) * sum(map(self._heads, self.sites)) * int(self._to_patch(group).sum())

    @torch.no_grad()
    def values(
        self, group: Sequence[PatchPair], batch: PatchBatch, source: Recorded, target: Recorded, bar: tqdm
    ) -> Swept:
        """The metrics of the patched runs of a group of pairs, and of the two runs as they are.

        Args:
            group: the pairs of the batch.
            batch: from `patch_batch`.
            source: the run of the batch's source prompts, by this model or another one.
            target: the run of its target prompts, by this model.
            bar: moved on by every patch.
        """
        to_patch = self._to_patch(group)
        exists = np.array([pair.to_patch() for pair in group]).T
        target_values = measured(self.metrics, target.last, batch.target, source.last).cpu().numpy()
        source_values = measured(self.metrics, source.last, batch.source, source.last).cpu().numpy()
        values: dict[str, np.ndarray] = {}
        paths: dict[str, str] = {}
        for sites, path in self._paths(batch, source, target):
            heads = [self._heads(site) for site in sites]
            todo = jobs(to_patch, len(self.layers), heads, batch.target.last.device)
            found = self._of_jobs(path, todo, batch, source, bar)
            for index, site in enumerate(sites):
                # A cell without a job keeps the target run's value, or NaN where the pair has no such column.
                shape = (len(self.metrics), len(self.layers), heads[index], *exists.shape)
                grid = np.where(exists, target_values[:, None, None, None], np.nan) * np.ones(shape)
                of_site = (todo.site == index).nonzero()[:, 0]
                grid[(slice(None), *todo.take(of_site).cells())] = found[:, of_site.cpu().numpy()]
                values[site] = grid if site in WITH_HEADS else grid[:, :, 0]
                paths[site] = path.name
        return Swept({site: values[site] for site in self.sites}, target_values, source_values, paths)

    def _of_jobs(
        self, path: Suffix | Hooked, todo: Jobs, batch: PatchBatch, source: Recorded, bar: tqdm
    ) -> Float[np.ndarray, "metric job"]:
        """The metrics of every job."""
        found = np.empty((len(self.metrics), len(todo)))
        for numbers, last in path(todo, self.max_batch):
            require_finite(last, f"a run patched by {path.name}")
            pairs = todo.pair[numbers]
            of_jobs = measured(self.metrics, last, batch.target_of(pairs), source.last[pairs])
            found[:, numbers.cpu().numpy()] = of_jobs.cpu().numpy()
            bar.update(len(numbers))
        return found

    @property
    def _known(self) -> tuple[str, ...]:
        """The sites that the fast way can patch."""
        return tuple(site for site in self.sites if site in SUFFIX_SITES)

    def _heads(self, site: str) -> int:
        return self.model.cfg.n_heads if site in WITH_HEADS else 1

    def _to_patch(self, group: Sequence[PatchPair]) -> Bool[np.ndarray, "pair column"]:
        return np.array([pair.to_patch(skip_unchanged=self.skip_unchanged) for pair in group])

    def _paths(
        self, batch: PatchBatch, source: Recorded, target: Recorded
    ) -> list[tuple[tuple[str, ...], Suffix | Hooked]]:
        """The fast way for the sites it knows, all at once, if it gives the model's logits; else the general way."""
        found: list[tuple[tuple[str, ...], Suffix | Hooked]] = []
        if self.blocks and self._known:
            fast = Suffix(self.model, self.blocks, batch, self._known, self.layers, source.states, target.states)
            if fast.agrees(target.last):
                found.append((self._known, fast))
        served = self._known if found else ()
        for site in self.sites:
            if site not in served:
                names = resolve(self.model, site, self.layers)
                found.append(((site,), Hooked(self.model, batch, site, names, source.states, target.last)))
        return found


@dataclass(frozen=True)
class AskedSite:
    """A site as its short name, one of `ctlens.models.hooks.SHORTHANDS`, and the numbers of its layers."""

    site: str
    layers: tuple[int, ...]


def asked_sites(model: LensModel, sites: Sequence[str], layers: Layers) -> dict[str, AskedSite]:
    """What each name asks for: a short one a site at the chosen layers, a full hook name one at its own layer.

    Raises:
        CtlensError: a site is unknown or named twice, none is named, or a layer does not exist or is another than that
            of a full name.
    """
    found = {}
    for name in sites:
        at = site_at(name, layers)
        if at.site not in SHORTHANDS:
            raise unknown_site(name)
        found[name] = AskedSite(at.site, select_layers(model.cfg.n_layers, at.layers))
    if not sites or len(set(sites)) < len(sites) or len(set(found.values())) < len(found):
        raise CtlensError("name at least one site, and each once.")
    return found


def require_head(model: LensModel, site: str, head: int | None) -> None:
    """Raises a `CtlensError` if a head is named that the site does not have."""
    if head is None:
        return
    if site not in WITH_HEADS:
        raise CtlensError(f"{site} has no heads: leave head out.")
    if not 0 <= head < model.cfg.n_heads:
        raise CtlensError(f"head {head} does not exist: {site} has heads 0 to {model.cfg.n_heads - 1}.")


def sweep_of(
    model: LensModel,
    prepared: Sequence[PatchPair],
    sites: Sequence[str],
    layers: tuple[int, ...],
    metrics: dict[str, Metric],
    max_batch: int | None,
    *,
    skip_unchanged: bool,
) -> Sweep:
    """The sweep of some sites, by their short names, over pairs."""
    longest = max(len(ids) for pair in prepared for ids in (pair.source, pair.target))
    blocks = read_blocks(model, longest) if set(sites) & set(SUFFIX_SITES) else None
    return Sweep(model, tuple(sites), layers, metrics, skip_unchanged, max_batch or fitting(model, longest), blocks)


def fitting(model: LensModel, length: int) -> int:
    """The number of prompts of a length that fit into `SWEEP_BYTES`."""
    cfg = model.cfg
    held = 8 * cfg.n_layers * cfg.d_model
    passing = 10 * cfg.d_model + 3 * cfg.d_mlp + 3 * cfg.n_heads * length + 2 * cfg.d_vocab
    return max(1, SWEEP_BYTES // (4 * length * (held + passing)))
