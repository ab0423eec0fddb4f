"""The result of an evaluation: one row per answer, with the tables and figures that are made of these rows."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctlens import plots
from ctlens.core.clusters import clustered_ratio
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.files import atomic_file
from ctlens.core.labels import BASE
from ctlens.core.rates import NOT_MEASURED, Rate
from ctlens.core.reading import number_or_nan, read_columns, typed, whole_number
from ctlens.data.pairs import CLUSTER_KINDS
from ctlens.evaluation.numbers import (
    PROBABILITIES,
    RATES,
    by,
    by_pair,
    clusters,
    clusters_by_pair,
    difference_with_interval,
    numbers,
    rate_with_interval,
    ratio,
    switch_numbers,
)
from ctlens.plots import Figure

_GROUPS = ("evaluated_threat", "split")
_COUNTED = ("item", "strength")
OUTCOME_COLUMNS = (
    *_GROUPS,
    "prompt_side",
    "item",
    "pair",
    "kind",
    "strength",
    "topic",
    "wrapper",
    "answer",
    "verdict",
    *PROBABILITIES,
)
RATE_COLUMNS = (*_GROUPS, "prompt_side", "metric", "value", "n_prompts", "n_effective", "ci_low", "ci_high")
OWN_PAIRS = "pairs"
"""A table gives this as the threat of a user's own pairs."""
_OTHER_PAIRS = "a {} needs evaluations of the same pairs: take equal splits, n_prompts and seed."
# Tables of an earlier ctlens have these names of columns.
_RENAMED_COLUMNS = {"arm": "prompt_side", "method": "condition", "n": "n_prompts", "pairs": "n_pairs"}


