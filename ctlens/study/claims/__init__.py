"""The claims of the field, judged by what a study measured: numbers, intervals, nulls, verdicts by a written rule."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ctlens.study.claims.answer import answer
from ctlens.study.claims.behaviour import behaviour_claims
from ctlens.study.claims.claim import VERDICTS, Claim, read_claims, verdict, write_claims
from ctlens.study.claims.inside import inside_claims
from ctlens.study.config import StudyConfig

__all__ = ["VERDICTS", "Claim", "answer", "judge", "read_claims", "verdict", "write_claims"]


def judge(config: StudyConfig, study: Path, results: pd.DataFrame) -> list[Claim]:
    """Every claim, from the results of a study and from the looks into its models.

    Args:
        config: of the study.
        study: its folder, with every cell and look.
        results: its rows.
    """
    return [*behaviour_claims(config, results), *inside_claims(config, study)]
