"""One cell of a study, from training to its folder, in whatever process it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import cast

import pandas as pd

from ctlens.analysis import attention_diff, residual_shift
from ctlens.analysis.outputs.gap_recovered import GAP_RECOVERED, Gap
from ctlens.core.digests import record_digests
from ctlens.core.errors import CtlensError, NotFinite
from ctlens.core.files import atomic_folder, write_json
from ctlens.core.keeping import KeptResults, keeping
from ctlens.core.labels import BASE, CLEAN_BORN
from ctlens.core.threads import one_thread
from ctlens.core.types import LensModel
from ctlens.data.batch import encode
from ctlens.data.pairs import Pair
from ctlens.evaluation import Evaluation
from ctlens.models.loading import load_model, save_model
from ctlens.models.lora import adapter_tensors, attach_adapters, has_adapters, save_adapters
from ctlens.models.parameters import copy_model
from ctlens.study.conditions import (
    DERIVED,
    FINE_TUNED,
    LAST_TOKEN,
    RETENTION,
    SHAM,
    condition_named,
    perturbed,
    sham,
)
from ctlens.study.config import SCREENING, Cell, StudyConfig
from ctlens.study.logs import logged
from ctlens.study.results import RESULT_COLUMNS, SPLIT
from ctlens.study.source import Subject, evaluated, splits_of, start_model, subject
from ctlens.threats import Natural, get, screen
from ctlens.training import Trainer
from ctlens.training.retention import held_prompts
from ctlens.training.run import ADAPTERS_FOLDER, trained_model

# Shares of the steps. Answers saturate early (on the pilot's jailbreak prompts at step 10 of 100, while methods still
# differed threefold in logits), so both lists are denser at the start; their very values are not tuned. Fifteen
# measurements of the gap are needed for one to come near the matched share, five evaluations draw the dose figure.
_EVALUATED_AT = (0.05, 0.1, 0.2, 0.4, 1.0)
_RECOVERY_AT = (0.02, 0.04, 0.07, 0.1, 0.12, 0.13, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
_NEAR_MATCHED = 0.08
"""How far from the matched share of the gap a model may be and still count as matched; chosen by eye, not tuned."""
SHARED: KeptResults = {}
"""What cells have in common: each worker draws a pair, renders a prompt and lets the base answer it once."""
OUTCOMES_FILE = "outcomes.csv"
MATCHED_FOLDER = "matched"
NEUTRAL_PROMPTS = 128
"""The number of prompts of retention, the KL to the reference on prompts that must not change; not tuned."""


def run_cell(config: StudyConfig, study: Path, cell: Cell) -> None:
    """Runs one cell and writes it into the folder of the study, whole or not at all.

    Args:
        config: of the study.
        study: its folder.
        cell: one that is not there yet.

    Raises:
        CtlensError: as `Trainer` and `evaluate`.
    """
    with one_thread(), keeping(SHARED), logged(study, cell.path(study).stem):
        if cell.condition == SCREENING:
            threat = cast(Natural, get(cell.threat))
            screen(base_model(config), threat, progress=False).save(cell.path(study))
        elif cell.condition in (BASE, CLEAN_BORN):
            asked = [subject(name, config.file, study) for name in config.asked]
            model = config.clean_born if cell.condition == CLEAN_BORN else config.model
            answering = start_model(model, config.device, config.dtype)
            answers = evaluated(answering, asked, splits_of(config.file), config.n_prompts)
            answers.save(cell.path(study))
        elif cell.condition in DERIVED:
            _derive(config, study, cell)
        else:
            CellTraining(config, study, cell).run()


def base_model(config: StudyConfig) -> LensModel:
    """The model that every training starts from."""
    return start_model(config.model, config.device, config.dtype)


def finished_model(config: StudyConfig, base: LensModel, folder: Path) -> LensModel:
    """The model in the folder of a cell, or of its matched step; one of adapters shares the base's other weights."""
    if (folder / ADAPTERS_FOLDER).is_dir():
        return trained_model(folder, base)
    return load_model(folder, device=config.device, dtype=config.dtype)


def probe_pairs(source: Subject, config: StudyConfig, model: LensModel, n_pairs: int) -> list[Pair]:
    """The held-out pairs whose activations are compared: those among `n_pairs` that align."""
    return aligned(source, n_pairs, model, config, split=SPLIT)


def gap_pairs(source: Subject, config: StudyConfig, model: LensModel) -> list[Pair]:
    """The held-out pairs on which the gap is measured, and by it the matched step chosen.

    They are others than those whose activations are compared, as many of each; a file that has no more has the same.
    """
    compared = probe_pairs(source, config, model, config.n_analysed)
    both = probe_pairs(source, config, model, 2 * config.n_analysed)
    return [pair for pair in both[len(compared) :] if pair not in compared] or compared


