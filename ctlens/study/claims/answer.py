"""The answer of a study: three sentences that follow from the verdicts on its claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ctlens.study.claims.claim import FAILS, HOLDS, OPEN, UNMEASURED, Claim
from ctlens.study.claims.estimates import SEEDS

_ON_BEHAVIOUR = {
    "repair": "Every method leaves fewer bad answers than retention alone",
    "output_only": "internal methods fail where BCT does not",
}
_ON_MECHANISM = {
    "shared": "internal methods move the residual stream alike at the last token, and BCT differently",
    "left_later": "losses on outputs leave part of the repair in later weights at the last token",
    "level": "KL on outputs leaves more there than ACT at the same tokens",
}
_VERDICT_WORDS = {HOLDS: "holds", FAILS: "does not hold", OPEN: "stays open"}


def answer(claims: Sequence[Claim]) -> tuple[str, str, str]:
    """Writes a sentence on behaviour, one on the mechanism, and one on the cue with what the intervals are over.

    A sentence lists verdicts and weighs nothing: a claim that holds on one threat and fails on another is listed twice.
    """
    behaviour = _listed(claims, _ON_BEHAVIOUR)
    mechanism = _listed(claims, _ON_MECHANISM)
    return (
        f"{'; '.join(behaviour)}." if behaviour else "What changed outside was not measured.",
        f"Inside, {'; '.join(mechanism)}." if mechanism else "What changed inside was not measured.",
        _cue(claims),
    )


def _listed(claims: Sequence[Claim], statements: Mapping[str, str]) -> list[str]:
    """The statements that were measured, each with its verdicts."""
    said = {key: _said(claims, key) for key in statements}
    return [f"“{statements[key]}” {verdicts}" for key, verdicts in said.items() if verdicts]


def _cue(claims: Sequence[Claim]) -> str:
    cues = [claim for claim in claims if claim.key.startswith("cue_") and claim.verdict != UNMEASURED]
    read = sum(claim.verdict == HOLDS for claim in cues)
    if not cues:
        return f"No cue was probed; {_basis(claims)}."
    cases = f"{read} of {len(cues)} cases, a method on a threat each"
    return f"A refitted probe still reads the cue in {cases}; {_basis(claims)}."


def _basis(claims: Sequence[Claim]) -> str:
    """Says what the intervals are over."""
    seeds = ", and over seeds" if any(claim.over == SEEDS for claim in claims) else ""
    one = "of one model, which supports no claim about training in general"
    return f"intervals are over topics and wrapper texts{seeds}, {one}"


def _said(claims: Sequence[Claim], key: str) -> str:
    """Lists the verdicts of a claim, shortened to the threat where a verdict holds at every setting."""
    found = [claim for claim in claims if claim.key == key and claim.verdict != UNMEASURED]
    by_verdict: dict[str, list[str]] = {}
    for claim in found:
        settings = {other.setting for other in found if other.threat == claim.threat}
        case = f"{claim.threat} at {claim.setting}" if len(settings) > 1 else claim.threat
        by_verdict.setdefault(claim.verdict, []).append(case)
    for verdict in by_verdict:
        threats = list(dict.fromkeys(claim.threat for claim in found if claim.verdict == verdict))
        if all(claim.verdict == verdict for claim in found if claim.threat in threats):
            by_verdict[verdict] = threats
    return ", ".join(f"{_VERDICT_WORDS[verdict]} on {_and(cases)}" for verdict, cases in by_verdict.items())


def _and(words: Sequence[str]) -> str:
    *first, last = words or [""]
    return f"{', '.join(first)} and {last}" if first else last
