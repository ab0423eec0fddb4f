"""Arrays and labels in, one plotly figure out: each function draws the answer to one question.

The functions know no models and no data frames, never show a figure, and change no global setting of plotly.

A name imported as itself (`from ... import X as X`) is public to type checkers; no other list of them is kept.
"""

from plotly.graph_objects import Figure as Figure

from ctlens.plots.agreement import agreement as agreement
from ctlens.plots.curve_panels import CurvePanel as CurvePanel
from ctlens.plots.curve_panels import curve_panels as curve_panels
from ctlens.plots.curves import dose_curves as dose_curves
from ctlens.plots.curves import layer_curves as layer_curves
from ctlens.plots.evidence import Measurement as Measurement
from ctlens.plots.evidence import evidence as evidence
from ctlens.plots.exchange import exchange_curves as exchange_curves
from ctlens.plots.exchange import graft_bars as graft_bars
from ctlens.plots.exploring import AnswerRow as AnswerRow
from ctlens.plots.exploring import LensLine as LensLine
from ctlens.plots.exploring import TokenRow as TokenRow
from ctlens.plots.exploring import answer_margins as answer_margins
from ctlens.plots.exploring import head_grids as head_grids
from ctlens.plots.exploring import layer_tokens as layer_tokens
from ctlens.plots.exploring import lens_lines as lens_lines
from ctlens.plots.exploring import patched_margins as patched_margins
from ctlens.plots.exploring import token_grid as token_grid
from ctlens.plots.export import save_figure as save_figure
from ctlens.plots.export import write_figures as write_figures
from ctlens.plots.heads import attention_heads as attention_heads
from ctlens.plots.heads import component_grids as component_grids
from ctlens.plots.intervals import Curve as Curve
from ctlens.plots.intervals import CurveWithX as CurveWithX
from ctlens.plots.intervals import IntervalGrid as IntervalGrid
from ctlens.plots.intervals import NullBand as NullBand
from ctlens.plots.interventions import against_random as against_random
from ctlens.plots.knockout import knockout_heads as knockout_heads
from ctlens.plots.knockout import knockout_layers as knockout_layers
from ctlens.plots.lines import costs as costs
from ctlens.plots.lines import cross_loss_steps as cross_loss_steps
from ctlens.plots.lines import update_ranks as update_ranks
from ctlens.plots.maps import LabelledMap as LabelledMap
from ctlens.plots.maps import labelled_maps as labelled_maps
from ctlens.plots.matrix import cross_loss_matrix as cross_loss_matrix
from ctlens.plots.matrix import cross_threat as cross_threat
from ctlens.plots.patching import PatchedTokens as PatchedTokens
from ctlens.plots.patching import first_order as first_order
from ctlens.plots.patching import patched_heads as patched_heads
from ctlens.plots.patching import patched_positions as patched_positions
from ctlens.plots.points import points as points
from ctlens.plots.probes import probe_curves as probe_curves
from ctlens.plots.rates import behaviour as behaviour
from ctlens.plots.replicated import replicated as replicated
from ctlens.plots.scattered import scattered as scattered
from ctlens.plots.similarity import similarity_curves as similarity_curves
from ctlens.plots.similarity import similarity_matrix as similarity_matrix
from ctlens.plots.strength import attack_strength as attack_strength
from ctlens.plots.theme import finish as finish
from ctlens.plots.theme import label as label
from ctlens.plots.theme import placed as placed
from ctlens.plots.theme import style as style
from ctlens.plots.tradeoff import TradeoffPanel as TradeoffPanel
from ctlens.plots.tradeoff import tradeoff as tradeoff
from ctlens.plots.training import history as history
from ctlens.plots.training import hook_history as hook_history
from ctlens.plots.training import progress as progress
