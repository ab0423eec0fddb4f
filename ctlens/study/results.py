"""The numbers of a study, read from its rows: rates pooled over trainings, by threat, condition and split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ctlens.core.errors import CtlensError
from ctlens.core.rates import NOT_MEASURED, Rate
from ctlens.core.reading import number_or_nan, read_columns, typed, whole_number
from ctlens.core.stats import student, wilson_of_share
from ctlens.data.pairs import PROMPT_SIDES
from ctlens.evaluation.result import RATE_COLUMNS, require_columns_of_today
from ctlens.plots.theme import METHOD_STYLES

VERDICT_RATES = ("bad_rate", "good_rate", "other_rate")
SPLIT = "heldout"
"""The split that every headline number is of: new entities under new wrapper texts."""
TRAINING_COLUMNS = ("trained_threat", "condition", "seed")
"""The columns of `results.csv` that tell trainings apart."""
RESULT_COLUMNS = (*TRAINING_COLUMNS, "step", *RATE_COLUMNS)
"""The columns of `results.csv`, one row per number, in their order.

- `trained_threat`: the threat that the model was trained on; empty for a model that was not trained.
- `condition`: what it was trained with: the name of a loss or of a control, see `ctlens.study.conditions`; `base` for
  the model before training, `clean-born` for its twin.
- `seed`: of the training.
- `step`: after how many steps it was measured.
- `evaluated_threat`: the threat that it was asked; `pairs` for pairs from a file.
- `split`: of the prompts: `heldout`, new items under new wrapper texts; `entities`, new items; `structure`, wrappers
  of another structure too.
- `prompt_side`: `wrapped`, `clean` or `benign`.
- `metric`: `bad_rate`, `good_rate` and `other_rate`, shares of the answers; `good_probability` and `bad_probability`,
  means; the threat's own metrics. After a training also `gap_recovered`, the share of the wrapper's effect in logits
  that is undone; `bad_rate_vs_retention`, the bad rate less that of retention alone; on the threat trained on
  `bad_rate_reduction`, the share of the base's bad rate that is gone; `share_repaired`, the share of the way from the
  base's bad rate to the twin's; and the ratio of a metric to the base's, `<metric>_ratio`.
- `value`: the number.
- `n_prompts`: how many prompts it is of, or of `gap_recovered` pairs.
- `n_effective`: how many independent prompts would tell a share as exactly; empty for other numbers.
- `ci_low`, `ci_high`: the ends of its 95 percent interval over topics and wrapper texts; empty where there is none.
"""
_RESULT_KINDS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(RESULT_COLUMNS, str),
    **dict.fromkeys(("step", "n_prompts"), whole_number),
    **dict.fromkeys(("seed", "value", "n_effective", "ci_low", "ci_high"), number_or_nan),
}

ResultRow = Mapping[Hashable, Any]


SEVERAL = 3
"""From so many trainings on, how they differ shows in an interval; Student's over two is too wide to say anything."""


class Counted(NamedTuple):
    """The answers of one training that a rate counts: how many, of how many, and how many independent ones those are.

    >>> Counted(10, 100, 80.0).share
    0.1
    """

    n_counted: int
    n_prompts: int
    n_effective: float

    @property
    def share(self) -> float:
        """The share of the answers that count."""
        return self.n_counted / self.n_prompts


def pooled(counts: Sequence[Counted]) -> Rate:
    """Pools the share over trainings that answered the same prompts.

    The interval is Wilson's with the prompts of one training that are effective: answers of several trainings to one
    prompt are not independent. Of `SEVERAL` trainings or more it also spans Student's interval over
    their shares.

    Args:
        counts: of each training.

    >>> str(pooled([Counted(10, 100, 100.0), Counted(20, 100, 100.0)]))
    '15% [9–23]'
    """
    n_answers = sum(one.n_prompts for one in counts)
    value = sum(one.n_counted for one in counts) / n_answers
    n_effective = float(np.mean([one.n_effective for one in counts]))
    low, high = wilson_of_share(value, n_effective)
    if len(counts) >= SEVERAL:
        ends = student(np.array([one.share for one in counts]))
        low = float(np.clip(np.minimum(low, ends[0]), 0, 1))  # NaN stays, where there are too few topics or wrappers
        high = float(np.clip(np.maximum(high, ends[1]), 0, 1))
    return Rate(value, low, high, round(n_answers / len(counts)), n_effective)


