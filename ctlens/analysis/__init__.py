"""Looking inside: each analysis is one public function and one frozen result with its figure."""

from ctlens.analysis.attention import AttentionDiff, attention_diff
from ctlens.analysis.crossloss import CrossLoss, cross_loss
from ctlens.analysis.lens import LogitAttribution, LogitLens, logit_attribution, logit_lens
from ctlens.analysis.residual import ResidualShift, residual_shift
from ctlens.analysis.states import States, states
from ctlens.analysis.updaterank import UpdateRank, update_rank

__all__ = [
    "AttentionDiff",
    "CrossLoss",
    "LogitAttribution",
    "LogitLens",
    "ResidualShift",
    "States",
    "UpdateRank",
    "attention_diff",
    "cross_loss",
    "logit_attribution",
    "logit_lens",
    "residual_shift",
    "states",
    "update_rank",
]
