"""Knockout: does a head that attends to the wrapper matter? Its attention is cut, and the answer measured.

A cut takes the attention of chosen queries to chosen keys out of the pattern and scales up what is left of
each row. That is the softmax over the remaining keys, and over a learned sink where the model has one, so it
is the same as masking the scores before the softmax (Geva et al. 2023, arXiv 2304.14767). Everything behind
the cut is computed anew.

Any cut removes information, so each has a null: as many other keys, drawn at random, cut in its place. Those
hold what the good answer needs, so the null mostly hurts it. A wrapper that matters shows as a change for the
better, of a size that the null has too; one that is attended to and not used, as none. The null is
matched in keys, not in attention: what it cuts is given beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctlens import plots
from ctlens.analysis.attention.cuts import (
    ALONE,
    DRAWS,
    FROM,
    HEAD,
    QUERIES,
    Cut,
    Edges,
    chosen_heads,
    edges,
    planned_cuts,
    random_keys,
)
from ctlens.analysis.base.contrast import ContrastBatch, contrast_batches, encoded_contrasts
from ctlens.analysis.base.forward import comparable_by_label, encoded_pairs
from ctlens.analysis.base.positions import Keys, key_positions
from ctlens.analysis.base.result import ResultOverPairs, groups_of
from ctlens.core.clusters import clustered_mean
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.progress import progress_bar
from ctlens.core.public import public
from ctlens.core.types import LensModel, Logits
from ctlens.data.inputs import Pairs
from ctlens.models.hooks import Layers, editing, resolve, run, run_capturing, select_layers
from ctlens.plots import Curve, Figure

_WORDS = {"logit_diff": "logit difference", "p_bad": "P(bad)"}
KNOCKOUT_MEASURES = tuple(_WORDS)


@dataclass(frozen=True)
class Knockout(ResultOverPairs):
    """The result of `knockout`: the answer of every pair under every cut.

    Attributes:
        uncut: `[model, measure, pair]`, measures as in `KNOCKOUT_MEASURES`: the logit difference, good minus
            bad, and the probability of the bad answer's token.
        cut: `[model, measure, cut, pair]`, with the chosen keys cut off.
        null: the same with random keys cut off, the mean over draws.
        attention: `[model, cut, pair]`, how much of the chosen queries' attention the chosen keys had, the mean over
            the cut's layers and heads in the model as it is.
        null_attention: the same of the random keys.
        n_keys, n_null_keys: per pair, how many keys are cut; the null has fewer where there are no more.
        kinds: of each cut, `"alone"` (one layer), `"from"` (that layer and all chosen ones behind it) or `"head"`.
        layers, heads: of each cut; the head is -1 for all chosen ones.
        models: their labels.
        queries: one of `QUERIES`.
        keys: the segment, or `"keys"` for a user's choice.
    """

    uncut: Float[np.ndarray, "model measure pair"]
    cut: Float[np.ndarray, "model measure cut pair"]
    null: Float[np.ndarray, "model measure cut pair"]
    attention: Float[np.ndarray, "model cut pair"]
    null_attention: Float[np.ndarray, "model cut pair"]
    n_keys: Int[np.ndarray, " pair"]
    n_null_keys: Int[np.ndarray, " pair"]
    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    models: tuple[str, ...]
    queries: str
    keys: str

    def effects(self, measure: str = "logit_diff") -> Float[np.ndarray, "edge_set model cut pair"]:
        """The changes that a cut makes, cut minus uncut: first for the chosen keys, then for the random ones.

        Raises:
            CtlensError: the measure is unknown.
        """
        if measure not in KNOCKOUT_MEASURES:
            raise unknown("measure", measure, KNOCKOUT_MEASURES)
        at = KNOCKOUT_MEASURES.index(measure)
        return np.stack([self.cut[:, at], self.null[:, at]]) - self.uncut[:, at, None]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model, cut and measure.

        Returns:
            Means over `n_pairs`: `uncut` and `cut`, the `effect` (cut minus uncut) with its 95
            percent interval, the `null_effect`, `beyond` (effect minus null effect, pair
            by pair) with its interval, and `attention` and `null_attention`.
        """
        tables = []
        for at, measure in enumerate(KNOCKOUT_MEASURES):
            effect, null = np.moveaxis(self.effects(measure), -1, 1)
            columns = {"uncut": np.broadcast_to(self.uncut[:, at].mean(-1)[:, None], self.attention.shape[:2])}
            columns |= {"cut": self.cut[:, at].mean(-1)}
            columns |= dict(zip(("effect", "ci_low", "ci_high"), clustered_mean(effect, self.clusters()), strict=True))
            columns |= {"null_effect": null.mean(0)}
            beyond = clustered_mean(effect - null, self.clusters())
            columns |= dict(zip(("beyond", "beyond_low", "beyond_high"), beyond, strict=True))
            columns |= {"attention": self.attention.mean(-1), "null_attention": self.null_attention.mean(-1)}
            labels = [
                (model, *cut, measure)
                for model in self.models
                for cut in zip(self.kinds, self.layers, self.heads, strict=True)
            ]
            table = pd.DataFrame(labels, columns=["model", "kind", "layer", "head", "measure"])
            tables.append(
                table.assign(**{name: np.ravel(values) for name, values in columns.items()}, n_pairs=len(effect))
            )
        return pd.concat(tables, ignore_index=True)

    def figure(self, measure: str = "logit_diff") -> Figure:
        """The attention that was cut beside the change it made: by layer, or one marker per head."""
        effect, null = self.effects(measure)
        change = f"change of {_WORDS[measure]}"
        shape = "small circles" if "head" in self.kinds else "dotted"
        subtitle = (
            f"{self.uncut.shape[-1]} wrapped prompts; attention from {QUERIES[self.queries]} to {self.keys} is cut; "
            f"{shape}: as many random other keys"
        )
        title = "Attended to, or used: what does cutting attention to the wrapper change?"
        if "head" in self.kinds:
            names = [f"L{layer}H{head}" for layer, head in zip(self.layers, self.heads, strict=True)]
            means = zip(self.attention.mean(-1), effect.mean(-1), null.mean(-1), strict=True)
            points = dict(zip(self.models, means, strict=True))
            return plots.knockout_heads(points, names, title, y_title=change, subtitle=subtitle)
        panels = {
            "attention before the cut": self._curves(self.attention, self.null_attention, ALONE),
            "cut in one layer": self._curves(effect, null, ALONE),
            "cut from a layer on": self._curves(effect, null, FROM),
        }
        layers = [layer for layer, kind in zip(self.layers, self.kinds, strict=True) if kind == ALONE]
        y_titles = ["share of attention", change, change]
        return plots.knockout_layers(layers, panels, title, y_titles=y_titles, subtitle=subtitle)

    def _curves(self, chosen: np.ndarray, null: np.ndarray, kind: str) -> dict[str, tuple[Curve, Curve]]:
        """The curves of one kind of cut over the layers and of its null, by model."""
        cuts = [number for number, name in enumerate(self.kinds) if name == kind]
        clusters = self.clusters()
        return {
            model: (clustered_mean(chosen[at, cuts].T, clusters), clustered_mean(null[at, cuts].T, clusters))
            for at, model in enumerate(self.models)
        }


