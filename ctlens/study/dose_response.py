"""How much training a repair takes: one study per number of training pairs, in one folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ctlens import plots
from ctlens.core.config import to_dict
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.files import atomic_file
from ctlens.plots import Figure
from ctlens.study.config import TRAINING, Cell, StudyConfig
from ctlens.study.figures import dose_figure
from ctlens.study.runner import Study, claim
from ctlens.study.workers import Pool
from ctlens.training import TrainConfig

PAIRS = (8, 32, 128, 512)
AXES = ("pairs", "steps")
COLUMNS = (
    "trained_threat", "method", "seed", "pairs", "step", "split", "prompt_side", "metric", "value", "n",
    "ci_low", "ci_high",
)  # fmt: skip


@dataclass(frozen=True)
class DoseConfig:
    """What a dose-response runs; equal configs give equal results.

    Attributes:
        threat: trained and evaluated on.
        methods: names of losses, `ctlens.study.conditions.METHODS` when none are given; the retention-only control is
            always added.
        pairs: the doses, numbers of training pairs, each once; sorted here.
        seeds: number of seeds, from 0.
        items: evaluation pairs a split.
        training: settings shared by every training.
    """

    threat: str
    methods: tuple[str, ...] = ()
    pairs: tuple[int, ...] = PAIRS
    seeds: int = 1
    items: int = 96
    training: TrainConfig = TRAINING

    def __post_init__(self) -> None:
        if not self.pairs or len(set(self.pairs)) < len(self.pairs):
            raise CtlensError("pairs must name at least one number of pairs, and each once.")
        object.__setattr__(self, "pairs", tuple(sorted(self.pairs)))
        self.studies()

    def studies(self) -> dict[int, StudyConfig]:
        """By number of pairs, the study of it."""
        return {
            pairs: StudyConfig(
                (self.threat,), self.methods, self.seeds, pairs, self.items, self.training, looked_into=()
            )
            for pairs in self.pairs
        }


@dataclass(frozen=True)
class DoseResult:
    """A finished dose-response.

    Attributes:
        folder: where it lies.
        results: one row per number, the columns of `doses.csv`; the base model has 0 pairs and 0 steps.
    """

    folder: Path
    results: pd.DataFrame

    def to_dataframe(self) -> pd.DataFrame:
        """The results."""
        return self.results

    def figure(self, axis: str = "pairs") -> Figure:
        """The bad rate on held-out wrapped prompts, a line a method, seeds pooled.

        Args:
            axis: `"pairs"`: at the last step, against the number of training pairs; `"steps"`: with
                the most pairs, against the training steps.

        Raises:
            CtlensError: the axis is neither.
        """
        if axis not in AXES:
            raise unknown("axis", axis, AXES)
        most, last = self.results["pairs"].max(), self.results["step"].max()
        where = f"{self.results['trained_threat'].iloc[0]}, wrappers and items held out"
        if axis == "pairs":
            return dose_figure(self.results.query("step == @last"), "pairs", f"{where}, after {last} steps")
        return dose_figure(self.results.query("pairs in (0, @most)"), "step", f"{where}, {most} training pairs")


class DoseStudy:
    """A dose-response in its folder; iterate over it to run the cells that are missing, then call `finish`.

    Each number of pairs is a `Study` of its own in `pairs-N`, with its figures and report.

    Args:
        config: what to run.
        out: the folder of the dose-response.
        resume: go on with one of the same config, base model and ctlens version in `out`.
        progress: show progress bars.
        workers: how many cells run at a time; by default as many as there are cores.

    Raises:
        CtlensError: `out` holds something else, or this dose-response and `resume` is not set.
    """

    def __init__(
        self,
        config: DoseConfig,
        out: str | Path,
        *,
        resume: bool = False,
        progress: bool = True,
        workers: int | None = None,
    ) -> None:
        self.folder, pool = Path(out), Pool(workers)
        claim(self.folder, to_dict(config), resume)
        self.studies = {
            pairs: Study(study, self.folder / f"pairs-{pairs}", resume=True, progress=progress, pool=pool)
            for pairs, study in config.studies().items()
        }

    def __iter__(self) -> Iterator[tuple[int, Cell, pd.DataFrame]]:
        """Yields every number of pairs and cell with its rows of the results."""
        for pairs, study in self.studies.items():
            for cell, rows in study:
                yield pairs, cell, rows

    def finish(self) -> DoseResult:
        """Finishes every study, writes `doses.csv` and the figures, and returns the results."""
        tables = [study.finish().results.assign(pairs=pairs) for pairs, study in self.studies.items()]
        base = tables[0].query("method == @BASE").assign(pairs=0, trained_threat=lambda rows: rows["evaluated_threat"])
        trained = [table.query("method != @BASE") for table in tables]
        results = pd.concat([base, *trained], ignore_index=True).reindex(columns=list(COLUMNS))
        with atomic_file(self.folder / "doses.csv") as temporary:
            results.to_csv(temporary, index=False)
        result = DoseResult(self.folder, results)
        plots.save_figures({self.folder / "figures" / axis: result.figure(axis) for axis in AXES})
        return result


def dose_response(
    threat: str,
    methods: Sequence[str] = (),
    pairs: Sequence[int] = PAIRS,
    seeds: int = 1,
    *,
    training: TrainConfig | None = None,
    out: str | Path,
    resume: bool = False,
    progress: bool = True,
    workers: int | None = None,
) -> DoseResult:
    """Trains on more and more pairs of one threat and evaluates on the way: how much does a repair take?

    Args:
        threat: trained and evaluated on.
        methods: names of losses; all when none are given.
        pairs: numbers of training pairs, at least 1 each.
        seeds: number of seeds.
        training: settings shared by every training.
        out: a new folder, or with `resume` the folder of the same dose-response.
        resume: finish one that was interrupted.
        progress: show progress bars.
        workers: how many trainings run at a time; by default as many as there are cores.

    Raises:
        CtlensError: as `DoseStudy`.
    """
    config = DoseConfig(threat, tuple(methods), tuple(pairs), seeds, training=training or TRAINING)
    study = DoseStudy(config, out, resume=resume, progress=progress, workers=workers)
    for _ in study:
        pass
    return study.finish()
