"""The claims from transplants: is a repair in the residual stream, or in the weights behind it?

Each number is made of shares. The trained model runs with the base's residual stream put in at one layer, and the share
of the repair that is lost is counted: what is not lost must sit in the weights behind that layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from ctlens.analysis import Transplant
from ctlens.analysis.base.metrics import SMALLEST_GAPS
from ctlens.analysis.exchange.exchange import EXCHANGE_QUANTITIES
from ctlens.plots import label
from ctlens.study.analyses import FinishedAnalyses
from ctlens.study.claims.claim import Claim, make_claim
from ctlens.study.claims.estimates import claim_estimate
from ctlens.study.claims.statistic import Statistic, of_parts, of_prompts, whole
from ctlens.study.conditions import INTERNAL_LEVEL, OUTPUT_LEVEL, condition_named
from ctlens.study.results import in_order

_NAN = float("nan")
_SHARE_UNIT = "share of the effect"
# What a loss compares (ACT the stream, KL the outputs) is crossed with the tokens that it sees (the study's window, or
# the last token alone). Each contrast is a mean over the other factor.
_LEVEL_WEIGHTS = {"act": 0.5, "act_last": 0.5, "klct": -0.5, "klct_last": -0.5}
_TOKEN_WEIGHTS = {"act": 0.5, "act_last": -0.5, "klct": 0.5, "klct_last": -0.5}

Shares: TypeAlias = Sequence[Statistic]
"""The share of every condition with an effect, by its name."""


def left_later(analyses: FinishedAnalyses, threat: str, setting: str) -> Claim:
    """Judges how much more of a repair is lost with the base's stream after internal losses than after output losses.

    Two conditions of one level differ as well. The number is what is left of the difference when that is taken off,
    for every choice of prompts: `mean(internal) - mean(output) - spread`, see `_beyond_spread` and `_spread`.
    """
    lost = _shares(analyses, threat, setting, "lost")
    given = _shares(analyses, threat, setting, "sufficient")
    name = (
        "share of the repair lost with the base's residual stream in the lower half, last token: internal "
        "losses less output losses, less what conditions of one level differ by"
    )
    found = {training: of_parts(name, _SHARE_UNIT, shares, _beyond_spread) for training, shares in lost.items()}
    within = [whole(of_parts("spread", _SHARE_UNIT, shares, _spread)) for shares in lost.values()]
    return make_claim(
        key="left_later",
        statement="losses on outputs leave part of the repair in later weights, "
        "internal losses put it into the residual stream, at the last token",
        threat=threat,
        setting=setting,
        found=claim_estimate(found),
        statistic=name,
        unit=_SHARE_UNIT,
        null=float(np.nanmean(within)) if within else _NAN,
        null_words="two conditions of one level differ by {null}",
        details="; ".join(filter(None, (_told("lost", lost), _told("the trained stream in the base restores", given)))),
        refused=analyses.refused("transplant", threat, setting),
    )


def level(analyses: FinishedAnalyses, threat: str, setting: str) -> Claim:
    """Judges the same contrast where losses of both levels see the same tokens.

    The number is `(act + act_last - klct - klct_last) / 2`, of their shares. Beside it stands what the tokens do at an
    equal level, `(act + klct - act_last - klct_last) / 2`.
    """
    lost = {
        training: shares
        for training, shares in _shares(analyses, threat, setting, "lost").items()
        if set(_LEVEL_WEIGHTS) <= {share.name for share in shares}
    }
    name = "the same share: ACT less KL on outputs, mean over the study's tokens and the last one alone"
    found = {training: of_parts(name, _SHARE_UNIT, shares, _level_contrast) for training, shares in lost.items()}
    tokens = [abs(whole(of_parts("tokens", _SHARE_UNIT, shares, _token_contrast))) for shares in lost.values()]
    return make_claim(
        key="level",
        statement="with the same window, KL on outputs leaves more of the repair in later weights than ACT, "
        "at the last token",
        threat=threat,
        setting=setting,
        found=claim_estimate(found),
        statistic=name,
        unit=_SHARE_UNIT,
        null=float(np.mean(tokens)) if tokens else _NAN,
        null_words="the tokens make a difference of {null} at an equal level",
        details=_told("lost", lost),
        refused=analyses.refused("transplant", threat, setting),
    )


def _level_contrast(shares: Mapping[str, float]) -> float:
    """ACT less KL on outputs, a mean over both windows."""
    return sum(weight * shares[name] for name, weight in _LEVEL_WEIGHTS.items())


def _token_contrast(shares: Mapping[str, float]) -> float:
    """The study's window less the last token, a mean over both levels."""
    return sum(weight * shares[name] for name, weight in _TOKEN_WEIGHTS.items())


def _beyond_spread(shares: Mapping[str, float]) -> float:
    """Internal losses less output losses, less what two conditions of one level differ by; NaN if a level has none."""
    internal = _of_level(shares, INTERNAL_LEVEL)
    output = _of_level(shares, OUTPUT_LEVEL)
    if not internal or not output:
        return _NAN
    return float(np.mean(internal) - np.mean(output)) - _spread(shares)


def _spread(shares: Mapping[str, float]) -> float:
    """The mean difference between two conditions of one level; 0 where no level has two."""
    found = []
    for side in (INTERNAL_LEVEL, OUTPUT_LEVEL):
        found += [abs(one - other) for one, other in combinations(_of_level(shares, side), 2)]
    return float(np.mean(found)) if found else 0.0


def _of_level(shares: Mapping[str, float], side: str) -> list[float]:
    return [share for name, share in shares.items() if condition_named(name).level == side]


def _shares(analyses: FinishedAnalyses, threat: str, setting: str, quantity: str) -> dict[int, Shares]:
    """A share per condition, by training; a control has none, nor has a condition whose effect is too small."""
    found = {}
    for training, results in analyses.of(Transplant, "transplant", threat, setting).items():
        shares = [
            _share(name, result, quantity)
            for name, result in results.items()
            if result.effect().mean() >= SMALLEST_GAPS["logit_diff"] and condition_named(name).level
        ]
        if shares:
            found[training] = shares
    return found


def _share(name: str, result: Transplant, quantity: str) -> Statistic:
    """The share of the effect that moves with the stream of one layer at the last token.

    The layer is number `n // 4` of `n`, in the lower half. It was chosen on a pilot: on the jailbreak prompts of one
    prototype organism of four layers, layer 1 told output losses from internal losses best. That is a forking path,
    for a layer picked where the contrast was largest flatters it on models like the pilot's. The transplant figures
    show every layer.
    """
    layer = len(result.layers) // 4
    position = result.positions.index("last")
    at = EXCHANGE_QUANTITIES.index(quantity)
    moved = result.values[at, 0, layer, position] - result.unpatched[at, 0]
    effect = result.source[at, 0] - result.unpatched[at, 0]
    return of_prompts(name, _SHARE_UNIT, np.stack([moved, effect], axis=1), _moved_of_effect, result.clusters())


def _moved_of_effect(rows: Float[np.ndarray, "prompt 2"]) -> float:
    """The sum of what moved over the sum of the effect."""
    return rows[:, 0].sum() / rows[:, 1].sum()


def _told(words: str, found: Mapping[int, Shares]) -> str:
    """The share of each condition in words, a mean over trainings; nothing where there is none."""
    by_name: dict[str, list[float]] = {}
    for shares in found.values():
        for share in shares:
            by_name.setdefault(share.name, []).append(whole(share))
    if not by_name:
        return ""
    return f"{words}: " + ", ".join(f"{label(name)} {np.mean(by_name[name]):.2f}" for name in in_order(by_name))
