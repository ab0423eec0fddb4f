"""Claims from transplants: is a repair in the residual stream, or in the weights behind it?"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from ctlens.analysis import Transplant
from ctlens.analysis.base.metrics import SMALLEST_GAPS
from ctlens.analysis.exchange.exchange import QUANTITIES
from ctlens.plots import label
from ctlens.study import conditions as arms
from ctlens.study.claims.claim import Claim, make
from ctlens.study.claims.estimates import Items, OfItems, Sample, estimate
from ctlens.study.conditions import INTERNAL, OUTPUT
from ctlens.study.looks import Looks, Training
from ctlens.study.results import in_order

NAN = float("nan")
SQUARE = {
    (INTERNAL, "all"): "act",
    (INTERNAL, "last"): "act_last",
    (OUTPUT, "all"): "klct",
    (OUTPUT, "last"): "klct_last",
}
"""The arms that cross what a loss compares with the tokens that it sees."""
Shares = Mapping[str, OfItems]
"""By arm, a share as a function of the prompts that count."""


def left_later(looks: Looks, threat: str, setting: str) -> Claim:
    """How much more of a repair is lost with the base's stream after internal losses than after output losses.

    Two arms of one level differ as well. What they differ by on average, taken anew in every
    resample, is subtracted: only a contrast beyond it is one of the levels.
    """
    lost = _shares(looks, threat, setting, "lost")
    samples = {training: Sample(n, _beyond(shares)) for training, (n, shares) in lost.items()}
    within = [_spread(shares)(np.arange(n)) for n, shares in lost.values()]
    given = _shares(looks, threat, setting, "sufficient")
    return make(
        "left_later",
        "losses on outputs leave part of the repair in later weights, internal losses put it into the residual stream",
        threat, setting, estimate(samples),
        statistic="share of the repair lost with the base's residual stream in the lower half, last token: internal "
        "losses less output losses, less what arms of one level differ by",
        unit="share of the effect",
        null=float(np.nanmean(within)) if within else NAN,
        null_words="two arms of one level differ by {null}",
        details="; ".join(filter(None, (_told("lost", lost), _told("the trained stream in the base restores", given)))),
        refused=looks.refused("transplant", threat, setting),
    )  # fmt: skip


def level(looks: Looks, threat: str, setting: str) -> Claim:
    """The same contrast where both levels see the same tokens, beside what the tokens do at an equal level."""
    lost = {
        training: (n, shares)
        for training, (n, shares) in _shares(looks, threat, setting, "lost").items()
        if set(SQUARE.values()) <= set(shares)
    }

    def effect(shares: Shares, signs: Mapping[tuple[str, str], int]) -> OfItems:
        return lambda items: sum(sign * shares[SQUARE[place]](items) for place, sign in signs.items()) / 2

    levels = {(kind, tokens): 1 if kind == INTERNAL else -1 for kind, tokens in SQUARE}
    tokens = {(kind, of): 1 if of == "all" else -1 for kind, of in SQUARE}
    samples = {training: Sample(n, effect(shares, levels)) for training, (n, shares) in lost.items()}
    window = [abs(Sample(n, effect(shares, tokens)).whole()) for n, shares in lost.values()]
    return make(
        "level",
        "at the same tokens, KL on outputs leaves more of the repair in later weights than ACT",
        threat, setting, estimate(samples),
        statistic="the same share: ACT less KL on outputs, mean over the study's tokens and the last one alone",
        unit="share of the effect",
        null=float(np.mean(window)) if window else NAN,
        null_words="the tokens make a difference of {null} at an equal level",
        details=_told("lost", lost),
        refused=looks.refused("transplant", threat, setting),
    )  # fmt: skip


def _beyond(shares: Shares) -> OfItems:
    sides = [[of for name, of in shares.items() if arms.get(name).level == side] for side in (INTERNAL, OUTPUT)]
    if not all(sides):
        return lambda items: NAN
    spread = _spread(shares)

    def beyond(items: Items) -> float:
        internal, output = (np.mean([of(items) for of in side]) for side in sides)
        return float(internal - output) - spread(items)

    return beyond


def _spread(shares: Shares) -> OfItems:
    """The mean difference between two arms of one level; 0 where no level has two."""

    def spread(items: Items) -> float:
        found = []
        for side in (INTERNAL, OUTPUT):
            values = [of(items) for name, of in shares.items() if arms.get(name).level == side]
            found += [abs(one - other) for one, other in combinations(values, 2)]
        return float(np.mean(found)) if found else 0.0

    return spread


def _shares(looks: Looks, threat: str, setting: str, quantity: str) -> dict[Training, tuple[int, Shares]]:
    """By training, the prompts, and by arm the share; arms whose effect is too small have none."""
    found = {}
    for training, results in looks.of(Transplant, "transplant", threat, setting).items():
        kept = {
            name: result for name, result in results.items() if result.effect().mean() >= SMALLEST_GAPS["logit_diff"]
        }
        kept = {name: result for name, result in kept.items() if arms.get(name).level}
        if kept:
            prompts = next(iter(kept.values())).n_pairs
            found[training] = prompts, {name: _share(result, quantity) for name, result in kept.items()}
    return found


def _share(result: Transplant, quantity: str) -> OfItems:
    """Of the stream behind the last block of the lower half but one, where the pilot's contrast was largest."""
    layer, position, at = len(result.layers) // 4, result.positions.index("last"), QUANTITIES.index(quantity)
    moved = result.values[at, 0, layer, position] - result.unpatched[at, 0]
    effect = result.source[at, 0] - result.unpatched[at, 0]
    return lambda items: float(moved[items].sum() / effect[items].sum())


def _told(words: str, lost: Mapping[Training, tuple[int, Shares]]) -> str:
    names = in_order({name for _, shares in lost.values() for name in shares})
    means = {
        name: np.mean([Sample(n, shares[name]).whole() for n, shares in lost.values() if name in shares])
        for name in names
    }
    return f"{words}: " + ", ".join(f"{label(name)} {value:.2f}" for name, value in means.items()) if means else ""