def aligned(
    source: Subject, n_pairs: int, model: LensModel, config: StudyConfig, *, split: str, seed: int = 0
) -> list[Pair]:
    """Those among `n_pairs` pairs that every condition can be trained on and every analysis can read.

    Raises:
        CtlensError: none aligns.
    """
    windows = {str(config.training.window), "shared", *([LAST_TOKEN] if source.ends_alike else [])}
    pairs = source.pairs(n_pairs, split=split, seed=seed)
    return [row.pair for row in encode(pairs, model.tokenizer, windows=windows, n_ctx=model.cfg.n_ctx).rows]


class CellTraining:
    """The training of one cell: measured and evaluated on the way and at its end, with its first analyses.

    Args:
        config: of the study.
        study: its folder, which holds the screening of natural threats.
        cell: one that trains.
        source: of its pairs; by default what the study's folder says of its threat.
    """

    def __init__(self, config: StudyConfig, study: Path, cell: Cell, source: Subject | None = None) -> None:
        self.config = config
        self.study = study
        self.cell = cell
        self.condition = condition_named(cell.condition)
        self.base = base_model(config)
        self.subject: Subject = source or subject(cell.threat, config.file, study)
        self.analysed = cell.threat in config.analysed_threats
        self.ceiling = cell.seed >= config.seeds
        self.main = cell.condition in (RETENTION, *config.methods) and not self.ceiling
        self.compared_inside = config.compares_inside(cell.threat)
        self.tables: list[pd.DataFrame] = []
        self.matched: dict[int, tuple[float, LensModel]] = {}
        self.share = float("nan")

    @cached_property
    def probes(self) -> list[Pair]:
        """The held-out pairs on which activations are compared."""
        return probe_pairs(self.subject, self.config, self.base, self.config.n_analysed)

    @cached_property
    def gap(self) -> Gap:
        """The gap of the model before training, which every measurement on the way is a share of."""
        return Gap(self.base, self.gap_pairs)

    @cached_property
    def gap_pairs(self) -> list[Pair]:
        """The held-out pairs on which the gap is measured."""
        return gap_pairs(self.subject, self.config, self.base)

    def run(self) -> None:
        """Trains and writes the folder."""
        trainer = self.trainer()
        steps = self.config.training.steps
        evaluated_at = _steps_at(_EVALUATED_AT, steps) - {steps}
        recovery_at = _steps_at(_RECOVERY_AT, steps)
        for step in trainer:
            if self.analysed and step.index in recovery_at:
                self._measure_recovery(step.index, trainer.model)
            if self.main and self.compared_inside and step.index in evaluated_at:
                self._evaluate(step.index, trainer.model, [self.cell.threat], [SPLIT])
        final = None if self.ceiling else self._final(trainer.model)
        with atomic_folder(self.cell.path(self.study)) as work:
            trainer.run.write(work, adapters_only=has_adapters(trainer.model))
            self._write_matched(work / MATCHED_FOLDER)
            if final:
                final.save(work / OUTCOMES_FILE)
            pd.concat(self.tables).to_csv(work / "results.csv", index=False)
            if self.compared_inside:
                _write_first_looks(self.base, trainer.model, self.probes, work)
            record_digests(work)

    def trainer(self) -> Trainer:
        """Builds the trainer; the conditions of a threat retain the same prompts and differ in what they train on."""
        config = self.config
        seed = self.cell.seed
        attacked = aligned(self.subject, config.n_pairs, self.base, config, split="train", seed=seed)
        ordinary = self.subject.neutral(NEUTRAL_PROMPTS, seed=seed)
        changes = {"seed": seed, "window": self.condition.window or config.training.window}
        if self.condition.trainable:
            changes["trainable"] = self.condition.trainable
        pairs = self.condition.pairs(attacked, ordinary, self.base.tokenizer)
        retain = held_prompts(attacked, ordinary)
        return Trainer(self.base, pairs, self.condition.losses(), replace(config.training, **changes), retain=retain)

    def _measure_recovery(self, step: int, model: LensModel) -> None:
        """Measures how much of the gap is recovered, and keeps the model that is nearest to the matched share."""
        share, low, high = _recovered(lambda: self.gap, model)
        self.tables.append(_row(self.cell, step, GAP_RECOVERED, share, low, high, len(self.gap_pairs)))
        off = abs(share - self.config.matched)
        if off <= min([_NEAR_MATCHED, *(held for held, _ in self.matched.values())]):
            self.matched = {step: (off, self._copied(model))}
            self.share = share

    def _copied(self, model: LensModel) -> LensModel:
        """A copy of the trained model; one with adapters goes on sharing the base's weights."""
        if not has_adapters(model):
            return copy_model(model)
        copied = copy_model(self.base, share_weights=True)
        attach_adapters(copied, *adapter_tensors(model))
        return copied

    def _write_matched(self, folder: Path) -> None:
        """Writes the model of the step that came nearest to the matched share, if one came near."""
        for step, (_, model) in self.matched.items():
            if has_adapters(model):
                save_adapters(model, folder / ADAPTERS_FOLDER)
            else:
                save_model(model, folder)
            write_json(folder / "step.json", {"step": step, GAP_RECOVERED: self.share})

    def _evaluate(self, step: int, model: LensModel, names: Sequence[str], splits: Sequence[str]) -> Evaluation:
        found = self._answers(model, names, splits)
        self.tables.append(result_rows(self.cell, step, found))
        return found

    def _answers(self, model: LensModel, names: Sequence[str], splits: Sequence[str]) -> Evaluation:
        asked = [subject(name, self.config.file, self.study) for name in names]
        return evaluated(model, asked, splits, self.config.n_prompts)

    def _final(self, model: LensModel) -> Evaluation:
        """Evaluates the trained model: a method on every threat and its own on every split, an extra one on its own."""
        own = [self.cell.threat]
        asked = [(list(self.config.asked) if self.main else own, [SPLIT])]
        if self.main and (others := [split for split in splits_of(self.config.file) if split != SPLIT]):
            asked.append((own, others))
        found = [self._answers(model, names, splits).outcomes for names, splits in asked]
        whole = Evaluation(pd.concat(found, ignore_index=True))
        self.tables.append(result_rows(self.cell, self.config.training.steps, whole))
        return whole


