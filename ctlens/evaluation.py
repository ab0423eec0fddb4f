"""Behaviour under a threat: wrapped, clean and benign arms, judged answer by answer, with intervals."""

from __future__ import annotations

import csv
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctlens import plots
from ctlens import threats as threat_registry
from ctlens.batch import require_room
from ctlens.chat import render
from ctlens.decoding import generate
from ctlens.errors import CtlensError, unknown
from ctlens.files import atomic_file
from ctlens.intervals import bootstrap, wilson
from ctlens.pairs import ARMS, Pair, Prompt
from ctlens.plots import Figure
from ctlens.threats import Threat, judge
from ctlens.types import LensModel

OUTCOME_COLUMNS = ("evaluated_threat", "split", "arm", "item", "answer", "verdict")
RATE_COLUMNS = ("evaluated_threat", "split", "arm", "metric", "value", "n", "ci_low", "ci_high")
RATES = {"bad_rate": "bad", "good_rate": "good", "other_rate": "other"}
OWN_PAIRS = "pairs"


@dataclass(frozen=True)
class Evaluation:
    """What a model answered and how it was judged.

    Attributes:
        outcomes: one row per answer: `evaluated_threat, split, arm, item, answer, verdict`.
    """

    outcomes: pd.DataFrame

    def to_dataframe(self) -> pd.DataFrame:
        """One row per number: `evaluated_threat, split, arm, metric, value, n, ci_low, ci_high`.

        `bad_rate`, `good_rate` and `other_rate` (answers that are neither) per arm with Wilson
        intervals; then the threat's own metrics. One of these that needs a single arm is a rate
        like the others; one that needs several stands under `wrapped`, with a bootstrap over items.
        """
        rows: list[tuple[object, ...]] = []
        for name, group in self.outcomes.groupby("evaluated_threat", sort=False):
            split = group["split"].iloc[0]
            verdicts = {str(arm): found["verdict"].to_numpy() for arm, found in group.groupby("arm", sort=False)}
            for arm, given in verdicts.items():
                rows += [(name, split, arm, metric, *_rate(given, RATES[metric])) for metric in RATES]
            rows += [(name, split, *row) for row in _field_metrics(str(name), verdicts)]
        return pd.DataFrame(rows, columns=list(RATE_COLUMNS))

    def rate(self, metric: str, arm: str, threat: str | None = None) -> float:
        """One rate, for example `rate("bad_rate", "wrapped")`; the threat may be left out when there is one.

        Raises:
            CtlensError: the evaluation holds no such number, or several.
        """
        table = self.to_dataframe()
        found = table.query("metric == @metric and arm == @arm")
        found = found if threat is None else found.query("evaluated_threat == @threat")
        if len(found) != 1:
            raise CtlensError(f"{len(found)} numbers are called {metric} on {arm}: name one arm and one threat.")
        return float(found["value"].iloc[0])

    def figure(self, metric: str = "bad_rate") -> Figure:
        """One rate on every arm, with its interval, a colour a threat.

        Raises:
            CtlensError: the metric is none of `bad_rate`, `good_rate` and `other_rate`.
        """
        if metric not in RATES:
            raise unknown("rate", metric, RATES)
        rows = {(row["evaluated_threat"], row["arm"]): row for row in self._rates(metric)}
        threats, arms = (list(dict.fromkeys(key)) for key in zip(*rows, strict=True))
        value, low, high = (
            np.array(
                [[rows[threat, arm][end] if (threat, arm) in rows else np.nan for arm in arms] for threat in threats]
            )
            for end in ("value", "ci_low", "ci_high")
        )
        name = metric.replace("_", " ")
        return plots.behaviour(threats, arms, value, low, high, metric=name, title=f"What is the {name} on each arm?")

    def _rates(self, metric: str) -> list[dict[Hashable, Any]]:
        return self.to_dataframe().query("metric == @metric").to_dict("records")

    def save(self, path: str | Path) -> None:
        """Writes the outcomes as CSV."""
        with atomic_file(path) as temporary:
            # Quoted, because an answer may hold a carriage return, which would end its row.
            self.outcomes.to_csv(temporary, index=False, quoting=csv.QUOTE_NONNUMERIC)

    @staticmethod
    def load(path: str | Path) -> Evaluation:
        """The evaluation that `save` wrote."""
        texts: Any = {name: str for name in OUTCOME_COLUMNS if name != "item"}  # else the answer "07" becomes 7
        return Evaluation(pd.read_csv(path, keep_default_na=False, dtype=texts))