class ConditionRates(NamedTuple):
    """A condition on one threat: its pooled rates by `(metric, prompt_side)`, and how many trainings they pool."""

    rates: dict[tuple[str, str], Rate]
    seeds: int

    def rate(self, metric: str, prompt_side: str) -> Rate:
        """One of the rates; `NOT_MEASURED` where there is none."""
        return self.rates.get((metric, prompt_side), NOT_MEASURED)


def read_results(path: str | Path) -> pd.DataFrame:
    """The rows of a `results.csv`, one number each.

    Raises:
        CtlensError: the file is missing or damaged, lacks a column, or was written by an earlier ctlens.
    """
    path = Path(path)
    if not path.is_file():
        raise CtlensError(f"{path} does not exist: run the study first, or check the path.")
    columns = read_columns(path)
    require_columns_of_today(columns, path)
    found = typed(columns, _RESULT_KINDS, path)
    if not np.isnan(found["seed"]).any():
        found["seed"] = [int(seed) for seed in found["seed"]]
    results = pd.DataFrame(found)
    if results.empty:
        raise CtlensError(f"{path} holds no rows: run the study first, or check the path.")
    _require_possible(results, path)
    return results


def _require_possible(results: pd.DataFrame, path: Path) -> None:
    """Refuses rows that no study writes: one number twice, and a share of answers beyond 0 and 1."""
    keys = results.columns.difference(["value", "n_prompts", "n_effective", "ci_low", "ci_high"])
    shares = results["metric"].isin(VERDICT_RATES) & (results["n_prompts"] > 0)
    checks = {
        "repeats the number of an earlier row": results.duplicated(list(keys)),
        "has a share of answers that is not between 0 and 1": shares & ~results["value"].between(0, 1),
        "has a negative number of prompts": results["n_prompts"] < 0,
    }
    for words, wrong in checks.items():
        if wrong.any():
            raise CtlensError(f"{path}, row {int(np.argmax(wrong)) + 1} {words}: check that it is a study's results.")


def summary_table(results: pd.DataFrame, split: str = SPLIT) -> pd.DataFrame:
    """Tabulates how often each condition answers badly and how often well, on the threat that it was trained on.

    Each training counts at its last step; seeds are pooled, see `pooled`.

    Args:
        results: rows as in `results.csv`; the base model is the condition `base`, without a trained threat.
        split: the prompts to count.

    Returns:
        One row per threat and condition, the base and the controls first, with the columns `threat`,
        `condition`, `bad wrapped`, `bad clean`, `bad benign`, `good wrapped`, `good clean` and
        `good benign`. A rate is a `Rate`: it has `value`, `low`, `high`, `n_prompts` and `n_effective`, and prints as
        `84% [76–90]`; its value is NaN where it was not measured.

    Raises:
        CtlensError: no row of that split holds a rate of a model on its own threat.
    """
    return pd.DataFrame(
        [
            {"threat": threat, "condition": condition}
            | {
                f"{name} {prompt_side}": found.rate(f"{name}_rate", prompt_side)
                for name in ("bad", "good")
                for prompt_side in PROMPT_SIDES
            }
            for threat, conditions in by_threat(results, split).items()
            for condition, found in conditions.items()
        ]
    )