def _steps_at(shares: Sequence[float], steps: int) -> set[int]:
    """The steps at these shares of a training, from 1."""
    return {max(1, round(share * steps)) for share in shares}


def _recovered(gap: Callable[[], Gap], model: LensModel) -> tuple[float, float, float]:
    """The share of the gap that a model has recovered, with its interval; NaN where the attack makes no gap."""
    try:
        return gap().share(model)
    except NotFinite:
        raise
    except CtlensError:
        return float("nan"), float("nan"), float("nan")


def _derive(config: StudyConfig, study: Path, cell: Cell) -> None:
    """Makes and measures the base moved as far as the methods move it, per matrix, but in another direction."""
    base = base_model(config)

    def finished(name: str) -> LensModel:
        return finished_model(config, base, replace(cell, condition=name).path(study))

    trained = [finished(name) for name in config.methods]
    is_sham = cell.condition == SHAM
    model = sham(base, trained, finished(FINE_TUNED)) if is_sham else perturbed(base, trained, cell.seed)
    source = subject(cell.threat, config.file, study)
    probes = probe_pairs(source, config, base, config.n_analysed)
    measured = gap_pairs(source, config, base)
    final = evaluated(model, [source], [SPLIT], config.n_prompts)
    share = _row(cell, 0, GAP_RECOVERED, *_recovered(lambda: Gap(base, measured), model), len(measured))
    with atomic_folder(cell.path(study)) as work:
        save_model(model, work / "model")
        final.save(work / OUTCOMES_FILE)
        pd.concat([share, result_rows(cell, 0, final)]).to_csv(work / "results.csv", index=False)
        _write_first_looks(base, model, probes, work)
        record_digests(work)


def _write_first_looks(base: LensModel, model: LensModel, pairs: Sequence[Pair], folder: Path) -> None:
    """Writes what a training did to the residual stream and to attention."""
    residual_shift(base, model, pairs, progress=False).save(folder / "residual.safetensors")
    attention_diff(base, model, pairs, progress=False).save(folder / "attention.safetensors")


def result_rows(cell: Cell, step: int, evaluation: Evaluation) -> pd.DataFrame:
    """An evaluation of a cell's model after some steps, as rows of the results."""
    return evaluation.to_dataframe().assign(**_labels(cell, step)).reindex(columns=list(RESULT_COLUMNS))


def _row(cell: Cell, step: int, metric: str, value: float, low: float, high: float, n_prompts: int) -> pd.DataFrame:
    """One number of a cell's own threat on wrapped prompts, as rows of the results."""
    number = {"metric": metric, "value": value, "n_prompts": n_prompts, "ci_low": low, "ci_high": high}
    prompts = {"evaluated_threat": cell.threat, "split": SPLIT, "prompt_side": "wrapped"}
    return pd.DataFrame([{**_labels(cell, step), **prompts, **number}], columns=list(RESULT_COLUMNS))


def _labels(cell: Cell, step: int) -> dict[str, object]:
    """The columns of the results that say which model a row is of."""
    return {
        "trained_threat": cell.threat,
        "condition": cell.condition,
        "seed": cell.seed,
        "step": step,
    }