def evaluate(
    model: LensModel,
    threats: Sequence[str] | None = None,
    *,
    pairs: Sequence[Pair] | None = None,
    split: str = "heldout",
    n: int = 96,
    seed: int = 0,
    max_new_tokens: int = 16,
    progress: bool = True,
) -> Evaluation:
    """Greedy answers to the wrapped, clean and benign prompts of threats or of given pairs, judged.

    Args:
        model: in eval mode, with a tokenizer.
        threats: names from `ctlens.threats.names()`; all by default, unless `pairs` are given.
        pairs: the user's own, with the answers that count as good or bad.
        split: of the threats' pairs.
        n: pairs a threat.
        seed: of the threats' pairs.
        max_new_tokens: longest answer, in tokens.
        progress: show a progress bar when it takes more than two seconds.

    Raises:
        CtlensError: a threat or split is unknown, a prompt names no answers, a prompt is too long,
            or there is nothing to evaluate.
    """
    if pairs is not None and threats:
        raise CtlensError("give threats or pairs, not both.")
    if pairs is not None:
        groups = {OWN_PAIRS: list(pairs)}
        split = ""
    else:
        chosen = [threat_registry.get(name) for name in threats or threat_registry.names()]
        groups = {threat.name: threat.pairs(n, split=split, seed=seed) for threat in chosen}
    items = [
        (name, arm, index, prompt)
        for name, group in groups.items()
        for arm in ARMS
        for index, pair in enumerate(group)
        if (prompt := pair.arm(arm)) is not None
    ]
    if not items:
        raise CtlensError("there is nothing to evaluate: give at least one pair.")
    for *_, prompt in items:
        judge(prompt, "")  # refuses a prompt without answers before the work of decoding
    answers = _answers(model, [prompt for *_, prompt in items], max_new_tokens, progress)
    rows = [
        (name, split, arm, index, answer, judge(prompt, answer))
        for (name, arm, index, prompt), answer in zip(items, answers, strict=True)
    ]
    return Evaluation(pd.DataFrame(rows, columns=list(OUTCOME_COLUMNS)))


def _answers(model: LensModel, prompts: Sequence[Prompt], max_new_tokens: int, progress: bool) -> list[str]:
    """One answer a prompt; equal prompts are decoded once."""
    tokenizer = model.tokenizer
    ids = [render(tokenizer, prompt.turns).ids for prompt in prompts]
    for row in ids:
        require_room(len(row) + max_new_tokens, model.cfg.n_ctx, "a prompt with its answer")
    distinct = list(dict.fromkeys(ids))
    end = tokenizer.eos_token_id
    given = generate(model, distinct, max_new_tokens=max_new_tokens, end=end, progress=progress)
    texts = dict(zip(distinct, tokenizer.batch_decode(given, skip_special_tokens=True), strict=True))
    return [texts[row].strip() for row in ids]


def _rate(verdicts: np.ndarray, verdict: str) -> tuple[float, int, float, float]:
    count = int((verdicts == verdict).sum())
    return count / len(verdicts), len(verdicts), *wilson(count, len(verdicts))


def _field_metrics(name: str, verdicts: dict[str, np.ndarray]) -> list[tuple[object, ...]]:
    """(arm, metric, value, n, low, high) of the threat's own metrics; none for the user's own pairs."""
    if name not in threat_registry.names():
        return []
    threat = threat_registry.get(name)
    rows: list[tuple[object, ...]] = []
    single: set[str] = set()
    for arm, given in verdicts.items():
        for metric, value in threat.metrics({arm: given}).items():
            single.add(metric)
            rows.append((arm, metric, value, len(given), *wilson(round(value * len(given)), len(given))))
    for metric, value in threat.metrics(verdicts).items():
        if metric not in single:
            rows.append(("wrapped", metric, value, *_resampled(threat, metric, verdicts)))
    return rows


def _resampled(threat: Threat, metric: str, verdicts: dict[str, np.ndarray]) -> tuple[int, float, float]:
    n = len(verdicts["wrapped"])

    def statistic(items: np.ndarray) -> float:
        return threat.metrics({arm: given[items] for arm, given in verdicts.items()})[metric]

    return n, *bootstrap(statistic, n)
