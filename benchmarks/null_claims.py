"""How often does a claim hold where there is nothing to find? Each kind of claim is judged on what its null says.

Run `python benchmarks/null_claims.py runs/replication/*/*` on finished studies of `--size replicated`. What is judged,
by the code that judges studies:

- one method: three seeds of a method play the parts of ACT, AttCT and BCT, in three orders;
- nine seeds: so do three times three seeds of a method, as a study of several seeds has; six of the nine are trained
  for it, into `runs/null-seeds`, on the first model of each group;
- a sham: a fine-tuning on other data, as long as the methods, plays the method that repairs;
- another twin: clean-born models of other seeds play the methods, beside the organism's own twin;
- a random draw: each random direction plays the one that the training made, among the others;
- shuffled labels: a probe of the base is to read a cue whose labels were shuffled.

Then each case is pooled over the studies as `ctlens replicate` pools. A claim should hold in at most 1 of 40, the
interval's one side, where it has one.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pandas as pd

from ctlens import load_model
from ctlens.analysis import (
    BoundaryDirection,
    Task,
    answer_hinted,
    probe,
    shift_similarity,
    transplant,
    wrapper_present,
)
from ctlens.analysis.directions.erasure import ERASURE_PROBES
from ctlens.analysis.directions.interventions import ALONG, COVARIANCE, ISOTROPIC
from ctlens.core.labels import BASE, CLEAN_BORN
from ctlens.core.progress import progress_bar
from ctlens.core.threads import one_thread
from ctlens.core.types import LensModel
from ctlens.study.analyses import ANALYSES, EQUAL_STEPS, Analysis, FinishedAnalyses, Scene
from ctlens.study.cells import base_model, finished_model, probe_pairs, run_cell
from ctlens.study.claims.behaviour import WrappedRates
from ctlens.study.claims.claim import HOLDS, Claim, claim_verdict
from ctlens.study.claims.inside import inside_claims
from ctlens.study.claims.pushed import pushed_claims
from ctlens.study.conditions import RETENTION, SHAM
from ctlens.study.config import Cell, StudyConfig, replicated_study
from ctlens.study.replication import pooled_over_models
from ctlens.study.results import SEVERAL, read_results
from ctlens.study.source import subject

HERE = Path(__file__).parent
PARTS = ("act", "attct", "bct")
ORDERS = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
"""Which seed plays which of the parts."""
ONE_METHOD = "one method"
NINE_SEEDS = "one method, nine seeds"
N_SEEDS = 9
PARTITIONS = (((0, 1, 2), (3, 4, 5), (6, 7, 8)), ((0, 3, 6), (1, 4, 7), (2, 5, 8)))
"""Two ways of giving each part three of the nine seeds."""
OTHER_TWIN = "another twin"
DRAW = "a random draw"
SHUFFLED = "shuffled labels"
OVER_SEEDS = ("shared", "shared_content", "attention")
"""The claims that tell one part from the others, with seeds in their interval where there are several."""
CONTRASTS = (*OVER_SEEDS, "left_later")
"""These, and one that is of the first seed alone."""
BEYOND_TWIN = ("relearnt", "returns", "wrappers", "embeddings")
"""The claims whose number is less the clean-born twin's."""
FROM_TWIN = ("relearning", "best-of-n", "embedding-attack")
"""The analyses that have those numbers."""
LABEL_DRAWS = 20


class Case(NamedTuple):
    """A claim that was judged where there is nothing to find.

    Attributes:
        key: of the claim, without the method's name.
        null: what there is in the place of something to find.
        case: what tells it from the other cases of the same study.
        value, low, high: the number above its floor, and its interval in one study.
        prompts_low, prompts_high: the interval over prompts alone.
        holds: whether it holds in this study.
    """

    key: str
    null: str
    case: tuple[str | int, ...]
    value: float
    low: float
    high: float
    prompts_low: float
    prompts_high: float
    holds: bool


