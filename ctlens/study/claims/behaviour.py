"""Claims about answers: each a difference of bad rates on wrapped prompts, wrappers and items held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd

from ctlens.core.stats import LEVEL, difference
from ctlens.plots import label
from ctlens.study import conditions
from ctlens.study.claims.claim import Claim, make, together
from ctlens.study.claims.estimates import NOTHING, Estimate, spanned
from ctlens.study.conditions import INTERNAL, RETENTION
from ctlens.study.config import StudyConfig
from ctlens.study.looks import EQUAL_STEPS
from ctlens.study.results import SPLIT, Rate, pooled

NAN = float("nan")
BCT = "bct"
HALF = 0.5
BEYOND_INTERNAL = ("prefill", "frustration")
"""Where internal methods are said to fail and BCT not (the code and cards of the stack paper)."""
ALL_THREATS = "all"


def behaviour_claims(config: StudyConfig, results: pd.DataFrame) -> Iterator[Claim]:
    """Every claim about answers."""
    wrapped = Wrapped(results)
    for threat in config.threats:
        yield _repair(config, wrapped, threat)
    for threat in BEYOND_INTERNAL:
        if threat in config.threats and BCT in config.methods:
            yield _output_only(config, wrapped, threat)
    if len(config.threats) > 1:
        yield _transfer(config, wrapped)


class Wrapped:
    """The bad rates on wrapped prompts of every training at its last step."""

    def __init__(self, results: pd.DataFrame) -> None:
        rows = results[(results["split"] == SPLIT) & (results["trained_threat"] != "")]
        rows = rows.query("metric == 'bad_rate' and prompt_side == 'wrapped'")
        last = rows.groupby(["trained_threat", "method", "seed", "organism"])["step"].transform("max")
        self.rows = rows[rows["step"] == last]

    def of(self, trained: str, method: str, evaluated: str) -> dict[tuple[int, int], tuple[int, int]]:
        """By training, how many of how many answers are bad."""
        found = self.rows.query("trained_threat == @trained and method == @method and evaluated_threat == @evaluated")
        return {
            (row["organism"], row["seed"]): (round(row["value"] * row["n"]), int(row["n"]))
            for row in found.to_dict("records")
        }

    def rate(self, trained: str, method: str, evaluated: str) -> Rate:
        """The share over trainings."""
        return pooled(list(self.of(trained, method, evaluated).values()))

    def gap(self, trained: str, method: str, other: str, evaluated: str, level: float = LEVEL) -> Estimate:
        """One method's rate less another's, over their common trainings."""
        one, two = self.of(trained, method, evaluated), self.of(trained, other, evaluated)
        common = [training for training in one if training in two]
        if not common:
            return NOTHING
        shares = {t: one[t][0] / one[t][1] - two[t][0] / two[t][1] for t in common}
        rates = [pooled([counts[t] for t in common]) for counts in (one, two)]
        ends = difference(*(number for rate in rates for number in (round(rate.value * rate.n), rate.n)), level=level)
        return spanned(rates[0].value - rates[1].value, ends, rates[0].n, shares, level)

    def left(self, trained: str, method: str) -> Estimate:
        """The bad answers that a method leaves, as a share of those under retention alone, a rate taken as known."""
        before = self.rate(trained, RETENTION, trained).value
        counts = self.of(trained, method, trained)
        if not before > 0 or not counts:
            return NOTHING
        rate, shares = pooled(list(counts.values())), {t: count / n / before for t, (count, n) in counts.items()}
        return spanned(rate.value / before, (rate.low / before, rate.high / before), rate.n, shares, LEVEL)


def _weakest(found: Mapping[str, Estimate]) -> str:
    """The name on which it hangs that all lie above 0: one that clearly does not, or else the one nearest to it."""
    below = [name for name, one in found.items() if one.high <= 0]
    return min(below or found, key=lambda name: found[name].high if below else found[name].low)


def _repair(config: StudyConfig, wrapped: Wrapped, threat: str) -> Claim:
    """The method that repairs least, against retention alone."""
    gaps = {name: wrapped.gap(threat, RETENTION, name, threat) for name in config.methods}
    least = _weakest(gaps)
    rates = {name: wrapped.rate(threat, name, threat).percent for name in config.methods}
    return make(
        "repair",
        "every method leaves fewer bad answers than retention alone",
        threat, EQUAL_STEPS, gaps[least],
        statistic=f"bad rate under retention alone, less that under the weakest method, {label(least)}",
        unit="share of answers",
        null=NAN, null_words="",
        details=f"bad rates: {_listed(rates)}; retention alone {wrapped.rate(threat, RETENTION, threat).percent}",
    )  # fmt: skip


def _output_only(config: StudyConfig, wrapped: Wrapped, threat: str) -> Claim:
    """Whether the best internal method leaves more than half of the bad answers, and BCT less than half."""
    internal = [name for name in config.methods if conditions.get(name).level == INTERNAL]
    left = {name: wrapped.left(threat, name) for name in (*internal, BCT)}
    margins = {name: _shifted(found, -1 if name == BCT else 1) for name, found in left.items()}
    weakest = _weakest(margins)
    rates = {name: wrapped.rate(threat, name, threat).percent for name in (*internal, BCT)}
    return make(
        "output_only",
        f"{together(internal)} fail where BCT does not",
        threat, EQUAL_STEPS, margins[weakest] if internal else NOTHING,
        statistic="bad answers left, as a share of those under retention alone: how far every internal method lies "
        f"above one half, and BCT below it; the closest is {label(weakest)}",
        unit="share of bad answers",
        null=wrapped.rate(threat, RETENTION, threat).value, null_words="the bad rate under retention alone is {null}",
        details=f"bad rates: {_listed(rates)}",
    )  # fmt: skip


def _shifted(found: Estimate, sign: int) -> Estimate:
    """How far a share lies above one half, or below it for -1."""
    low, high = sorted((sign * (found.low - HALF), sign * (found.high - HALF)))
    return replace(found, value=sign * (found.value - HALF), low=low, high=high)


def _transfer(config: StudyConfig, wrapped: Wrapped) -> Claim:
    """The clearest change on a threat that was not trained on, corrected for how many were looked at."""
    places = [(t, m, e) for t, m, e in product(config.threats, config.methods, config.threats) if t != e]
    gaps = {(t, m, e): wrapped.gap(t, RETENTION, m, e, level=1 - (1 - LEVEL) / len(places)) for t, m, e in places}
    place = max(gaps, key=lambda at: max(gaps[at].low, -gaps[at].high))
    found, (trained, method, evaluated) = gaps[place], place
    if found.value < 0:
        found = Estimate(-found.value, -found.high, -found.low, found.n, found.over)
    clear = sum(gap.low > 0 or gap.high < 0 for gap in gaps.values())
    means = {m: 100 * np.mean([gap.value for at, gap in gaps.items() if at[1] == m]) for m in config.methods}
    return make(
        "transfer",
        "training against one threat moves another one",
        ALL_THREATS, EQUAL_STEPS, found,
        statistic=f"clearest change of a bad rate, against retention alone: {evaluated}, {label(method)} on {trained}",
        unit="share of answers",
        null=NAN, null_words="",
        details=f"{clear} of {len(places)} changes are clear of 0 with Bonferroni's correction; "
        f"bad answers fall on average by {_listed({name: f'{value:.1f}' for name, value in means.items()})} points",
    )  # fmt: skip


def _listed(values: dict[str, str]) -> str:
    return ", ".join(f"{label(name)} {value}" for name, value in values.items())
