"""Looking inside: each analysis is one public function and one frozen result with its figure.

A name imported as itself (`from ... import probe as probe`) is public to type checkers; no other list of them is kept.
"""

from ctlens.analysis.attention.diff import AttentionDiff as AttentionDiff
from ctlens.analysis.attention.diff import attention_diff as attention_diff
from ctlens.analysis.attention.knockout import Knockout as Knockout
from ctlens.analysis.attention.knockout import knockout as knockout
from ctlens.analysis.attention.maps import AttentionMaps as AttentionMaps
from ctlens.analysis.attention.maps import attention_maps as attention_maps
from ctlens.analysis.attention.saliency import SaliencyAgreement as SaliencyAgreement
from ctlens.analysis.attention.saliency import saliency_agreement as saliency_agreement
from ctlens.analysis.base.record import record as record
from ctlens.analysis.base.recording import Recording as Recording
from ctlens.analysis.base.result import Result as Result
from ctlens.analysis.base.states import States as States
from ctlens.analysis.base.states import states as states
from ctlens.analysis.directions.directions import Directions as Directions
from ctlens.analysis.directions.directions import mean_difference as mean_difference
from ctlens.analysis.directions.erasure import Erasure as Erasure
from ctlens.analysis.directions.erasure import erase_or_mask as erase_or_mask
from ctlens.analysis.directions.from_probe import probe_direction as probe_direction
from ctlens.analysis.directions.interventions import Intervention as Intervention
from ctlens.analysis.directions.steering import ablate as ablate
from ctlens.analysis.directions.steering import steer as steer
from ctlens.analysis.exchange.mediation import Mediation as Mediation
from ctlens.analysis.exchange.mediation import mediation as mediation
from ctlens.analysis.exchange.transplant import Transplant as Transplant
from ctlens.analysis.exchange.transplant import transplant as transplant
from ctlens.analysis.outputs.cross_loss import CrossLoss as CrossLoss
from ctlens.analysis.outputs.cross_loss import cross_loss as cross_loss
from ctlens.analysis.outputs.gap_recovered import GapRecovered as GapRecovered
from ctlens.analysis.outputs.gap_recovered import gap_recovered as gap_recovered
from ctlens.analysis.outputs.logit_lens import LogitAttribution as LogitAttribution
from ctlens.analysis.outputs.logit_lens import LogitLens as LogitLens
from ctlens.analysis.outputs.logit_lens import logit_attribution as logit_attribution
from ctlens.analysis.outputs.logit_lens import logit_lens as logit_lens
from ctlens.analysis.patching.attribution import AttributionAgreement as AttributionAgreement
from ctlens.analysis.patching.attribution import attribution_agreement as attribution_agreement
from ctlens.analysis.patching.attribution import attribution_patch as attribution_patch
from ctlens.analysis.patching.patch import patch as patch
from ctlens.analysis.patching.result import Patching as Patching
from ctlens.analysis.probing.probe import Probe as Probe
from ctlens.analysis.probing.probe import probe as probe
from ctlens.analysis.probing.tasks import Task as Task
from ctlens.analysis.probing.tasks import answer_hinted as answer_hinted
from ctlens.analysis.probing.tasks import labelled as labelled
from ctlens.analysis.probing.tasks import will_misbehave as will_misbehave
from ctlens.analysis.probing.tasks import wrapper_present as wrapper_present
from ctlens.analysis.residual.shift import ResidualShift as ResidualShift
from ctlens.analysis.residual.shift import residual_shift as residual_shift
from ctlens.analysis.residual.similarity import shift_similarity as shift_similarity
from ctlens.analysis.residual.similarity_result import ShiftSimilarity as ShiftSimilarity
from ctlens.analysis.weights.graft import Graft as Graft
from ctlens.analysis.weights.graft import graft as graft
from ctlens.analysis.weights.update_rank import UpdateRank as UpdateRank
from ctlens.analysis.weights.update_rank import update_rank as update_rank
