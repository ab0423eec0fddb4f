"""The figures of a study, from its results, the first analyses in its cells and its later ones."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from ctlens import plots
from ctlens.analysis import AttentionDiff, CrossLoss, Erasure, Graft, ResidualShift, ShiftSimilarity, Transplant
from ctlens.analysis.base.positions import ALIGNED_POSITIONS
from ctlens.analysis.base.shares import floor_of
from ctlens.analysis.exchange.exchange import Exchange
from ctlens.analysis.outputs.gap_recovered import GAP_RECOVERED
from ctlens.core.labels import BASE
from ctlens.core.rates import Rate
from ctlens.data.pairs import PROMPT_SIDES
from ctlens.evaluation import Evaluation
from ctlens.plots import Figure
from ctlens.study.analyses import EQUAL_STEPS, MATCHED, Analysis, ResultT
from ctlens.study.claims.behaviour import TRANSFERS_FILE
from ctlens.study.conditions import RETENTION, SHAM
from ctlens.study.config import Cell, StudyConfig
from ctlens.study.results import (
    SPLIT,
    ConditionRates,
    Counted,
    by_threat,
    counted,
    in_order,
    pooled,
)
from ctlens.study.workers import Pool, run_in_order

ExchangeT = TypeVar("ExchangeT", bound=Exchange)
_DOSE_TITLES = {
    "step": "How much training until the wrapper no longer works?",
    "n_pairs": "How many training pairs until the wrapper no longer works?",
}
_ENDS = ("value", "ci_low", "ci_high")
_CROSSED_FIGURE = ("act", "act_last", "klct", "klct_last", RETENTION)
"""The conditions that cross what a loss compares with the tokens that it sees, and the null."""


def prompts_in_words(n_prompts: int) -> str:
    """The held-out prompts of a figure and what its bands are, in words."""
    return f"{n_prompts} prompts, wrappers and items held out; 95% intervals"


def save_study_figures(config: StudyConfig, folder: Path, results: pd.DataFrame, pool: Pool) -> list[Path]:
    """Draws every figure of a study into its `figures` folder and returns the paths written.

    Rates pool the answers of all trainings; curves of analyses are averaged over seeds. Intervals are over topics and
    wrapper texts.

    Args:
        config: of the study.
        folder: of the study, with its base's answers, its finished cells and analyses.
        results: the rows of the study.
        pool: where the figures are drawn, those of one threat together.
    """
    tasks = [(config, folder, results, threat) for threat in ("", *config.threats)]
    return list(chain.from_iterable(run_in_order(_draw_part, tasks, pool)))


def _draw_part(config: StudyConfig, folder: Path, results: pd.DataFrame, threat: str) -> list[Path]:
    """Draws the figures of one threat, or with an empty name those of the whole study."""
    of_part = _of_threat(config, folder, results, threat) if threat else _of_study(config, folder)
    return plots.write_figures({folder / "figures" / name: figure for name, figure in of_part})


def _of_study(config: StudyConfig, folder: Path) -> Iterator[tuple[str, Figure]]:
    if len(config.asked) > 1:
        yield "cross-threat", cross_threat_figure(pd.read_csv(folder / TRANSFERS_FILE))
    yield "attack-strength", Evaluation.load(folder / "base.csv").strength_figure()


def _compared(config: StudyConfig) -> list[str]:
    """The base, the null and the methods: what stands in the figures of behaviour."""
    return [BASE, RETENTION, *config.methods]


def _rows_of(results: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(results[results["condition"].isin(conditions)])


def _of_threat(config: StudyConfig, folder: Path, results: pd.DataFrame, threat: str) -> Iterator[tuple[str, Figure]]:
    shown = _rows_of(results, _compared(config))
    splits = {str(split): by_threat(shown, str(split)) for split in dict.fromkeys(shown["split"])}
    conditions = splits[SPLIT][threat]
    trained = [name for name in conditions if name != BASE]
    own = shown.query("evaluated_threat == @threat and trained_threat in ('', @threat)")
    words = prompts_in_words(config.n_prompts)
    drawn: list[Iterable[tuple[str, Figure]]] = [
        [("dose", dose_figure(own, "step", words))],
        _rates(threat, conditions, splits, words),
    ]
    if config.compares_inside(threat):
        drawn.append(_first_analyses(config, folder, threat, trained))
    if threat in config.analysed_threats:
        of_threat = results.query("trained_threat == @threat")
        shares = of_threat.query("metric == @GAP_RECOVERED")["value"].tolist()
        if not all(map(math.isnan, shares)):  # an attack may make no gap
            drawn.append([("gap-dose", gap_figure(of_threat, config.methods, prompts_in_words(config.n_analysed)))])
        drawn.append(analysis_figures(config, folder, threat))
    for name, figure in chain.from_iterable(drawn):
        yield f"{threat}-{name}", plots.placed(figure, threat)


def _rates(
    threat: str,
    conditions: dict[str, ConditionRates],
    splits: dict[str, dict[str, dict[str, ConditionRates]]],
    words: str,
) -> Iterator[tuple[str, Figure]]:
    rates = {
        name: [found.rate("bad_rate", prompt_side) for prompt_side in PROMPT_SIDES]
        for name, found in conditions.items()
    }
    title = "How often is the answer bad, with the wrapper and without?"
    yield "bad-rate", _behaviour(rates, PROMPT_SIDES, title, words)
    rates = {
        name: [found[threat][name].rate("bad_rate", "wrapped") for found in splits.values()] for name in conditions
    }
    title = "Does the repair hold on new entities, new wrapper texts and new structures?"
    yield "generalisation", _behaviour(rates, splits, title, f"wrapped, {words}", x_title="split")


def _behaviour(
    rates: dict[str, list[Rate]],
    columns: Iterable[str],
    title: str,
    subtitle: str,
    x_title: str = "prompt",
) -> Figure:
    value, low, high = _arrays(list(rates.values()))
    texts: dict[str, Any] = {"metric": "bad rate", "title": title, "subtitle": subtitle, "x_title": x_title}
    return plots.behaviour(list(rates), list(columns), value, low, high, **texts)


def _arrays(rates: list[list[Rate]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, lower and upper ends, in the shape of the rates."""
    table = np.array([[(rate.value, rate.low, rate.high) for rate in row] for row in rates])
    return table[..., 0], table[..., 1], table[..., 2]


