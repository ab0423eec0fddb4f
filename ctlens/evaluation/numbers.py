"""The numbers of an evaluation: rates, probabilities and the metrics of a threat, each with its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import nan
from typing import Any, cast

import numpy as np
import pandas as pd

from ctlens import threats as threat_registry
from ctlens.core.clusters import (
    Clusters,
    clustered_mean,
    clustered_rate,
    clustered_statistic,
    effective_size,
    half_width,
    influences,
    paired_difference,
)
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.stats import LEVEL, wilson_of_share
from ctlens.data.pairs import CLUSTER_KINDS
from ctlens.threats.base import NO_ANSWER, UNPARSED, Count, Metrics, Outcomes, switches

RATES = {"bad_rate": "bad", "good_rate": "good", "other_rate": "other", "unparsed_rate": UNPARSED}
PROBABILITIES = ("good_probability", "bad_probability")

Number = tuple[str, str, float, int, float, float, float]
"""A number is a row: prompt side, metric, value, prompts, of a rate how many independent ones, ends of its interval."""


def numbers(name: str, rows: pd.DataFrame) -> Iterator[Number]:
    """Yields every number of one threat and split, from its rows of the outcomes."""
    for (prompt_side,), answers in by(rows, "prompt_side"):
        for metric, verdict in RATES.items():
            if verdict == UNPARSED and UNPARSED not in set(answers["verdict"]):
                continue
            yield prompt_side, metric, *rate_with_interval(answers, metric)
        for metric in PROBABILITIES:
            known = answers.dropna(subset=[metric])
            if len(known):
                mean, low, high = clustered_mean(known[metric].to_numpy(), clusters(known))
                ends = (float(low.clip(0, 1)), float(high.clip(0, 1)))
                yield prompt_side, metric, float(mean), len(known), nan, *ends
    if _is_threat(name):
        yield from _field_metrics(threat_registry.get(name).metrics, rows)


def switch_numbers(rows: pd.DataFrame) -> Iterator[Number]:
    """Yields the directed switch rates of one threat and split, whatever its own metrics are."""
    yield from _field_metrics(switches, rows)


def rate_with_interval(answers: pd.DataFrame, metric: str) -> tuple[float, int, float, float, float]:
    """Computes one of `RATES` over some answers: value, answers, how many independent ones, ends of its interval."""
    flags = (answers["verdict"] == RATES[metric]).to_numpy()
    share, effective, low, high = clustered_rate(flags, clusters(answers))
    return share, len(flags), effective, low, high


def difference_with_interval(
    ones: Sequence[pd.DataFrame], others: Sequence[pd.DataFrame], metric: str, level: float = LEVEL
) -> tuple[float, float, float]:
    """Subtracts a rate from the same rate of other models' answers to the same prompts, with its paired interval.

    Args:
        ones, others: the answers of one or more models, and of as many to compare with; all to the same prompts, in
            the same order.
        metric: one of `RATES`.
        level: of confidence.
    """
    counts = [np.stack([(rows["verdict"] == RATES[metric]).to_numpy() for rows in side]) for side in (ones, others)]
    gained = (counts[0] & ~counts[1]).mean(0)
    lost = (counts[1] & ~counts[0]).mean(0)
    ends = paired_difference(gained, lost, clusters(ones[0]), level)
    return float((gained - lost).mean()), *ends


def clusters(answers: pd.DataFrame) -> Clusters:
    """Which of some answers go together: those about one topic, and those under one wrapper text."""
    return Clusters.of({name: answers[name].tolist() for name in CLUSTER_KINDS})


def clusters_by_pair(rows: pd.DataFrame) -> Clusters:
    """Which pairs of one threat and split go together, in the order of `by_pair`."""
    return clusters(rows.drop_duplicates("item").sort_values("item"))


def by(table: pd.DataFrame, *columns: str) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Yields the parts of a table that have equal values in some columns, with these values, in order of appearance."""
    yield from cast(Any, table.groupby(list(columns), sort=False))


def by_pair(rows: pd.DataFrame) -> Outcomes:
    """Turns the rows of one threat and split, a row per answer, into outcomes with one entry per pair."""
    verdicts = rows.pivot(index="item", columns="prompt_side", values="verdict").fillna(NO_ANSWER)
    pairs = rows.drop_duplicates("item").set_index("item").loc[verdicts.index]
    answers = rows.pivot(index="item", columns="prompt_side", values="answer").fillna(NO_ANSWER)
    return Outcomes(
        verdicts=_by_side(verdicts),
        strengths=pairs["strength"].to_numpy(),
        kinds=np.array(pairs["kind"].tolist(), dtype=str),
        answers=_by_side(answers),
    )


def _by_side(table: pd.DataFrame) -> dict[str, np.ndarray]:
    return {str(prompt_side): np.array(given.tolist(), dtype=str) for prompt_side, given in table.items()}


def _field_metrics(metrics: Callable[[Outcomes], Metrics], rows: pd.DataFrame) -> Iterator[Number]:
    outcomes = by_pair(rows)
    grid = clusters_by_pair(rows)
    found = {metric: value for metric, value in metrics(outcomes).items() if value is not None}
    every = np.arange(len(grid))
    without = [metrics(outcomes.take(np.delete(every, item))) for item in every]
    moved = influences(np.array([[_value(some, metric) for metric in found] for some in without], dtype=float))
    for number, (metric, value) in enumerate(found.items()):
        if isinstance(value, Count):
            effective = effective_size(moved[:, number], grid, value.n_prompts)
            ends = wilson_of_share(value.rate, effective)
            yield value.prompt_side, metric, value.rate, value.n_prompts, effective, *ends
        else:
            reach = float(half_width(moved[:, number], grid))
            yield "wrapped", metric, float(value), len(grid), nan, float(value) - reach, float(value) + reach


def ratio(name: str, metric: str, after: Outcomes, before: Outcomes, grid: Clusters) -> tuple[float, float, float]:
    """Divides a metric after training by its value before, with its interval over the pairs of both.

    Raises:
        CtlensError: the metric is unknown or has no value, or is 0 before training.
    """
    known = _metrics(name, before)
    if metric not in known:
        raise unknown("metric", metric, known)
    value = _value(_metrics(name, after), metric)
    below = _value(known, metric)
    if np.isnan([value, below]).any() or not below:
        raise CtlensError(
            f"{metric} has no ratio: it is {below:g} before training and {value:g} after it: take a metric above 0."
        )

    def quotient(items: np.ndarray) -> list[float]:
        value = _value(_metrics(name, after.take(items)), metric)
        below = _value(_metrics(name, before.take(items)), metric)
        return [value / below if below else nan]

    ((low, high),) = clustered_statistic(quotient, len(grid), grid)
    return value / below, low, high


def _metrics(name: str, outcomes: Outcomes) -> Metrics:
    """Collects the rates of the wrapped prompts, and the metrics of the threat called `name` if there is one."""
    rates = {metric: outcomes.count(verdict, "wrapped") for metric, verdict in RATES.items()}
    return {**rates, **(threat_registry.get(name).metrics(outcomes) if _is_threat(name) else {})}


def _is_threat(name: str) -> bool:
    """Tells the name of a threat from that of a user's own pairs."""
    return name in (*threat_registry.names(), *threat_registry.natural_names())


def _value(found: Metrics, metric: str) -> float:
    value = found.get(metric)
    if value is None:
        return nan
    return value.rate if isinstance(value, Count) else float(value)
