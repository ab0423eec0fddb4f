"""Behaviour under threats: a model answers the prompts of every prompt side, and rates with intervals come of it."""

from __future__ import annotations

from ctlens.evaluation.asking import evaluate
from ctlens.evaluation.result import OUTCOME_COLUMNS, RATE_COLUMNS, Evaluation

__all__ = ["OUTCOME_COLUMNS", "RATE_COLUMNS", "Evaluation", "evaluate"]
