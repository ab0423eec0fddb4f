"""What a study runs: its settings, its cells, and one cell from training to its folder, in whatever process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from ctlens.analysis import attention_diff, gap_recovered, residual_shift
from ctlens.analysis.outputs.gap_recovered import SHARE
from ctlens.core.errors import CtlensError
from ctlens.core.files import atomic_folder, write_json
from ctlens.core.labels import BASE
from ctlens.core.threads import one_thread
from ctlens.core.types import LensModel
from ctlens.data.batch import encode
from ctlens.data.pairs import Pair
from ctlens.evaluation import Evaluation
from ctlens.models.loading import save_model
from ctlens.models.parameters import copy_model
from ctlens.organism import train_organism
from ctlens.study import conditions
from ctlens.study.conditions import PERTURBED, RETENTION
from ctlens.study.config import ORGANISM, Cell, StudyConfig, organism_cell
from ctlens.study.results import SPLIT
from ctlens.study.source import Subject, evaluated, splits_of, start_model, subject
from ctlens.training import Trainer, load_run
from ctlens.training.retention import held_prompts

DOSES = (0.05, 0.1, 0.2, 0.4, 1.0)
OUTCOMES, MATCHED_FOLDER = "outcomes.csv", "matched"
LOOKS = (0.02, 0.04, 0.07, 0.1, 0.12, 0.13, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
NEAR = 0.08
ANALYSED_PAIRS = 64
NEUTRAL_PROMPTS = 128
NAN = float("nan")
RESULT_COLUMNS = (
    "trained_threat", "method", "seed", "organism", "step", "evaluated_threat", "split", "prompt_side", "metric",
    "value", "n", "ci_low", "ci_high",
)  # fmt: skip


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
        if cell.method == ORGANISM:
            train_organism(cell.place(study), seed=cell.organism, progress=False)
        elif cell.method == BASE:
            answers = evaluated(
                base_model(config, study, cell), config.threats, splits_of(config.file), config.items, config.file
            )
            answers.save(cell.place(study))
        elif cell.method == PERTURBED:
            _perturb(config, study, cell)
        else:
            CellTraining(config, study, cell).run()


def base_model(config: StudyConfig, study: Path, cell: Cell) -> LensModel:
    """The model that a cell starts from."""
    trained = organism_cell(cell.organism).place(study) if cell.organism else None
    return start_model(config.model, trained, config.device, config.dtype)


def probe_pairs(config: StudyConfig, threat: str, model: LensModel, n: int = ANALYSED_PAIRS) -> list[Pair]:
    """The held-out pairs whose activations are compared: those among `n` that align."""
    return aligned(subject(threat, config.file), n, model, config, split=SPLIT)


def aligned(source: Subject, n: int, model: LensModel, config: StudyConfig, *, split: str, seed: int = 0) -> list[Pair]:
    """Those among `n` pairs that every condition can be trained on and every analysis can read.

    Raises:
        CtlensError: none aligns.
    """
    windows = {str(config.training.window), "shared", *([conditions.LAST] if source.ends_alike else [])}
    pairs = source.pairs(n, split=split, seed=seed)
    return [row.pair for row in encode(pairs, model.tokenizer, windows=windows, n_ctx=model.cfg.n_ctx).rows]


class CellTraining:
    """A cell that is trained, looked at on the way, evaluated and looked into."""

    def __init__(self, config: StudyConfig, study: Path, cell: Cell) -> None:
        self.config, self.study, self.cell, self.condition = config, study, cell, conditions.get(cell.method)
        self.base = base_model(config, study, cell)
        self.subject: Subject = subject(cell.threat, config.file)
        self.inside = cell.threat in config.insides
        self.ceiling = cell.seed >= config.seeds
        self.main = cell.method in (RETENTION, *config.methods) and not self.ceiling
        self.tables: list[pd.DataFrame] = []
        self.matched: dict[int, tuple[float, LensModel]] = {}
        self.share = NAN

    @cached_property
    def probes(self) -> list[Pair]:
        """The held-out pairs that are looked at."""
        return probe_pairs(self.config, self.cell.threat, self.base)

    def run(self) -> None:
        """Trains and writes the folder."""
        trainer = self.trainer()
        steps = self.config.training.steps
        doses, looks = ({max(1, round(share * steps)) for share in shares} for shares in (DOSES, LOOKS))
        for step in trainer:
            if self.inside and step.index in looks:
                self._look(step.index, trainer.model)
            if self.main and step.index in doses - {steps}:
                self._evaluate(step.index, trainer.model, [self.cell.threat], [SPLIT])
        final = None if self.ceiling else self._final(trainer.model)
        shift = residual_shift(self.base, trainer.model, self.probes, progress=False)
        attention = attention_diff(self.base, trainer.model, self.probes, progress=False)
        with atomic_folder(self.cell.place(self.study)) as work:
            trainer.run.write(work)
            self._write_matched(work / MATCHED_FOLDER)
            if final:
                final.save(work / OUTCOMES)
            pd.concat(self.tables).to_csv(work / "results.csv", index=False)
            shift.save(work / "residual.safetensors")
            attention.save(work / "attention.safetensors")

    def trainer(self) -> Trainer:
        """Every condition holds the same prompts, so that they differ in nothing but what they are trained on."""
        config, seed = self.config, self.cell.seed
        attacked = aligned(self.subject, config.pairs, self.base, config, split="train", seed=seed)
        ordinary = self.subject.neutral(NEUTRAL_PROMPTS, seed=seed)
        changes = {"seed": seed, "window": self.condition.window or config.training.window}
        changes |= {"trainable": self.condition.trainable} if self.condition.trainable else {}
        pairs = self.condition.pairs(attacked, ordinary, self.base.tokenizer)
        retain = held_prompts(attacked, ordinary)
        return Trainer(self.base, pairs, self.condition.losses(), replace(config.training, **changes), retain=retain)

    def _look(self, step: int, model: LensModel) -> None:
        """Measures the effect in logits, and keeps the weights where it is close to what methods are matched at."""
        share, low, high = recovered(self.base, model, self.probes)
        self.tables.append(_row(self.cell, step, SHARE, share, low, high, len(self.probes)))
        off = abs(share - self.config.matched)
        if off <= min([NEAR, *(held for held, _ in self.matched.values())]):
            self.matched = {step: (off, copy_model(model))}
            self.share = share

    def _write_matched(self, folder: Path) -> None:
        """The model at the step whose effect was nearest to the one that methods are matched at, if any was near."""
        for step, (_, model) in self.matched.items():
            save_model(model, folder)
            write_json(folder / "step.json", {"step": step, SHARE: self.share})

    def _evaluate(self, step: int, model: LensModel, names: Sequence[str], splits: Sequence[str]) -> Evaluation:
        found = evaluated(model, names, splits, self.config.items, self.config.file)
        self.tables.append(rows(self.cell, step, found))
        return found

    def _final(self, model: LensModel) -> Evaluation:
        """A cell of the comparison answers every threat, and its own on every split; one beside it its own alone."""
        steps, own, file = self.config.training.steps, [self.cell.threat], self.config.file
        asked = [(list(self.config.threats) if self.main else own, [SPLIT])]
        if self.main and (others := [split for split in splits_of(file) if split != SPLIT]):
            asked.append((own, others))
        found = [evaluated(model, names, splits, self.config.items, file).outcomes for names, splits in asked]
        whole = Evaluation(pd.concat(found, ignore_index=True))
        self.tables.append(rows(self.cell, steps, whole))
        return whole


def recovered(base: LensModel, model: LensModel, pairs: Sequence[Pair]) -> tuple[float, float, float]:
    """The share of the gap that a model has recovered, with its interval; NaN where the attack makes no gap."""
    try:
        return gap_recovered(base, {"model": model}, pairs, progress=False).share("model")
    except CtlensError:
        return NAN, NAN, NAN


def _perturb(config: StudyConfig, study: Path, cell: Cell) -> None:
    """Noise of the norm, matrix by matrix, that the methods' updates have on average."""
    base = base_model(config, study, cell)
    trained = [load_run(replace(cell, method=name).place(study)).model for name in config.methods]
    model = conditions.perturbed(base, trained, cell.seed)
    probes = probe_pairs(config, cell.threat, base)
    final = evaluated(model, [cell.threat], [SPLIT], config.items, config.file)
    share = _row(cell, 0, SHARE, *recovered(base, model, probes), len(probes))
    with atomic_folder(cell.place(study)) as work:
        save_model(model, work / "model")
        final.save(work / OUTCOMES)
        pd.concat([share, rows(cell, 0, final)]).to_csv(work / "results.csv", index=False)
        residual_shift(base, model, probes, progress=False).save(work / "residual.safetensors")
        attention_diff(base, model, probes, progress=False).save(work / "attention.safetensors")


def rows(cell: Cell, step: int, evaluation: Evaluation) -> pd.DataFrame:
    """An evaluation of a cell's model after some steps, as rows of the results."""
    return evaluation.to_dataframe().assign(**_place(cell, step)).reindex(columns=list(RESULT_COLUMNS))


def _row(cell: Cell, step: int, metric: str, value: float, low: float, high: float, n: int) -> pd.DataFrame:
    """One number of a cell's own threat on wrapped prompts, as rows of the results."""
    number = {"metric": metric, "value": value, "n": n, "ci_low": low, "ci_high": high}
    where = {"evaluated_threat": cell.threat, "split": SPLIT, "prompt_side": "wrapped"}
    return pd.DataFrame([{**_place(cell, step), **where, **number}], columns=list(RESULT_COLUMNS))


def _place(cell: Cell, step: int) -> dict[str, object]:
    where = {"trained_threat": cell.threat, "method": cell.method, "seed": cell.seed, "organism": cell.organism}
    return {**where, "step": step}
