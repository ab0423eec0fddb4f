"""Behaviour under threats: prompts of every prompt side asked once, answers judged one by one, rates with intervals."""

from __future__ import annotations

from ctlens.evaluation.asking import evaluate
from ctlens.evaluation.result import OUTCOME_COLUMNS, RATE_COLUMNS, Evaluation

__all__ = ["OUTCOME_COLUMNS", "RATE_COLUMNS", "Evaluation", "evaluate"]
