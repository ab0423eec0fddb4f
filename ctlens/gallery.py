"""The figures of a study, from its results and the analyses of its cells."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd

from ctlens import plots
from ctlens.analysis import AttentionDiff, ResidualShift, attention, residual
from ctlens.analysis.result import Result
from ctlens.intervals import wilson
from ctlens.pairs import ARMS
from ctlens.plots import Figure
from ctlens.report import Rate, summary_table

R = TypeVar("R", bound=Result)


def save_figures(folder: Path, results: pd.DataFrame) -> list[Path]:
    """Draws every figure of a study into its `figures` folder and returns the paths written.

    Rates pool the answers of all seeds; curves of analyses are averaged over seeds and their
    intervals are over pairs.
    """
    summary = summary_table(results)
    drawn = {
        f"{threat}-{name}": figure
        for threat in dict.fromkeys(summary["threat"])
        for name, figure in _figures(folder, results, summary.query("threat == @threat"), str(threat))
    }
    return [path for name, figure in drawn.items() for path in plots.save_figure(figure, folder / "figures" / name)]


def _figures(folder: Path, results: pd.DataFrame, summary: pd.DataFrame, threat: str) -> Iterator[tuple[str, Figure]]:
    trained = [str(method) for method in summary["method"] if method != "none"]
    shifts = {method: _over_seeds(ResidualShift, folder, threat, method, "residual") for method in trained}
    masses = {method: _over_seeds(AttentionDiff, folder, threat, method, "attention") for method in trained}
    where = f"{threat}, wrappers and items held out"
    yield "bad-rate", _behaviour(summary, "bad", where)
    yield "good-rate", _behaviour(summary, "good", where)
    yield "dose", _dose(results, trained, threat, where)
    for place in residual.PLACES:
        yield f"residual-{place}", residual.figure(shifts, place=place, subtitle=where)
    yield "attention", attention.figure(masses, subtitle=where)


def _over_seeds(kind: type[R], folder: Path, threat: str, method: str, name: str) -> R:
    """The mean over seeds of an analysis, pair by pair."""
    paths = sorted((folder / "runs").glob(f"{threat}-{method}-seed*/{name}.safetensors"))
    loaded = [kind.load(path) for path in paths]
    arrays = [f.name for f in dataclasses.fields(loaded[0]) if isinstance(getattr(loaded[0], f.name), np.ndarray)]
    return dataclasses.replace(loaded[0], **{a: np.mean([getattr(r, a) for r in loaded], axis=0) for a in arrays})


def _behaviour(summary: pd.DataFrame, verdict: str, where: str) -> Figure:
    rates: list[list[Rate]] = [[row[f"{verdict} {arm}"] for arm in ARMS] for row in summary.to_dict("records")]
    value, low, high = (
        np.array([[getattr(rate, end) for rate in row] for row in rates]) for end in ("value", "low", "high")
    )
    methods = [str(method) for method in summary["method"]]
    title = f"How often is the answer {verdict}, with the wrapper and without?"
    return plots.behaviour(methods, ARMS, value, low, high, metric=f"{verdict} rate", title=title, subtitle=where)


def _dose(results: pd.DataFrame, methods: list[str], threat: str, where: str) -> Figure:
    counts: defaultdict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    for row in results.query("evaluated_threat == @threat and metric == 'bad_rate' and arm == 'wrapped'").to_dict(
        "records"
    ):
        if row["trained_threat"] in ("", threat):
            counts[row["method"], row["step"]][0] += round(row["value"] * row["n"])
            counts[row["method"], row["step"]][1] += row["n"]
    steps = sorted({step for _, step in counts})
    start = counts["none", 0]
    curves = {method: _curve([start, *(counts[method, step] for step in steps[1:])]) for method in methods}
    return plots.dose_response(steps, curves, "How much training until the wrapper no longer works?", subtitle=where)


def _curve(counts: list[list[int]]) -> plots.Curve:
    ends = np.array([wilson(count, n) for count, n in counts])
    return np.array([count / n for count, n in counts]), ends[:, 0], ends[:, 1]
