"""Claims about the mechanism: each is a number from the analyses of one threat's models, at one setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Float

from ctlens.analysis import CrossLoss, Erasure, ShiftSimilarity
from ctlens.analysis.base.positions import ALIGNED_POSITIONS, POSITIONS_IN_WORDS, STATE_POSITIONS
from ctlens.analysis.residual.shift_vectors import SHIFT_PARTS
from ctlens.core.labels import BASE
from ctlens.core.stats import LEVEL
from ctlens.plots import label
from ctlens.study.analyses import EQUAL_STEPS, SETTINGS, FinishedAnalyses
from ctlens.study.claims.claim import Claim, make_claim, together
from ctlens.study.claims.estimates import NOTHING, SEEDS, ClaimEstimate, claim_estimate, spanned
from ctlens.study.claims.pushed import pushed_claims
from ctlens.study.claims.statistic import Statistic, of_parts, of_prompts, whole
from ctlens.study.claims.transplants import left_later, level
from ctlens.study.conditions import INTERNAL_LEVEL, RETENTION, condition_named
from ctlens.study.results import SEVERAL

_NAN = float("nan")
_ACT = "act"
_ATTCT = "attct"
_BCT = "bct"


def inside_claims(analyses: FinishedAnalyses) -> Iterator[Claim]:
    """Judges every claim about the mechanism on every analysed threat."""
    config = analyses.config
    for threat in config.analysed_threats:
        for setting in SETTINGS:
            yield from (_shared(analyses, threat, setting, positions) for positions in ALIGNED_POSITIONS)
            yield left_later(analyses, threat, setting)
            yield level(analyses, threat, setting)
        yield _distance(analyses, threat)
        yield _attention(analyses, threat)
        for method in config.methods:
            yield _cue(analyses, threat, method)
        yield from pushed_claims(analyses, threat)


def _shared(analyses: FinishedAnalyses, threat: str, setting: str, positions: str) -> Claim:
    """Judges whether internal methods move the residual stream alike, and BCT differently.

    Cosines are between the methods' shifts, off the gap. With `apart(m)` = the mean cosine among the methods other than
    `m`, less the mean cosine between `m` and them, the number is `apart(BCT) - max(apart(m) for internal m)`.
    """
    where = POSITIONS_IN_WORDS[positions]
    name = f"cosine off the gap, {where}: how far BCT stands apart, less the furthest internal method"
    methods = (*_internal(analyses.config.methods), _BCT)
    known = [results["similarity"] for results in analyses.of(ShiftSimilarity, "similarity", threat, setting).values()]
    missing = sorted({name for result in known for name in methods if name not in result.methods})
    asked = _BCT in analyses.config.methods and len(methods) > 2
    found = known[0] if known and not missing and asked else None  # of all seeds at once
    estimate = NOTHING if found is None else _over_seeds(name, found, methods, positions)
    told = ""
    floor = _NAN
    if found is not None:
        apart = zip(methods, _apart(_mean(_off_gap(found.by_prompt, found, methods, positions))), strict=True)
        told = "apart from the others by " + ", ".join(f"{label(method)} {value:.2f}" for method, value in apart)
        if found.null:
            floor = float(_mean(_off_gap(found.by_prompt, found, (*methods, found.null), positions))[:-1, -1].mean())
    absent = f"never near the effect: {', '.join(map(label, missing))}" if missing else ""
    return make_claim(
        "shared" if positions == "last" else f"shared_{positions}",
        f"{together(methods[:-1])} move the residual stream alike, and BCT differently, {where}",
        threat,
        setting,
        estimate,
        statistic=name,
        unit="cosine",
        null=floor,
        null_words=f"with {label(found.null)} they are {{null}} alike" if found and found.null else "",
        details=told or absent,
        unmet=_seeds_unmet(estimate),
        refused=analyses.refused("similarity", threat, setting),
    )


def _over_seeds(name: str, result: ShiftSimilarity, methods: Sequence[str], positions: str) -> ClaimEstimate:
    """How far BCT stands apart, with its interval over prompts and, by the jackknife, over seeds."""

    def margin(cosines: Float[np.ndarray, "part positions layer prompt a b"]) -> Statistic:
        table = _off_gap(cosines, result, methods, positions)
        return of_prompts(name, "cosine", table, _bct_apart, result.clusters())

    every = margin(result.by_prompt)
    found = claim_estimate({0: every})
    left = np.array([whole(margin(cosines)) for cosines in result.without_seed])
    trainings = dict(enumerate(len(left) * whole(every) - (len(left) - 1) * left))
    ends = (found.prompts_low, found.prompts_high)
    return found if np.isnan(left).any() else spanned(found.value, ends, found.n, trainings, LEVEL)


def _seeds_unmet(found: ClaimEstimate) -> str:
    """Why a claim that tells methods apart stays open where seeds are no part of its interval, in words."""
    return "" if found.over == SEEDS else f"whether seeds of one method differ by less takes {SEVERAL} of each to tell"


def _off_gap(
    cosines: Float[np.ndarray, "part positions layer prompt a b"],
    result: ShiftSimilarity,
    methods: Sequence[str],
    positions: str,
) -> Float[np.ndarray, "prompt method method"]:
    """The cosines of each prompt off the gap at some positions, means over layers, between these methods."""
    values = _mean(cosines[SHIFT_PARTS.index("off"), STATE_POSITIONS.index(positions)])
    at = [result.methods.index(name) for name in methods]
    return values[:, at][:, :, at]


def _mean(values: Float[np.ndarray, "item ..."]) -> Float[np.ndarray, ...]:
    """The mean of what is known; NaN where nothing is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(0) / known.sum(0)


