"""The claims of the field, judged by what a study measured: numbers, intervals, nulls, verdicts by a written rule."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ctlens.study.analyses import FinishedAnalyses
from ctlens.study.claims.answer import answer, basis
from ctlens.study.claims.behaviour import behaviour_claims
from ctlens.study.claims.claim import CLAIM_VERDICTS, Claim, claim_verdict, read_claims, write_claims
from ctlens.study.claims.inside import inside_claims
from ctlens.study.config import StudyConfig

__all__ = ["CLAIM_VERDICTS", "Claim", "answer", "basis", "claim_verdict", "judge_claims", "read_claims", "write_claims"]


def judge_claims(config: StudyConfig, study: Path, results: pd.DataFrame) -> list[Claim]:
    """Judges every claim by the results of a study and by the analyses of its models.

    Args:
        config: of the study.
        study: its folder, with every cell and analysis.
        results: its rows.
    """
    return [*behaviour_claims(config, study, results), *inside_claims(FinishedAnalyses(config, study))]
