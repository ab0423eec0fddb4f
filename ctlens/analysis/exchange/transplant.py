"""Where a training lives: activations of one model put into another one on the same prompt, and back.

The activation of the donor at a layer and a place replaces the recipient's, and the answer is read again. In
the one direction it tells what is sufficient: the share of the effect, the difference between the two
models, that appears in the recipient. In the other it tells what is left in later weights: the share of the effect that
is lost when the recipient's activation is put back into the donor; 1 is nothing left. A donor may
be a trained model and the recipient its base, or both may be trained, by one method each. Where two methods do alike,
there is no effect between them, and `Transplant.kept` asks whether each still works with the other's activations.

The last token, the content before it and the wrapper are never pooled, because they give different
answers. Positions need no alignment, for both models read the same prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ctlens import plots
from ctlens.analysis.base.contrast import contrasts
from ctlens.analysis.base.forward import encoded, require_comparable
from ctlens.analysis.base.metrics import UserMetric, named_metrics
from ctlens.analysis.base.positions import POSITIONS_IN_WORDS, SIDES, STATE_POSITIONS
from ctlens.analysis.exchange.exchange import QUANTITIES, WORDS, Exchange, curve, where, with_effect
from ctlens.analysis.patching.jobs import Column, PatchBatch, PatchPair, patch_batch
from ctlens.analysis.patching.sweep import Recorded, Sweep, sweep_of
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.types import LensModel
from ctlens.data.batch import EncodedPair
from ctlens.data.pairs import Pair
from ctlens.models.hooks import Layers, capture
from ctlens.plots import Figure

ALL = "all"
POSITIONS = (*STATE_POSITIONS, ALL)
IN_WORDS = {**POSITIONS_IN_WORDS, ALL: "at all tokens"}


@dataclass(frozen=True)
class Transplant(Exchange):
    """The answers of both models with activations of the other one.

    Attributes:
        values, unpatched, source, metrics: see `Exchange`; a cell is `[layer, position]`, for `z` and
            `pattern` `[layer, head, position]`.
        layers: the number of each layer.
        positions: the name of each place.
        site: the hook point.
        side: of the pairs, whose prompts were read.
        path: how it was computed, see `Patching`.
    """

    layers: tuple[int, ...]
    positions: tuple[str, ...]
    site: str
    side: str
    path: str

    def cells(self) -> pd.DataFrame:
        """Layer, head (where there are heads) and position of every cell."""
        layer, *head, position = np.indices(self.values.shape[2:-1]).reshape(self.values.ndim - 3, -1)
        heads = {"head": head[0]} if head else {}
        places = {"position": np.array(self.positions)[position]}
        return pd.DataFrame({"layer": np.array(self.layers)[layer], **heads, **places})

    def figure(self, position: str | None = None, metric: str | None = None) -> Figure:
        """The shares in both directions by layer, or by layer and head; raises as `figure` of this module."""
        return figure({"donor": self}, position, metric)


def figure(
    results: Mapping[str, Transplant],
    position: str | None = None,
    metric: str | None = None,
    *,
    smallest_gap: float | None = None,
    subtitle: str | None = None,
) -> Figure:
    """Several donors in one figure, a line each, or where heads were exchanged a grid each.

    Args:
        results: by the donor's name; one whose effect is too small for a share is left out, with a note.
        position: which of the measured ones, by default the first.
        metric: by default the first.
        smallest_gap: see `Exchange.normalised`.
        subtitle: before the note.

    Raises:
        CtlensError: a position or the metric was not measured, or no donor has an effect.
    """
    first = next(iter(results.values()))
    position = first.positions[0] if position is None else position
    for result in results.values():
        if position not in result.positions:
            raise unknown("measured position", position, result.positions)
    tables, note = with_effect(results, metric, smallest_gap)
    chosen = {name: where(table, position=position) for name, table in tables.items()}
    what = f"{first.site}, {first.n_pairs} {first.side} prompts, {metric or first.metrics[0]}"
    words = {"subtitle": "; ".join(filter(None, (subtitle or what, note)))}
    title = f"Where does the training live, {IN_WORDS[position]}?"
    if "head" in next(iter(chosen.values())):
        return _grids(chosen, title, **words)
    panels = {
        WORDS[quantity]: {name: curve(where(table, quantity=quantity)) for name, table in chosen.items()}
        for quantity in QUANTITIES
    }
    return plots.exchange_curves(first.layers, panels, title, y_title="share of the effect", **words)


def _grids(tables: Mapping[str, pd.DataFrame], title: str, *, subtitle: str) -> Figure:
    grids, heads = {}, 0
    for name, table in tables.items():
        for quantity, of_quantity in table.groupby("quantity", sort=False):
            grid = of_quantity.pivot(index="layer", columns="head", values="value").to_numpy()
            grids[f"{plots.label(name)}: {quantity}"], heads = grid, grid.shape[1]
    columns = [f"H{head}" for head in range(heads)]
    return plots.component_grids(grids, columns, title, unit="share of the effect", subtitle=subtitle)


def transplant(
    donor: LensModel,
    recipient: LensModel,
    pairs: Sequence[Pair],
    *,
    site: str = "resid_post",
    positions: str | Sequence[str] = ("last", "content"),
    side: str = "wrapped",
    layers: Layers = "all",
    metrics: Sequence[str | UserMetric] = ("logit_diff",),
    max_batch: int | None = None,
    progress: bool = True,
) -> Transplant:
    """Every activation of one site, exchanged between two models in both directions.

    >>> import ctlens as ct
    >>> base, threat = ct.load_organism(), ct.threats.get("sycophancy")
    >>> trained = ct.train(base, threat.pairs(64), ct.ACT(), steps=16, progress=False).model
    >>> found = ct.analysis.transplant(trained, base, threat.pairs(16, split="heldout"), progress=False)
    >>> found.values.shape  # quantities, metrics, layers, positions, pairs
    (2, 1, 4, 2, 16)
    >>> shares = found.normalised().query("layer == 3 and position == 'last'")
    >>> shares["value"].round(3).tolist()  # behind the last layer, the last token is all that is read
    [1.0, 1.0]

    Args:
        donor: for example a trained model, in eval mode.
        recipient: for example its base, in eval mode.
        pairs: with good and bad answers on the side.
        site: what is exchanged, one of `ctlens.models.hooks.SHORTHANDS`, see `patch`.
        positions: one or several of `"last"`, the token that predicts the answer; `"content"`, the
            aligned tokens before it; `"wrapper"`, the tokens that the attack added; and `"all"`, every token.
        side: `"wrapped"` or `"clean"`: the prompt of each pair that both models read.
        layers: which ones, see `ctlens.models.hooks.select_layers`.
        metrics: see `patch`; `"kl"` is measured from the model that is the source.
        max_batch: patches, and pairs, held at once; by default as many as fit.
        progress: show a progress bar.

    Returns:
        What the models answer with each other's activations. The final norm and the unembedding are each model's
        own, so that even the whole last layer is the donor only where these are equal.

    Raises:
        CtlensError: the models do not compare or are in training mode, an option is unknown, or a pair
            has no answers or no token at a position.
    """
    require_comparable(donor, recipient)
    places = (positions,) if isinstance(positions, str) else tuple(positions)
    prepared = _prepared(recipient, pairs, side, places)
    measures = named_metrics(metrics)
    into = [
        sweep_of(model, prepared, (site,), layers, measures, max_batch, skip_unchanged=False)
        for model in (recipient, donor)
    ]
    groups = into[0].groups(prepared)
    total = sum(sweep.patches(group) for sweep in into for group in groups)
    with tqdm(total=total, desc="transplants", disable=not progress, leave=False) as bar:
        chunks = [_exchanged(into, group, bar) for group in groups]
    values, unpatched, source, paths = zip(*chunks, strict=True)
    return Transplant(
        np.concatenate(values, -1),
        np.concatenate(unpatched, -1),
        np.concatenate(source, -1),
        tuple(measures),
        into[0].layers,
        places,
        site,
        side,
        " and ".join(sorted(set().union(*paths))),
    )


def _exchanged(
    into: Sequence[Sweep], group: Sequence[PatchPair], bar: tqdm
) -> tuple[np.ndarray, np.ndarray, np.ndarray, set[str]]:
    """The patches of both directions, stacked, and the ways they went."""
    batch = patch_batch(group, next(into[0].model.parameters()).device)
    runs = [_recorded(sweep, batch) for sweep in into]
    found = [
        sweep.values(group, batch, source, target, bar)
        for sweep, source, target in zip(into, runs[::-1], runs, strict=True)
    ]
    site = into[0].sites[0]
    values, unpatched, source = (
        np.stack(part)
        for part in zip(*((swept.values[site], swept.target, swept.source) for swept in found), strict=True)
    )
    return values, unpatched, source, {swept.paths[site] for swept in found}


def _recorded(sweep: Sweep, batch: PatchBatch) -> Recorded:
    logits, found = capture(sweep.model, batch.target.side.tokens, sweep.needed, grad=False)
    return Recorded(batch.target.at_last(logits), found)


def _prepared(model: LensModel, pairs: Sequence[Pair], side: str, positions: Sequence[str]) -> list[PatchPair]:
    """Every prompt as source and target of itself, with a column a place."""
    if side not in SIDES:
        raise unknown("side", side, SIDES)
    for position in positions:
        if position not in POSITIONS:
            raise unknown("choice of positions", position, POSITIONS)
    if not positions or len(set(positions)) < len(positions):
        raise CtlensError(f"name at least one choice of positions, and each once, among {', '.join(POSITIONS)}.")
    if "wrapper" in positions and side == "clean":
        raise CtlensError("a clean prompt has no wrapper: choose side='wrapped' or other positions.")
    rows = encoded(model, pairs, "shared" if "content" in positions else None)
    found = []
    for number, (row, contrast) in enumerate(zip(rows, contrasts(model, pairs, side), strict=True), start=1):
        columns = [_at(position, row, side, len(contrast.prompt)) for position in positions]
        for position, column in zip(positions, columns, strict=True):
            if not column:
                raise CtlensError(f"pair {number} has no token at {position!r}: leave it out or choose others.")
        every = _at(ALL, row, side, len(contrast.prompt))
        found.append(PatchPair(contrast.prompt, contrast, tuple(columns), every))
    return found


def _at(position: str, row: EncodedPair, side: str, length: int) -> Column:
    """The tokens of a place, each as its own twin; those that both answers begin with count as content."""
    begun = range(len(getattr(row, side).ids), length)
    last = length - 1
    if position == "content":
        chosen = sorted({*getattr(row.alignments["shared"], side), *begun} - {last})
    else:
        chosen = {"last": (last,), "wrapper": row.wrapper, ALL: range(length)}[position]
    return tuple((place, place) for place in chosen)
