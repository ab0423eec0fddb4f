"""A study: threats x methods x seeds with the retention-only control, in one folder, resumable cell by cell."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from ctlens import threats as threat_registry
from ctlens.cells import BASE_CELL, CONTROL, HELD_OUT, RESULT_COLUMNS, SPLIT, Cell, StudyConfig, rows, run_cell
from ctlens.config import environment, to_dict
from ctlens.errors import CtlensError
from ctlens.evaluation import Evaluation
from ctlens.files import atomic_file, read_json, require_free, write_json
from ctlens.gallery import save_figures
from ctlens.intervals import difference, wilson
from ctlens.organism import load_organism
from ctlens.parameters import fingerprint
from ctlens.report import write_report
from ctlens.training import TrainConfig
from ctlens.workers import available, in_order


@dataclass(frozen=True)
class StudyResult:
    """A finished study.

    Attributes:
        folder: where it lies.
        results: one row per number, the columns of `results.csv`.
    """

    folder: Path
    results: pd.DataFrame

    def to_dataframe(self) -> pd.DataFrame:
        """The results."""
        return self.results


class Study:
    """A study in its folder; iterate over it to run the cells that are missing, then call `finish`.

    Args:
        config: what to run.
        out: the folder of the study.
        resume: go on with a study of the same config, base model and ctlens version in `out`.
        progress: show a progress bar.
        workers: how many cells run at a time, each in a process on one thread; by default as many
            as there are cores. The results do not depend on it.

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
        workers: int | None = None,
    ) -> None:
        self.config, self.folder, self.progress = config, Path(out), progress
        self.workers = available(workers)
        claim(self.folder, to_dict(config), resume)

    def __len__(self) -> int:
        return len(self.config.cells())

    def __iter__(self) -> Iterator[tuple[Cell, pd.DataFrame]]:
        """Yields every cell with its rows of the results; finished ones are read, missing ones are run."""
        cells = self.config.cells()
        missing = [cell for cell in (BASE_CELL, *cells) if not cell.place(self.folder).exists()]
        tasks = [(self.config, self.folder, cell) for cell in missing]
        try:
            with (
                closing(in_order(run_cell, tasks, self.workers)) as done,
                tqdm(cells, desc=self.folder.name, disable=not self.progress) as bar,
            ):
                if BASE_CELL in missing:
                    next(done)
                base = self._base()
                for cell in bar:
                    if cell in missing:
                        next(done)
                    yield cell, self._compared(cell, base)
        finally:
            self._sweep(missing)

    def _sweep(self, cells: Sequence[Cell]) -> None:
        """Removes what workers that were ended in the middle of writing have left."""
        for place in (cell.place(self.folder) for cell in cells):
            for left in place.parent.glob(f".{place.name}.*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _base(self) -> Evaluation:
        return Evaluation.load(BASE_CELL.place(self.folder))

    def _compared(self, cell: Cell, base: Evaluation) -> pd.DataFrame:
        """The rows of a finished cell, with its bad rates against the base's and against the control's."""
        found = pd.read_csv(cell.place(self.folder) / "results.csv", keep_default_na=False)
        own, control = (
            Evaluation.load(c.place(self.folder) / "outcomes.csv")
            for c in (cell, Cell(cell.threat, CONTROL, cell.seed))
        )
        place = (cell.threat, cell.method, cell.seed, self.config.training.steps, cell.threat)
        added = [(*place, *row) for row in _against(cell, own, base, control)]
        return pd.concat([found, pd.DataFrame(added, columns=list(RESULT_COLUMNS))], ignore_index=True)

    def finish(self) -> StudyResult:
        """Writes `results.csv`, `environment.json`, the figures and `report.html`, and returns the results."""
        base = self._base()
        cells = [self._compared(cell, base) for cell in self.config.cells()]
        results = pd.concat([rows(BASE_CELL, 0, base), *cells], ignore_index=True)
        with atomic_file(self.folder / "results.csv") as temporary:
            results.to_csv(temporary, index=False)
        write_json(self.folder / "environment.json", environment())
        save_figures(self.folder, results)
        write_report(self.folder)
        return StudyResult(self.folder, results)


def claim(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """Makes a folder for work with these settings, on the shipped organism and this version of ctlens.

    Args:
        folder: absent, empty, or claimed before.
        settings: what tells this work from another, ready for JSON.
        resume: whether it may have been claimed before.

    Raises:
        CtlensError: the folder holds something else, or this work and `resume` is not set.
    """
    held = folder / "config.json"
    described = {**settings, "model": fingerprint(load_organism()), "ctlens": environment()["ctlens"]}
    if not held.is_file():
        require_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(held, described)
    elif read_json(held) != described:
        raise CtlensError(f"{folder} holds another study: name a new folder with --out.")
    elif not resume:
        raise CtlensError(f"{folder} holds this study: pass --resume to finish it, or name a new folder.")


def compare(
    threats: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: int = 1,
    *,
    training: TrainConfig | None = None,
    out: str | Path,
    resume: bool = False,
    progress: bool = True,
    workers: int | None = None,
) -> StudyResult:
    """Runs a whole study: trains every cell, evaluates it on held-out pairs, looks inside, writes the folder.

    Args:
        threats, methods: what to run; all when none are given.
        seeds: number of seeds.
        training: settings shared by every cell.
        out: a new folder, or with `resume` the folder of the same study.
        resume: finish a study that was interrupted.
        progress: show a progress bar.
        workers: how many cells run at a time; by default as many as there are cores.

    Raises:
        CtlensError: as `Study`.
    """
    config = StudyConfig(tuple(threats), tuple(methods), seeds, training=training or TrainConfig())
    study = Study(config, out, resume=resume, progress=progress, workers=workers)
    for _ in study:
        pass
    return study.finish()


def _against(
    cell: Cell, own: Evaluation, base: Evaluation, control: Evaluation
) -> Iterator[tuple[str, str, str, float, int, float, float]]:
    """(split, arm, metric, value, n, low, high) of each comparison of a trained model on its own threat."""
    for split in HELD_OUT:
        (bad, n), before, held = (_bad_count(e, cell.threat, split) for e in (own, base, control))
        if before[0]:
            rate, (low, high) = before[0] / before[1], wilson(bad, n)
            yield split, "wrapped", "bad_rate_reduction", 1 - bad / n / rate, n, 1 - high / rate, 1 - low / rate
        if cell.method != CONTROL:
            gap, interval = bad / n - held[0] / held[1], difference(bad, n, *held)
            yield split, "wrapped", "bad_rate_vs_retention", gap, n, *interval
    if metric := threat_registry.get(cell.threat).ratio:
        numbers = base.to_dataframe().query(
            "metric == @metric and evaluated_threat == @cell.threat and split == @SPLIT"
        )
        if any(numbers["value"]):
            ratio, low, high = own.ratio(base, metric, cell.threat, SPLIT)
            yield SPLIT, "wrapped", f"{metric}_ratio", ratio, int(numbers["n"].iloc[0]), low, high


def _bad_count(evaluation: Evaluation, threat: str, split: str) -> tuple[int, int]:
    """Bad answers on wrapped prompts of a threat, and all of them."""
    wrapped = evaluation.outcomes.query("evaluated_threat == @threat and split == @split and arm == 'wrapped'")
    return list(wrapped["verdict"]).count("bad"), len(wrapped)
