"""Looking inside: each analysis is one public function and one frozen result with its figure."""

from ctlens.analysis.attention import AttentionDiff, attention_diff
from ctlens.analysis.residual import ResidualShift, residual_shift

__all__ = ["AttentionDiff", "ResidualShift", "attention_diff", "residual_shift"]
