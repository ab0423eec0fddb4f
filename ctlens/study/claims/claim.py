"""One claim with its statistic, interval, null and a verdict that follows from them by one rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from ctlens.core.errors import CtlensError, unknown
from ctlens.core.files import atomic_file
from ctlens.core.reading import number_or_nan, read_columns, typed, whole_number
from ctlens.plots import label
from ctlens.study.claims.estimates import ClaimEstimate

HOLDS = "holds"
FAILS = "does not hold"
OPEN = "inconclusive"
UNMEASURED = "not measured"
CLAIM_VERDICTS = (HOLDS, FAILS, OPEN, UNMEASURED)

_REASONS = {
    HOLDS: "{value:.2f} [{low:.2f}, {high:.2f}] lies above {floor:.2g} with its whole interval",
    FAILS: "{value:.2f} [{low:.2f}, {high:.2f}] lies at or below {floor:.2g} with its whole interval",
    OPEN: "the interval of {value:.2f}, [{low:.2f}, {high:.2f}], holds {floor:.2g}",
    UNMEASURED: "it could not be measured here",
}
"""The rule of each verdict in words, with the numbers."""
_TOO_FEW = "it is {value:.2f}, of too few topics or wrapper texts for an interval"


@dataclass(frozen=True)
class Claim:
    """One claim on one threat, as measured.

    Attributes:
        key: names the claim, whatever the threat.
        statement: what is claimed, a sentence without its full stop.
        threat: trained and evaluated on; `"all"` where the claim is about several.
        setting: `"equal steps"` or `"matched effect"`, how the methods were made comparable.
        statistic: what the number is, in words.
        unit: of the number.
        value, ci_low, ci_high: the number with its 95 percent interval; NaN where not measured.
        prompts_low, prompts_high: the ends of the interval over prompts alone, which is narrower where there are seeds.
        null: the number that a control or chance gives, to compare with; NaN where there is none.
        floor: what the whole interval has to exceed for the claim to hold.
        n: prompts.
        over: what the interval is over, in words.
        verdict: one of `CLAIM_VERDICTS`.
        reason: why, in one sentence with the numbers in it.
    """

    key: str
    statement: str
    threat: str
    setting: str
    statistic: str
    unit: str
    value: float
    ci_low: float
    ci_high: float
    prompts_low: float
    prompts_high: float
    null: float
    floor: float
    n: int
    over: str
    verdict: str
    reason: str


_KINDS: dict[str, Callable[[str], Any]] = {"str": str, "float": number_or_nan, "int": whole_number}
_CLAIM_KINDS = {field.name: _KINDS[str(field.type)] for field in fields(Claim)}


def claim_verdict(value: float, low: float, high: float, floor: float = 0.0) -> str:
    """Decides whether a claim holds: its whole interval lies above the floor, below it, or on both sides.

    >>> claim_verdict(0.5, 0.2, 0.8), claim_verdict(-0.1, -0.3, -0.05), claim_verdict(0.1, -0.2, 0.4)
    ('holds', 'does not hold', 'inconclusive')
    >>> claim_verdict(float("nan"), float("nan"), float("nan"))
    'not measured'
    """
    if pd.isna(value) or pd.isna(low) or pd.isna(high):
        return UNMEASURED
    if low > floor:
        return HOLDS
    return FAILS if high <= floor else OPEN


def write_claims(claims: Iterable[Claim], path: str | Path) -> None:
    """Writes `claims.csv`, one claim per row."""
    with atomic_file(Path(path)) as temporary:
        pd.DataFrame([astuple(claim) for claim in claims], columns=list(_CLAIM_KINDS)).to_csv(temporary, index=False)


def read_claims(path: str | Path) -> list[Claim]:
    """Reads the claims of a `claims.csv`.

    Raises:
        CtlensError: the file is missing or damaged, or lacks a column.
    """
    path = Path(path)
    if not path.is_file():
        raise CtlensError(f"{path} does not exist: run the study to its end first, or check the path.")
    columns = typed(read_columns(path), _CLAIM_KINDS, path)
    for row, word in enumerate(columns["verdict"], start=1):
        if word not in CLAIM_VERDICTS:
            raise CtlensError(f"{path}, row {row}: {unknown('verdict', word, CLAIM_VERDICTS)}")
    return [Claim(*row) for row in zip(*columns.values(), strict=True)]


def make_claim(
    key: str,
    statement: str,
    threat: str,
    setting: str,
    found: ClaimEstimate,
    *,
    statistic: str,
    unit: str,
    null: float,
    null_words: str,
    details: str = "",
    floor: float = 0.0,
    unmet: str = "",
    refused: str = "",
) -> Claim:
    """Builds a claim with its verdict and its reason in words.

    Args:
        key, statement, threat, setting, statistic, unit, null, floor: see `Claim`.
        found: the number.
        null_words: the null in words, with `{null}` for its number.
        details: the numbers behind the number, in words.
        unmet: the part of the claim that the number does not show and that is not clear, in words; with it a claim
            that would hold stays open.
        refused: why there is no number, if an analysis refused.
    """
    verdict = claim_verdict(found.value, found.low, found.high, floor)
    words = _TOO_FEW if verdict == UNMEASURED and not pd.isna(found.value) else _REASONS[verdict]
    reason = words.format(value=found.value, low=found.low, high=found.high, floor=floor)
    if verdict == HOLDS and unmet:
        verdict = OPEN
        reason = f"{reason}, but {unmet}"
    null_known = not pd.isna(null) and verdict != UNMEASURED
    parts = [reason, null_words.format(null=f"{null:.2g}") if null_known else "", details or refused]
    return Claim(
        key=key,
        statement=statement,
        threat=threat,
        setting=setting,
        statistic=statistic,
        unit=unit,
        value=found.value,
        ci_low=found.low,
        ci_high=found.high,
        prompts_low=found.prompts_low,
        prompts_high=found.prompts_high,
        null=null,
        floor=floor,
        n=found.n,
        over=found.over,
        verdict=verdict,
        reason="; ".join(filter(None, parts)),
    )


def together(names: Sequence[str]) -> str:
    """Lists internal methods in words.

    >>> together(["act", "mlpct", "attct"]), together([])
    ('ACT, MLPCT and AttCT', 'internal methods')
    """
    *first, last = [label(name) for name in names] or ["internal methods"]
    return f"{', '.join(first)} and {last}" if first else last
