"""Cross-model patching: activations of one model are put into another model on the same prompt, and the other way.

The activation of the source model at a layer and some tokens replaces the target's, and the answer is read again. That
direction says what is sufficient: the share of the effect, the difference between the two models, that appears in the
target. The other direction, the target's activation in the source, says what is left in later weights: the share of the
effect that is lost; 1 is nothing left. The source may be a trained model and the target its base, or each may be
trained by a method of its own. Two methods that behave alike have no effect between them; `Transplant.kept` then asks
whether each still works with the other's activations.

The last token, the content before it and the wrapper are never pooled, because they give different
answers. Positions need no alignment, for both models read the same prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ctlens import plots
from ctlens.analysis.base.contrast import encoded_contrasts
from ctlens.analysis.base.forward import encoded_pairs, require_comparable
from ctlens.analysis.base.metrics import UserMetric, named_metrics
from ctlens.analysis.base.positions import PAIR_SIDES, POSITIONS_IN_WORDS, STATE_POSITIONS
from ctlens.analysis.base.result import beside, groups_of
from ctlens.analysis.exchange.exchange import (
    EXCHANGE_QUANTITIES,
    QUANTITY_TITLES,
    Exchange,
    curve,
    rows_with,
    with_effect,
)
from ctlens.analysis.patching.jobs import Column, PatchBatch, PatchPair, patch_batch
from ctlens.analysis.patching.sweep import Recorded, Sweep, Swept, asked_sites, sweep_of
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.progress import ProgressBar, progress_bar
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.batch import EncodedPair
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair
from ctlens.models.hooks import Layers, run_capturing
from ctlens.plots import Figure

_ALL = "all"
STREAM_SITES = ("resid_pre", "resid_mid", "resid_post")
TRANSPLANT_POSITIONS = (*STATE_POSITIONS, _ALL)
TRANSPLANT_POSITIONS_IN_WORDS = {**POSITIONS_IN_WORDS, _ALL: "at all tokens"}


@dataclass(frozen=True)
class Transplant(Exchange):
    """The result of cross-model patching: what each of two models answers with activations of the other.

    Attributes:
        values, unpatched, source, metrics: see `Exchange`; a cell is `[layer, positions]`, for `z` and
            `pattern` `[layer, head, positions]`.
        layers: the number of each layer.
        positions: the tokens that were patched together, by name.
        site: the hook point.
        side: `"wrapped"` or `"clean"`, the side of the pairs whose prompts both models read.
        path: how it was computed, see `Patching`.
    """

    layers: tuple[int, ...]
    positions: tuple[str, ...]
    site: str
    side: str
    path: str

    def cells(self) -> pd.DataFrame:
        """Layer, head (where there are heads) and positions of every cell."""
        layer, *head, position = np.indices(self.values.shape[2:-1]).reshape(self.values.ndim - 3, -1)
        table = pd.DataFrame({"layer": np.array(self.layers)[layer]})
        if head:
            table["head"] = head[0]
        return table.assign(positions=np.array(self.positions)[position])

    @property
    def adds_up(self) -> bool:
        """True of the residual stream, which holds at a layer what all layers up to it have written."""
        return self.site in STREAM_SITES

    def added(self, metric: str | None = None, *, smallest_gap: float | None = None) -> pd.DataFrame:
        """The table of `normalised` with what each layer adds to the share of the layer in front of it.

        The first row of a kind has all that is there at the first layer. So the rows add up to the share of the last
        layer. At the content tokens a layer adds less than nothing where other tokens have read them, which carry the
        effect from there on.

        Args:
            metric: by default the first.
            smallest_gap: see `Exchange.normalised`.

        Raises:
            CtlensError: as `normalised`; or the site is no residual stream, so that its layers do not add up.
        """
        if not self.adds_up:
            raise CtlensError(f"{self.site} is each layer's own and does not add up: read the shares of `normalised`.")
        return self._shares(metric, smallest_gap, lambda moved: np.diff(moved, axis=0, prepend=0.0))

    def figure(
        self, positions: str | None = None, metric: str | None = None, *, smallest_gap: float | None = None
    ) -> Figure:
        """The shares in both directions, by layer or by layer and head; of the stream what each layer adds.

        Args:
            positions: any of the measured ones, by default the first.
            metric: by default the first.
            smallest_gap: see `Exchange.normalised`.

        Raises:
            CtlensError: the positions or the metric were not measured, or there is no effect.
        """
        return _drawn({"source": self}, positions, metric, smallest_gap)

    def compare(
        self,
        others: Mapping[str, Transplant],
        *,
        label: str,
        positions: str | None = None,
        metric: str | None = None,
        smallest_gap: float | None = None,
        subtitle: str | None = None,
    ) -> Figure:
        """The shares of several source models, as `figure` has them: a line per model, or a grid of heads.

        Args:
            others: transplants from other source models, by label; they may hold this one too, under its label. A
                model whose effect is too small for a share is left out, with a note.
            label: of this source model.
            positions: any of the measured ones, by default the first.
            metric: by default the first.
            smallest_gap: see `Exchange.normalised`.
            subtitle: one line under the title, in front of the note.

        Raises:
            CtlensError: another transplant has this one's label, the positions or the metric were not measured, or no
                model has an effect.
        """
        return _drawn(beside(self, others, label), positions, metric, smallest_gap, subtitle)


def _drawn(
    results: Mapping[str, Transplant],
    positions: str | None,
    metric: str | None,
    smallest_gap: float | None,
    subtitle: str | None = None,
) -> Figure:
    """Lines by layer, or grids by layer and head if heads were patched."""
    first = next(iter(results.values()))
    positions = first.positions[0] if positions is None else positions
    for result in results.values():
        if positions not in result.positions:
            raise unknown("measured positions", positions, result.positions)
    shares_of = Transplant.added if first.adds_up else Transplant.normalised
    tables, note = with_effect(results, metric, smallest_gap, shares_of)
    chosen = {name: rows_with(table, positions=positions) for name, table in tables.items()}
    prompts = f"{first.site}, {first.n_pairs} {first.side} prompts, {metric or first.metrics[0]}"
    subtitle = "; ".join(filter(None, (subtitle or prompts, note)))
    where = TRANSPLANT_POSITIONS_IN_WORDS[positions]
    title = f"Which layers bring the training, {where}?" if first.adds_up else f"Where does the training live, {where}?"
    if "head" in next(iter(chosen.values())):
        return _grids(chosen, title, subtitle)
    panels = {
        QUANTITY_TITLES[quantity]: {name: curve(rows_with(table, quantity=quantity)) for name, table in chosen.items()}
        for quantity in EXCHANGE_QUANTITIES
    }
    y_title = "share of the effect added" if first.adds_up else "share of the effect"
    options = {"adds_up": first.adds_up, "subtitle": subtitle}
    return plots.exchange_curves(first.layers, panels, title, y_title=y_title, **options)


def _grids(tables: Mapping[str, pd.DataFrame], title: str, subtitle: str) -> Figure:
    """A grid of layers by heads per source model and direction."""
    grids = {}
    heads = 0
    for name, table in tables.items():
        for quantity, of_quantity in table.groupby("quantity", sort=False):
            grid = of_quantity.pivot(index="layer", columns="head", values="value").to_numpy()
            grids[f"{plots.label(name)}: {quantity}"] = grid
            heads = grid.shape[1]
    columns = [f"H{head}" for head in range(heads)]
    return plots.component_grids(grids, columns, title, unit="share of the effect", subtitle=subtitle)


@public
def transplant(
    source: LensModel,
    target: LensModel,
    pairs: Pairs,
    *,
    site: str = "resid_post",
    positions: str | Sequence[str] = ("last", "content"),
    side: str = "wrapped",
    layers: Layers = "all",
    metrics: Sequence[str | UserMetric] = ("logit_diff",),
    max_batch: int | None = None,
    progress: bool = True,
) -> Transplant:
    """Cross-model patching: every activation of one site of one model put into another model, and the other way.

    >>> import ctlens as ct
    >>> base, threat = ct.load_organism(), ct.threats.get("sycophancy")
    >>> trained = ct.train(base, threat.pairs(64), ct.ACT(), steps=16, progress=False).model
    >>> found = ct.analysis.transplant(trained, base, threat.pairs(16, split="heldout"), progress=False)
    >>> found.values.shape  # quantities, metrics, layers, positions, pairs
    (2, 1, 4, 2, 16)
    >>> shares = found.normalised().query("layer == 3 and positions == 'last'")
    >>> shares["value"].round(3).tolist()  # behind the last layer, the last token is all that is read
    [1.0, 1.0]

    Args:
        source: for example a trained model, in eval mode.
        target: for example its base, in eval mode.
        pairs: with good and bad answers on the side. `ctlens.pairs` makes them of two lists of texts.
        site: the hook point that is patched, short or in full, see `patch`.
        positions: one or several of `"last"`, the token that predicts the answer; `"content"`, the
            aligned tokens before it; `"wrapper"`, the tokens that the attack added; and `"all"`, every token.
        side: `"wrapped"` or `"clean"`: the prompt of each pair that both models read.
        layers: which ones, see `ctlens.models.hooks.select_layers`.
        metrics: see `patch`; `"kl"` is measured from the model whose activations are put in.
        max_batch: patches, and pairs, held at once; by default as many as fit.
        progress: show a progress bar.

    Returns:
        What the models answer with each other's activations. The final norm and the unembedding are each model's
        own, so the target with all of the source's last layer answers as the source only if these are equal.

    Raises:
        CtlensError: the models do not compare or are in training mode, an option is unknown, or a pair
            has no answers or no token at a position.
    """
    require_comparable(target, source)
    at = asked_sites(target, (site,), layers)[site]
    chosen = (positions,) if isinstance(positions, str) else tuple(positions)
    prepared = same_prompts(target, pairs, side, chosen)
    measures = named_metrics(metrics)
    into = [
        sweep_of(model, prepared, (at.site,), at.layers, measures, max_batch, skip_unchanged=False)
        for model in (target, source)
    ]
    groups = into[0].groups(prepared)
    total = sum(sweep.patches(group) for sweep in into for group in groups)
    with progress_bar(total=total, desc="transplants", shown=progress, leave=False) as bar:
        found = [_both_ways(into, group, bar) for group in groups]
    paths = {swept.paths[at.site] for both in found for swept in both}
    return Transplant(
        values=_joined([[swept.values[at.site] for swept in both] for both in found]),
        unpatched=_joined([[swept.target for swept in both] for both in found]),
        source=_joined([[swept.source for swept in both] for both in found]),
        metrics=tuple(measures),
        layers=at.layers,
        positions=chosen,
        site=at.site,
        side=side,
        path=" and ".join(sorted(paths)),
        groups=groups_of(pairs),
    )


def _joined(groups: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """The arrays of both directions, stacked, of all groups of pairs."""
    return np.concatenate([np.stack(both) for both in groups], -1)


def _both_ways(into: Sequence[Sweep], group: Sequence[PatchPair], bar: ProgressBar) -> list[Swept]:
    """Sweeps a group of prompts in each model, with the other model's run as the source."""
    batch = patch_batch(group, next(into[0].model.parameters()).device)
    runs = [recorded(sweep.model, batch, sweep.needed) for sweep in into]
    return [
        sweep.values(group, batch, other, own, bar) for sweep, other, own in zip(into, runs[::-1], runs, strict=True)
    ]


