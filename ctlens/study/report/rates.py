"""What the page says of behaviour: per threat, a line per method, compared with the control and the base."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import pandas as pd

from ctlens.core.labels import BASE
from ctlens.study import conditions
from ctlens.study.conditions import PERTURBED
from ctlens.study.results import (
    NOT_MEASURED,
    RATES,
    SPLIT,
    Measured,
    Rate,
    Row,
    by_threat,
    final_rows,
    in_order,
)

BESIDE = {BASE, PERTURBED, *conditions.CONTROLS, *conditions.CROSSED_CONDITIONS, *conditions.ABLATED}
REFERENCES = {"retention": "retention-only training", BASE: "the base model"}
WORDS = {
    "lower than": "lower",
    "higher than": "higher",
    "not distinguishable from": "no clear difference",
    "not compared with": "–",
}
Cells = dict[tuple[str, str], dict[str, str]]
"""By metric and prompt side, a text per method."""


@dataclass(frozen=True)
class Line:
    """One method on one threat, at its last step on held-out prompts.

    Attributes:
        method: its name.
        found: its rates.
        against: how its bad rate on wrapped prompts compares with that of the reference, a key of `WORDS`.
        benign: how its good rate on benign twins compares with the base's, a key of `WORDS`.
        gap: bad rate on wrapped minus on clean prompts, in points.
        held: the bad rate on wrapped prompts of each split.
    """

    method: str
    found: Measured
    against: str
    benign: str
    gap: float
    held: tuple[Rate, ...]

    @property
    def is_beside(self) -> bool:
        """Whether it stands beside the methods: the base, a control or a crossed condition."""
        return self.method in BESIDE


@dataclass(frozen=True)
class Threat:
    """What was measured on one threat.

    Attributes:
        lines: a line per method, the base and the controls first.
        reference: the control that the methods are compared with.
        metrics: the field's metrics.
    """

    lines: tuple[Line, ...]
    reference: str
    metrics: Cells

    @property
    def reference_name(self) -> str:
        """The reference, in words."""
        return REFERENCES[self.reference]

    @property
    def trained(self) -> list[Line]:
        """The lines of the methods, without the controls."""
        return [line for line in self.lines if not line.is_beside]

    @property
    def lower(self) -> list[Line]:
        """The methods that leave fewer bad answers to wrapped prompts than the reference does."""
        return [line for line in self.trained if line.against == "lower than"]

    @property
    def measured(self) -> list[str]:
        """The methods with a value of one of the field's metrics."""
        return in_order(method for values in self.metrics.values() for method in values)


def splits(results: pd.DataFrame) -> list[str]:
    """The kinds of prompts that were evaluated, as they come."""
    return [str(split) for split in dict.fromkeys(results["split"])]


def rates_by_threat(results: pd.DataFrame) -> dict[str, Threat]:
    """Per threat, what is said of it.

    Args:
        results: rows as in `results.csv`.

    Raises:
        CtlensError: they hold no rate on the headline split.
    """
    on = [by_threat(results, split) for split in splits(results)]
    metrics = _field_metrics(results)
    return {
        name: _threat(methods, [found.get(name, {}) for found in on], metrics[name])
        for name, methods in by_threat(results).items()
    }


def _threat(methods: dict[str, Measured], on: list[dict[str, Measured]], metrics: Cells) -> Threat:
    reference = next((name for name in REFERENCES if name in methods), BASE)

    def rate(method: str, metric: str, prompt_side: str) -> Rate:
        return methods[method].rate(metric, prompt_side) if method in methods else NOT_MEASURED

    def line(method: str) -> Line:
        bad, benign = rate(method, "bad_rate", "wrapped"), rate(method, "good_rate", "benign")
        held = (found[method].rate("bad_rate", "wrapped") if method in found else NOT_MEASURED for found in on)
        return Line(
            method,
            methods[method],
            bad.against(rate(reference, "bad_rate", "wrapped")),
            benign.against(rate(BASE, "good_rate", "benign")),
            100 * (bad.value - rate(method, "bad_rate", "clean").value),
            tuple(held),
        )

    return Threat(tuple(map(line, methods)), reference, metrics)


def _field_metrics(results: pd.DataFrame) -> dict[str, Cells]:
    """Per threat, the metrics that are not one of `RATES`."""
    seeds: dict[str, dict[tuple[str, str], dict[str, list[Row]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in final_rows(results, SPLIT):
        if row["metric"] not in RATES and not pd.isna(row["value"]):
            seeds[row["evaluated_threat"]][row["metric"], row["prompt_side"]][row["method"]].append(row)
    cells: dict[str, Cells] = defaultdict(dict)
    for threat, found in seeds.items():
        cells[threat] = {
            place: {name: _over_seeds(rows) for name, rows in by_method.items()} for place, by_method in found.items()
        }
    return cells


def _over_seeds(rows: list[Row]) -> str:
    values = [row["value"] for row in rows]
    if len(values) > 1:
        return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"
    low, high = rows[0]["ci_low"], rows[0]["ci_high"]
    return f"{values[0]:.2f}" if pd.isna(low) else f"{values[0]:.2f} [{low:.2f}, {high:.2f}]"
