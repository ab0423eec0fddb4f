"""The analyses of a study: each compares the finished models of one threat and lies in a folder of its own.

`run_analyses` runs those that are missing; `FinishedAnalyses` loads them, by seed, for claims and figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from ctlens.analysis import (
    AttentionDiff,
    Erasure,
    Task,
    answer_hinted,
    best_of_n,
    boundary_direction,
    cross_loss,
    embedding_attack,
    erase_or_mask,
    graft,
    relearn,
    shift_similarity,
    transplant,
    wrapper_present,
)
from ctlens.analysis.base.result import Result
from ctlens.core.digests import record_digests, require_undamaged
from ctlens.core.errors import CtlensError
from ctlens.core.files import atomic_folder, sweep, write_json
from ctlens.core.keeping import keeping
from ctlens.core.labels import BASE, CLEAN_BORN
from ctlens.core.progress import progress_bar
from ctlens.core.reading import read_json
from ctlens.core.threads import one_thread
from ctlens.core.types import LensModel
from ctlens.data.chat import Turn, render
from ctlens.data.pairs import Pair, Prompt
from ctlens.models.hooks import run
from ctlens.study.cells import (
    MATCHED_FOLDER,
    NEUTRAL_PROMPTS,
    SHARED,
    aligned,
    base_model,
    finished_model,
    probe_pairs,
)
from ctlens.study.conditions import DERIVED, RETENTION, SHAM
from ctlens.study.config import Cell, StudyConfig
from ctlens.study.logs import logged
from ctlens.study.source import Subject, start_model, subject
from ctlens.study.workers import Pool, run_in_order

_PROBED_OVER_ANALYSED = 3
"""Pairs for probes over those of other analyses: they are fitted on two thirds and need every answer in each third."""
EQUAL_STEPS = "equal steps"
"""The setting that compares the models at the end of their trainings."""
MATCHED = "matched effect"
"""The setting that compares the models where each has the same effect, the study's `matched`."""
SETTINGS = (EQUAL_STEPS, MATCHED)
_AT_BOTH_SETTINGS = ("similarity", "transplant")
"""The analyses that run at both settings; every other one runs at equal steps alone."""
_ROUNDINGS = 32
"""Units of rounding of the largest logit below which two models do not differ; chosen by eye."""
_WITH_A_TWIN = ("boundary", "relearning", "best-of-n", "embedding-attack")
"""The analyses that push a repair; they run where there is a clean-born twin to compare with."""
_RELEARNING_STEPS = (1, 2, 4, 8, 16, 32)
"""After how many steps of fine-tuning a model is asked; chosen on first trials, where sycophancy was half back at 8."""
_OF_ALL_SEEDS = ("similarity",)
"""The analyses that take the models of all seeds at once; every other one runs seed by seed."""
_MOST_ERASURE_LAYERS = 10
"""The most layers on which models are asked whether a cue is erased: each costs a search with its null; not tuned."""
_GRAFTED = ("block", "component")
"""The parts whose weights are swapped, those that the study's figure shows."""
_REFUSALS_FILE = "refused.json"
"""The file in the folder of an analysis with the reasons of the results that were refused, by name."""

ResultT = TypeVar("ResultT", bound=Result)


@dataclass(frozen=True)
class Analysis:
    """One analysis of the models that were trained on one threat.

    Attributes:
        name: a key of `ANALYSES`.
        threat: trained on.
        setting: one of `SETTINGS`: the models at the end of the training, or at the effect of the study's `matched`.
        seed: of the trainings; of an analysis of all seeds at once 0.
    """

    name: str
    threat: str
    setting: str
    seed: int = 0

    def path(self, study: Path) -> Path:
        """The folder of the analysis, inside that of a study."""
        matched = "-matched" if self.setting == MATCHED else ""
        seed = f"-seed{self.seed}" if self.name not in _OF_ALL_SEEDS else ""
        return study / "analyses" / self.threat / f"{self.name}{matched}{seed}"

    def load(self, study: Path, kind: type[ResultT]) -> dict[str, ResultT]:
        """Loads the results of the analysis, by name; none where it has not run.

        Raises:
            CtlensError: a file is damaged.
        """
        folder = self.path(study)
        require_undamaged(folder, remove=folder)
        return {path.stem: kind.load(path) for path in sorted(folder.glob("*.safetensors"))}

    def refusals(self, study: Path) -> dict[str, str]:
        """Reads why there is no result, by the name of the result."""
        path = self.path(study) / _REFUSALS_FILE
        return read_json(path) if path.is_file() else {}