def recorded(model: LensModel, batch: PatchBatch, names: Sequence[str]) -> Recorded:
    """Runs the prompts of a batch and keeps the last logits and the activations at some full hook names."""
    logits, found = run_capturing(model, batch.target.side.tokens, names, grad=False)
    return Recorded(batch.target.at_last(logits), found)


def same_prompts(model: LensModel, pairs: Sequence[Pair], side: str, positions: Sequence[str]) -> list[PatchPair]:
    """Builds every prompt as source and target of itself, with a column for each name in `positions`.

    Raises:
        CtlensError: the side or a choice of positions is unknown or named twice, or a pair does not align, has no
            answers or no token at a position.
    """
    if side not in PAIR_SIDES:
        raise unknown("side", side, PAIR_SIDES)
    for name in positions:
        if name not in TRANSPLANT_POSITIONS:
            raise unknown("choice of positions", name, TRANSPLANT_POSITIONS)
    if not positions or len(set(positions)) < len(positions):
        raise CtlensError(
            f"name at least one choice of positions, and each once, among {', '.join(TRANSPLANT_POSITIONS)}."
        )
    if "wrapper" in positions and side == "clean":
        raise CtlensError("a clean prompt has no wrapper: choose side='wrapped' or other positions.")
    rows = encoded_pairs(model, pairs, ("shared",) if "content" in positions else ())
    found = []
    for number, (row, contrast) in enumerate(zip(rows, encoded_contrasts(model, rows, side), strict=True), start=1):
        columns = [_column(name, row, side, len(contrast.prompt)) for name in positions]
        for name, column in zip(positions, columns, strict=True):
            if not column:
                raise CtlensError(f"pair {number} has no token at {name!r}: leave it out or choose others.")
        every = _column(_ALL, row, side, len(contrast.prompt))
        found.append(PatchPair(contrast.prompt, contrast, tuple(columns), every, kinds=()))
    return found


def _column(positions: str, row: EncodedPair, side: str, length: int) -> Column:
    """The chosen tokens, each as its own twin; tokens that both answers begin with count as content."""
    begun = range(len(getattr(row, side).ids), length)
    last = length - 1
    if positions == "content":
        chosen = sorted({*getattr(row.alignments["shared"], side), *begun} - {last})
    else:
        chosen = {"last": (last,), "wrapper": row.wrapper, _ALL: range(length)}[positions]
    return tuple((position, position) for position in chosen)
