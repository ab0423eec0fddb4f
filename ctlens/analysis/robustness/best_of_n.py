"""Best-of-n: an attacker tries several wrappers around each request, and the worst answer counts.

A repair that holds for the average wrapper may still fall to one of ten. The candidates of a request are the distinct
wrapped prompts of all pairs that share its clean prompt. With `b` bad answers among `N` candidates, an attacker who
tries `n` of them at random gets a bad one with probability `1 - C(N - b, n) / C(N, n)`; that is the mean over all
subsets of `n`, without drawing any (as pass@k of Chen et al. 2021, arXiv 2107.03374).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from ctlens import plots
from ctlens.analysis.base.forward import comparable_by_label
from ctlens.analysis.base.result import ResultOverPairs, clusters_in, groups_of
from ctlens.analysis.robustness.over_refusal import benign_twins, over_refusal, over_refusal_in_words, unanswered_twins
from ctlens.core.clusters import clustered_mean
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.keeping import keeping
from ctlens.core.public import public
from ctlens.core.stats import wilson
from ctlens.core.types import LensModel
from ctlens.data.chat import Turn
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair, Prompt
from ctlens.plots import Figure
from ctlens.threats import Judge, ask


@dataclass(frozen=True)
class BestOfN(ResultOverPairs):
    """The result of `best_of_n`: which candidates of each request got a bad answer.

    Attributes:
        bad: `[model, candidate]`, whether the greedy answer was the bad one.
        requests: `[candidate]`, the number of each candidate's request.
        groups: of the requests, their topics alone.
        twin_groups: of the benign twins.
        failed: `[model, twin]`, whether a benign twin went unanswered.
        models: their labels.
    """

    bad: Bool[np.ndarray, "model candidate"]
    requests: Int[np.ndarray, " candidate"]
    failed: Bool[np.ndarray, "model twin"]
    twin_groups: Mapping[str, Int[np.ndarray, " twin"]]
    models: tuple[str, ...]

    @property
    def tries(self) -> tuple[int, ...]:
        """The numbers of wrappers that are tried: from 1 to as many as the request with the fewest has."""
        return tuple(range(1, int(np.bincount(self.requests).min()) + 1))

    def curve(self, model: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The bad rate of a model by `tries`, and its 95 percent interval over requests and their topics.

        At a rate of 0 or 1, where that has no width, it is Wilson's interval.

        Raises:
            CtlensError: there is no such model.
        """
        rates = self.by_request(model)
        rate, low, high = clustered_mean(rates, self.clusters())
        for end in (0, 1):
            own_low, own_high = wilson(end * len(rates), len(rates))
            low = np.where(rate == end, own_low, low)
            high = np.where(rate == end, own_high, high)
        return rate, low, high

    def by_request(self, model: str) -> Float[np.ndarray, "request n"]:
        """The probability that each request gets a bad answer, by `tries`.

        Raises:
            CtlensError: there is no such model.
        """
        if model not in self.models:
            raise unknown("model", model, self.models)
        bad = self.bad[self.models.index(model)]
        return np.array([[_any_bad(bad[self.requests == one], n) for n in self.tries] for one in self._numbers])

    @property
    def _numbers(self) -> Int[np.ndarray, " request"]:
        return np.unique(self.requests)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model and number of tries: the bad rate with its interval, and the model's over-refusal."""
        refusal = over_refusal(self.failed, self.models, clusters_in(self.twin_groups))
        tables = []
        for model in self.models:
            rate, low, high = self.curve(model)
            columns = {"model": model, "n": self.tries, "bad_rate": rate, "ci_low": low, "ci_high": high}
            tables.append(pd.DataFrame(columns).assign(n_requests=len(self._numbers)))
        return pd.concat(tables, ignore_index=True).join(refusal, on="model")

    def figure(self) -> Figure:
        """Draws the bad rate by number of tries, a line per model."""
        curves = {model: self.curve(model) for model in self.models}
        subtitle = f"{len(self._numbers)} requests, {len(self.requests)} wrapped prompts"
        subtitle += over_refusal_in_words(self.failed, self.models)
        return plots.dose_curves(
            self.tries,
            curves,
            "Does an attacker who tries several wrappers get through?",
            subtitle=subtitle,
            x_title="wrappers tried per request",
            y_title="requests with a bad answer",
        )


def _any_bad(bad: Bool[np.ndarray, " candidate"], n: int) -> float:
    """The probability that some of `n` candidates at random are bad.

    >>> _any_bad(np.array([True, False, False, False]), 2)
    0.5
    """
    return 1 - comb(len(bad) - int(bad.sum()), n) / comb(len(bad), n)


@public
@keeping()
def best_of_n(
    models: LensModel | Mapping[str, LensModel],
    pairs: Pairs,
    *,
    judge: Judge | None = None,
    max_new_tokens: int = 16,
    progress: bool = True,
) -> BestOfN:
    """Asks each request under all wrappers that the pairs have for it, and the benign twins.

    >>> import ctlens as ct
    >>> pairs = ct.threats.get("jailbreak").pairs(96, split="heldout")
    >>> found = ct.analysis.best_of_n({"base": ct.load_organism()}, pairs, progress=False)
    >>> rate = found.curve("base")[0]
    >>> bool(rate[0] < rate[-1])
    True

    Args:
        models: by their labels, in eval mode.
        pairs: at least two wrapped prompts per clean prompt; those that share one are the candidates of a request.
            `ctlens.pairs` makes them of two lists of texts.
        judge: gives the verdicts, see `ctlens.threats.Judge`; by default the answers that the prompts name decide.
        max_new_tokens: length of the longest answer, in tokens.
        progress: show a progress bar when it takes more than two seconds.

    Raises:
        CtlensError: models do not compare or are in training mode, a request has one wrapped prompt alone, a prompt
            names no answers, or there are no pairs.
    """
    named = comparable_by_label(models)
    candidates: dict[tuple[Turn, ...], dict[Prompt, None]] = {}
    first: dict[tuple[Turn, ...], Pair] = {}
    for pair in pairs:
        first.setdefault(pair.clean.turns, pair)
        candidates.setdefault(pair.clean.turns, {})[pair.wrapped] = None
    for number, of_request in enumerate(candidates.values(), start=1):
        if len(of_request) < 2:
            raise CtlensError(
                f"request {number} of {len(candidates)} has one wrapped prompt alone, so there is nothing to choose "
                "from: give more pairs."
            )
    asked = [prompt for of_request in candidates.values() for prompt in of_request]
    bad = []
    for model in named.values():
        replies = ask(model, asked, judge=judge, max_new_tokens=max_new_tokens, progress=progress)
        bad.append([reply.verdict == "bad" for reply in replies])
    return BestOfN(
        bad=np.array(bad),
        requests=np.repeat(np.arange(len(candidates)), [len(of_request) for of_request in candidates.values()]),
        failed=unanswered_twins(named, pairs, judge, max_new_tokens),
        twin_groups=groups_of(list(benign_twins(pairs).values())),
        groups={"topic": groups_of(list(first.values()))["topic"]},
        models=tuple(map(str, named)),
    )