def analyses_of(config: StudyConfig) -> list[Analysis]:
    """Lists every analysis of a study."""
    found = []
    for threat in config.analysed_threats:
        for name in ANALYSES if config.clean_born else [name for name in ANALYSES if name not in _WITH_A_TWIN]:
            for setting in SETTINGS if name in _AT_BOTH_SETTINGS else SETTINGS[:1]:
                found += [Analysis(name, threat, setting, seed) for seed in _seeds_of(config, name)]
    return found


def _seeds_of(config: StudyConfig, name: str) -> range:
    """The seeds that have an analysis of their own."""
    return range(1 if name in _OF_ALL_SEEDS else min(config.analysed_seeds or config.seeds, config.seeds))


class FinishedAnalyses:
    """The finished analyses of a study, by the seed of the training.

    Args:
        config: of the study.
        study: its folder.
    """

    def __init__(self, config: StudyConfig, study: Path) -> None:
        self.config = config
        self.study = study

    def of(
        self, kind: type[ResultT], name: str, threat: str, setting: str = EQUAL_STEPS
    ) -> dict[int, dict[str, ResultT]]:
        """Loads the results of an analysis by seed and name; one that all seeds share stands at seed 0 alone."""
        seeds = _seeds_of(self.config, name)
        found = {seed: Analysis(name, threat, setting, seed).load(self.study, kind) for seed in seeds}
        return {seed: results for seed, results in found.items() if results}

    def refused(self, name: str, threat: str, setting: str = EQUAL_STEPS) -> str:
        """The reasons of an analysis that refused to give a result, each once."""
        analyses = [Analysis(name, threat, setting, seed) for seed in _seeds_of(self.config, name)]
        reasons = [reason for analysis in analyses for reason in analysis.refusals(self.study).values()]
        return "; ".join(dict.fromkeys(reasons))

    def attention(self, threat: str) -> dict[int, dict[str, AttentionDiff]]:
        """Loads what each method did to attention, by seed."""
        return {
            seed: {
                name: AttentionDiff.load(Cell(threat, name, seed).path(self.study) / "attention.safetensors")
                for name in (RETENTION, *self.config.methods)
            }
            for seed in range(self.config.seeds)
        }


def run_analyses(config: StudyConfig, study: Path, pool: Pool, *, progress: bool) -> None:
    """Runs the analyses that are missing.

    Args:
        config: of the study, whose cells are all there.
        study: its folder.
        pool: where the analyses run.
        progress: show a progress bar.
    """
    missing = [analysis for analysis in analyses_of(config) if not analysis.path(study).exists()]
    tasks = [(config, study, analysis) for analysis in missing]
    try:
        with closing(run_in_order(run_analysis, tasks, pool)) as done:
            for _ in progress_bar(done, desc="analyses", total=len(tasks), shown=progress):
                pass
    finally:
        sweep(analysis.path(study) for analysis in missing)


def run_analysis(config: StudyConfig, study: Path, analysis: Analysis) -> None:
    """Runs one analysis and writes its folder, whole or not at all; for a result that is refused, the reason."""
    refusals = {}
    path = analysis.path(study)
    log = f"{path.parent.name}-{path.name}"
    with one_thread(), keeping(SHARED), logged(study, log), atomic_folder(path) as work:
        for name, analyse in ANALYSES[analysis.name](Scene(config, study, analysis)):
            try:
                result = analyse()
            except CtlensError as error:
                refusals[name] = str(error)
            else:  # a disk that is full is no refusal of the analysis
                result.save(work / f"{name}.safetensors")
        write_json(work / _REFUSALS_FILE, refusals)
        record_digests(work)