def overview(results: pd.DataFrame) -> pd.DataFrame:
    """A line per threat and condition, for a terminal: where the attack still works, and what stays good.

    Args:
        results: rows as in `results.csv`.

    Returns:
        The columns `threat`, `condition`, one per split with the bad rate on wrapped prompts, and the
        good rates on clean and benign prompts of the headline split; `Rate`s.

    Raises:
        CtlensError: as `summary_table`.
    """
    names = ["threat", "condition"]
    table = summary_table(results)
    lines = table[names]
    for split in dict.fromkeys(results["split"]):
        on = summary_table(results, str(split)).rename(columns={"bad wrapped": str(split)})
        lines = lines.merge(on[[*names, str(split)]], how="left")
    lines = lines.map(lambda cell: cell if isinstance(cell, str | Rate) else NOT_MEASURED)
    return lines.assign(**{name: table[name] for name in ("good clean", "good benign")})


def by_threat(results: pd.DataFrame, split: str = SPLIT) -> dict[str, dict[str, ConditionRates]]:
    """The rates that `summary_table` lists: per threat, those of every condition that was trained on it.

    Raises:
        CtlensError: as `summary_table`.
    """
    rates = _pooled(final_rows(results, split), lambda row: (row["evaluated_threat"], row["condition"]))
    if not rates:
        raise CtlensError(f"the results hold no rates on the split {split!r}: evaluate on that split first.")
    threats: dict[str, dict[str, ConditionRates]] = {threat: {} for threat, _ in rates}
    for (threat, condition), found in rates.items():
        threats[threat][condition] = found
    return {threat: {name: found[name] for name in in_order(found)} for threat, found in threats.items()}


def in_order(conditions: Iterable[str]) -> list[str]:
    """Sorts the names of conditions as they are listed everywhere: the base, the controls, the losses, then any other.

    >>> in_order(["mine", "bct", "base", "act"])
    ['base', 'act', 'bct', 'mine']
    """
    known = list(METHOD_STYLES)
    return sorted(set(conditions), key=lambda name: (known.index(name) if name in known else len(known), name))


def final_rows(results: pd.DataFrame, split: str) -> list[ResultRow]:
    """The rows of every model on its own threat at its last step; the base and shared controls count for every one."""
    rows = _last_rows(results, split)
    trained = {row["trained_threat"] for row in rows} - {""} or {row["evaluated_threat"] for row in rows}
    return [
        row
        for row in rows
        if row["evaluated_threat"] in trained and row["trained_threat"] in ("", row["evaluated_threat"])
    ]


def last_step(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of every training at its last step, of those given."""
    last = results.groupby(list(TRAINING_COLUMNS), dropna=False)["step"].transform("max")
    return pd.DataFrame(results[results["step"] == last])


def _last_rows(results: pd.DataFrame, split: str) -> list[ResultRow]:
    """The rows of every training on one split, at its last step there."""
    chosen = pd.DataFrame(results[results["split"] == split]).fillna({"trained_threat": ""})
    return [*last_step(chosen).to_dict("records")]


def _pooled(rows: Iterable[ResultRow], key: Callable[[ResultRow], Any]) -> dict[Any, ConditionRates]:
    """Pools the rates over all trainings, by key."""
    counts: dict[Any, dict[tuple[str, str], list[Counted]]] = defaultdict(lambda: defaultdict(list))
    seeds: dict[Any, set[int]] = defaultdict(set)
    for row in rows:
        if row["metric"] in VERDICT_RATES and row["n_prompts"] > 0:
            counts[key(row)][row["metric"], row["prompt_side"]].append(counted(row))
            if not pd.isna(row["seed"]):
                seeds[key(row)].add(int(row["seed"]))
    return {
        name: ConditionRates({metric: pooled(of) for metric, of in found.items()}, len(seeds[name]))
        for name, found in counts.items()
    }


def counted(row: ResultRow) -> Counted:
    """The answers that the rate of a row counts."""
    return Counted(round(row["value"] * row["n_prompts"]), int(row["n_prompts"]), float(row["n_effective"]))