@dataclass(frozen=True)
class Evaluation:
    """An evaluation holds the answers of a model and their verdicts.

    Attributes:
        outcomes: one row per answer: `evaluated_threat, split, prompt_side, item, pair, kind, strength, topic,
            wrapper, answer, verdict, good_probability, bad_probability`. `item` numbers the pairs of a threat and
            split, `pair` is a digest of its prompts and answers, `kind` and `strength` are its
            labels (empty and 0 for a pair without them), `topic` and `wrapper` say which pairs go together in an
            interval (see `ctlens.core.clusters`). The probabilities are those of the first token of the
            good and of the bad answer: NaN for an answer that the prompt does not name, both NaN if the two
            begin with the same token; for a multiple-choice question, their shares among the options. Do not
            change the table: numbers are computed from it once and kept.
    """

    outcomes: pd.DataFrame

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulates one row per number.

        The columns are `evaluated_threat, split, prompt_side, metric, value, n_prompts, n_effective, ci_low, ci_high`.
        The metrics per threat, split and prompt side are `bad_rate`, `good_rate` and `other_rate` (answers that are
        neither), and the means of `good_probability` and `bad_probability`, where known. Then the threat's own
        metrics: one that is a share of one prompt side's answers stands under that prompt side, one made of several
        shares under `wrapped`. Intervals are over topics and wrapper texts, see `ctlens.core.clusters`: of a share
        Wilson's, with `n_effective` prompts in place of `n_prompts`; of another number Student's (NaN if too few
        pairs carry it). With fewer than five topics or wrapper texts there is none.
        """
        return self._table.copy()

    def summary(self) -> pd.DataFrame:
        """Tabulates where the attack works and what stays good: a row per threat and split, for a reader.

        The columns are `threat`, `split`, `bad wrapped`, `good clean` and `good benign`; the last three hold `Rate`s,
        which print as `84% [76–90]`, and as a dash where there is no such prompt.
        """
        rows = []
        for (threat, split), part in by(self.outcomes, *_GROUPS):
            shown: dict[str, Any] = {"threat": threat, "split": split}
            for verdict, prompt_side in (("bad", "wrapped"), ("good", "clean"), ("good", "benign")):
                answers = _select(part, prompt_side=prompt_side)
                shown[f"{verdict} {prompt_side}"] = _rate(answers, verdict) if len(answers) else NOT_MEASURED
            rows.append(shown)
        return pd.DataFrame(rows)

    def metrics(self) -> pd.DataFrame:
        """Tabulates the threats' own metrics for a reader: `threat`, `split`, `metric`, `value` and its interval."""
        given = ["threat", "split", "metric", "prompt_side", "value", "n_prompts", "ci_low", "ci_high"]
        own = pd.DataFrame(self._table[~self._table["metric"].isin([*RATES, *PROBABILITIES])])
        return own.rename(columns={"evaluated_threat": "threat"}).filter(given)

    def switches(self) -> pd.DataFrame:
        """Tabulates the directed switch rates of every threat, see `ctlens.threats.base.switches`.

        The columns are those of `to_dataframe`, and so are the numbers of threats that have these among their metrics.
        There are none where only one of a pair's two prompts was asked.
        """
        rows = [
            (threat, split, *number)
            for (threat, split), part in by(self.outcomes, *_GROUPS)
            for number in switch_numbers(part)
        ]
        return pd.DataFrame(rows, columns=list(RATE_COLUMNS))

    def __repr__(self) -> str:
        return f"Evaluation({len(self.outcomes)} answers)\n{self.summary().map(str).to_string(index=False)}"

    def _repr_html_(self) -> str:
        return self.summary().map(str).to_html(index=False, border=0)

    @cached_property
    def _table(self) -> pd.DataFrame:
        rows = [
            (threat, split, *number)
            for (threat, split), part in by(self.outcomes, *_GROUPS)
            for number in numbers(threat, part)
        ]
        return pd.DataFrame(rows, columns=list(RATE_COLUMNS))

    def rate(self, metric: str, prompt_side: str, threat: str | None = None, split: str | None = None) -> float:
        """Returns one number, for example `rate("bad_rate", "wrapped")`.

        Threat and split have to be named if there are several.

        Raises:
            CtlensError: the evaluation has no such number, or several.
        """
        for column, name in (("metric", metric), ("prompt_side", prompt_side)):
            known = list(dict.fromkeys(self._table[column]))
            if name not in known:
                raise unknown(column.replace("_", " "), name, known)
        found = _select(self._table, metric=metric, prompt_side=prompt_side, evaluated_threat=threat, split=split)
        if len(found) != 1:
            raise CtlensError(
                f"{len(found)} numbers are called {metric} on {prompt_side}: "
                "name one prompt side, one threat and one split."
            )
        return float(found["value"].iloc[0])

    def ratio(
        self, before: Evaluation, metric: str, threat: str, split: str | None = None
    ) -> tuple[float, float, float]:
        """Divides a metric by its value before training, and gives the ends of its interval over the pairs.

        With `metric="brr"` this is the BRR ratio of Chua et al. (arXiv 2403.05518); 0 is perfect, 1 is no change.

        Args:
            before: the evaluation of the untrained model on the same pairs.
            metric: a metric of the threat, or one of `bad_rate`, `good_rate` and `other_rate` on wrapped prompts.
            threat: the name of the threat.
            split: the split; needed if several were evaluated.

        Raises:
            CtlensError: the evaluations are of different pairs, or the metric is unknown, has no
                value or is 0 before training.
        """
        rows = [evaluation._rows_of(threat, split) for evaluation in (self, before)]
        if _asked(rows[0]) != _asked(rows[1]):
            raise CtlensError(_OTHER_PAIRS.format("ratio"))
        return ratio(threat, metric, by_pair(rows[0]), by_pair(rows[1]), clusters_by_pair(rows[0]))

    def difference(
        self,
        other: Evaluation,
        threat: str,
        split: str | None = None,
        *,
        metric: str = "bad_rate",
        prompt_side: str = "wrapped",
    ) -> tuple[float, float, float]:
        """Subtracts another model's rate from this one's, and gives the ends of the interval of the difference.

        Both models have answered the same prompts, so the interval is for paired answers, see
        `ctlens.core.clusters.paired_difference`; its ends are NaN with fewer than five topics or wrapper texts.

        Args:
            other: the evaluation of the other model on the same pairs.
            threat: the name of the threat.
            split: the split; needed if several were evaluated.
            metric: `bad_rate`, `good_rate` or `other_rate`.
            prompt_side: `wrapped`, `clean` or `benign`.

        Raises:
            CtlensError: the metric or the prompt side is unknown, or the evaluations are of different pairs.
        """
        _check_rate(metric)
        one, two = _paired("difference", self, other, threat=threat, split=split, prompt_side=prompt_side)
        return difference_with_interval([one], [two], metric)

    def share_repaired(
        self,
        before: Evaluation,
        clean_born: Evaluation,
        threat: str,
        split: str | None = None,
        *,
        metric: str = "bad_rate",
        prompt_side: str = "wrapped",
    ) -> tuple[float, float, float]:
        """The share of a vulnerability that is gone: 0 as before training, 1 as in the twin that never had it.

        It is `(before - this) / (before - clean-born)` of a rate, with the ends of its interval over topics and wrapper
        texts; all three models have answered the same prompts. Beyond 1 a model gives fewer such answers than the twin.

        Args:
            before: the evaluation of the model before training.
            clean_born: that of its twin, see `ctlens organism train --recipe clean-born`.
            threat, split, metric, prompt_side: as of `difference`.

        Raises:
            CtlensError: as `difference`, or the rates before training and of the twin are equal.
        """
        _check_rate(metric)
        prompts = {"threat": threat, "split": split, "prompt_side": prompt_side}
        rows = _paired("share of a vulnerability", self, before, clean_born, **prompts)
        flags = [(of["verdict"] == RATES[metric]).to_numpy(dtype=float) for of in rows]
        own, vulnerable, twin = flags
        if vulnerable.mean() == twin.mean():
            raise CtlensError(
                f"the twin's {metric} is that before training, so there is no vulnerability to share out."
            )
        share, low, high = clustered_ratio(vulnerable - own, vulnerable - twin, clusters(rows[0]))
        return float(share), float(low), float(high)

    def answers(self, threat: str, split: str | None = None, prompt_side: str = "wrapped") -> pd.DataFrame:
        """The outcomes of one threat, split and prompt side, in the order of the pairs.

        Raises:
            CtlensError: several splits were evaluated and none is named, or the prompt side was not evaluated.
        """
        rows = self._rows_of(threat, split)
        if prompt_side not in set(rows["prompt_side"]):
            raise unknown("prompt side", prompt_side, dict.fromkeys(rows["prompt_side"]))
        return _select(rows, prompt_side=prompt_side).sort_values("item")

    def _rows_of(self, threat: str, split: str | None) -> pd.DataFrame:
        rows = _select(self.outcomes, evaluated_threat=threat, split=split)
        splits = set(rows["split"])
        if len(splits) != 1:
            raise CtlensError(f"{len(splits)} splits of {threat!r} were evaluated: name one split.")
        return rows

    def by_strength(self, metric: str = "bad_rate", prompt_side: str = "wrapped") -> pd.DataFrame:
        """Tabulates a rate by strength of the attack.

        The columns are `evaluated_threat, split, strength, value, n_prompts, n_effective, ci_low, ci_high`.

        Args:
            metric: `bad_rate`, `good_rate` or `other_rate`.
            prompt_side: `wrapped`, `clean` or `benign`.

        Raises:
            CtlensError: the metric is unknown, or no pair of that prompt side has a strength.
        """
        _check_rate(metric)
        known = _select(self.outcomes, prompt_side=prompt_side).query("strength > 0")
        if known.empty:
            raise CtlensError(
                f"no pair on the prompt side {prompt_side!r} has a strength: label the pairs with 'strength', from '1'."
            )
        rows = [
            (*asked, strength, *rate_with_interval(answers, metric))
            for asked, part in by(known, *_GROUPS)
            for (strength,), answers in by(part.sort_values("strength"), "strength")
        ]
        return pd.DataFrame(
            rows, columns=[*_GROUPS, "strength", "value", "n_prompts", "n_effective", "ci_low", "ci_high"]
        )

    def figure(self, metric: str = "bad_rate", threat: str | None = None, split: str | None = None) -> Figure:
        """Draws one rate on every prompt side, with its interval: a mark per threat and split.

        Args:
            metric: `bad_rate`, `good_rate` or `other_rate`.
            threat: draws this threat alone; by default all.
            split: draws this split alone; by default all.

        Raises:
            CtlensError: the metric is unknown, or the threat or split was not evaluated.
        """
        _check_rate(metric)
        table = _select(self._table, metric=metric, evaluated_threat=threat, split=split)
        told = [column for column in _GROUPS if len(set(table[column])) > 1] or ["evaluated_threat"]
        labels = zip(*(table[column] for column in told), strict=True)
        table = table.assign(mark=[", ".join(label) for label in labels])
        marks = list(dict.fromkeys(table["mark"]))
        prompt_sides = list(dict.fromkeys(table["prompt_side"]))
        rates = {
            end: table.pivot(index="mark", columns="prompt_side", values=end).loc[marks, prompt_sides].to_numpy()
            for end in ("value", "ci_low", "ci_high")
        }
        name = metric.replace("_", " ")
        return plots.behaviour(
            marks, prompt_sides, *rates.values(), metric=name, title=f"What is the {name} on each prompt side?"
        )

    def strength_figure(self, prompt_side: str = "wrapped") -> Figure:
        """Draws the bad rate against the strength of the attack: a panel per threat, a line per split.

        Raises:
            CtlensError: no pair of that prompt side has a strength.
        """
        table = self.by_strength(prompt_side=prompt_side)
        curves: dict[str, dict[str, Any]] = {}
        for (threat, split), rows in by(table, *_GROUPS):
            curve = tuple(rows[column].to_numpy() for column in ("strength", "value", "ci_low", "ci_high"))
            curves.setdefault(threat, {})[split or threat] = curve  # pairs of one's own have no split
        bare = "; no whisker where a strength has too few topics or wrapper texts for an interval"
        subtitle = f"{prompt_side} prompts{bare if np.isnan(table['ci_low'].to_numpy()).any() else ''}"
        return plots.attack_strength(curves, "Does a stronger attack work more often?", subtitle=subtitle)

    def save(self, path: str | Path) -> None:
        """Writes the outcomes as CSV."""
        with atomic_file(path) as temporary:
            # Quoted, because an answer may hold a carriage return, which would end its row.
            self.outcomes.to_csv(temporary, index=False, quoting=csv.QUOTE_NONNUMERIC)

    @staticmethod
    def load(path: str | Path) -> Evaluation:
        """Reads the evaluation that `save` wrote.

        Raises:
            CtlensError: the file is missing or damaged, or was written by an earlier ctlens.
        """
        columns = read_columns(path)
        require_columns_of_today(columns, path)
        counted = dict.fromkeys(_COUNTED, whole_number)
        kinds = {**dict.fromkeys(OUTCOME_COLUMNS, str), **counted, **dict.fromkeys(PROBABILITIES, number_or_nan)}
        return Evaluation(pd.DataFrame(typed(columns, kinds, path)))


