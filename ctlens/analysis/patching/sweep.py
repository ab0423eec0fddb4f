"""The sweep itself: jobs handed to the fast or the general way, and their metrics put where they belong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ctlens.analysis.base.metrics import Metric, measured
from ctlens.analysis.patching.blocks import Block, read_blocks
from ctlens.analysis.patching.hooked import WITH_HEADS, Hooked
from ctlens.analysis.patching.jobs import PatchBatch, PatchPair, jobs
from ctlens.analysis.patching.suffix import SITES, Suffix, needed
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.types import Activations, LensModel
from ctlens.models.hooks import SHORTHANDS, Layers, resolve, select_layers

MEMORY = 2**28
"""Bytes that one forward pass, or the activations held of one group of pairs, take by default."""


@dataclass(frozen=True)
class Recorded:
    """One run of a batch's prompts, with what a sweep reads of it.

    Attributes:
        last: the logits at each prompt's last token, `[pair, d_vocab]`.
        states: activations by hook name, those of `Sweep.needed`.
    """

    last: Tensor
    states: Activations


@dataclass(frozen=True)
class Swept:
    """What a sweep found of a group of pairs.

    Attributes:
        values: by site, `[metric, layer, position, pair]`, where there are heads with their axis behind the layers.
        target, source: the metrics of the two runs, `[metric, pair]`.
        paths: the way each site went.
    """

    values: dict[str, np.ndarray]
    target: np.ndarray
    source: np.ndarray
    paths: dict[str, str]


@dataclass(frozen=True)
class Sweep:
    """The settings of a sweep that are the same for every group of pairs.

    A sweep makes every patch of some sites into the runs of one model, wherever the activations come from.
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
        """The hook names that are patched, and those that the fast way needs."""
        held = needed(self._known, len(self.blocks)) if self.blocks else []
        return [*(name for site in self.sites for name in resolve(self.model, site, self.layers)), *held]

    def groups(self, prepared: Sequence[PatchPair]) -> list[Sequence[PatchPair]]:
        """Pairs whose activations are held at once."""
        return [prepared[start : start + self.max_batch] for start in range(0, len(prepared), self.max_batch)]

    def patches(self, group: Sequence[PatchPair]) -> int:
        """The number of patches in a group."""
        return len(self.layers) * sum(map(self._heads, self.sites)) * int(self._places(group).sum())

    @torch.no_grad()
    def values(
        self, group: Sequence[PatchPair], batch: PatchBatch, source: Recorded, target: Recorded, bar: tqdm
    ) -> Swept:
        """The patched runs of a group of pairs, and the two runs as they are.

        Args:
            group: the pairs of the batch.
            batch: from `collate_patches`.
            source: of the batch's source prompts, by this model or another one.
            target: of its target prompts, by this model.
            bar: moved on by every patch.
        """
        places, exists = self._places(group), np.array([pair.places() for pair in group]).T
        unpatched, whole = (
            measured(self.metrics, run.last, rows, source.last).cpu().numpy()
            for run, rows in ((target, batch.target), (source, batch.source))
        )
        values: dict[str, np.ndarray] = {}
        paths: dict[str, str] = {}
        for sites, path in self._paths(batch, source, target):
            heads = [self._heads(site) for site in sites]
            todo = jobs(places, len(self.layers), heads, batch.target.last.device)
            found = np.empty((len(self.metrics), len(todo)))
            for numbers, last in path(todo, self.max_batch):
                pairs = todo.pair[numbers]
                of_jobs = measured(self.metrics, last, batch.target_of(pairs), source.last[pairs])
                found[:, numbers.cpu().numpy()] = of_jobs.cpu().numpy()
                bar.update(len(numbers))
            for number, site in enumerate(sites):
                shape = (len(self.metrics), len(self.layers), heads[number], *exists.shape)
                grid = np.where(exists, unpatched[:, None, None, None], np.nan) * np.ones(shape)
                done = (todo.site == number).nonzero()[:, 0]
                grid[(slice(None), *todo.take(done).cells())] = found[:, done.cpu().numpy()]
                values[site] = grid if site in WITH_HEADS else grid[:, :, 0]
                paths[site] = path.name
        return Swept({site: values[site] for site in self.sites}, unpatched, whole, paths)

    @property
    def _known(self) -> tuple[str, ...]:
        """The sites that the fast way can patch."""
        return tuple(site for site in self.sites if site in SITES)

    def _heads(self, site: str) -> int:
        return self.model.cfg.n_heads if site in WITH_HEADS else 1

    def _places(self, group: Sequence[PatchPair]) -> np.ndarray:
        return np.array([pair.places(skip_unchanged=self.skip_unchanged) for pair in group])

    def _paths(
        self, batch: PatchBatch, source: Recorded, target: Recorded
    ) -> list[tuple[tuple[str, ...], Suffix | Hooked]]:
        """The fast way for the sites it knows, all at once, if its logits are the model's; else the general one."""
        known = self._known if self.blocks else ()
        found: list[tuple[tuple[str, ...], Suffix | Hooked]] = []
        if self.blocks and known:
            fast = Suffix(self.model, self.blocks, batch, known, self.layers, source.states, target.states)
            if fast.agrees(target.last):
                found.append((known, fast))
        for site in self.sites:
            if not found or site not in known:
                names = resolve(self.model, site, self.layers)
                found.append(((site,), Hooked(self.model, batch, site, names, source.states, target.last)))
        return found


def sweep_of(
    model: LensModel,
    prepared: Sequence[PatchPair],
    sites: Sequence[str],
    layers: Layers,
    metrics: dict[str, Metric],
    max_batch: int | None,
    *,
    skip_unchanged: bool,
) -> Sweep:
    """The sweep of some sites for pairs.

    Raises:
        CtlensError: a site is unknown or there twice, there is none, a layer does not exist, or `max_batch` is less
            than 1.
    """
    require_sites(sites, max_batch)
    longest = max(len(ids) for pair in prepared for ids in (pair.source, pair.target))
    numbers = select_layers(model.cfg.n_layers, layers)
    blocks = read_blocks(model, longest) if set(sites) & set(SITES) else None
    return Sweep(model, tuple(sites), numbers, metrics, skip_unchanged, max_batch or fitting(model, longest), blocks)


def require_sites(sites: Sequence[str], max_batch: int | None) -> None:
    """Raises a `CtlensError` where a site is unknown or there twice, there is none, or `max_batch` is less than 1."""
    for site in sites:
        if site not in SHORTHANDS:
            raise unknown("site", site, SHORTHANDS)
    if not sites or len(set(sites)) < len(sites):
        raise CtlensError("name at least one site, and each once.")
    if max_batch is not None and max_batch < 1:
        raise CtlensError(f"max_batch is {max_batch}: at least 1 is needed.")


def fitting(model: LensModel, length: int) -> int:
    """The number of prompts of a length that fit into `MEMORY`."""
    cfg = model.cfg
    held = 8 * cfg.n_layers * cfg.d_model
    passing = 10 * cfg.d_model + 3 * cfg.d_mlp + 3 * cfg.n_heads * length + 2 * cfg.d_vocab
    return max(1, MEMORY // (4 * length * (held + passing)))
