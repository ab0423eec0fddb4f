"""Looking into the finished models of a study: every analysis of every threat, each a file in the study's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from tqdm.auto import tqdm

from ctlens.analysis import (
    Erasure,
    answer_hinted,
    cross_loss,
    erase_or_mask,
    graft,
    shift_similarity,
    transplant,
)
from ctlens.analysis.base.result import Result
from ctlens.core.errors import CtlensError
from ctlens.core.files import atomic_folder, sweep, write_json
from ctlens.core.threads import one_thread
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair
from ctlens.models.loading import load_model
from ctlens.study.cells import ANALYSED_PAIRS, MATCHED_FOLDER, base_model, probe_pairs
from ctlens.study.conditions import PERTURBED, RETENTION
from ctlens.study.config import Cell, StudyConfig, base_cell
from ctlens.study.looks import ALL_SEEDS, AT_BOTH, EQUAL_STEPS, MATCHED, REFUSALS, SETTINGS, Look
from ctlens.study.workers import Pool, in_order

PROBED_PAIRS = 192
"""For probes, which are fitted on two thirds of them and need every answer in each third."""


@dataclass(frozen=True)
class Scene:
    """The models of one look and the pairs that they are compared on."""

    config: StudyConfig
    study: Path
    look: Look

    @cached_property
    def base(self) -> LensModel:
        """The model before training."""
        return base_model(self.config, self.study, base_cell(self.look.organism))

    def pairs(self, n: int = ANALYSED_PAIRS) -> list[Pair]:
        """Up to so many that were held out."""
        return probe_pairs(self.config, self.look.threat, self.base, n)

    def models(self, names: Sequence[str], seed: int) -> dict[str, LensModel]:
        """The trained models of a seed by condition; those that never came near the matched effect are not there."""
        found = {}
        for name in names:
            place = Cell(self.look.threat, name, seed, self.look.organism).place(self.study)
            place /= MATCHED_FOLDER if self.look.setting == MATCHED else "model"
            if place.exists():
                found[name] = load_model(place, device=self.config.device, dtype=self.config.dtype)
        return found

    @property
    def conditions(self) -> list[str]:
        """The methods, and what is trained beside them."""
        return [*self.config.methods, *self.config.beside_of(self.look.threat)]


def looks(config: StudyConfig) -> list[Look]:
    """Every look of a study."""
    found = []
    for organism in range(config.organisms):
        for threat in config.insides:
            for analysis in ANALYSES:
                for setting in SETTINGS if analysis in AT_BOTH else SETTINGS[:1]:
                    seeds = range(1 if analysis in ALL_SEEDS else config.seeds)
                    found += [Look(analysis, threat, organism, setting, seed) for seed in seeds]
    return found


def look_inside(config: StudyConfig, study: Path, pool: Pool, *, progress: bool) -> None:
    """Runs the looks that are missing.

    Args:
        config: of the study, whose cells are all there.
        study: its folder.
        pool: where the looks run.
        progress: show a progress bar.
    """
    missing = [look for look in looks(config) if not look.place(study).exists()]
    tasks = [(config, study, look) for look in missing]
    try:
        with closing(in_order(run_look, tasks, pool)) as done:
            for _ in tqdm(done, desc="looking inside", total=len(tasks), disable=not progress):
                pass
    finally:
        sweep(look.place(study) for look in missing)


def run_look(config: StudyConfig, study: Path, look: Look) -> None:
    """Runs one look and writes its folder, whole or not at all; of what an analysis refuses, the reason."""
    refusals = {}
    with one_thread(), atomic_folder(look.place(study)) as work:
        for name, analyse in ANALYSES[look.analysis](Scene(config, study, look)):
            try:
                analyse().save(work / f"{name}.safetensors")
            except CtlensError as error:
                refusals[name] = str(error)
        write_json(work / REFUSALS, refusals)


Analyses = Iterator[tuple[str, Callable[[], Result]]]
"""Names and what makes the result; models are loaded outside, so that only the analysis can refuse."""


def _similarity(scene: Scene) -> Analyses:
    """Of every condition and control, all seeds, with retention alone as the floor."""
    models: dict[tuple[str, int], LensModel] = {}
    null = RETENTION if scene.look.setting == EQUAL_STEPS else None  # a null has no effect to be matched
    names = [*([RETENTION, PERTURBED] if null else []), *scene.conditions]
    for seed in sorted({cell.seed for cell in scene.config.cells()}):
        models |= {(name, seed): model for name, model in scene.models(names, seed).items()}
    if len(models) > 1:
        pairs = scene.pairs()
        yield "similarity", lambda: shift_similarity(scene.base, models, pairs, null=null, progress=False)


def _cross_loss(scene: Scene) -> Analyses:
    models, pairs = scene.models([*scene.conditions, RETENTION], scene.look.seed), scene.pairs()
    yield "cross-loss", lambda: cross_loss(scene.base, models, pairs, progress=False)


def _transplants(scene: Scene) -> Analyses:
    pairs = scene.pairs()
    for name, model in scene.models(scene.conditions, scene.look.seed).items():
        yield name, partial(transplant, model, scene.base, pairs, progress=False)


def _grafts(scene: Scene) -> Analyses:
    pairs = scene.pairs()
    for name, model in scene.models(scene.conditions, scene.look.seed).items():
        yield name, partial(graft, model, scene.base, pairs, progress=False)


def _erasure(scene: Scene) -> Analyses:
    models, pairs = scene.models([*scene.config.methods, RETENTION], scene.look.seed), scene.pairs(PROBED_PAIRS)
    hinted = all({"hint", "relation"} <= set(pair.labels) for pair in pairs)

    def analyse() -> Erasure:
        cue = answer_hinted(pairs) if hinted else None
        return erase_or_mask(scene.base, models, pairs, cue=cue, control=RETENTION, progress=False)

    yield "erasure", analyse


ANALYSES: dict[str, Callable[[Scene], Analyses]] = {
    "similarity": _similarity,
    "cross-loss": _cross_loss,
    "transplant": _transplants,
    "graft": _grafts,
    "erasure": _erasure,
}
