"""Arrays and labels in, one plotly figure out: each function draws the answer to one question.

The functions know no models and no data frames, never show a figure, and change no global setting of plotly.
"""

from plotly.graph_objects import Figure

from ctlens.plots.agreement import agreement
from ctlens.plots.curves import dose_curves, layer_curves
from ctlens.plots.evidence import Measurement, evidence
from ctlens.plots.exchange import exchange_curves, graft_bars
from ctlens.plots.export import save_figure, write_figures
from ctlens.plots.heads import attention_heads, component_grids
from ctlens.plots.intervals import Curve, CurveWithX, IntervalGrid, NullBand
from ctlens.plots.interventions import against_random
from ctlens.plots.knockout import knockout_heads, knockout_layers
from ctlens.plots.lines import costs, cross_loss_steps, update_ranks
from ctlens.plots.maps import LabelledMap, labelled_maps
from ctlens.plots.matrix import cross_loss_matrix, cross_threat
from ctlens.plots.patching import first_order, patched_heads, patched_positions
from ctlens.plots.points import points
from ctlens.plots.probes import probe_curves
from ctlens.plots.rates import behaviour
from ctlens.plots.similarity import similarity_curves, similarity_matrix
from ctlens.plots.strength import attack_strength
from ctlens.plots.theme import finish, label, style
from ctlens.plots.training import history, hook_history, progress

__all__ = [
    "Curve",
    "CurveWithX",
    "Figure",
    "IntervalGrid",
    "LabelledMap",
    "Measurement",
    "NullBand",
    "against_random",
    "agreement",
    "attack_strength",
    "attention_heads",
    "behaviour",
    "component_grids",
    "costs",
    "cross_loss_matrix",
    "cross_loss_steps",
    "cross_threat",
    "dose_curves",
    "evidence",
    "exchange_curves",
    "finish",
    "first_order",
    "graft_bars",
    "history",
    "hook_history",
    "knockout_heads",
    "knockout_layers",
    "label",
    "labelled_maps",
    "layer_curves",
    "patched_heads",
    "patched_positions",
    "points",
    "probe_curves",
    "progress",
    "save_figure",
    "similarity_curves",
    "similarity_matrix",
    "style",
    "update_ranks",
    "write_figures",
]