def _apart(cosines: Float[np.ndarray, "a b"]) -> list[float]:
    """How far each method stands apart: the others' mean cosine with each other, less their mean cosine with it."""
    found = []
    for odd in range(len(cosines)):
        rest = [number for number in range(len(cosines)) if number != odd]
        alike = np.mean([cosines[pair] for pair in combinations(rest, 2)])
        found.append(float(alike - cosines[rest, odd].mean()))
    return found


def _bct_apart(table: Float[np.ndarray, "prompt a b"]) -> float:
    """How far BCT, the last method, stands apart, less the same of the internal method that stands furthest apart."""
    *internal, bct = _apart(_mean(table))
    return bct - max(internal)


def _distance(analyses: FinishedAnalyses, threat: str) -> Claim:
    """Judges the claim of Irpan et al. (arXiv 2510.27062): BCT raises the distance of activations from the clean ones.

    The clean activations are the reference's. Training on retention alone drifts too, so the distance after BCT is
    divided by the distance after retention alone, not by that before training.
    """
    known = analyses.of(CrossLoss, "cross-loss", threat) if _BCT in analyses.config.methods else {}
    found = {training: results["cross-loss"] for training, results in known.items()}
    lowered = {training: _ratio(result, _BCT, _BCT, BASE) for training, result in found.items()}
    entropy = claim_estimate(lowered)
    raised = {training: _ratio(result, _BCT, _ACT, RETENTION) for training, result in found.items()}
    own = [whole(_ratio(result, _BCT, _ACT, BASE)) for result in found.values()]
    held = [whole(_ratio(result, RETENTION, _ACT, BASE)) for result in found.values()]
    told = f"BCT leaves {np.mean(own):.2f} of that before training" if own else ""
    return make_claim(
        "distance",
        "BCT raises the activation distance while it lowers the cross-entropy",
        threat,
        EQUAL_STEPS,
        claim_estimate(raised),
        statistic="activation distance from the reference's clean prompts after BCT, as a multiple of that after "
        "retention alone",
        unit="ratio",
        null=float(np.mean(held)) if held else _NAN,
        null_words="retention alone leaves {null} of that before training",
        details=f"{told}, and {entropy.value:.2f} of the cross-entropy" if told else "",
        floor=1.0,
        unmet="" if entropy.high < 1 else "it is not clear that BCT lowers the cross-entropy",
        refused=analyses.refused("cross-loss", threat),
    )


def _ratio(result: CrossLoss, model: str, loss: str, other: str) -> Statistic:
    """The loss after one training, as a multiple of the same loss after another training."""
    at = result.losses.index(loss)
    aligned = result.aligned[at]
    values = result.values[:, at][:, aligned]
    both = np.stack([values[result.models.index(name)] for name in (model, other)], axis=1)
    return of_prompts(f"{loss} of {model} over {other}", "ratio", both, _ratio_of_sums, result.clusters(aligned))


