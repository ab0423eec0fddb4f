"""What the claims of a study say together, in three sentences that follow from their verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from ctlens.study.claims.claim import FAILS, HOLDS, OPEN, UNMEASURED, Claim
from ctlens.study.claims.estimates import ORGANISMS, SEEDS

OUTSIDE = {
    "repair": "Every method leaves fewer bad answers than retention alone",
    "output_only": "internal methods fail where BCT does not",
}
INSIDE = {
    "shared": "internal methods move the residual stream alike at the last token, and BCT differently",
    "left_later": "losses on outputs leave part of the repair in later weights",
    "level": "KL on outputs leaves more there than ACT at the same tokens",
}
WORDS = {HOLDS: "holds", FAILS: "does not hold", OPEN: "stays open"}


def answer(claims: Sequence[Claim]) -> tuple[str, str, str]:
    """On behaviour, on the mechanism, and on the cue, with what all of it is measured on.

    A sentence lists verdicts and weighs nothing: what holds on one threat and not on another is said of each.
    """
    behaviour, mechanism = (
        [f"“{words}” {said}" for key, words in parts.items() if (said := _said(claims, key))]
        for parts in (OUTSIDE, INSIDE)
    )
    return (
        f"{'; '.join(behaviour)}." if behaviour else "What changed outside was not measured.",
        f"Inside, {'; '.join(mechanism)}." if mechanism else "What changed inside was not measured.",
        _cue(claims),
    )


def _cue(claims: Sequence[Claim]) -> str:
    cues = [claim for claim in claims if claim.key.startswith("cue_") and claim.verdict != UNMEASURED]
    read = sum(claim.verdict == HOLDS for claim in cues)
    if not cues:
        return f"No cue was probed; {_basis(claims)}."
    cases = f"{read} of {len(cues)} cases, a method on a threat each"
    return f"A refitted probe still reads the cue in {cases}; {_basis(claims)}."


def _basis(claims: Sequence[Claim]) -> str:
    """What the intervals are over."""
    organisms = {claim.n for claim in claims if claim.over == ORGANISMS}
    if organisms:
        return f"intervals are over {_and(sorted(map(str, organisms)))} organisms"
    over = "over prompts and seeds" if any(claim.over == SEEDS for claim in claims) else "over prompts"
    return f"intervals are {over}, of too few organisms for a claim about training in general"


def _said(claims: Sequence[Claim], key: str) -> str:
    """The verdicts of a claim, those on which all threats and settings agree in one word."""
    found = [claim for claim in claims if claim.key == key and claim.verdict != UNMEASURED]
    by_verdict: dict[str, list[str]] = {}
    for claim in found:
        settings = {other.setting for other in found if other.threat == claim.threat}
        place = f"{claim.threat} at {claim.setting}" if len(settings) > 1 else claim.threat
        by_verdict.setdefault(claim.verdict, []).append(place)
    for verdict in by_verdict:
        threats = list(dict.fromkeys(claim.threat for claim in found if claim.verdict == verdict))
        if all(claim.verdict == verdict for claim in found if claim.threat in threats):
            by_verdict[verdict] = threats
    return ", ".join(f"{WORDS[verdict]} on {_and(places)}" for verdict, places in by_verdict.items())


def _and(words: Sequence[str]) -> str:
    *first, last = words or [""]
    return f"{', '.join(first)} and {last}" if first else last
