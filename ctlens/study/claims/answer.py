"""The answer of a study: a sentence per question, each from the verdicts on its claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ctlens.study.claims.claim import FAILS, HOLDS, OPEN, UNMEASURED, Claim
from ctlens.study.claims.estimates import SEEDS

_QUESTIONS = {
    "repair": "Does every method leave fewer bad answers than retention alone?",
    "output_only": "Do internal losses fail where BCT does not?",
    "shared": "Do internal losses move the residual stream alike, and BCT differently?",
    "left_later": "Do losses on outputs leave part of the repair in later weights?",
    "level": "Does KL on outputs leave more there than ACT on the same tokens?",
}
"""The questions that one claim answers, by its key."""
_QUESTIONS_OF_METHODS = {
    "cue": "Can a refitted probe still read the cue?",
    "relearnt": "Is the bad answer learnt again sooner than by a model that never gave it?",
    "wrappers": "Does an attacker who tries several wrappers still get bad answers?",
}
"""The questions that a claim about each method answers, by the kind of the claim."""
_VERDICT_WORDS = {HOLDS: "yes", FAILS: "no", OPEN: "not clear"}


class Finding(NamedTuple):
    """A question of a study and its answer, one sentence."""

    question: str
    sentence: str


def answer(claims: Sequence[Claim]) -> list[Finding]:
    """Answers each question that was measured.

    A sentence lists verdicts and weighs nothing: where a claim holds on one threat and fails on another, both are said.

    Returns:
        The questions on behaviour, on the mechanism, and on each method, in this order.
    """
    measured = [claim for claim in claims if claim.verdict != UNMEASURED]
    found = [Finding(question, _said(measured, key)) for key, question in _QUESTIONS.items()]
    found += [Finding(question, _counted(measured, kind)) for kind, question in _QUESTIONS_OF_METHODS.items()]
    return [answered for answered in found if answered.sentence]


def basis(claims: Sequence[Claim]) -> str:
    """Says what the intervals are over, and what they are not."""
    seeds = ", and over seeds" if any(claim.over == SEEDS for claim in claims) else ""
    one = "of one model, which supports no claim about training in general"
    return f"Intervals are over topics and wrapper texts{seeds}, {one}."


def _counted(claims: Sequence[Claim], kind: str) -> str:
    """How many claims of a kind have each verdict."""
    verdicts = [claim.verdict for claim in claims if claim.key.startswith(f"{kind}_")]
    counts = {words: verdicts.count(verdict) for verdict, words in _VERDICT_WORDS.items()}
    said = ", ".join(f"{words} in {count}" for words, count in counts.items() if count)
    return f"Of {len(verdicts)} cases, a method on a threat each: {said}." if said else ""


def _said(claims: Sequence[Claim], key: str) -> str:
    """Lists the verdicts of a claim, by the threat alone where every setting has the same."""
    found = [claim for claim in claims if claim.key == key]
    by_verdict: dict[str, list[str]] = {}
    for claim in found:
        verdicts = {other.verdict for other in found if other.threat == claim.threat}
        case = claim.threat if len(verdicts) == 1 else f"{claim.threat} at {claim.setting}"
        cases = by_verdict.setdefault(claim.verdict, [])
        if case not in cases:
            cases.append(case)
    said = "; ".join(
        f"{words} on {_and(by_verdict[verdict])}" for verdict, words in _VERDICT_WORDS.items() if verdict in by_verdict
    )
    return f"{said[0].upper()}{said[1:]}." if said else ""


def _and(words: Sequence[str]) -> str:
    *first, last = words or [""]
    return f"{', '.join(first)} and {last}" if first else last