def _ratio_of_sums(rows: Float[np.ndarray, "prompt 2"]) -> float:
    return rows[:, 0].sum() / rows[:, 1].sum()


def _attention(analyses: FinishedAnalyses, threat: str) -> Claim:
    """Judges whether AttCT takes more attention off the wrapper than any other method does.

    The number is the fall under AttCT less the largest fall under another method; a fall is that of the mass from the
    last token on the wrapper, a mean over heads and layers.
    """
    name = "fall of the mass on the wrapper from the last token, mean over heads: AttCT's less the next"
    diffs = analyses.attention(threat)
    clusters = {training: found[RETENTION].clusters() for training, found in diffs.items()}
    falls = {
        training: {name: (diff.before - diff.after).mean((1, 2)) for name, diff in found.items()}
        for training, found in diffs.items()
    }

    margins = {}
    if _ATTCT in analyses.config.methods and len(analyses.config.methods) > 1:
        for training, of in falls.items():
            parts = [
                of_prompts(method, "share of attention", fall, np.mean, clusters[training])
                for method, fall in of.items()
                if method != RETENTION
            ]
            margins[training] = of_parts(name, "share of attention", parts, _attct_beyond)
    means = {
        condition: np.mean([of[condition].mean() for of in falls.values()])
        for condition in (RETENTION, *analyses.config.methods)
    }
    estimate = claim_estimate(margins)
    return make_claim(
        "attention",
        "attention from the last token to the wrapper falls more under AttCT than under any other method",
        threat,
        EQUAL_STEPS,
        estimate,
        statistic=name,
        unit="share of attention",
        null=float(means.pop(RETENTION)),
        null_words="under retention alone it falls by {null}",
        details="fall: " + ", ".join(f"{label(condition)} {value:.3f}" for condition, value in means.items()),
        unmet=_seeds_unmet(estimate),
    )


def _attct_beyond(falls: Mapping[str, float]) -> float:
    return falls[_ATTCT] - max(fall for name, fall in falls.items() if name != _ATTCT)


def _cue(analyses: FinishedAnalyses, threat: str, method: str) -> Claim:
    """Judges whether a refitted linear probe still reads the cue at the last token.

    The layer is that where a probe reads the cue best before training.
    """
    found = {training: results["erasure"] for training, results in analyses.of(Erasure, "erasure", threat).items()}
    readable = {training: result.measured()["readable_last_ridge"] for training, result in found.items()}
    layers = {training: int(by_layer[0, :, 0].argmax()) for training, by_layer in readable.items()}

    def read(name: str) -> dict[int, Float[np.ndarray, " 5"]]:
        return {t: readable[t][result.models.index(name), layers[t]] for t, result in found.items()}

    own = read(method)
    held = read(RETENTION)
    verdicts = {t: (result.layers[layers[t]], result.verdicts()[method][layers[t]]) for t, result in found.items()}
    judged = [f"layer {layer}: {word}" for layer, word in verdicts.values()]
    n = next((result.wrapped.shape[1] for result in found.values()), 0)
    accuracy = NOTHING
    if found:
        value, low, high, *_ = np.mean(list(own.values()), axis=0).tolist()
        accuracy = spanned(value, (low, high), n, {t: float(values[0]) for t, values in own.items()}, LEVEL)
    shuffled = max((float(values[4]) for values in own.values()), default=0.0)
    return make_claim(
        f"cue_{method}",
        f"the cue can still be read at the last token after {label(method)}",
        threat,
        EQUAL_STEPS,
        accuracy,
        statistic="balanced accuracy of a refitted probe at the last token for "
        + next((result.question for result in found.values()), "the cue"),
        unit="accuracy",
        null=float(np.mean([values[0] for values in held.values()])) if found else _NAN,
        null_words=f"after retention alone it is {{null}}, and shuffled labels reach {shuffled:.2g}",
        details="erased or masked? " + "; ".join(dict.fromkeys(judged)) if judged else "",
        floor=shuffled,
        refused=analyses.refused("erasure", threat),
    )


def _internal(methods: Sequence[str]) -> list[str]:
    return [name for name in methods if condition_named(name).level == INTERNAL_LEVEL]
