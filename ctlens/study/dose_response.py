"""How much training a repair takes: one study per number of training pairs, in one folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ctlens import plots
from ctlens.core.config import to_dict
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.files import alone, atomic_file
from ctlens.core.labels import BASE
from ctlens.core.public import public
from ctlens.core.shown import Shown
from ctlens.plots import Figure
from ctlens.study.config import SHARED_TRAINING, Cell, StudyConfig
from ctlens.study.figures import dose_figure, prompts_in_words
from ctlens.study.runner import Study, claim_folder
from ctlens.study.workers import Pool
from ctlens.training import TrainConfig

DOSES = (8, 32, 128, 512)
"""The default numbers of training pairs: equal steps on a logarithmic axis, around the 256 of a study."""
AXES = ("pairs", "steps")
DOSE_COLUMNS = (
    "trained_threat",
    "condition",
    "seed",
    "n_pairs",
    "step",
    "split",
    "prompt_side",
    "metric",
    "value",
    "n_prompts",
    "n_effective",
    "ci_low",
    "ci_high",
)


@dataclass(frozen=True)
class DoseConfig:
    """The settings of a dose-response; equal configs give equal results.

    Attributes:
        threat: trained and evaluated on.
        methods: names of losses, `ctlens.study.conditions.DEFAULT_METHODS` when none are given; the retention-only
            control is always added.
        n_pairs: the doses, numbers of training pairs, each once; sorted here.
        seeds: number of seeds, from 0.
        n_prompts: evaluation pairs per split.
        training: settings shared by every training.
    """

    threat: str
    methods: tuple[str, ...] = ()
    n_pairs: tuple[int, ...] = DOSES
    seeds: int = 1
    n_prompts: int = 96
    training: TrainConfig = SHARED_TRAINING

    def __post_init__(self) -> None:
        if not self.n_pairs or len(set(self.n_pairs)) < len(self.n_pairs):
            raise CtlensError("n_pairs must name at least one number of pairs, and each once.")
        object.__setattr__(self, "n_pairs", tuple(sorted(self.n_pairs)))
        self.studies()

    def studies(self) -> dict[int, StudyConfig]:
        """The study of each number of pairs."""
        return {
            n_pairs: StudyConfig(
                threats=(self.threat,),
                methods=self.methods,
                seeds=self.seeds,
                n_pairs=n_pairs,
                n_prompts=self.n_prompts,
                training=self.training,
                analysed=(),
            )
            for n_pairs in self.n_pairs
        }


@dataclass(frozen=True)
class DoseResult(Shown):
    """The result of a dose-response: the rows of its studies.

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
        """Draws the bad rate on held-out wrapped prompts, a line per condition, seeds pooled.

        Args:
            axis: `"pairs"`: at the last step, against the number of training pairs; `"steps"`: with
                the most pairs, against the training steps.

        Raises:
            CtlensError: the axis is neither.
        """
        if axis not in AXES:
            raise unknown("axis", axis, AXES)
        most = self.results["n_pairs"].max()
        last = self.results["step"].max()
        prompts = prompts_in_words(int(self.results["n_prompts"].to_numpy().max()))
        if axis == "pairs":
            figure = dose_figure(self.results.query("step == @last"), "n_pairs", f"{prompts}; after {last} steps")
        else:
            rows = self.results.query("n_pairs in (0, @most)")
            figure = dose_figure(rows, "step", f"{prompts}; {most} training pairs")
        return plots.placed(figure, self.results["trained_threat"].iloc[0])


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
        self.folder = Path(out)
        pool = Pool(workers)
        claim_folder(self.folder, to_dict(config), resume)
        self.studies = {
            n_pairs: Study(study, self.folder / f"pairs-{n_pairs}", resume=True, progress=progress, pool=pool)
            for n_pairs, study in config.studies().items()
        }

    def __iter__(self) -> Iterator[tuple[int, Cell, pd.DataFrame]]:
        """Yields every number of pairs and cell with its rows of the results."""
        with alone(self.folder):
            for n_pairs, study in self.studies.items():
                for cell, rows in study:
                    yield n_pairs, cell, rows

    def finish(self) -> DoseResult:
        """Finishes every study, writes `doses.csv` and the figures, and returns the results."""
        with alone(self.folder):
            return self._finish()

    def _finish(self) -> DoseResult:
        tables = [study.finish().results.assign(n_pairs=n_pairs) for n_pairs, study in self.studies.items()]
        base = tables[0].loc[tables[0]["condition"] == BASE]
        base = base.assign(n_pairs=0, trained_threat=base["evaluated_threat"])
        trained = [table.loc[table["condition"] != BASE] for table in tables]
        results = pd.concat([base, *trained], ignore_index=True).reindex(columns=list(DOSE_COLUMNS))
        with atomic_file(self.folder / "doses.csv") as temporary:
            results.to_csv(temporary, index=False)
        result = DoseResult(self.folder, results)
        plots.write_figures({self.folder / "figures" / axis: result.figure(axis) for axis in AXES})
        return result


@public
def dose_response(
    threat: str,
    methods: Sequence[str] = (),
    n_pairs: Sequence[int] = DOSES,
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
        n_pairs: numbers of training pairs, at least 1 each.
        seeds: number of seeds.
        training: settings shared by every training.
        out: a new folder, or with `resume` the folder of the same dose-response.
        resume: finish one that was interrupted.
        progress: show progress bars.
        workers: how many trainings run at a time; by default as many as there are cores.

    Raises:
        CtlensError: as `DoseStudy`.
    """
    config = DoseConfig(threat, tuple(methods), tuple(n_pairs), seeds, training=training or SHARED_TRAINING)
    study = DoseStudy(config, out, resume=resume, progress=progress, workers=workers)
    for _ in study:
        pass
    return study.finish()