def _rate(answers: pd.DataFrame, verdict: str) -> Rate:
    value, n_prompts, n_effective, low, high = rate_with_interval(answers, f"{verdict}_rate")
    return Rate(value, low, high, n_prompts, n_effective)


def require_columns_of_today(table: Iterable[str], path: str | Path) -> None:
    """Checks that a saved table has today's columns, and not those of an earlier ctlens.

    Raises:
        CtlensError: it has a column under its former name, and the sentence says how to rename it, or none that says
            which prompts go together.
    """
    renames = [f"{old} to {new}" for old, new in _RENAMED_COLUMNS.items() if old in table and new not in table]
    if renames:
        base = f", and write {BASE} for the method none" if "method" in table else ""
        raise CtlensError(f"{path} was written by an earlier ctlens: rename its column {', '.join(renames)}{base}.")
    if {"verdict", "metric"} & set(table) and not {"n_effective", *CLUSTER_KINDS} & set(table):
        raise CtlensError(
            f"{path} was written by an earlier ctlens, which did not say which prompts go together: evaluate again."
        )


def _check_rate(metric: str) -> None:
    if metric not in RATES:
        raise unknown("rate", metric, RATES)


def _paired(what: str, *evaluations: Evaluation, **prompts: Any) -> list[pd.DataFrame]:
    """The answers of several models to the same prompts, see `Evaluation.answers`; refuses those to others."""
    rows = [evaluation.answers(**prompts) for evaluation in evaluations]
    if any(_asked(of_other) != _asked(rows[0]) for of_other in rows[1:]):
        raise CtlensError(_OTHER_PAIRS.format(what))
    return rows


def _asked(rows: pd.DataFrame) -> set[tuple[str, ...]]:
    """Collects which pairs the rows belong to, on which prompt sides."""
    return set(zip(*(rows[column] for column in ("split", "prompt_side", "item", "pair")), strict=True))


def _select(table: Any, **wanted: str | None) -> pd.DataFrame:
    """Takes the rows with these values in the named columns; None stands for any value."""
    for column, value in wanted.items():
        table = table if value is None else table[table[column] == value]
    return table