@public
def knockout(
    models: LensModel | Mapping[str, LensModel],
    pairs: Pairs,
    *,
    queries: str = "last",
    keys: Keys = "wrapper",
    by: str = "layer",
    layers: Layers = "all",
    heads: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Knockout:
    """Measures the answers to wrapped prompts while attention to the keys is cut, layer by layer or head by head.

    >>> import ctlens as ct
    >>> pairs = ct.threats.get("sycophancy").pairs(8, split="heldout")
    >>> found = ct.analysis.knockout(ct.load_organism(), pairs, progress=False)
    >>> bool(found.effects()[0, 0, 4].mean() > 2)  # cut from layer 0 on, the good answer gains
    True

    Args:
        models: one, or several of one shape by their labels, in eval mode.
        pairs: with good and bad answers on the wrapped side. `ctlens.pairs` makes them of two lists of texts.
        queries: whose attention is cut: `"last"`, the token that predicts the answer; `"content"`,
            the aligned tokens before it; `"all"`, every token outside the keys.
        keys: the keys that are cut off: a segment such as `"wrapper"`, or a function that names positions.
        by: `"layer"`, each layer alone, and each with those behind it; or `"head"`, each head alone.
        layers: which ones.
        heads: which ones in each layer; None for all.
        seed: of the null's random keys, drawn for each pair from the prompt's other tokens
            without the first and the last.
        batch_size: prompts per forward pass.
        progress: show a progress bar.

    Raises:
        CtlensError: a model is in training mode or does not compare with the first, a name is
            unknown, a pair lacks a contrast or the keys, there are no other keys to draw, or a cut
            would leave a query without any attention.
    """
    named = comparable_by_label(models)
    first = next(iter(named.values()))
    plan = planned_cuts(select_layers(first.cfg.n_layers, layers), chosen_heads(first, heads), by)
    rows = encoded_pairs(first, pairs, ("shared",))
    items = encoded_contrasts(first, rows)
    chosen = [key_positions(keys, row) for row in rows]
    drawn = [random_keys(row, of_row, seed) for row, of_row in zip(rows, chosen, strict=True)]
    total = len(named) * len(plan) * (1 + DRAWS) * -(-len(rows) // batch_size)
    found = []
    with progress_bar(total=total, desc="knockout", shown=progress, leave=False) as bar:
        for number, batch in enumerate(contrast_batches(first, items, batch_size, progress=False)):
            part = slice(number * batch_size, (number + 1) * batch_size)
            edge_sets = [
                edges(batch, rows[part], queries, edge_set)
                for edge_set in (chosen[part], *zip(*drawn[part], strict=True))
            ]
            if not edge_sets[0].any((1, 2)).all():
                raise CtlensError(f"{QUERIES[queries]} of a pair cannot see the keys: choose other queries or keys.")
            found.append([_measured(model, batch, edge_sets, plan, bar.update) for model in named.values()])
    measured = _joined(found)
    return Knockout(
        uncut=measured.uncut,
        cut=measured.cut,
        null=measured.null,
        attention=measured.attention,
        null_attention=measured.null_attention,
        n_keys=np.array([len(of_row) for of_row in chosen]),
        n_null_keys=np.array([len(of_row[0]) for of_row in drawn]),
        kinds=tuple(cut.kind for cut in plan),
        layers=tuple(cut.layers[0] for cut in plan),
        heads=tuple(cut.heads[0] if cut.kind == HEAD else -1 for cut in plan),
        models=tuple(named),
        queries=queries,
        keys=keys if isinstance(keys, str) else "keys",
        groups=groups_of(pairs),
    )


class _Measured(NamedTuple):
    """One model's answers to a batch, and its attention to the keys that are cut.

    Attributes:
        uncut: the answers without a cut, measures as in `KNOCKOUT_MEASURES`.
        cut: the answers with the chosen keys cut off.
        null: the answers with random keys cut off, the mean over draws.
        attention: the chosen queries' attention to the chosen keys before the cut.
        null_attention: their attention to the random keys, the mean over draws.
    """

    uncut: Float[np.ndarray, "*model measure pair"]
    cut: Float[np.ndarray, "*model measure cut pair"]
    null: Float[np.ndarray, "*model measure cut pair"]
    attention: Float[np.ndarray, "*model cut pair"]
    null_attention: Float[np.ndarray, "*model cut pair"]


def _joined(found: Sequence[Sequence[_Measured]]) -> _Measured:
    """Joins the measurements of each model on each batch: models become the first axis, pairs stay the last."""
    by_batch = [[np.stack(of_models) for of_models in zip(*of_batch, strict=True)] for of_batch in found]
    return _Measured(*(np.concatenate(of_batches, -1) for of_batches in zip(*by_batch, strict=True)))


def _measured(
    model: LensModel, batch: ContrastBatch, edge_sets: Sequence[Edges], plan: Sequence[Cut], done: Callable[[], object]
) -> _Measured:
    """Runs a model on a batch without a cut, then with every cut of the plan, for every set of edges.

    Args:
        model: in eval mode.
        batch: the prompts with their answers.
        edge_sets: the edges that are cut: those to the chosen keys first, then those to each draw of random ones.
        plan: the cuts.
        done: called after every pass with a cut.
    """
    logits, patterns = run_capturing(model, batch.side.tokens, resolve(model, "pattern"), grad=False)
    uncut = _answers(batch, logits)
    attention = torch.stack(
        [torch.stack([cut.attention(model, patterns, edge_set) for cut in plan]) for edge_set in edge_sets]
    )
    by_edge_set = []
    for edge_set in edge_sets:
        of_set = []
        for cut in plan:
            with torch.no_grad(), editing(model, cut.edits(model, edge_set)):
                of_set.append(_answers(batch, run(model, batch.side.tokens)))
            done()
        by_edge_set.append(torch.stack(of_set, 1))
    answers = torch.stack(by_edge_set)  # [edge_set, measure, cut, pair]
    return _Measured(
        uncut=_array(uncut),
        cut=_array(answers[0]),
        null=_array(answers[1:].mean(0)),
        attention=_array(attention[0]),
        null_attention=_array(attention[1:].mean(0)),
    )


def _array(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()


def _answers(batch: ContrastBatch, logits: Logits) -> Float[Tensor, "measure batch"]:
    """The logit difference and the probability of the bad answer's token."""
    last = batch.at_last(logits)
    bad = last.softmax(-1).gather(-1, batch.answers[:, 1:])[:, 0]
    return torch.stack([batch.logit_diff(last), bad])