@dataclass(frozen=True)
class Scene:
    """The models of one analysis and the pairs that they are compared on."""

    config: StudyConfig
    study: Path
    analysis: Analysis

    @cached_property
    def base(self) -> LensModel:
        """The model before training."""
        return base_model(self.config)

    def pairs(self, times: int = 1) -> list[Pair]:
        """Draws held-out pairs: up to as many as the study analyses, or some times as many."""
        return probe_pairs(self.subject, self.config, self.base, times * self.config.n_analysed)

    @property
    def subject(self) -> Subject:
        """Where the pairs come from."""
        return subject(self.analysis.threat, self.config.file, self.study)

    def training_pairs(self) -> list[Pair]:
        """Draws pairs of the split that the models were trained on."""
        config = self.config
        return aligned(self.subject, config.n_analysed, self.base, config, split="train", seed=self.analysis.seed)

    def pushed(self) -> dict[str, LensModel]:
        """The models whose repairs are pushed: of every method, beside retention alone, the base and its twin."""
        trained = self.models([RETENTION, *self.config.methods], self.analysis.seed)
        twin = start_model(self.config.clean_born, self.config.device, self.config.dtype)
        return {BASE: self.base, CLEAN_BORN: twin, **trained}

    def models(self, names: Sequence[str], seed: int) -> dict[str, LensModel]:
        """The trained models of a seed by condition, without those that never came near the matched effect."""
        found = {}
        for name in names:
            path = Cell(self.analysis.threat, name, seed).path(self.study)
            if self.analysis.setting == MATCHED:
                path /= MATCHED_FOLDER
            if path.exists():
                found[name] = finished_model(self.config, self.base, path)
        return found

    @property
    def conditions(self) -> list[str]:
        """The methods and the extra conditions."""
        return [*self.config.methods, *self.config.extra_conditions_of(self.analysis.threat)]


NamedResults: TypeAlias = Iterator[tuple[str, Callable[[], Result]]]
"""Pairs of a result's name and the call that makes it.

Models are loaded before the call: a model that cannot be loaded is an error, and must not be written down as an
analysis that refused.
"""


def _similarity(scene: Scene) -> NamedResults:
    """Compares every condition and control, over all seeds.

    The floor is the fine-tuning on other data that is as long as the methods' updates, where there is one, and else
    retention alone, which hardly moves. A null has no effect to be matched.
    """
    models: dict[tuple[str, int], LensModel] = {}
    nulls = [RETENTION, *DERIVED] if scene.analysis.setting == EQUAL_STEPS else []
    names = [*nulls, *scene.conditions]
    pairs = scene.pairs()
    for seed in sorted({cell.seed for cell in scene.config.cells()}):
        found = scene.models(names, seed).items()
        models |= {(name, seed): model for name, model in found if _moved(scene.base, model, pairs[0])}
    there = {name for name, _ in models}
    null = next((name for name in (SHAM, RETENTION) if name in nulls and name in there), None)
    if len(models) > 1:
        yield "similarity", lambda: shift_similarity(scene.base, models, pairs, null=null, progress=False)


@torch.no_grad()
def _moved(base: LensModel, model: LensModel, pair: Pair) -> bool:
    """Tells whether training changed a logit by more than rounding; retention alone begins at its optimum."""
    tokens = torch.tensor([render(base.tokenizer, pair.wrapped.turns).ids], device=base.cfg.device)
    before = run(base, tokens)
    rounding = _ROUNDINGS * torch.finfo(before.dtype).eps * float(before.abs().max())
    return float((run(model, tokens) - before).abs().max()) > rounding


