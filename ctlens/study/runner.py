"""A study: threats x methods x seeds with their controls, in one folder, resumable cell by cell.

The folder holds:

- `report.html`, all of it on one page; it opens with a sentence per question.
- `results.csv`, one row per number, see `ctlens.study.results.RESULT_COLUMNS`.
- `claims.csv`, one row per claim, threat and setting, see `ctlens.study.claims.claim.Claim`.
- `transfers.csv`, what each method changes on every threat, see `ctlens.study.claims.behaviour.write_transfers`.
- `transcripts.jsonl`, five prompts with what every model answered, see `ctlens.study.transcripts.Transcript`.
- `base.csv`, every answer of the model before training, and `clean-born.csv`, those of its clean-born twin, where the
  study has one; both as `ctlens.evaluation.Evaluation` saves them.
- `config.json` and `environment.json`: the settings with what tells the model, its pairs and the version of ctlens,
  and what it ran on.
- `digests.csv`, a digest of each of these files: one that was damaged since is refused.
- `figures/`: each figure as `.html`, as `.json`, and its numbers as `.data.csv`; with the extra `export` also as
  `.png` and `.svg`.
- `screened/`, for natural threats: which questions the model answers right without an attack.
- `runs/`, a folder per training, `<threat>-<condition>-seed<n>`: a run (`ctlens.load_run`) with its own
  `results.csv`, its answers (`outcomes.csv`), two analyses (`residual.safetensors`, `attention.safetensors`) and in
  `matched/` the model at the step of matched effect. The conditions that are made from trainings lie beside them.
- `analyses/<threat>/`, a folder per analysis, with `-matched` in its name at matched effect: a `.safetensors` file
  per result, and in `refused.json` why there is none.
- `logs/`, a file per cell and analysis: when and where it began, and how it ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from ctlens.core.config import environment, first_difference, to_dict
from ctlens.core.digests import record_digests, require_undamaged
from ctlens.core.errors import CtlensError
from ctlens.core.files import alone, atomic_file, digest, require_free, sweep, sweep_folder, write_json, writing
from ctlens.core.progress import progress_bar
from ctlens.core.public import public
from ctlens.core.reading import read_json
from ctlens.core.shown import Shown
from ctlens.core.threads import one_thread
from ctlens.evaluation import Evaluation
from ctlens.evaluation.numbers import rate_with_interval
from ctlens.evaluation.result import OWN_PAIRS
from ctlens.models.parameters import fingerprint, same_fingerprint
from ctlens.study.analyses import analyses_of, run_analyses
from ctlens.study.cells import OUTCOMES_FILE, CellTraining, result_rows, run_cell
from ctlens.study.claims import Claim, judge_claims, write_claims
from ctlens.study.claims.behaviour import TRANSFERS_FILE, write_transfers
from ctlens.study.conditions import RETENTION
from ctlens.study.config import BASE_CELL, TWIN_CELL, Cell, StudyConfig, size_for, study_of_size
from ctlens.study.figures import save_study_figures
from ctlens.study.report import write_report
from ctlens.study.results import RESULT_COLUMNS, SPLIT, read_results
from ctlens.study.source import start_model, subject
from ctlens.study.transcripts import TRANSCRIPTS_FILE, write_transcripts
from ctlens.study.workers import Pool, run_in_order

# The cost model of `seconds`. Its constants were set once, so that the estimate met the time of the matrix on two
# cores of the machine on which the study was first made; neither was measured again since.
_STEPS_TIMED = 5
_TRAINING_COST = 2.2
"""The time of a training over that of its steps alone: it is evaluated on the way, and workers slow each other."""
_ANALYSIS_COST = 1.0
"""The time of an analysis over that of a training."""


@dataclass(frozen=True)
class StudyResult(Shown):
    """A finished study.

    Attributes:
        folder: where it lies.
        results: one row per number, the columns of `results.csv`.
        claims: the verdict of the results on each claim.
    """

    folder: Path
    results: pd.DataFrame
    claims: tuple[Claim, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """The results."""
        return self.results


class Study:
    """A study in its folder; iterate over it to run the cells that are missing, then call `finish`.

    Args:
        config: what to run.
        out: the folder of the study.
        resume: go on with a study of the same config, base model and ctlens version in `out`.
        progress: show progress bars.
        pool: where cells run; by default in as many processes as there are cores, each on one
            thread. The results do not depend on it.

    Raises:
        CtlensError: `out` holds something else, or this study and `resume` is not set.
    """

    def __init__(
        self,
        config: StudyConfig,
        out: str | Path,
        *,
        resume: bool = False,
        progress: bool = True,
        pool: Pool | None = None,
    ) -> None:
        self.config = config
        self.folder = Path(out)
        self.progress = progress
        self.pool = pool or Pool()
        self._rows: dict[Cell, pd.DataFrame] = {}
        self._untrained: dict[Cell, Evaluation] = {}
        if config.file:
            subject(OWN_PAIRS, config.file).pairs(1)  # refuses a file that is none before the folder is made
        beside = {"pairs_digest": digest(config.file)} if config.file else {}
        if config.clean_born:  # as with the pairs, a folder that is no model is refused first
            beside["clean_born_weights"] = fingerprint(start_model(config.clean_born))
        claim_folder(self.folder, {**to_dict(config), **beside}, resume, config.model)

    def __len__(self) -> int:
        return len(self.config.cells()) + len(self.config.derived())

    def __iter__(self) -> Iterator[tuple[Cell, pd.DataFrame]]:
        """Yields every cell with its rows of the results; finished ones are read, missing ones are run."""
        with (
            _writing_alone(self.folder),
            progress_bar(total=len(self), desc=self.folder.name, shown=self.progress) as bar,
        ):
            for wave in self._waves():
                for cell in self._run(wave):
                    if cell.trained:
                        yield cell, self._compared(cell)
                        bar.update()

    def _waves(self) -> list[list[Cell]]:
        """The cells in parts that need only earlier parts.

        Natural threats are screened before all else, and the base answers before trainings are compared with it.
        """
        config = self.config
        return [config.screenings(), [*config.answering, *config.cells()], config.derived()]

    def _run(self, cells: Sequence[Cell]) -> Iterator[Cell]:
        """Runs the missing cells and yields every cell once it is done."""
        missing = [cell for cell in cells if not cell.path(self.folder).exists()]
        tasks = [(self.config, self.folder, cell) for cell in missing]
        try:
            with closing(run_in_order(run_cell, tasks, self.pool)) as done:
                for cell in cells:
                    if cell in missing:
                        next(done)
                        if not cell.trained:  # a file in the study's folder, which workers share
                            record_digests(self.folder, [cell.path(self.folder)])
                    yield cell
        finally:
            sweep(cell.path(self.folder) for cell in missing)

    def _answers(self, cell: Cell) -> Evaluation:
        """What a model answered that is not trained, read once."""
        if cell not in self._untrained:
            path = cell.path(self.folder)
            require_undamaged(self.folder, path.name)
            self._untrained[cell] = Evaluation.load(path)
        return self._untrained[cell]

    def _compared(self, cell: Cell) -> pd.DataFrame:
        """The rows of a finished cell, with its bad rates against the base's and against the control's, found once."""
        if cell not in self._rows:
            self._rows[cell] = self._read(cell)
        return self._rows[cell]

    def _read(self, cell: Cell) -> pd.DataFrame:
        folder = cell.path(self.folder)
        require_undamaged(folder, remove=folder)
        found = read_results(folder / "results.csv")
        if not (folder / OUTCOMES_FILE).exists():
            return found
        own = Evaluation.load(folder / OUTCOMES_FILE)
        control = Evaluation.load(replace(cell, condition=RETENTION).path(self.folder) / OUTCOMES_FILE)
        step = max(found["step"].tolist())
        ratio = subject(cell.threat, self.config.file, self.folder).ratio
        twin = self._answers(TWIN_CELL) if self.config.clean_born else None
        labels = (cell.threat, cell.condition, cell.seed, step)
        added = [(*labels, *row) for row in _comparisons(cell, own, self._answers(BASE_CELL), control, twin, ratio)]
        return pd.concat([found, pd.DataFrame(added, columns=list(RESULT_COLUMNS))], ignore_index=True)

    def finish(self) -> StudyResult:
        """Runs the analyses, writes results, claims, figures and the report, and returns them."""
        with _writing_alone(self.folder):
            return self._finish()

    def _finish(self) -> StudyResult:
        every = [*self.config.cells(), *self.config.derived()]
        before = [result_rows(cell, 0, self._answers(cell)) for cell in self.config.answering]
        results = pd.concat([*before, *(self._compared(cell) for cell in every)], ignore_index=True)
        with atomic_file(self.folder / "results.csv") as temporary:
            results.to_csv(temporary, index=False)
        write_json(self.folder / "environment.json", environment())
        run_analyses(self.config, self.folder, self.pool, progress=self.progress)
        claims = judge_claims(self.config, self.folder, results)
        write_claims(claims, self.folder / "claims.csv")
        write_transfers(self.config, self.folder, results)
        write_transcripts(self.config, self.folder)
        drawn = save_study_figures(self.config, self.folder, results, self.pool)
        self._record([path for path in drawn if path.suffix in (".json", ".csv")])
        write_report(self.folder)
        return StudyResult(self.folder, results, tuple(claims))

    def _record(self, figures: Sequence[Path]) -> None:
        """Writes down the digests of what the report shows and a resume reads, once all of it is there."""
        names = ("config.json", "environment.json", "results.csv", "claims.csv", TRANSFERS_FILE, TRANSCRIPTS_FILE)
        answers = [cell.path(self.folder) for cell in self.config.answering]
        record_digests(self.folder, [*(self.folder / name for name in names), *answers, *figures])


def claim_folder(folder: Path, settings: dict[str, Any], resume: bool, model: str = "") -> None:
    """Makes a folder for work with these settings, on one model and this version of ctlens, or finds that work there.

    Args:
        folder: absent, empty, or claimed before.
        settings: what tells this work from another, ready for JSON.
        resume: whether it may have been claimed before.
        model: the folder of the model; the shipped organism if empty.

    Raises:
        CtlensError: the folder holds something else, work of another version of ctlens, or this work and `resume`
            is not set; or another process writes to it.
    """
    with alone(folder):
        _claim_folder(folder, settings, resume, model)


def _claim_folder(folder: Path, settings: dict[str, Any], resume: bool, model: str) -> None:
    held = folder / "config.json"
    if resume and folder.is_dir():
        sweep_folder(folder)
    described = {**settings, "weights": fingerprint(start_model(model)), "ctlens": environment()["ctlens"]}
    if not held.is_file():
        require_free(folder)
        write_json(held, described)
        return
    found = read_json(held)
    if "weights" not in found:
        raise CtlensError(f"{folder} holds something else than a study: name a new folder with --out.")
    if found.get("ctlens", described["ctlens"]) != described["ctlens"]:
        raise CtlensError(
            f"{folder} holds a study of ctlens {found['ctlens']}, and this is {described['ctlens']}: "
            "finish it with that version, or name a new folder with --out."
        )
    if same_fingerprint(found.get("weights"), described["weights"]):
        found = {**found, "weights": described["weights"]}
    if other := first_difference(found, described):
        raise CtlensError(f"{folder} holds another study ({other}): name a new folder with --out.")
    if not resume:
        raise CtlensError(f"{folder} holds this study: pass --resume to finish it, or name a new folder.")


def seconds(config: StudyConfig, pool: Pool) -> float:
    """Estimates how many seconds a study takes, from a few steps of one of its trainings here and now."""
    cell = next(cell for cell in config.cells() if cell.condition != RETENTION)
    timed = replace(config, training=replace(config.training, steps=_STEPS_TIMED + 1))
    with one_thread():
        trainer = CellTraining(timed, Path(), cell, subject(cell.threat, config.file)).trainer()
        next(trainer)  # the reference answers first
        began = time.perf_counter()
        for _ in trainer:
            pass
    step = (time.perf_counter() - began) / _STEPS_TIMED
    training = _TRAINING_COST * step * config.training.steps
    analyses = _ANALYSIS_COST * len(analyses_of(config))
    return training * (len(config.cells()) + analyses) / pool.workers


@public
def compare(
    threats: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: int | None = None,
    *,
    size: str = "",
    out: str | Path,
    resume: bool = False,
    progress: bool = True,
    workers: int | None = None,
    **settings: Any,
) -> StudyResult:
    """Runs a whole study: trains every cell, evaluates it on held-out pairs, analyses the models, writes the folder.

    Args:
        threats, methods: what to run; those of the size when none are given.
        seeds: number of seeds; by default 1, or 3 in a full study.
        size: `"first"`, a newcomer's two threats with their controls; `"matrix"`, every threat, with the crossed
            conditions and a second seed; `"full"`, three seeds and all of it on every threat; `"replicated"`, two
            threats with three seeds, one of several such studies that `ct.replicate` pools; `"natural"`, a real model,
            few pairs and three seeds. By default natural for natural threats, and first for others.
        out: a new folder, or with `resume` the folder of the same study.
        resume: finish a study that was interrupted.
        progress: show progress bars.
        workers: how many cells run at a time; by default as many as there are cores.
        settings: any other of `StudyConfig`.

    Raises:
        CtlensError: as `StudyConfig` and `Study`.
    """
    chosen = settings if seeds is None else {**settings, "seeds": seeds}
    config = study_of_size(size or size_for(threats), threats=tuple(threats), methods=tuple(methods), **chosen)
    study = Study(config, out, resume=resume, progress=progress, pool=Pool(workers))
    for _ in study:
        pass
    return study.finish()


@contextmanager
def _writing_alone(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a study's folder; if it vanishes inside the block, that is one sentence."""
    with alone(folder), writing(folder):
        yield


