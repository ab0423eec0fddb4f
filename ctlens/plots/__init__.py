"""Arrays and labels in, one plotly figure out: each function answers one question.

Nothing here knows of models or data frames, shows a figure by itself, or changes a global
plotly setting.
"""

from plotly.graph_objects import Figure

from ctlens.plots.agreement import agreement
from ctlens.plots.curves import Curve, dose_response, layer_curves
from ctlens.plots.evidence import Measurement, evidence
from ctlens.plots.exchange import exchange_curves, graft_bars
from ctlens.plots.export import save_figure, save_figures
from ctlens.plots.heads import attention_heads, component_grids
from ctlens.plots.interventions import against_random
from ctlens.plots.knockout import knockout_heads, knockout_layers
from ctlens.plots.lines import StepCurve, costs, cross_loss_steps, update_ranks
from ctlens.plots.maps import LabelledMap, attention_maps
from ctlens.plots.matrix import Panel, cross_loss, cross_threat
from ctlens.plots.patching import first_order, patched_heads, patched_positions
from ctlens.plots.points import points
from ctlens.plots.probes import probe_curves
from ctlens.plots.rates import behaviour
from ctlens.plots.similarity import similarity_curves, similarity_matrix
from ctlens.plots.strength import StrengthCurve, attack_strength
from ctlens.plots.theme import finish, label, style
from ctlens.plots.training import history, hook_history, progress

__all__ = [
    "Curve",
    "Figure",
    "LabelledMap",
    "Measurement",
    "Panel",
    "StepCurve",
    "StrengthCurve",
    "against_random",
    "agreement",
    "attack_strength",
    "attention_heads",
    "attention_maps",
    "behaviour",
    "component_grids",
    "costs",
    "cross_loss",
    "cross_loss_steps",
    "cross_threat",
    "dose_response",
    "evidence",
    "exchange_curves",
    "finish",
    "graft_bars",
    "first_order",
    "history",
    "hook_history",
    "knockout_heads",
    "knockout_layers",
    "label",
    "layer_curves",
    "patched_heads",
    "patched_positions",
    "points",
    "probe_curves",
    "progress",
    "save_figure",
    "save_figures",
    "similarity_curves",
    "similarity_matrix",
    "style",
    "update_ranks",
]
