"""What a study runs: its settings, its cells, and one cell from training to its folder, in whatever process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pandas as pd
import torch

from ctlens import losses as loss_registry
from ctlens import threats as threat_registry
from ctlens.analysis import attention_diff, residual_shift
from ctlens.errors import CtlensError
from ctlens.evaluation import Evaluation, evaluate
from ctlens.files import atomic_folder
from ctlens.organism import load_organism
from ctlens.tables import SPLIT
from ctlens.training import TrainConfig, Trainer
from ctlens.types import LensModel
from ctlens.world import SPLITS

CONTROL = "retention"
BASE = "none"
METHODS = ("act", "mlpct", "attct", "bct")
HELD_OUT = tuple(split for split in SPLITS if split != "train")
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
        methods: names of losses, `METHODS` when none are given; the retention-only control is always added.
        seeds: number of seeds, from 0.
        pairs: training pairs a threat.
        items: evaluation pairs a threat and split.
        training: settings shared by every cell, whatever its method: window (`"shared"` unless it names
            another), trainable parameters, steps, order of the pairs, retention, calibration; the seed
            is replaced by the cell's.
    """

    threats: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    seeds: int = 1
    pairs: int = 256
    items: int = 96
    training: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        defaults = {"threats": (threat_registry, threat_registry.names()), "methods": (loss_registry, METHODS)}
        for name, (registry, default) in defaults.items():
            values = tuple(getattr(self, name)) or tuple(default)
            object.__setattr__(self, name, values)
            for value in values:
                registry.get(value)
            if len(set(values)) < len(values):
                raise CtlensError(f"{name} must name each once, not {', '.join(values)}.")
        if self.training.window is None:
            object.__setattr__(self, "training", replace(self.training, window="shared"))
        for name in ("seeds", "pairs", "items"):
            if getattr(self, name) < 1:
                raise CtlensError(f"{name} must be at least 1, not {getattr(self, name)}.")

    def cells(self) -> list[Cell]:
        """Every training of the study, in their order."""
        methods = (CONTROL, *self.methods)
        return [Cell(t, m, s) for s in range(self.seeds) for t in self.threats for m in methods]


@dataclass(frozen=True)
class Cell:
    """One training of a study: a threat, a method and a seed; or the base model, which has no threat."""

    threat: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """The name of the cell's folder."""
        return f"{self.threat}-{self.method}-seed{self.seed}"

    def place(self, study: Path) -> Path:
        """What there is in the folder of a study once the cell is done: a folder, or the file of the base's answers."""
        return study / "runs" / self.name if self.threat else study / "base.csv"


BASE_CELL = Cell("", BASE, 0)


def run_cell(config: StudyConfig, study: Path, cell: Cell) -> None:
    """Runs one cell and writes it into the folder of the study, whole or not at all.

    Args:
        config: of the study.
        study: its folder.
        cell: one that is not there yet.

    Raises:
        CtlensError: as `Trainer` and `evaluate`.
    """
    with one_thread():
        if cell == BASE_CELL:
            _evaluate(config, base_model(), config.threats, HELD_OUT).save(cell.place(study))
        else:
            _train(config, study, cell)


@cache
def base_model() -> LensModel:
    """The model that every cell starts from, loaded once a process and never changed."""
    return load_organism()


def _train(config: StudyConfig, study: Path, cell: Cell) -> None:
    threat = threat_registry.get(cell.threat)
    losses = [] if cell.method == CONTROL else [loss_registry.get(cell.method)]
    training = replace(config.training, seed=cell.seed)
    pairs = threat.pairs(config.pairs, split="train", seed=cell.seed)
    retain = threat.neutral(NEUTRAL_PROMPTS, seed=cell.seed)
    trainer = Trainer(base_model(), pairs, losses, training, retain=retain)
    tables = []
    marks = {max(1, round(share * training.steps)) for share in DOSES} - {training.steps}
    for step in trainer:
        if step.index in marks:
            tables.append(rows(cell, step.index, _evaluate(config, trainer.model, [cell.threat], [SPLIT])))
    final = _final(config, cell, trainer.model)
    probes = threat.pairs(ANALYSED_PAIRS, split=SPLIT)
    shift = residual_shift(base_model(), trainer.model, probes, progress=False)
    attention = attention_diff(base_model(), trainer.model, probes, progress=False)
    with atomic_folder(cell.place(study)) as work:
        trainer.run.write(work)
        final.save(work / "outcomes.csv")
        pd.concat([*tables, rows(cell, training.steps, final)]).to_csv(work / "results.csv", index=False)
        shift.save(work / "residual.safetensors")
        attention.save(work / "attention.safetensors")


def _final(config: StudyConfig, cell: Cell, model: LensModel) -> Evaluation:
    """Every threat on the headline split, and the cell's own on the other ones too."""
    others = [split for split in HELD_OUT if split != SPLIT]
    own, all_threats = (
        _evaluate(config, model, threats, splits)
        for threats, splits in (([cell.threat], others), (config.threats, [SPLIT]))
    )
    return Evaluation(pd.concat([own.outcomes, all_threats.outcomes], ignore_index=True))


def _evaluate(config: StudyConfig, model: LensModel, threats: Sequence[str], splits: Sequence[str]) -> Evaluation:
    return evaluate(model, threats, split=splits, n=config.items, progress=False)


def rows(cell: Cell, step: int, evaluation: Evaluation) -> pd.DataFrame:
    """An evaluation of a cell's model after some steps, as rows of the results."""
    place = {"trained_threat": cell.threat, "method": cell.method, "seed": cell.seed, "step": step}
    return evaluation.to_dataframe().assign(**place).reindex(columns=list(RESULT_COLUMNS))


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread inside the block.

    On models of the organism's size more threads bring nothing, and cost much beside other work;
    and sums come out the same whatever the number of cores and of workers.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
