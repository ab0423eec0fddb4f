"""Looking inside: each analysis is one public function and one frozen result with its figure."""

from ctlens.analysis.attention import AttentionDiff, attention_diff
from ctlens.analysis.crossloss import CrossLoss, cross_loss
from ctlens.analysis.residual import ResidualShift, residual_shift
from ctlens.analysis.states import States, states

__all__ = [
    "AttentionDiff", "CrossLoss", "ResidualShift", "States", "attention_diff", "cross_loss", "residual_shift", "states",
]  # fmt: skip
