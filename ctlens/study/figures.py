"""The figures of a study, from its results and the analyses of its cells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

from ctlens import plots
from ctlens.analysis import AttentionDiff, ResidualShift
from ctlens.analysis.attention import diff as attention
from ctlens.analysis.base.positions import ALIGNED_POSITIONS
from ctlens.analysis.outputs.gap_recovered import SHARE
from ctlens.analysis.residual import shift as residual
from ctlens.core.labels import BASE
from ctlens.data.pairs import PROMPT_SIDES
from ctlens.evaluation import Evaluation
from ctlens.plots import Figure
from ctlens.study.conditions import RETENTION
from ctlens.study.config import StudyConfig
from ctlens.study.inside_figures import inside_figures, over_seeds, where
from ctlens.study.results import NOT_MEASURED, SPLIT, Measured, Rate, by_threat, by_training, in_order, pooled

DOSE_TITLES = {
    "step": "How much training until the wrapper no longer works?",
    "pairs": "How many training pairs until the wrapper no longer works?",
}


def save_figures(config: StudyConfig, folder: Path, results: pd.DataFrame) -> list[Path]:
    """Draws every figure of a study into its `figures` folder and returns the paths written.

    Rates pool the answers of all trainings; curves of analyses are averaged over seeds and their
    intervals are over pairs.

    Args:
        config: of the study.
        folder: of the study, with its base's answers, its finished cells and looks.
        results: the rows of the study.
    """
    drawn = dict(chain(_of_study(config, folder, results), _of_threats(config, folder, results)))
    for threat in config.insides:
        drawn |= {f"{threat}-{name}": figure for name, figure in inside_figures(config, folder, threat)}
    return plots.save_figures({folder / "figures" / name: figure for name, figure in drawn.items()})


def _of_study(config: StudyConfig, folder: Path, results: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    if len(config.threats) > 1:
        yield "cross-threat", cross_threat_figure(_rows_of(results, _compared(config)))
    yield "attack-strength", Evaluation.load(folder / "base.csv").strength_figure()


def _compared(config: StudyConfig) -> list[str]:
    """The base, the null and the methods: what stands in the figures of behaviour."""
    return [BASE, RETENTION, *config.methods]


def _rows_of(results: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(results[results["method"].isin(methods)])


def _of_threats(config: StudyConfig, folder: Path, results: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    shown = _rows_of(results, _compared(config))
    splits = {str(split): by_threat(shown, str(split)) for split in dict.fromkeys(shown["split"])}
    for threat, methods in splits[SPLIT].items():
        trained = [name for name in methods if name != BASE]
        drawn = chain(_rates(threat, methods, splits), _looks(config, folder, threat, trained))
        own = shown.query("evaluated_threat == @threat and trained_threat in ('', @threat)")
        yield f"{threat}-dose", dose_figure(own, "step", where(threat))
        if threat in config.insides:
            yield f"{threat}-gap-dose", gap_figure(results.query("trained_threat == @threat"), where(threat))
        yield from ((f"{threat}-{name}", figure) for name, figure in drawn)


def _rates(
    threat: str, methods: dict[str, Measured], splits: dict[str, dict[str, dict[str, Measured]]]
) -> Iterator[tuple[str, Figure]]:
    for verdict in ("bad", "good"):
        rates = {
            name: [found.rate(f"{verdict}_rate", prompt_side) for prompt_side in PROMPT_SIDES]
            for name, found in methods.items()
        }
        title = f"How often is the answer {verdict}, with the wrapper and without?"
        yield f"{verdict}-rate", _behaviour(rates, PROMPT_SIDES, f"{verdict} rate", title, where(threat))
    rates = {name: [found[threat][name].rate("bad_rate", "wrapped") for found in splits.values()] for name in methods}
    title = "Does the repair hold on new entities, new wrapper texts and new structures?"
    yield "generalisation", _behaviour(rates, splits, "bad rate", title, f"{threat}, wrapped prompts", x_title="split")


def _behaviour(
    rates: dict[str, list[Rate]],
    columns: Iterable[str],
    metric: str,
    title: str,
    subtitle: str,
    x_title: str = "prompt",
) -> Figure:
    value, low, high = _arrays(list(rates.values()))
    return plots.behaviour(
        list(rates), list(columns), value, low, high, metric=metric, title=title, subtitle=subtitle, x_title=x_title
    )


def _arrays(rates: list[list[Rate]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, lower and upper ends, in the shape of the rates."""
    table = np.array([[(rate.value, rate.low, rate.high) for rate in row] for row in rates])
    return table[..., 0], table[..., 1], table[..., 2]


