"""A study: threats x methods x seeds with the retention-only control, in one folder, resumable cell by cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from ctlens import losses as loss_registry
from ctlens import threats as threat_registry
from ctlens.analysis import attention_diff, residual_shift
from ctlens.config import environment, to_dict
from ctlens.errors import CtlensError
from ctlens.evaluation import Evaluation, evaluate
from ctlens.files import atomic_file, atomic_folder, read_json, require_free, write_json
from ctlens.gallery import save_figures
from ctlens.intervals import difference, wilson
from ctlens.organism import load_organism
from ctlens.parameters import fingerprint
from ctlens.report import write_report
from ctlens.training import TrainConfig, Trainer
from ctlens.types import LensModel

CONTROL = "retention"
BASE = "none"
SPLIT = "heldout"
DOSES = (0.05, 0.1, 0.2, 0.4, 1.0)
ANALYSED_PAIRS = 64
NEUTRAL_PROMPTS = 128
RESULT_COLUMNS = (
    "trained_threat", "method", "seed", "step", "evaluated_threat", "split", "arm", "metric", "value", "n",
    "ci_low", "ci_high",
)  # fmt: skip


@dataclass(frozen=True)
class StudyConfig:
    """What a study runs; equal configs give equal studies.

    Attributes:
        threats: trained on, one at a time; each trained model is evaluated on all of them. None
            given means all there are.
        methods: names of losses, all when none are given; the retention-only control is always added.
        seeds: number of seeds, from 0.
        pairs: training pairs a threat.
        items: evaluation pairs a threat, from the held-out split.
        training: settings shared by every cell; its seed is replaced by the cell's.
    """

    threats: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    seeds: int = 1
    pairs: int = 256
    items: int = 96
    training: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        for name, registry in (("threats", threat_registry), ("methods", loss_registry)):
            values = tuple(getattr(self, name)) or tuple(registry.names())
            object.__setattr__(self, name, values)
            for value in values:
                registry.get(value)
            if len(set(values)) < len(values):
                raise CtlensError(f"{name} must name each once, not {', '.join(values)}.")
        for name in ("seeds", "pairs", "items"):
            if getattr(self, name) < 1:
                raise CtlensError(f"{name} must be at least 1, not {getattr(self, name)}.")

    def cells(self) -> list[Cell]:
        """Every training of the study, in the order they run."""
        methods = (CONTROL, *self.methods)
        return [Cell(t, m, s) for s in range(self.seeds) for t in self.threats for m in methods]


@dataclass(frozen=True)
class Cell:
    """One training of a study: a threat, a method and a seed."""

    threat: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """The name of the cell's folder."""
        return f"{self.threat}-{self.method}-seed{self.seed}"


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
        progress: show progress bars.

    Raises:
        CtlensError: `out` holds something else, or this study and `resume` is not set.
    """

    def __init__(self, config: StudyConfig, out: str | Path, *, resume: bool = False, progress: bool = True) -> None:
        self.config, self.folder, self.progress = config, Path(out), progress
        self.model = load_organism()
        self._claim(resume)
        self.threats = {name: threat_registry.get(name) for name in config.threats}

    def _claim(self, resume: bool) -> None:
        held = self.folder / "config.json"
        described = {**to_dict(self.config), "model": fingerprint(self.model), "ctlens": environment()["ctlens"]}
        if not held.is_file():
            require_free(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(held, described)
        elif read_json(held) != described:
            raise CtlensError(f"{self.folder} holds another study: name a new folder with --out.")
        elif not resume:
            raise CtlensError(f"{self.folder} holds this study: pass --resume to finish it, or name a new folder.")

    def __len__(self) -> int:
        return len(self.config.cells())

    def __iter__(self) -> Iterator[tuple[Cell, pd.DataFrame]]:
        """Yields every cell with its rows of the results; finished ones are read, missing ones are run."""
        base = self._base()
        for cell in tqdm(self.config.cells(), desc="study", disable=not self.progress):
            folder = self.folder / "runs" / cell.name
            if not folder.is_dir():
                with one_thread():
                    self._run(cell, folder)
            yield cell, self._compared(cell, base)

    def _base(self) -> Evaluation:
        path = self.folder / "base.csv"
        if not path.is_file():
            with one_thread():
                self._evaluate(self.config.threats, self.model).save(path)
        return Evaluation.load(path)

    def _evaluate(self, threats: Sequence[str], model: LensModel) -> Evaluation:
        return evaluate(model, threats, split=SPLIT, n=self.config.items, progress=self.progress)

    def _run(self, cell: Cell, folder: Path) -> None:
        threat = self.threats[cell.threat]
        pairs = threat.pairs(self.config.pairs, split="train", seed=cell.seed)
        losses = [] if cell.method == CONTROL else [loss_registry.get(cell.method)]
        config = replace(self.config.training, seed=cell.seed)
        retain = threat.neutral(NEUTRAL_PROMPTS, seed=cell.seed)
        trainer = Trainer(self.model, pairs, losses, config, retain=retain, progress=self.progress)
        tables = []
        marks = {max(1, round(share * config.steps)) for share in DOSES}
        for step in tqdm(trainer, desc=cell.name, disable=not self.progress, leave=False):
            if step.index in marks - {config.steps}:
                tables.append(_rows(cell, step.index, self._evaluate([cell.threat], trainer.model)))
        final = self._evaluate(self.config.threats, trainer.model)
        tables.append(_rows(cell, config.steps, final))
        probes = threat.pairs(ANALYSED_PAIRS, split=SPLIT)
        shift = residual_shift(self.model, trainer.model, probes, progress=False)
        attention = attention_diff(self.model, trainer.model, probes, progress=False)
        with atomic_folder(folder) as work:
            trainer.run.write(work)
            final.save(work / "outcomes.csv")
            pd.concat(tables).to_csv(work / "results.csv", index=False)
            shift.save(work / "residual.safetensors")
            attention.save(work / "attention.safetensors")

    def _compared(self, cell: Cell, base: Evaluation) -> pd.DataFrame:
        """The rows of a finished cell, with its bad rate against the base's and against the control's."""
        rows = pd.read_csv(self.folder / "runs" / cell.name / "results.csv", keep_default_na=False)
        control = self.folder / "runs" / Cell(cell.threat, CONTROL, cell.seed).name / "outcomes.csv"
        own = _bad_count(Evaluation.load(self.folder / "runs" / cell.name / "outcomes.csv"), cell.threat)
        before, held = _bad_count(base, cell.threat), _bad_count(Evaluation.load(control), cell.threat)
        step = int(rows.step.max())
        place = (cell.threat, cell.method, cell.seed, step, cell.threat, SPLIT, "wrapped")
        added = []
        if before[0]:
            rate, (low, high) = before[0] / before[1], wilson(*own)
            reduction = (1 - own[0] / own[1] / rate, own[1], 1 - high / rate, 1 - low / rate)
            added.append((*place, "bad_rate_reduction", *reduction))
        if cell.method != CONTROL:
            gap = own[0] / own[1] - held[0] / held[1]
            added.append((*place, "bad_rate_vs_retention", gap, own[1], *difference(*own, *held)))
        return pd.concat([rows, pd.DataFrame(added, columns=list(RESULT_COLUMNS))], ignore_index=True)

    def finish(self) -> StudyResult:
        """Writes `results.csv`, `environment.json`, the figures and `report.html`, and returns the results."""
        base = self._base()
        cells = [self._compared(cell, base) for cell in self.config.cells()]
        results = pd.concat([_rows(Cell("", BASE, 0), 0, base), *cells], ignore_index=True)
        with atomic_file(self.folder / "results.csv") as temporary:
            results.to_csv(temporary, index=False)
        write_json(self.folder / "environment.json", environment())
        save_figures(self.folder, results)
        write_report(self.folder)
        return StudyResult(self.folder, results)


def compare(
    threats: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: int = 1,
    *,
    training: TrainConfig | None = None,
    out: str | Path,
    resume: bool = False,
    progress: bool = True,
) -> StudyResult:
    """Runs a whole study: trains every cell, evaluates it on held-out pairs, looks inside, writes the folder.

    Args:
        threats, methods: what to run; all when none are given.
        seeds: number of seeds.
        training: settings shared by every cell.
        out: a new folder, or with `resume` the folder of the same study.
        resume: finish a study that was interrupted.
        progress: show progress bars.

    Raises:
        CtlensError: as `Study`.
    """
    config = StudyConfig(tuple(threats), tuple(methods), seeds, training=training or TrainConfig())
    study = Study(config, out, resume=resume, progress=progress)
    for _ in study:
        pass
    return study.finish()


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread inside the block.

    On models of the organism's size more threads bring nothing, and cost much beside other work;
    and sums come out the same whatever the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rows(cell: Cell, step: int, evaluation: Evaluation) -> pd.DataFrame:
    place = {"trained_threat": cell.threat, "method": cell.method, "seed": cell.seed, "step": step}
    return evaluation.to_dataframe().assign(**place).reindex(columns=list(RESULT_COLUMNS))


def _bad_count(evaluation: Evaluation, threat: str) -> tuple[int, int]:
    """Bad answers on wrapped prompts of a threat, and all of them."""
    wrapped = evaluation.outcomes.query("evaluated_threat == @threat and arm == 'wrapped'")
    return list(wrapped["verdict"]).count("bad"), len(wrapped)