class _Comparison(NamedTuple):
    """A number of a trained model against another model: the last columns of a row of the results."""

    evaluated_threat: str
    split: str
    prompt_side: str
    metric: str
    value: float
    n_prompts: int
    n_effective: float
    ci_low: float
    ci_high: float


def _comparisons(
    cell: Cell, own: Evaluation, base: Evaluation, control: Evaluation, twin: Evaluation | None, ratio: str
) -> Iterator[_Comparison]:
    """Compares a trained model with retention alone on every threat, and on its own with the base and the twin.

    Args:
        cell: of the trained model.
        own, base, control: the evaluations of the three.
        twin: that of the clean-born twin, if there is one.
        ratio: a metric whose ratio to the base's is wanted; empty for none.
    """
    asked = own.outcomes[["evaluated_threat", "split"]].drop_duplicates().itertuples(index=False)
    for threat, split in asked:
        wrapped = own.answers(threat, split)
        bad, n_prompts, n_effective, low, high = rate_with_interval(wrapped, "bad_rate")
        before, *_ = rate_with_interval(base.answers(threat, split), "bad_rate")
        if before and threat == cell.threat:
            reduction = (1 - bad / before, n_prompts, n_effective, 1 - high / before, 1 - low / before)
            yield _Comparison(threat, split, "wrapped", "bad_rate_reduction", *reduction)
        if cell.condition != RETENTION:
            gap, *ends = own.difference(control, threat, split)
            yield _Comparison(threat, split, "wrapped", "bad_rate_vs_retention", gap, n_prompts, float("nan"), *ends)
        if twin and threat == cell.threat and before != rate_with_interval(twin.answers(threat, split), "bad_rate")[0]:
            share, *ends = own.share_repaired(base, twin, threat, split)
            yield _Comparison(threat, split, "wrapped", "share_repaired", share, n_prompts, float("nan"), *ends)
    if ratio:
        numbers = base.to_dataframe().query("metric == @ratio and evaluated_threat == @cell.threat and split == @SPLIT")
        if any(numbers["value"]):
            value, low, high = own.ratio(base, ratio, cell.threat, SPLIT)
            n_prompts = int(numbers["n_prompts"].iloc[0])
            yield _Comparison(
                cell.threat, SPLIT, "wrapped", f"{ratio}_ratio", value, n_prompts, float("nan"), low, high
            )
