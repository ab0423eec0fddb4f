"""Looking inside: each analysis is one public function and one frozen result with its figure."""

from ctlens.analysis.attention.diff import AttentionDiff, attention_diff
from ctlens.analysis.attention.knockout import Knockout, knockout
from ctlens.analysis.attention.maps import AttentionMaps, attention_maps
from ctlens.analysis.attention.saliency import SaliencyAgreement, saliency_agreement
from ctlens.analysis.base.record import record
from ctlens.analysis.base.recording import Recording
from ctlens.analysis.base.result import Result
from ctlens.analysis.base.states import States, states
from ctlens.analysis.directions.directions import Directions, mean_difference
from ctlens.analysis.directions.erasure import Erasure, erase_or_mask
from ctlens.analysis.directions.from_probe import probe_direction
from ctlens.analysis.directions.interventions import Intervention
from ctlens.analysis.directions.steering import ablate, steer
from ctlens.analysis.exchange.mediation import Mediation, mediation
from ctlens.analysis.exchange.transplant import Transplant, transplant
from ctlens.analysis.outputs.cross_loss import CrossLoss, cross_loss
from ctlens.analysis.outputs.gap_recovered import GapRecovered, gap_recovered
from ctlens.analysis.outputs.logit_lens import LogitAttribution, LogitLens, logit_attribution, logit_lens
from ctlens.analysis.patching.attribution import AttributionAgreement, attribution_agreement, attribution_patch
from ctlens.analysis.patching.patch import patch, patch_sites
from ctlens.analysis.patching.result import Patching
from ctlens.analysis.probing.probe import Probe, probe
from ctlens.analysis.probing.tasks import Task, answer_hinted, labelled, will_misbehave, wrapper_present
from ctlens.analysis.residual.shift import ResidualShift, residual_shift
from ctlens.analysis.residual.similarity import shift_similarity
from ctlens.analysis.residual.similarity_result import ShiftSimilarity
from ctlens.analysis.weights.graft import Graft, graft
from ctlens.analysis.weights.update_rank import UpdateRank, update_rank

__all__ = [
    "AttentionDiff",
    "AttentionMaps",
    "AttributionAgreement",
    "CrossLoss",
    "Directions",
    "Erasure",
    "GapRecovered",
    "Graft",
    "Intervention",
    "Knockout",
    "LogitAttribution",
    "LogitLens",
    "Mediation",
    "Patching",
    "Probe",
    "Recording",
    "ResidualShift",
    "Result",
    "SaliencyAgreement",
    "ShiftSimilarity",
    "States",
    "Task",
    "Transplant",
    "UpdateRank",
    "ablate",
    "attribution_agreement",
    "attribution_patch",
    "answer_hinted",
    "attention_diff",
    "attention_maps",
    "cross_loss",
    "erase_or_mask",
    "gap_recovered",
    "graft",
    "knockout",
    "labelled",
    "logit_attribution",
    "logit_lens",
    "mean_difference",
    "mediation",
    "patch",
    "patch_sites",
    "probe",
    "probe_direction",
    "record",
    "residual_shift",
    "saliency_agreement",
    "shift_similarity",
    "states",
    "steer",
    "transplant",
    "update_rank",
    "will_misbehave",
    "wrapper_present",
]