@dataclass(frozen=True)
class PlayedScene(Scene):
    """The models of an analysis of which others play the parts; `played` has the folder of each, none for the base."""

    played: Mapping[str, str]

    def pushed(self) -> dict[str, LensModel]:
        """The models that play the parts."""
        return {name: load_model(folder) if folder else self.base for name, folder in self.played.items()}


class NullStudy:
    """A finished study on whose models the nulls are made.

    Args:
        folder: of the study.
        twins: the folders of other clean-born models, which play the methods; none if another study asked its twin.
        nine: the folder of its further seeds; none if it has no more.
    """

    def __init__(self, folder: Path, twins: Sequence[str], nine: Path | None) -> None:
        self.folder = folder
        self.twins = twins
        self.nine = nine
        self.config = _config(folder)

    @cached_property
    def base(self) -> LensModel:
        """The organism before training."""
        return base_model(self.config)

    def cases(self, threat: str) -> Iterator[Case]:
        """Judges every kind of claim on a threat."""
        yield from self.one_method(threat)
        if self.nine:
            yield from self.nine_seeds(threat)
        yield self.sham(threat)
        if self.twins:
            yield from self.other_twins(threat)
        yield from self.draws(threat)
        yield from self.shuffled(threat)

    def one_method(self, threat: str) -> Iterator[Case]:
        """Judges the claims that tell methods apart where the seeds of one method play all parts."""
        pairs = probe_pairs(subject(threat), self.config, self.base, self.config.n_analysed)
        for method in self.config.methods:
            folders = [Cell(threat, method, seed).path(self.folder) for seed in range(len(PARTS))]
            models = [finished_model(self.config, self.base, folder) for folder in folders]
            moved = [transplant(model, self.base, pairs, progress=False) for model in models]
            for order in ORDERS:
                named = dict(zip(PARTS, order, strict=True))
                with TemporaryDirectory() as work:
                    alike = Analysis("similarity", threat, EQUAL_STEPS).path(Path(work))
                    alike.mkdir(parents=True)
                    taken = {part: models[seed] for part, seed in named.items()}
                    shift_similarity(self.base, taken, pairs, progress=False).save(alike / "similarity.safetensors")
                    moves = Analysis("transplant", threat, EQUAL_STEPS).path(Path(work))
                    moves.mkdir()
                    for part, seed in named.items():
                        moved[seed].save(moves / f"{part}.safetensors")
                    self._show_attention(Path(work), threat, 0, {part: folders[seed] for part, seed in named.items()})
                    played = StudyConfig((threat,), PARTS, analysed=(threat,), extra_conditions=(), ceiling_seeds=1)
                    for claim in inside_claims(FinishedAnalyses(played, Path(work))):
                        if claim.key in CONTRASTS and claim.setting == EQUAL_STEPS:
                            yield _case(claim, claim.key, ONE_METHOD, threat, method, *order)

    def nine_seeds(self, threat: str) -> Iterator[Case]:
        """Judges the claims whose intervals hold seeds where each part is three of nine seeds of one method."""
        pairs = probe_pairs(subject(threat), self.config, self.base, self.config.n_analysed)
        for method in PARTS:
            folders = [self._seed(threat, method, seed) for seed in range(N_SEEDS)]
            models = [finished_model(self.config, self.base, folder) for folder in folders]
            for number, partition in enumerate(PARTITIONS):
                keyed = {(part, n): models[of[n]] for part, of in zip(PARTS, partition, strict=True) for n in range(3)}
                alike = shift_similarity(self.base, keyed, pairs, progress=False)
                for order in ORDERS:
                    methods = tuple(PARTS[at] for at in order)
                    named = dict(zip(methods, partition, strict=True))
                    with TemporaryDirectory() as work:
                        found = Analysis("similarity", threat, EQUAL_STEPS).path(Path(work))
                        found.mkdir(parents=True)
                        replace(alike, methods=methods).save(found / "similarity.safetensors")
                        for seed in range(3):
                            attention = {part: folders[of[seed]] for part, of in named.items()}
                            self._show_attention(Path(work), threat, seed, attention)
                        played = StudyConfig((threat,), PARTS, 3, analysed=(threat,), extra_conditions=())
                        for claim in inside_claims(FinishedAnalyses(played, Path(work))):
                            if claim.key in OVER_SEEDS and claim.setting == EQUAL_STEPS:
                                yield _case(claim, claim.key, NINE_SEEDS, threat, method, number, *order)

    def _seed(self, threat: str, method: str, seed: int) -> Path:
        """The folder of a training; one of a further seed is trained if it is not there."""
        cell = Cell(threat, method, seed)
        if seed < self.config.seeds:
            return cell.path(self.folder)
        assert self.nine is not None
        if not (found := cell.path(self.nine)).exists():
            run_cell(self.config, self.nine, cell)
        return found

    def _show_attention(self, work: Path, threat: str, seed: int, folders: Mapping[str, Path]) -> None:
        """Puts what trainings did to attention where a study has it, beside that of retention alone."""
        retention = Cell(threat, RETENTION, 0).path(self.folder)
        for part, folder in {RETENTION: retention, **folders}.items():
            there = Cell(threat, part, seed).path(work)
            there.mkdir(parents=True)
            shutil.copyfile(folder / "attention.safetensors", there / "attention.safetensors")

    def sham(self, threat: str) -> Case:
        """Judges whether the sham leaves fewer bad answers than retention alone."""
        wrapped = WrappedRates(self.folder, read_results(self.folder / "results.csv"))
        found = wrapped.gap(threat, RETENTION, SHAM, threat)
        ends = (found.low, found.high, found.prompts_low, found.prompts_high)
        return Case("repair", "a sham", (threat,), found.value, *ends, _above(found.value, found.low, found.high))

    def other_twins(self, threat: str) -> Iterator[Case]:
        """Judges the claims on pushed repairs where other clean-born models play the methods."""
        played = {BASE: "", CLEAN_BORN: self.config.clean_born, RETENTION: ""}
        played |= dict(zip(self.config.methods, self.twins, strict=True))
        with TemporaryDirectory() as work:
            for name in FROM_TWIN:
                analysis = Analysis(name, threat, EQUAL_STEPS)
                scene = PlayedScene(self.config, self.folder, analysis, played)
                folder = analysis.path(Path(work))
                folder.mkdir(parents=True)
                for result, analyse in ANALYSES[name](scene):
                    analyse().save(folder / f"{result}.safetensors")
            for claim in pushed_claims(FinishedAnalyses(self.config, Path(work)), threat):
                kind, _, method = claim.key.rpartition("_")
                if kind in BEYOND_TWIN:
                    yield _case(claim, kind, OTHER_TWIN, threat, method)

    def draws(self, threat: str) -> Iterator[Case]:
        """Judges the claims on one direction where each random direction plays it, among the others."""
        analysis = Analysis("boundary", threat, EQUAL_STEPS)
        (found,) = analysis.load(self.folder, BoundaryDirection).values()
        drawn = [at for at, name in enumerate(found.variants) if name == COVARIANCE]
        with TemporaryDirectory() as work:
            folder = analysis.path(Path(work))
            folder.mkdir(parents=True)
            for number, chosen in enumerate(drawn):
                own = dict.fromkeys([found.variants.index(ALONG)], ISOTROPIC) | {chosen: ALONG}
                variants = tuple(own.get(at, name) for at, name in enumerate(found.variants))
                replace(found, variants=variants).save(folder / "boundary.safetensors")
                for claim in pushed_claims(FinishedAnalyses(self.config, Path(work)), threat):
                    kind, _, method = claim.key.rpartition("_")
                    if kind.startswith("boundary"):
                        yield _case(claim, kind, DRAW, threat, method, number)

    def shuffled(self, threat: str) -> Iterator[Case]:
        """Judges whether the cue can be read at the last token of the base where its labels were shuffled."""
        pairs = probe_pairs(subject(threat), self.config, self.base, 3 * self.config.n_analysed)
        hinted = all({"hint", "relation"} <= set(pair.labels) for pair in pairs)
        task = answer_hinted(pairs) if hinted else wrapper_present(pairs, self.base.tokenizer)
        reading = {"site": "resid_post", "layers": "all", "batch_size": 64, "progress": False}
        states = task.states_at(self.base, ("last",), **reading)
        name, seeds = next(iter(ERASURE_PROBES.items()))
        for number in range(LABEL_DRAWS):
            asked = _shuffled(task, np.random.default_rng(number))
            found = probe({BASE: states}, asked, estimators=[name], seeds=seeds, progress=False)
            accuracy, low, high = found.curve(BASE, BASE, "last", name)
            layer = int(accuracy.argmax())
            floor = float(np.max(found.null("last", name)[1]))
            ends = float(low[layer]) - floor, float(high[layer]) - floor
            value = float(accuracy[layer]) - floor
            yield Case("cue", SHUFFLED, (threat, number), value, *ends, *ends, _above(value, *ends))