def _first_analyses(
    config: StudyConfig, folder: Path, threat: str, conditions: Sequence[str]
) -> Iterator[tuple[str, Figure]]:
    """Draws the analyses that every cell of the comparison holds."""
    first = conditions[0]
    words = prompts_in_words(config.n_analysed)
    shifts = _over_seeds(ResidualShift, "residual", config, folder, threat, conditions)
    for positions in ALIGNED_POSITIONS:
        yield f"residual-{positions}", shifts[first].compare(shifts, label=first, positions=positions, subtitle=words)
    masses = _over_seeds(AttentionDiff, "attention", config, folder, threat, conditions)
    yield "attention", masses[first].compare(masses, label=first, subtitle=words)


def cross_threat_figure(transfers: pd.DataFrame) -> Figure:
    """Draws what training against each threat does to the bad rate on every threat, beside retention alone.

    Args:
        transfers: the rows of a `transfers.csv`.
    """
    trained = list(dict.fromkeys(transfers["trained_threat"]))
    evaluated = list(dict.fromkeys(transfers["evaluated_threat"]))
    panels = {}
    clear = {}
    for name in in_order(transfers["condition"]):
        cells = transfers.query("condition == @name")  # a row per trained and evaluated threat, in this order
        value, low, high = cells[[*_ENDS]].to_numpy().T.reshape(3, len(trained), len(evaluated))
        panels[name] = (value, low, high)
        clear[name] = cells["clear"].to_numpy().reshape(value.shape)
    title = "Does training against one threat change the others?"
    n_prompts = transfers["n_prompts"].to_numpy().max()
    subtitle = f"wrapped prompts, {n_prompts} of each threat, wrappers and items held out"
    return plots.cross_threat(trained, evaluated, panels, clear, title, subtitle=subtitle)


def dose_figure(results: pd.DataFrame, axis: str, subtitle: str) -> Figure:
    """Draws the bad rate on held-out wrapped prompts by the amount of training: a line per condition, seeds pooled.

    Args:
        results: rows of one threat, at every dose; those of the base stand for the dose 0 of every condition.
        axis: the column with the dose, `"step"` or `"n_pairs"`.
        subtitle: one line under the title.
    """
    counts: defaultdict[tuple[str, int], list[Counted]] = defaultdict(list)
    shown = results.query("metric == 'bad_rate' and prompt_side == 'wrapped' and split == @SPLIT")
    for row in shown.to_dict("records"):
        counts[row["condition"], row[axis]].append(counted(row))
    doses = sorted({dose for _, dose in counts})
    curves = {
        condition: _curve([counts[condition if dose else BASE, dose] for dose in doses])
        for condition in in_order(condition for condition, _ in counts if condition != BASE)
    }
    layout = {"x_title": "training pairs", "log_x": True} if axis == "n_pairs" else {}
    return plots.dose_curves(doses, curves, _DOSE_TITLES[axis], subtitle=subtitle, **layout)


def _curve(counts: list[list[Counted]]) -> plots.Curve:
    rates = np.array([(rate.value, rate.low, rate.high) for rate in (pooled(of_dose) for of_dose in counts)])
    return rates[:, 0], rates[:, 1], rates[:, 2]


