"""An evaluation: one row per answer, and the tables and figures made of them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ctlens import plots
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.files import atomic_file
from ctlens.core.labels import BASE
from ctlens.evaluation.numbers import PROBABILITIES, RATES, by, by_pair, numbers, rate_with_interval, ratio
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
    "answer",
    "verdict",
    *PROBABILITIES,
)
RATE_COLUMNS = (*_GROUPS, "prompt_side", "metric", "value", "n_prompts", "ci_low", "ci_high")
OWN_PAIRS = "pairs"
"""The name of a table's threat where the pairs are the user's own."""
# What an earlier ctlens called the columns of its tables.
_RENAMED_COLUMNS = {"arm": "prompt_side", "method": "condition", "n": "n_prompts", "pairs": "n_pairs"}


@dataclass(frozen=True)
class Evaluation:
    """What a model answered and how it was judged.

    Attributes:
        outcomes: one row per answer: `evaluated_threat, split, prompt_side, item, pair, kind, strength, answer,
            verdict, good_probability, bad_probability`. `item` numbers the pairs of a threat and
            split, `pair` is a digest of its prompts and answers, `kind` and `strength` are its
            labels (empty and 0 where it has none). The probabilities are those that the answer begins
            with the first token of the good and of the bad answer: NaN where the prompt names
            none, and both where they begin alike; of a multiple-choice question, their shares among
            the options. It must not be changed.
    """

    outcomes: pd.DataFrame

    def to_dataframe(self) -> pd.DataFrame:
        """One row per number: `evaluated_threat, split, prompt_side, metric, value, n_prompts, ci_low, ci_high`.

        Per threat, split and prompt side: `bad_rate`, `good_rate` and `other_rate` (answers that are
        neither) with Wilson intervals, and the means of `good_probability` and `bad_probability`,
        where known, with bootstrap intervals. Then the threat's own metrics: a share of one prompt side's
        answers stands under that prompt side, with a Wilson interval; one made of several stands under
        `wrapped`, with a bootstrap over pairs (NaN where too few pairs carry the metric).
        """
        return self._table.copy()

    @cached_property
    def _table(self) -> pd.DataFrame:
        rows = [
            (threat, split, *number)
            for (threat, split), part in by(self.outcomes, *_GROUPS)
            for number in numbers(threat, part)
        ]
        return pd.DataFrame(rows, columns=list(RATE_COLUMNS))

    def rate(self, metric: str, prompt_side: str, threat: str | None = None, split: str | None = None) -> float:
        """One number, for example `rate("bad_rate", "wrapped")`; threat and split may be left out when there is one.

        Raises:
            CtlensError: the evaluation holds no such number, or several.
        """
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
        """A metric over its value before training, with the ends of a bootstrap interval over the pairs.

        With `metric="brr"` this is the BRR ratio of Chua et al. (arXiv 2403.05518); 0 is perfect, 1 is no change.

        Args:
            before: the evaluation of the untrained model on the same pairs.
            metric: of the threat, or one of `bad_rate`, `good_rate` and `other_rate` on wrapped prompts.
            threat: its name.
            split: may be left out when there is one.

        Raises:
            CtlensError: the evaluations are not of the same pairs, or the metric is unknown, has no
                value or is 0 before training.
        """
        rows = [evaluation._rows_of(threat, split) for evaluation in (self, before)]
        if _asked(rows[0]) != _asked(rows[1]):
            raise CtlensError("a ratio needs two evaluations of the same pairs: take equal splits, n_prompts and seed.")
        return ratio(threat, metric, *map(by_pair, rows))

    def _rows_of(self, threat: str, split: str | None) -> pd.DataFrame:
        rows = _select(self.outcomes, evaluated_threat=threat, split=split)
        splits = set(rows["split"])
        if len(splits) != 1:
            raise CtlensError(f"{len(splits)} splits of {threat!r} were evaluated: name one split.")
        return rows

    def by_strength(self, metric: str = "bad_rate", prompt_side: str = "wrapped") -> pd.DataFrame:
        """One rate per strength of the attack: `evaluated_threat, split, strength, value, n_prompts, ci_low, ci_high`.

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
            (*asked, strength, *rate_with_interval(answers["verdict"], metric))
            for asked, part in by(known, *_GROUPS)
            for (strength,), answers in by(part.sort_values("strength"), "strength")
        ]
        return pd.DataFrame(rows, columns=[*_GROUPS, "strength", "value", "n_prompts", "ci_low", "ci_high"])

    def figure(self, metric: str = "bad_rate", threat: str | None = None, split: str | None = None) -> Figure:
        """Draws one rate on every prompt side, with its interval: a mark per threat and split, or of those named alone.

        Raises:
            CtlensError: the metric is none of `bad_rate`, `good_rate` and `other_rate`, or nothing is left to draw.
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
        curves: dict[str, dict[str, Any]] = {}
        for (threat, split), rows in by(self.by_strength(prompt_side=prompt_side), *_GROUPS):
            curve = tuple(rows[column].to_numpy() for column in ("strength", "value", "ci_low", "ci_high"))
            curves.setdefault(threat, {})[split or threat] = curve  # pairs of one's own have no split
        return plots.attack_strength(
            curves, "Does a stronger attack work more often?", subtitle=f"{prompt_side} prompts"
        )

    def save(self, path: str | Path) -> None:
        """Writes the outcomes as CSV."""
        with atomic_file(path) as temporary:
            # Quoted, because an answer may hold a carriage return, which would end its row.
            self.outcomes.to_csv(temporary, index=False, quoting=csv.QUOTE_NONNUMERIC)

    @staticmethod
    def load(path: str | Path) -> Evaluation:
        """The evaluation that `save` wrote.

        Raises:
            CtlensError: the file was written by an earlier ctlens.
        """
        # Texts are named, or the answer "07" becomes 7; Python reads every digit of a float, pandas may not.
        texts: Any = {name: str for name in OUTCOME_COLUMNS if name not in (*_COUNTED, *PROBABILITIES)}
        floats: Any = dict.fromkeys(PROBABILITIES, lambda text: float(text or "nan"))
        outcomes: Any = pd.read_csv(path, keep_default_na=False, dtype=texts, converters=floats)
        require_columns_of_today(outcomes, path)
        return Evaluation(outcomes)


def require_columns_of_today(table: pd.DataFrame, path: str | Path) -> None:
    """Checks that a saved table has none of the columns that an earlier ctlens wrote under another name.

    Raises:
        CtlensError: it has some; the sentence says how to rename them.
    """
    renames = [f"{old} to {new}" for old, new in _RENAMED_COLUMNS.items() if old in table and new not in table]
    if renames:
        base = f", and write {BASE} for the method none" if "method" in table else ""
        raise CtlensError(f"{path} was written by an earlier ctlens: rename its column {', '.join(renames)}{base}.")


def _check_rate(metric: str) -> None:
    if metric not in RATES:
        raise unknown("rate", metric, RATES)


def _asked(rows: pd.DataFrame) -> set[tuple[str, ...]]:
    """Which pairs the rows are of, on which prompt sides."""
    return set(zip(*(rows[column] for column in ("split", "prompt_side", "item", "pair")), strict=True))


def _select(table: Any, **wanted: str | None) -> pd.DataFrame:
    """The rows with these values; None for any."""
    for column, value in wanted.items():
        table = table if value is None else table[table[column] == value]
    return table