def _shuffled(task: Task, draw: np.random.Generator) -> Task:
    """The task with its prompts' labels dealt out anew; each takes its groups along, so that folds are as good."""
    order = draw.permutation(len(task.labels))

    def dealt(values: Sequence[str]) -> tuple[str, ...]:
        return tuple(values[at] for at in order)

    groups = {factor: dealt(values) for factor, values in task.groups.items()}
    return replace(task, labels=dealt(task.labels), groups=groups, known=dealt(task.stratum), parts=())


def _config(folder: Path) -> StudyConfig:
    settings = json.loads((folder / "config.json").read_text())
    return replicated_study(model=settings["model"], clean_born=settings["clean_born"])


def _case(claim: Claim, key: str, null: str, *case: str | int) -> Case:
    numbers = (claim.value, claim.ci_low, claim.ci_high, claim.prompts_low, claim.prompts_high)
    above = [number - claim.floor for number in numbers]
    return Case(key, null, case, *above, holds=claim.verdict == HOLDS)


def main(studies: Sequence[Path]) -> None:
    """Judges every study and threat, and writes how often each claim holds."""
    every = list(dict.fromkeys(_config(folder).clean_born for folder in studies))
    asked = set()
    found: list[Case] = []
    threats = replicated_study().threats
    with one_thread(), progress_bar(total=len(studies) * len(threats), desc="null studies", shown=True) as bar:
        for folder in studies:
            own = _config(folder).clean_born
            others = [] if own in asked else [twin for twin in every if twin != own]
            first = next(one for one in studies if one.parent == folder.parent)
            nine = Path("runs/null-seeds") / folder.parent.name / folder.name
            study = NullStudy(folder, others, nine if folder == first else None)
            asked.add(own)
            for threat in threats:
                found += study.cases(threat)
                bar.update()
    rows = []
    for key, null in dict.fromkeys((case.key, case.null) for case in found):
        cases = [case for case in found if (case.key, case.null) == (key, null)]
        pooled = defaultdict(list)
        for case in cases:
            pooled[case.case].append(case)
        replicated = [of for of in pooled.values() if len(of) >= SEVERAL]
        rows.append(
            {
                "claim": key,
                "null": null,
                "studies": len(cases),
                "holds in one study": f"{np.mean([case.holds for case in cases]):.3f}",
                "replications": len(replicated),
                "holds over studies": f"{np.mean(list(map(_holds_over_models, replicated))):.3f}" if replicated else "",
            }
        )
    pd.DataFrame(rows).to_csv(HERE / "null_claims.csv", index=False)


def _above(value: float, low: float, high: float) -> bool:
    return claim_verdict(value, low, high) == HOLDS


def _holds_over_models(cases: Sequence[Case]) -> bool:
    """Whether the claim holds by its number over the models of all studies."""
    numbers = np.array([(case.value, case.prompts_low, case.prompts_high) for case in cases])
    over = pooled_over_models(*numbers.T)
    return _above(over.value, over.low, over.high)


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
