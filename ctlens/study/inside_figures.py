"""The figures of the looks into one threat's models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from ctlens.analysis import CrossLoss, Erasure, Graft, ResidualShift, ShiftSimilarity, Transplant
from ctlens.analysis.base.positions import ALIGNED_POSITIONS
from ctlens.analysis.base.result import Result
from ctlens.analysis.base.shares import floor_of
from ctlens.analysis.exchange import transplant as transplants
from ctlens.analysis.exchange.exchange import Exchange
from ctlens.analysis.residual import shift as residual
from ctlens.analysis.weights import graft as grafts
from ctlens.plots import Figure
from ctlens.study.analyses import EQUAL_STEPS, MATCHED, Look
from ctlens.study.conditions import RETENTION
from ctlens.study.config import Cell, StudyConfig
from ctlens.study.results import in_order

R = TypeVar("R", bound=Result)
E = TypeVar("E", bound=Exchange)
CROSSED = ("act", "act_last", "klct", "klct_last", RETENTION)


def inside_figures(config: StudyConfig, folder: Path, threat: str) -> Iterator[tuple[str, Figure]]:
    """Every figure of the looks into the models of one threat, of the first organism and seed, by name.

    Args:
        config: of the study.
        folder: of the study.
        threat: one that was looked into.
    """
    crossed = [name for name in CROSSED if name in (*config.methods, *config.beside_of(threat), RETENTION)]
    if len(crossed) > 2:
        shifts = {name: over_seeds(ResidualShift, folder, config, threat, name, "residual") for name in crossed}
        for positions in ALIGNED_POSITIONS:
            words = f"{where(threat)}; level and window crossed"
            yield f"crossed-{positions}", residual.figure(shifts, positions=positions, subtitle=words)
    for setting, end in ((EQUAL_STEPS, ""), (MATCHED, "-matched")):
        yield from ((f"{name}{end}", figure) for name, figure in at_setting(config, folder, threat, setting))
    for result in _load(CrossLoss, "cross-loss", folder, threat).values():
        yield "cross-loss", result.figure()
    if found := _with_effect(_among(_load(Graft, "graft", folder, threat), config.methods)):
        yield "graft", grafts.figure(found, subtitle=where(threat))
    for result in _load(Erasure, "erasure", folder, threat).values():
        yield "erasure", result.figure()


def at_setting(config: StudyConfig, folder: Path, threat: str, setting: str) -> Iterator[tuple[str, Figure]]:
    """What is compared at equal steps and again at a matched effect."""
    for result in _load(ShiftSimilarity, "similarity", folder, threat, setting).values():
        shown = [name for name in (RETENTION, *config.methods, *config.beside_of(threat)) if name in result.methods]
        compared = [name for name in shown if name in (RETENTION, *config.methods)]
        for name, methods in (("similarity", compared), ("similarity-all", shown)):
            if len(methods) > 1:  # a matrix of one is none
                yield name, result.among(methods).figure()
    found = _with_effect(_load(Transplant, "transplant", folder, threat, setting))
    for positions in ALIGNED_POSITIONS if found else ():
        words = f"{where(threat)}; at {setting}"
        yield f"transplant-{positions}", transplants.figure(found, positions, subtitle=words)


def _load(kind: type[R], analysis: str, folder: Path, threat: str, setting: str = EQUAL_STEPS) -> dict[str, R]:
    found = Look(analysis, threat, 0, setting).load(folder, kind)
    return {name: found[name] for name in in_order(found)}


def _among(found: dict[str, R], names: Sequence[str]) -> dict[str, R]:
    return {name: found[name] for name in names if name in found}


def _with_effect(found: dict[str, E]) -> dict[str, E]:
    """The exchanges between models that differ enough for shares of the difference."""
    return {
        name: result for name, result in found.items() if abs(result.effect().mean()) >= floor_of("logit_diff", None)
    }


def over_seeds(kind: type[R], folder: Path, config: StudyConfig, threat: str, method: str, name: str) -> R:
    """The mean over the seeds of the first organism of an analysis of every cell, pair by pair."""
    paths = [Cell(threat, method, seed).place(folder) / f"{name}.safetensors" for seed in range(config.seeds)]
    loaded = [kind.load(path) for path in paths]
    arrays = [f.name for f in dataclasses.fields(loaded[0]) if isinstance(getattr(loaded[0], f.name), np.ndarray)]
    return dataclasses.replace(loaded[0], **{a: np.mean([getattr(r, a) for r in loaded], axis=0) for a in arrays})


def where(threat: str) -> str:
    """The prompts of a figure, in words."""
    return f"{threat}, wrappers and items held out"
