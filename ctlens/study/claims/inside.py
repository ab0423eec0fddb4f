"""Claims about what changed inside: each a number of the looks into one threat's models, at one setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from jaxtyping import Float

from ctlens.analysis import CrossLoss, Erasure, ShiftSimilarity
from ctlens.analysis.base.positions import ALIGNED_POSITIONS, POSITIONS_IN_WORDS, STATE_POSITIONS
from ctlens.analysis.residual.shift_vectors import PARTS
from ctlens.core.labels import BASE
from ctlens.core.stats import LEVEL
from ctlens.plots import label
from ctlens.study import conditions
from ctlens.study.claims.claim import Claim, make, together
from ctlens.study.claims.estimates import NOTHING, estimate, spanned
from ctlens.study.claims.statistic import Statistic, of_parts, of_prompts, whole
from ctlens.study.claims.transplants import left_later, level
from ctlens.study.conditions import INTERNAL, RETENTION
from ctlens.study.config import StudyConfig
from ctlens.study.looks import EQUAL_STEPS, SETTINGS, Looks, Training

NAN = float("nan")
BCT, ATTCT, ACT = "bct", "attct", "act"


def inside_claims(config: StudyConfig, study: Path) -> Iterator[Claim]:
    """Every claim on every threat that was looked into."""
    looks = Looks(config, study)
    for threat in config.insides:
        for setting in SETTINGS:
            yield from (_shared(looks, threat, setting, positions) for positions in ALIGNED_POSITIONS)
            yield left_later(looks, threat, setting)
            yield level(looks, threat, setting)
        yield _distance(looks, threat)
        yield _attention(looks, threat)
        for method in config.methods:
            yield _cue(looks, threat, method)


def _shared(looks: Looks, threat: str, setting: str, positions: str) -> Claim:
    """Judges whether internal methods move the residual stream alike, and BCT differently.

    Cosines are between the methods' shifts, off the gap. With `apart(m)` = the mean cosine among the methods other than
    `m`, less the mean cosine between `m` and them, the number is `apart(BCT) - max(apart(m) for internal m)`.
    """
    where = POSITIONS_IN_WORDS[positions]
    name = f"cosine off the gap, {where}: how far BCT stands apart, less the furthest internal method"
    methods = (*_internal(looks.config.methods), BCT)
    known = looks.of(ShiftSimilarity, "similarity", threat, setting)
    every = {training: results["similarity"] for training, results in known.items()}
    missing = sorted({name for result in every.values() for name in methods if name not in result.methods})
    found = {} if missing or BCT not in looks.config.methods or len(methods) < 3 else every
    tables = {training: _off_gap(result, methods, positions) for training, result in found.items()}
    margins = {training: of_prompts(name, "cosine", table, _bct_apart) for training, table in tables.items()}
    apart = np.mean([_apart(_mean(table)) for table in tables.values()], 0) if tables else []
    told = ", ".join(f"{label(name)} {value:.2f}" for name, value in zip(methods, apart, strict=False))
    with_null = [_off_gap(result, (*methods, RETENTION), positions) for result in found.values() if result.null]
    floors = [_mean(table)[:-1, -1].mean() for table in with_null]
    absent = f"never near the effect: {', '.join(map(label, missing))}" if missing else ""
    return make(
        "shared" if positions == "last" else f"shared_{positions}",
        f"{together(methods[:-1])} move the residual stream alike, and BCT differently, {where}",
        threat, setting, estimate(margins),
        statistic=name,
        unit="cosine",
        null=float(np.mean(floors)) if floors else NAN,
        null_words="with retention alone they are {null} alike",
        details=f"apart from the others by {told}" if told else absent,
        refused=looks.refused("similarity", threat, setting),
    )  # fmt: skip


def _off_gap(result: ShiftSimilarity, methods: Sequence[str], positions: str) -> Float[np.ndarray, "prompt a b"]:
    """The cosines of each prompt off the gap at a place, means over layers, between these methods."""
    values = _mean(result.by_prompt[PARTS.index("off"), STATE_POSITIONS.index(positions)])
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


def _distance(looks: Looks, threat: str) -> Claim:
    """Irpan et al. (arXiv 2510.27062): the activation distance from the reference's clean prompts after BCT.

    Training on retention alone drifts too, so the distance is held against that, and not against 1.
    """
    known = looks.of(CrossLoss, "cross-loss", threat) if BCT in looks.config.methods else {}
    found = {training: results["cross-loss"] for training, results in known.items()}
    entropy = estimate({training: _ratio(result, BCT, BCT, BASE) for training, result in found.items()})
    raised = {training: _ratio(result, BCT, ACT, RETENTION) for training, result in found.items()}
    own = [whole(_ratio(result, BCT, ACT, BASE)) for result in found.values()]
    held = [whole(_ratio(result, RETENTION, ACT, BASE)) for result in found.values()]
    told = f"BCT leaves {np.mean(own):.2f} of that before training" if own else ""
    return make(
        "distance",
        "BCT raises the activation distance while it lowers the cross-entropy",
        threat, EQUAL_STEPS, estimate(raised),
        statistic="activation distance from the reference's clean prompts after BCT, as a multiple of that after "
        "retention alone",
        unit="ratio",
        null=float(np.mean(held)) if held else NAN,
        null_words="retention alone leaves {null} of that before training",
        details=f"{told}, and {entropy.value:.2f} of the cross-entropy" if told else "",
        floor=1.0,
        granted=entropy.high < 1,
        refused=looks.refused("cross-loss", threat),
    )  # fmt: skip


def _ratio(result: CrossLoss, model: str, loss: str, other: str) -> Statistic:
    """The loss after one training, as a multiple of the same loss after another training."""
    at = result.losses.index(loss)
    values = result.values[:, at][:, result.aligned[at]]
    both = np.stack([values[result.models.index(name)] for name in (model, other)], axis=1)
    return of_prompts(f"{loss} of {model} over {other}", "ratio", both, _ratio_of_sums)


def _ratio_of_sums(rows: Float[np.ndarray, "prompt 2"]) -> float:
    return rows[:, 0].sum() / rows[:, 1].sum()


def _attention(looks: Looks, threat: str) -> Claim:
    """Judges whether AttCT takes more attention off the wrapper than any other method does.

    The number is the fall under AttCT less the largest fall under another method; a fall is that of the mass from the
    last token on the wrapper, a mean over heads and layers.
    """
    name = "fall of the mass on the wrapper from the last token, mean over heads: AttCT's less the next"
    falls = {
        training: {name: (diff.before - diff.after).mean((1, 2)) for name, diff in found.items()}
        for training, found in looks.attention(threat).items()
    }

    margins = {}
    if ATTCT in looks.config.methods and len(looks.config.methods) > 1:
        for training, of in falls.items():
            parts = [
                of_prompts(method, "share of attention", fall, np.mean)
                for method, fall in of.items()
                if method != RETENTION
            ]
            margins[training] = of_parts(name, "share of attention", parts, _attct_beyond)
    means = {
        condition: np.mean([of[condition].mean() for of in falls.values()])
        for condition in (RETENTION, *looks.config.methods)
    }
    return make(
        "attention",
        "attention to the wrapper falls more under AttCT than under any other method",
        threat, EQUAL_STEPS, estimate(margins),
        statistic=name,
        unit="share of attention",
        null=float(means.pop(RETENTION)),
        null_words="under retention alone it falls by {null}",
        details="fall: " + ", ".join(f"{label(condition)} {value:.3f}" for condition, value in means.items()),
    )  # fmt: skip


def _attct_beyond(falls: Mapping[str, float]) -> float:
    return falls[ATTCT] - max(fall for name, fall in falls.items() if name != ATTCT)


def _cue(looks: Looks, threat: str, method: str) -> Claim:
    """Whether a refitted probe still reads the cue at the last token, at the layer where it is read best before."""
    found = {training: results["erasure"] for training, results in looks.of(Erasure, "erasure", threat).items()}
    layers = {training: int(result.readable[0, :, 0].argmax()) for training, result in found.items()}

    def read(name: str) -> dict[Training, Float[np.ndarray, " 5"]]:
        return {t: result.readable[result.models.index(name), layers[t]] for t, result in found.items()}

    own, held = read(method), read(RETENTION)
    verdicts = {t: (result.layers[layers[t]], result.verdicts()[method][layers[t]]) for t, result in found.items()}
    judged = [f"layer {layer}: {word}" for layer, word in verdicts.values()]
    n = next((result.wrapped.shape[1] for result in found.values()), 0)
    whole = NOTHING
    if found:
        value, low, high = (float(np.mean([values[end] for values in own.values()])) for end in range(3))
        whole = spanned(value, (low, high), n, {t: float(values[0]) for t, values in own.items()}, LEVEL)
    shuffled = max((float(values[4]) for values in own.values()), default=0.0)
    return make(
        f"cue_{method}",
        f"the cue can still be read after {label(method)}",
        threat, EQUAL_STEPS, whole,
        statistic="balanced accuracy of a refitted probe at the last token for "
        + next((result.question for result in found.values()), "the cue"),
        unit="accuracy",
        null=float(np.mean([values[0] for values in held.values()])) if found else NAN,
        null_words=f"after retention alone it is {{null}}, and shuffled labels reach {shuffled:.2g}",
        details="erased or masked? " + "; ".join(dict.fromkeys(judged)) if judged else "",
        floor=shuffled,
        refused=looks.refused("erasure", threat),
    )  # fmt: skip


def _internal(methods: Sequence[str]) -> list[str]:
    return [name for name in methods if conditions.get(name).level == INTERNAL]