def _cross_loss(scene: Scene) -> NamedResults:
    models = scene.models([*scene.conditions, RETENTION], scene.analysis.seed)
    pairs = scene.pairs()
    yield "cross-loss", lambda: cross_loss(scene.base, models, pairs, progress=False)


def _transplants(scene: Scene) -> NamedResults:
    pairs = scene.pairs()
    for name, model in scene.models(scene.conditions, scene.analysis.seed).items():
        yield name, partial(transplant, model, scene.base, pairs, progress=False)


def _grafts(scene: Scene) -> NamedResults:
    pairs = scene.pairs()
    for name, model in scene.models(scene.conditions, scene.analysis.seed).items():
        yield name, partial(graft, model, scene.base, pairs, by=_GRAFTED, progress=False)


def _erasure(scene: Scene) -> NamedResults:
    models = scene.models([*scene.config.methods, RETENTION], scene.analysis.seed)
    pairs = scene.pairs(_PROBED_OVER_ANALYSED)

    def analyse() -> Erasure:
        cue = _cue(scene, pairs)
        layers = _spread_over(scene.base.cfg.n_layers, _MOST_ERASURE_LAYERS)
        return erase_or_mask(scene.base, models, pairs, cue=cue, layers=layers, control=RETENTION, progress=False)

    yield "erasure", analyse


def _spread_over(n_layers: int, at_most: int) -> list[int]:
    """Layers from the first to the last, evenly apart, every one of them where there are few."""
    return np.linspace(0, n_layers - 1, min(n_layers, at_most)).round().astype(int).tolist()


def _cue(scene: Scene, pairs: Sequence[Pair]) -> Task | None:
    """What probes read: the answer that was hinted, or whether there is an attack, among neutral words (None) or twins.

    The benign twin of a natural threat has the attack's wrapper and names the right answer in it.
    """
    if all({"hint", "relation"} <= set(pair.labels) for pair in pairs):
        return answer_hinted(pairs)
    if not scene.config.natural:
        return None
    twins = [replace(pair, wrapped=pair.benign) for pair in pairs if pair.benign]
    return wrapper_present(pairs, scene.base.tokenizer, negatives=twins)


def _boundary(scene: Scene) -> NamedResults:
    models = scene.models(scene.config.methods, scene.analysis.seed)
    fitted = scene.training_pairs()
    heldout = scene.pairs()
    yield "boundary", lambda: boundary_direction(scene.base, models, fitted, heldout, progress=False)


def _relearning(scene: Scene) -> NamedResults:
    models = scene.pushed()
    attacked = scene.training_pairs()
    benign = scene.subject.neutral(NEUTRAL_PROMPTS, seed=scene.analysis.seed)
    heldout = scene.pairs()
    options: dict[str, Any] = {"benign": benign, "steps": _RELEARNING_STEPS, "progress": False}
    yield "relearning", lambda: relearn(models, attacked, heldout, **options)


def _best_of_n(scene: Scene) -> NamedResults:
    """Asks the requests that have several wrappers among the held-out pairs for probes."""
    models = scene.pushed()
    wrappers: dict[tuple[Turn, ...], set[Prompt]] = {}
    pairs = scene.pairs(_PROBED_OVER_ANALYSED)
    for pair in pairs:
        wrappers.setdefault(pair.clean.turns, set()).add(pair.wrapped)
    several = [pair for pair in pairs if len(wrappers[pair.clean.turns]) > 1]
    yield "best-of-n", lambda: best_of_n(models, several, progress=False)


def _embedding_attack(scene: Scene) -> NamedResults:
    models = scene.pushed()
    pairs = scene.pairs()
    yield "embedding-attack", lambda: embedding_attack(models, pairs, progress=False)


ANALYSES: dict[str, Callable[[Scene], NamedResults]] = {
    "similarity": _similarity,
    "cross-loss": _cross_loss,
    "transplant": _transplants,
    "graft": _grafts,
    "erasure": _erasure,
    "boundary": _boundary,
    "relearning": _relearning,
    "best-of-n": _best_of_n,
    "embedding-attack": _embedding_attack,
}
