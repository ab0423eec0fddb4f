"""Looking inside: each analysis is one public function and one frozen result with its figure."""

from ctlens.analysis.attention import AttentionDiff, attention_diff
from ctlens.analysis.attention_maps import AttentionMaps, attention_maps
from ctlens.analysis.attribution import AttributionAgreement, attribution_agreement, attribution_patch
from ctlens.analysis.crossloss import CrossLoss, cross_loss
from ctlens.analysis.directions import Directions, mean_difference
from ctlens.analysis.erasure import Erasure, erase_or_mask
from ctlens.analysis.grafts import Graft, graft
from ctlens.analysis.interventions import Intervention
from ctlens.analysis.knockout import Knockout, knockout
from ctlens.analysis.lens import LogitAttribution, LogitLens, logit_attribution, logit_lens
from ctlens.analysis.mediators import Mediation, mediation
from ctlens.analysis.patching import patch, patch_sites
from ctlens.analysis.patching_result import Patching
from ctlens.analysis.probe import Probe, probe
from ctlens.analysis.probeweights import probe_direction
from ctlens.analysis.record import record
from ctlens.analysis.recording import Recording
from ctlens.analysis.recovery import GapRecovered, gap_recovered
from ctlens.analysis.residual import ResidualShift, residual_shift
from ctlens.analysis.result import Result
from ctlens.analysis.saliency import SaliencyAgreement, saliency_agreement
from ctlens.analysis.similarity import shift_similarity
from ctlens.analysis.similarity_result import ShiftSimilarity
from ctlens.analysis.states import States, states
from ctlens.analysis.steering import ablate, steer
from ctlens.analysis.tasks import Task, answer_hinted, labelled, will_misbehave, wrapper_present
from ctlens.analysis.transplants import Transplant, transplant
from ctlens.analysis.updaterank import UpdateRank, update_rank

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
