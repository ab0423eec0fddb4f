"""The numbers of an evaluation: rates, probabilities and the metrics of a threat, each with its interval."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import nan
from typing import Any, cast

import numpy as np
import pandas as pd

from ctlens import threats as threat_registry
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.stats import Interval, bootstrap, bootstrap_mean, wilson
from ctlens.threats.base import NO_ANSWER, UNPARSED, Count, Metrics, Outcomes, Threat

RATES = {"bad_rate": "bad", "good_rate": "good", "other_rate": "other", "unparsed_rate": UNPARSED}
PROBABILITIES = ("good_probability", "bad_probability")

Number = tuple[str, str, float, int, float, float]
"""A number is a row: prompt side, metric, value, number of prompts and the two ends of its interval."""


def numbers(name: str, rows: pd.DataFrame) -> Iterator[Number]:
    """Yields every number of one threat and split, from its rows of the outcomes."""
    for (prompt_side,), answers in by(rows, "prompt_side"):
        for metric, verdict in RATES.items():
            if verdict == UNPARSED and UNPARSED not in set(answers["verdict"]):
                continue
            yield prompt_side, metric, *rate_with_interval(answers["verdict"], metric)
        for metric in PROBABILITIES:
            known = answers[metric].to_numpy()
            known = known[~np.isnan(known)]
            if len(known):
                mean, low, high = bootstrap_mean(known)
                yield prompt_side, metric, float(mean), len(known), float(low), float(high)
    if _is_threat(name):
        yield from _field_metrics(threat_registry.get(name), by_pair(rows))


def rate_with_interval(verdicts: Iterable[str], metric: str) -> tuple[float, int, float, float]:
    """Computes one of `RATES` over some answers: value, number of answers and the ends of the Wilson interval."""
    given = list(verdicts)
    count = given.count(RATES[metric])
    return count / len(given), len(given), *wilson(count, len(given))


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


def _field_metrics(threat: Threat, outcomes: Outcomes) -> Iterator[Number]:
    found = {metric: value for metric, value in threat.metrics(outcomes).items() if value is not None}
    made = [metric for metric, value in found.items() if not isinstance(value, Count)]
    intervals = dict(zip(made, _bootstrap(threat, outcomes, made), strict=True))
    for metric, value in found.items():
        if isinstance(value, Count):
            yield value.prompt_side, metric, value.rate, value.n_prompts, *wilson(value.count, value.n_prompts)
        else:
            yield "wrapped", metric, float(value), len(outcomes.kinds), *intervals[metric]


def _bootstrap(threat: Threat, outcomes: Outcomes, metrics: list[str]) -> list[Interval]:
    """Computes the intervals of several metrics, all from the same resamples."""
    if not metrics:
        return []

    def values(items: np.ndarray) -> list[float]:
        found = threat.metrics(outcomes.take(items))
        return [_value(found, metric) for metric in metrics]

    return bootstrap(values, len(outcomes.kinds))


def ratio(name: str, metric: str, after: Outcomes, before: Outcomes) -> tuple[float, float, float]:
    """Divides a metric after training by its value before, with the bootstrap interval over the pairs of both.

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

    ((low, high),) = bootstrap(quotient, len(before.kinds))
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
