"""The page's part on behaviour: per threat, a line per condition, compared with the control and the base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from ctlens.core.labels import BASE, CLEAN_BORN
from ctlens.core.rates import NOT_MEASURED, Rate
from ctlens.study import conditions
from ctlens.study.results import (
    SPLIT,
    VERDICT_RATES,
    ConditionRates,
    ResultRow,
    by_threat,
    final_rows,
    in_order,
)

_BESIDE_METHODS = {
    *(BASE, CLEAN_BORN),
    *conditions.DERIVED,
    *conditions.CONTROLS,
    *conditions.CROSSED_CONDITIONS,
    *conditions.ABLATED,
}
_REFERENCES = {"retention": "retention-only training", BASE: "the base model"}
COMPARISON_WORDS = {
    "lower than": "lower",
    "higher than": "higher",
    "not distinguishable from": "no clear difference",
    "not compared with": "–",
}
MetricTexts = dict[tuple[str, str], dict[str, str]]
"""By metric and prompt side, a text per condition."""


@dataclass(frozen=True)
class ConditionLine:
    """One condition on one threat, at its last step on held-out prompts.

    Attributes:
        condition: its name.
        found: its rates.
        against: how its bad rate on wrapped prompts compares with that of the reference, a key of `COMPARISON_WORDS`.
        benign: how its good rate on benign twins compares with the base's, a key of `COMPARISON_WORDS`.
        gap: bad rate on wrapped minus on clean prompts, in points.
        held: the bad rate on wrapped prompts of each split.
    """

    condition: str
    found: ConditionRates
    against: str
    benign: str
    gap: float
    held: tuple[Rate, ...]

    @property
    def is_beside_methods(self) -> bool:
        """True of the base, a control and a crossed condition, which are listed beside the methods."""
        return self.condition in _BESIDE_METHODS


@dataclass(frozen=True)
class ThreatRates:
    """The numbers of one threat, as the page lays them out.

    Attributes:
        lines: a line per condition, the base and the controls first.
        reference: the control that the methods are compared with.
        metrics: the field's metrics.
    """

    lines: tuple[ConditionLine, ...]
    reference: str
    metrics: MetricTexts

    def line(self, condition: str) -> ConditionLine | None:
        """The line of a condition; None where it was not trained on this threat."""
        return next((line for line in self.lines if line.condition == condition), None)

    @property
    def reference_name(self) -> str:
        """The reference, in words."""
        return _REFERENCES[self.reference]

    @property
    def trained(self) -> list[ConditionLine]:
        """The lines of the methods, without the controls."""
        return [line for line in self.lines if not line.is_beside_methods]

    @property
    def lower(self) -> list[ConditionLine]:
        """The methods that leave fewer bad answers to wrapped prompts than the reference does."""
        return [line for line in self.trained if line.against == "lower than"]

    @property
    def measured(self) -> list[str]:
        """The conditions with a value of one of the field's metrics."""
        return in_order(condition for values in self.metrics.values() for condition in values)


def compared_conditions(threats: Mapping[str, ThreatRates]) -> list[str]:
    """The conditions of the table of methods and threats: the base, its twin, retention alone, and the methods."""
    methods = [line.condition for rates in threats.values() for line in rates.trained]
    known = {line.condition for rates in threats.values() for line in rates.lines}
    return in_order(known & {*_REFERENCES, CLEAN_BORN, *methods})


def splits(results: pd.DataFrame) -> list[str]:
    """The splits that were evaluated, in the order of the rows."""
    return [str(split) for split in dict.fromkeys(results["split"])]


def rates_by_threat(results: pd.DataFrame) -> dict[str, ThreatRates]:
    """Computes the numbers of every threat.

    Args:
        results: rows as in `results.csv`.

    Raises:
        CtlensError: they hold no rate on the headline split.
    """
    on = [by_threat(results, split) for split in splits(results)]
    metrics = _field_metrics(results)
    return {
        name: _threat(conditions, [found.get(name, {}) for found in on], metrics[name])
        for name, conditions in by_threat(results).items()
    }


def _threat(
    measured: dict[str, ConditionRates], on: list[dict[str, ConditionRates]], metrics: MetricTexts
) -> ThreatRates:
    reference = next((name for name in _REFERENCES if name in measured), BASE)

    def rate(condition: str, metric: str, prompt_side: str) -> Rate:
        return measured[condition].rate(metric, prompt_side) if condition in measured else NOT_MEASURED

    def line(condition: str) -> ConditionLine:
        bad = rate(condition, "bad_rate", "wrapped")
        benign = rate(condition, "good_rate", "benign")
        held = [found[condition].rate("bad_rate", "wrapped") if condition in found else NOT_MEASURED for found in on]
        return ConditionLine(
            condition=condition,
            found=measured[condition],
            against=bad.against(rate(reference, "bad_rate", "wrapped")),
            benign=benign.against(rate(BASE, "good_rate", "benign")),
            gap=100 * (bad.value - rate(condition, "bad_rate", "clean").value),
            held=tuple(held),
        )

    return ThreatRates(tuple(map(line, measured)), reference, metrics)


def _field_metrics(results: pd.DataFrame) -> dict[str, MetricTexts]:
    """Per threat, the metrics that are none of `VERDICT_RATES`."""
    seeds: dict[str, dict[tuple[str, str], dict[str, list[ResultRow]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in final_rows(results, SPLIT):
        if row["metric"] not in VERDICT_RATES and not pd.isna(row["value"]):
            seeds[row["evaluated_threat"]][row["metric"], row["prompt_side"]][row["condition"]].append(row)
    cells: dict[str, MetricTexts] = defaultdict(dict)
    for threat, found in seeds.items():
        cells[threat] = {
            metric: {name: _seeds_in_words(rows) for name, rows in by_condition.items()}
            for metric, by_condition in found.items()
        }
    return cells


def _seeds_in_words(rows: list[ResultRow]) -> str:
    """The value of one seed with its interval, or the mean of several with the lowest and highest."""
    values = [row["value"] for row in rows]
    if len(values) > 1:
        return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"
    low = rows[0]["ci_low"]
    high = rows[0]["ci_high"]
    return f"{values[0]:.2f}" if pd.isna(low) else f"{values[0]:.2f} [{low:.2f}, {high:.2f}]"
