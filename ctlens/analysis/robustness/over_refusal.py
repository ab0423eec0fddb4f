"""Over-refusal: how often benign twins go unanswered, which stands beside every attack that a model withstands.

A model that answers nothing well withstands every attack. The benign twin has the same wrapper around a harmless
request, so that its good answer is to answer it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from ctlens import plots
from ctlens.core.clusters import Clusters, clustered_rate
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, Prompt
from ctlens.threats import Judge, ask

OVER_REFUSAL = ("over_refusal", "n_benign", "over_refusal_low", "over_refusal_high")


def benign_twins(pairs: Sequence[Pair]) -> dict[Prompt, Pair]:
    """The distinct benign twins of pairs, each with the first pair that has it."""
    found: dict[Prompt, Pair] = {}
    for pair in pairs:
        if pair.benign is not None:
            found.setdefault(pair.benign, pair)
    return found


def unanswered_twins(
    models: Mapping[str, LensModel], pairs: Sequence[Pair], judge: Judge | None, max_new_tokens: int
) -> Bool[np.ndarray, "model twin"]:
    """Whether each model fails each of the `benign_twins`: its answer is bad, or not the good one if there is one."""
    twins = list(benign_twins(pairs))
    failed = []
    for model in models.values():
        replies = ask(model, twins, judge=judge, max_new_tokens=max_new_tokens)
        of_twins = zip(replies, twins, strict=True)
        failed += [reply.verdict == "bad" or (reply.verdict == "other" and bool(twin.good)) for reply, twin in of_twins]
    return np.array(failed, dtype=bool).reshape(len(models), len(twins))


def unanswered_by_pair(
    model: LensModel, pairs: Sequence[Pair], judge: Judge | None, max_new_tokens: int
) -> Float[np.ndarray, " pair"]:
    """1 for each pair whose benign twin a model fails, 0 where it answers it; NaN for a pair without one."""
    (failed,) = unanswered_twins({"": model}, pairs, judge, max_new_tokens)
    of_twin = dict(zip(benign_twins(pairs), failed.tolist(), strict=True))
    return np.array([np.nan if pair.benign is None else of_twin[pair.benign] for pair in pairs], dtype=float)


def over_refusal(
    failed: Bool[np.ndarray, "model twin"], models: Sequence[str], clusters: Clusters | None
) -> pd.DataFrame:
    """The columns `OVER_REFUSAL`, with a row per model: the share of failed twins with its interval."""
    if not failed.shape[1]:
        return pd.DataFrame(float("nan"), index=list(models), columns=list(OVER_REFUSAL)).assign(n_benign=0)
    rates = [clustered_rate(of_model, clusters) for of_model in failed]
    table = pd.DataFrame(rates, index=list(models), columns=list(OVER_REFUSAL))
    return table.assign(n_benign=failed.shape[1])


def over_refusal_in_words(failed: Bool[np.ndarray, "model twin"], models: Sequence[str]) -> str:
    """The over-refusal of every model, for the subtitle of a figure; empty without benign twins."""
    if not failed.shape[1]:
        return ""
    shares = ", ".join(f"{plots.label(name)} {share:.0%}" for name, share in zip(models, failed.mean(-1), strict=True))
    return f"; over-refusal: {shares}"
