"""The figures of a study, from its results and the analyses of its cells."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd

from ctlens import plots
from ctlens.analysis import AttentionDiff, ResidualShift, attention, residual
from ctlens.analysis.result import Result
from ctlens.analysis.states import ALIGNED
from ctlens.evaluation import Evaluation
from ctlens.intervals import wilson
from ctlens.pairs import ARMS
from ctlens.plots import Figure
from ctlens.tables import NOT_MEASURED, SPLIT, Measured, Rate, by_threat, by_training, in_order

R = TypeVar("R", bound=Result)

DOSE_TITLES = {
    "step": "How much training until the wrapper no longer works?",
    "pairs": "How many training pairs until the wrapper no longer works?",
}


def save_figures(folder: Path, results: pd.DataFrame) -> list[Path]:
    """Draws every figure of a study into its `figures` folder and returns the paths written.

    Rates pool the answers of all seeds; curves of analyses are averaged over seeds and their
    intervals are over pairs.

    Args:
        folder: of the study, with its base's answers and its finished cells.
        results: the rows of the study.
    """
    drawn = dict(chain(_of_study(folder, results), _of_threats(folder, results)))
    return plots.save_figures({folder / "figures" / name: figure for name, figure in drawn.items()})


def _of_study(folder: Path, results: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    if len(set(results["evaluated_threat"])) > 1:
        yield "cross-threat", cross_threat_figure(results)
    yield "attack-strength", Evaluation.load(folder / "base.csv").strength_figure()


def _of_threats(folder: Path, results: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    splits = {str(split): by_threat(results, str(split)) for split in dict.fromkeys(results["split"])}
    for threat, methods in splits[SPLIT].items():
        drawn = chain(_rates(threat, methods, splits), _looks(folder, threat, [m for m in methods if m != "none"]))
        own = results.query("evaluated_threat == @threat and trained_threat in ('', @threat)")
        yield f"{threat}-dose", dose_figure(own, "step", _where(threat))
        yield from ((f"{threat}-{name}", figure) for name, figure in drawn)


def _where(threat: str) -> str:
    return f"{threat}, wrappers and items held out"


def _rates(
    threat: str, methods: dict[str, Measured], splits: dict[str, dict[str, dict[str, Measured]]]
) -> Iterator[tuple[str, Figure]]:
    for verdict in ("bad", "good"):
        rates = {name: [found.rate(f"{verdict}_rate", arm) for arm in ARMS] for name, found in methods.items()}
        title = f"How often is the answer {verdict}, with the wrapper and without?"
        yield f"{verdict}-rate", _behaviour(rates, ARMS, f"{verdict} rate", title, _where(threat))
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


def _looks(folder: Path, threat: str, methods: Sequence[str]) -> Iterator[tuple[str, Figure]]:
    shifts = {method: _over_seeds(ResidualShift, folder, threat, method, "residual") for method in methods}
    for place in ALIGNED:
        yield f"residual-{place}", residual.figure(shifts, place=place, subtitle=_where(threat))
    masses = {method: _over_seeds(AttentionDiff, folder, threat, method, "attention") for method in methods}
    yield "attention", attention.figure(masses, subtitle=_where(threat))


def _over_seeds(kind: type[R], folder: Path, threat: str, method: str, name: str) -> R:
    """The mean over seeds of an analysis, pair by pair."""
    paths = sorted((folder / "runs").glob(f"{threat}-{method}-seed*/{name}.safetensors"))
    loaded = [kind.load(path) for path in paths]
    arrays = [f.name for f in dataclasses.fields(loaded[0]) if isinstance(getattr(loaded[0], f.name), np.ndarray)]
    return dataclasses.replace(loaded[0], **{a: np.mean([getattr(r, a) for r in loaded], axis=0) for a in arrays})


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
        for rows in ([""] if method == "none" else trained,)
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
    counts: defaultdict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    for row in results.query("metric == 'bad_rate' and arm == 'wrapped' and split == @SPLIT").to_dict("records"):
        counts[row["method"], row[axis]][0] += round(row["value"] * row["n"])
        counts[row["method"], row[axis]][1] += row["n"]
    doses = sorted({dose for _, dose in counts})
    curves = {
        method: _curve([counts[method if dose else "none", dose] for dose in doses])
        for method in in_order(method for method, _ in counts if method != "none")
    }
    shown = {"x_title": "training pairs", "log_x": True} if axis == "pairs" else {}
    return plots.dose_response(doses, curves, DOSE_TITLES[axis], subtitle=subtitle, **shown)


def _curve(counts: list[list[int]]) -> plots.Curve:
    ends = np.array([wilson(count, n) for count, n in counts])
    return np.array([count / n for count, n in counts]), ends[:, 0], ends[:, 1]
