"""Looking inside: each analysis is one public function and one frozen result with its figure."""

from ctlens.analysis.attention import AttentionDiff, attention_diff
from ctlens.analysis.crossloss import CrossLoss, cross_loss
from ctlens.analysis.residual import ResidualShift, residual_shift

__all__ = ["AttentionDiff", "CrossLoss", "ResidualShift", "attention_diff", "cross_loss", "residual_shift"]