def gap_figure(results: pd.DataFrame, methods: Sequence[str], subtitle: str) -> Figure:
    """Draws the share of the gap in the logit difference that each condition recovers by step, a mean over trainings.

    Args:
        results: rows of one trained threat.
        methods: the conditions of the first panel; controls and other windows are in the second.
        subtitle: one line under the title.
    """
    found: defaultdict[str, dict[int, list[tuple[float, ...]]]] = defaultdict(lambda: defaultdict(list))
    for row in results.query("step > 0").to_dict("records"):
        if row["metric"] != GAP_RECOVERED or pd.isna(row["value"]):
            continue
        found[row["condition"]][row["step"]].append((row["value"], row["ci_low"], row["ci_high"]))
    steps = sorted({step for by_step in found.values() for step in by_step})
    unknown = [(float("nan"),) * 3]
    curves = {
        condition: tuple(np.array([np.mean(found[condition].get(step, unknown), axis=0) for step in steps]).T)
        for condition in in_order(found)
    }
    title = "How much of the wrapper's effect on the answer is undone, before rates saturate?"
    unit = "share of the gap in the logit difference"
    parts = {
        "methods": {name: curve for name, curve in curves.items() if name in methods},
        "controls and other windows": {name: curve for name, curve in curves.items() if name not in methods},
    }
    panels = {name: plots.CurvePanel(shown, unit, levels=(0, 1)) for name, shown in parts.items() if shown}
    caption = "Lines are means over trainings, bands their 95% intervals; dotted: none and all of the gap."
    texts: dict[str, Any] = {
        "x_title": "training steps",
        "caption": caption,
        "subtitle": subtitle,
        "kind": "dose_response",
    }
    return plots.curve_panels(steps, panels, title, **texts)


def analysis_figures(config: StudyConfig, folder: Path, threat: str) -> Iterator[tuple[str, Figure]]:
    """Draws the analyses of one threat's models, of the first seed, each with its name.

    Args:
        config: of the study.
        folder: of the study.
        threat: one whose models were analysed.
    """
    words = prompts_in_words(config.n_analysed)
    trained = (*config.methods, *config.extra_conditions_of(threat), RETENTION)
    crossed = [name for name in _CROSSED_FIGURE if name in trained]
    if len(crossed) > 2:
        shifts = _over_seeds(ResidualShift, "residual", config, folder, threat, crossed)
        for positions in ALIGNED_POSITIONS:
            first = crossed[0]
            figure = shifts[first].compare(shifts, label=first, positions=positions, subtitle=words)
            yield f"crossed-{positions}", plots.placed(figure, "each loss on all aligned tokens and on the last alone")
    for setting, end in ((EQUAL_STEPS, ""), (MATCHED, "-matched")):
        for name, figure in figures_at_setting(config, folder, threat, setting):
            yield f"{name}{end}", plots.placed(figure, f"at {setting}") if setting == MATCHED else figure
    for result in _load(CrossLoss, "cross-loss", folder, threat).values():
        yield "cross-loss", result.figure()
    found = _load(Graft, "graft", folder, threat)
    if shown := _with_effect({name: found[name] for name in config.methods if name in found}):
        first = next(iter(shown))
        yield "graft", shown[first].compare(shown, label=first, subtitle=words)
    for result in _load(Erasure, "erasure", folder, threat).values():
        yield "erasure", result.figure()


def figures_at_setting(config: StudyConfig, folder: Path, threat: str, setting: str) -> Iterator[tuple[str, Figure]]:
    """Draws the analyses that compare at equal steps and again at a matched effect."""
    for result in _load(ShiftSimilarity, "similarity", folder, threat, setting).values():
        shown = [name for name in (SHAM, *config.methods) if name in result.methods]
        if len(shown) > 1:  # a matrix of one compares nothing
            yield "similarity", result.among(shown).figure()
    found = _with_effect(_load(Transplant, "transplant", folder, threat, setting))
    for positions in ALIGNED_POSITIONS if found else ():
        subtitle = f"source: a trained model, target: the base; {prompts_in_words(config.n_analysed)}"
        first = next(iter(found))
        figure = found[first].compare(found, label=first, positions=positions, subtitle=subtitle)
        yield f"transplant-{positions}", figure


def _load(
    kind: type[ResultT], analysis: str, folder: Path, threat: str, setting: str = EQUAL_STEPS
) -> dict[str, ResultT]:
    found = Analysis(analysis, threat, setting).load(folder, kind)
    return {name: found[name] for name in in_order(found)}


def _with_effect(found: Mapping[str, ExchangeT]) -> dict[str, ExchangeT]:
    """The exchanges between models that differ enough for shares of the difference."""
    floor = floor_of("logit_diff", None)
    return {name: result for name, result in found.items() if abs(result.effect().mean()) >= floor}


def _over_seeds(
    kind: type[ResultT], analysis: str, config: StudyConfig, folder: Path, threat: str, conditions: Iterable[str]
) -> dict[str, ResultT]:
    """An analysis that every cell holds, by condition: its mean over the seeds, pair by pair."""
    return {
        name: _mean(
            [
                kind.load(Cell(threat, name, seed).path(folder) / f"{analysis}.safetensors")
                for seed in range(config.seeds)
            ]
        )
        for name in conditions
    }


def _mean(results: Sequence[ResultT]) -> ResultT:
    """The first of some results with its arrays averaged over all."""
    first = results[0]
    arrays = [f.name for f in dataclasses.fields(first) if isinstance(getattr(first, f.name), np.ndarray)]
    means = {name: np.mean([getattr(result, name) for result in results], axis=0) for name in arrays}
    return dataclasses.replace(first, **means)