def _looks(config: StudyConfig, folder: Path, threat: str, methods: Sequence[str]) -> Iterator[tuple[str, Figure]]:
    shifts = {method: over_seeds(ResidualShift, folder, config, threat, method, "residual") for method in methods}
    for positions in ALIGNED_POSITIONS:
        yield f"residual-{positions}", residual.figure(shifts, positions=positions, subtitle=where(threat))
    masses = {method: over_seeds(AttentionDiff, folder, config, threat, method, "attention") for method in methods}
    yield "attention", attention.figure(masses, subtitle=where(threat))


def cross_threat_figure(results: pd.DataFrame) -> Figure:
    """The bad rate on wrapped prompts of every threat after training against each, a matrix a method."""
    measured = by_training(results)
    methods = in_order(method for _, method, _ in measured)
    trained = list(dict.fromkeys(threat for threat, *_ in measured if threat))
    evaluated = list(dict.fromkeys(threat for *_, threat in measured))

    def bad(place: tuple[str, str, str]) -> Rate:
        return measured[place].rate("bad_rate", "wrapped") if place in measured else NOT_MEASURED

    panels = {
        method: _arrays([[bad((row, method, column)) for column in evaluated] for row in rows])
        for method in methods
        for rows in ([""] if method == BASE else trained,)
    }
    title = "Does training against one threat protect against the others?"
    return plots.cross_threat(
        trained, evaluated, panels, title, subtitle="wrapped prompts, wrappers and items held out"
    )


def dose_figure(results: pd.DataFrame, axis: str, subtitle: str) -> Figure:
    """The bad rate on held-out wrapped prompts against the amount of training, seeds pooled, a line a method.

    Args:
        results: rows of one threat, at every dose; those of the base stand for the dose 0 of every method.
        axis: the column with the dose, `"step"` or `"pairs"`.
        subtitle: one line under the title.
    """
    counts: defaultdict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for row in results.query("metric == 'bad_rate' and prompt_side == 'wrapped' and split == @SPLIT").to_dict(
        "records"
    ):
        counts[row["method"], row[axis]].append((round(row["value"] * row["n"]), row["n"]))
    doses = sorted({dose for _, dose in counts})
    curves = {
        method: _curve([counts[method if dose else BASE, dose] for dose in doses])
        for method in in_order(method for method, _ in counts if method != BASE)
    }
    shown = {"x_title": "training pairs", "log_x": True} if axis == "pairs" else {}
    return plots.dose_response(doses, curves, DOSE_TITLES[axis], subtitle=subtitle, **shown)


def _curve(counts: list[list[tuple[int, int]]]) -> plots.Curve:
    rates = np.array([(rate.value, rate.low, rate.high) for rate in (pooled(of_dose) for of_dose in counts)])
    return rates[:, 0], rates[:, 1], rates[:, 2]


def gap_figure(results: pd.DataFrame, subtitle: str) -> Figure:
    """The share of the gap in the logit difference that each condition recovers by step, a mean over trainings.

    Args:
        results: rows of one trained threat.
        subtitle: one line under the title.
    """
    found: defaultdict[str, dict[int, list[tuple[float, ...]]]] = defaultdict(lambda: defaultdict(list))
    for row in results.query("step > 0").to_dict("records"):
        if row["metric"] != SHARE or pd.isna(row["value"]):
            continue
        found[row["method"]][row["step"]].append((row["value"], row["ci_low"], row["ci_high"]))
    steps = sorted({step for by_step in found.values() for step in by_step})
    unknown = [(float("nan"),) * 3]
    curves = {
        method: tuple(np.array([np.mean(found[method].get(step, unknown), axis=0) for step in steps]).T)
        for method in in_order(found)
    }
    title = "How much of the wrapper's effect on the answer is undone, before rates saturate?"
    unit = "share of the gap in the logit difference"
    return plots.dose_response(steps, curves, title, subtitle=subtitle, y_title=unit)
