"""Behaviour under threats: a model answers the prompts of every prompt side, and rates with intervals come of it.

A name imported as itself (`from ... import X as X`) is public to type checkers; no other list of them is kept.
"""

from __future__ import annotations

from ctlens.evaluation.asking import evaluate as evaluate
from ctlens.evaluation.capability import Capability as Capability
from ctlens.evaluation.capability import capability as capability
from ctlens.evaluation.prompt_files import export_prompts as export_prompts
from ctlens.evaluation.prompt_files import judge_answers as judge_answers
from ctlens.evaluation.result import OUTCOME_COLUMNS as OUTCOME_COLUMNS
from ctlens.evaluation.result import RATE_COLUMNS as RATE_COLUMNS
from ctlens.evaluation.result import Evaluation as Evaluation
