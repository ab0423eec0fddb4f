"""Head curves: how many attention heads carry a training.

The heads of all layers are put in an order, by default by how much the training changed each head's attention to the
wrapper. Then the outputs (`z`) of the first `k` of one model are put into the other together, for `k` from none to all.
Into the base from the trained model, the curve says with how many heads the repair appears; the other way, with how
many it is lost. The same curve over heads in random order is the null: heads that carry the repair no more than others
do rise no faster, however much of it all heads carry. A head whose output changed much moves the answer more than one
whose output hardly did, whatever it carries; so `matched` orders swap each head of the ranking for one of those whose
outputs changed about as much.

What is put in was computed by the other model as it is, so a later head's output is its own and not what it would have
become behind the earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ctlens import plots
from ctlens.analysis.attention.diff import attention_diff
from ctlens.analysis.base.forward import require_comparable
from ctlens.analysis.base.metrics import Metric, UserMetric, measured, named_metrics
from ctlens.analysis.base.result import groups_of
from ctlens.analysis.base.shares import floor_of
from ctlens.analysis.exchange.exchange import EXCHANGE_QUANTITIES, QUANTITY_TITLES, Exchange, curve, rows_with
from ctlens.analysis.exchange.transplant import TRANSPLANT_POSITIONS_IN_WORDS, recorded, same_prompts
from ctlens.analysis.patching.hooked import write_of
from ctlens.analysis.patching.jobs import Jobs, PatchBatch, PatchPair, patch_batch
from ctlens.analysis.patching.sweep import Recorded, fitting
from ctlens.core.clusters import Clusters
from ctlens.core.errors import CtlensError
from ctlens.core.limits import PROBABILITY, require
from ctlens.core.progress import ProgressBar, progress_bar
from ctlens.core.public import public
from ctlens.core.stats import ENDS
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair
from ctlens.models.finite import require_finite
from ctlens.models.hooks import editing, resolve, run
from ctlens.plots import CurvePanel, Figure

HeadOfLayer: TypeAlias = tuple[int, int]
"""The number of a layer, and that of one of its heads."""
_Subset: TypeAlias = frozenset[HeadOfLayer]
RANKED = "ranked"
RANDOM = "random"
_SITE = "z"
_BY_ATTENTION = "change of attention to the wrapper"
_GIVEN = "given"
_ALIKE_HEADS = 4  # in a set of heads that changed about as much; fewer leave nothing to swap, not tuned


@dataclass(frozen=True)
class HeadCurve(Exchange):
    """The result of `head_curve`: what each of two models answers with the outputs of some heads of the other.

    Attributes:
        values, unpatched, source, metrics: see `Exchange`; a cell is `[order, count]`: the first order is the ranking,
            the others are random.
        layers, heads: of the heads in the order of the ranking.
        counts: how many heads were put in together.
        ranked_by: in words, what the ranking follows.
        matched: whether the random orders swap heads whose outputs changed about as much.
        positions: the tokens at which the outputs were put in.
        side: `"wrapped"` or `"clean"`, the side of the pairs whose prompts both models read.
    """

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    counts: tuple[int, ...]
    ranked_by: str
    matched: bool
    positions: str
    side: str

    @property
    def draws(self) -> int:
        """The number of random orders."""
        return self.values.shape[2] - 1

    def cells(self) -> pd.DataFrame:
        """Order, draw (0 for the ranking) and number of heads of every cell."""
        draw = np.repeat(np.arange(1 + self.draws), len(self.counts))
        order = np.where(draw == 0, RANKED, RANDOM)
        return pd.DataFrame({"order": order, "draw": draw, "n_heads": np.tile(self.counts, 1 + self.draws)})

    def heads_needed(
        self, share: float = 0.8, metric: str | None = None, *, smallest_gap: float | None = None
    ) -> pd.DataFrame:
        """Counts the heads that it takes to reach a share of what all heads together bring; one row per direction.

        Args:
            share: of the effect of all heads, above 0 up to 1.
            metric: by default the first.
            smallest_gap: see `Exchange.normalised`.

        Returns:
            `n_heads` of the ranking, the first measured number at which the mean over pairs is there, with the ends of
            the pigeonhole bootstrap interval over topics and wrapper texts (NaN with too few of a kind). The lowest,
            middle and highest number of the random orders; `p_random`, the share of orders, this one among them, that
            need no more heads than it does. `whole` is what all heads together bring, in the metric's unit; where
            that is less than `smallest_gap`, the other numbers are NaN.

        Raises:
            CtlensError: the metric was not measured or is your own without a `smallest_gap`, or the share is none.
        """
        require(PROBABILITY, share=share)
        metric = self.metrics[0] if metric is None else metric
        row = self._row(metric)
        floor = floor_of(metric, smallest_gap)
        rows = [self._needed(index, row, share, floor) for index in range(len(EXCHANGE_QUANTITIES))]
        table = pd.DataFrame(rows)
        table.insert(0, "quantity", EXCHANGE_QUANTITIES)
        table.insert(1, "metric", metric)
        return table.assign(share=share, n_pairs=self.n_pairs)

    def _needed(self, quantity: int, row: int, share: float, floor: float) -> dict[str, float]:
        """The numbers of one row of `heads_needed`."""
        moved = self.values[quantity, row] - self.unpatched[quantity, row]
        whole = float(moved[0, -1].mean())
        names = ("n_heads", "ci_low", "ci_high", "random_low", "random_median", "random_high", "p_random")
        if abs(whole) < floor or whole == 0:
            return dict.fromkeys(names, np.nan) | {"whole": whole}
        counts = np.array(self.counts, dtype=float)
        ranked, *random = counts[_first_there(moved.mean(-1), share)].tolist()
        clusters = self.clusters() or Clusters.alone(self.n_pairs)
        low = np.nan
        high = np.nan
        if not clusters.too_few:
            resampled = (moved[0] @ clusters.resamples().T).T
            low, high = np.quantile(counts[_first_there(resampled, share)], ENDS, method="closest_observation").tolist()
        beaten = (1 + sum(other <= ranked for other in random)) / (1 + self.draws)
        found = (ranked, low, high, min(random), float(np.median(random)), max(random), beaten)
        return dict(zip(names, found, strict=True)) | {"whole": whole}

    def figure(self, metric: str | None = None, *, smallest_gap: float | None = None) -> Figure:
        """Draws the share of the effect by number of heads, a panel per direction, on the band of the random orders.

        Args:
            metric: by default the first.
            smallest_gap: see `Exchange.normalised`.

        Raises:
            CtlensError: the metric was not measured, or there is no effect.
        """
        table = self.normalised(metric, smallest_gap=smallest_gap)
        panels = {}
        for quantity in EXCHANGE_QUANTITIES:
            of_quantity = rows_with(table, quantity=quantity)
            random = rows_with(of_quantity, order=RANDOM)["value"].to_numpy().reshape(self.draws, -1)
            name = "orders of heads that changed as much" if self.matched else "random orders"
            null = (name, (random.min(0), random.max(0)))
            ranked = {"ranked heads": curve(rows_with(of_quantity, order=RANKED))}
            panels[QUANTITY_TITLES[quantity]] = CurvePanel(ranked, "share of the effect", null, levels=(0, 1))
        where = TRANSPLANT_POSITIONS_IN_WORDS[self.positions]
        return plots.curve_panels(
            self.counts,
            panels,
            f"How many heads carry the training, {where}?",
            x_title="number of heads",
            caption="Lines are ratios of means over pairs, bands their 95% intervals; the grey band is from the lowest "
            "to the highest random order. Dotted: none and all of the effect.",
            subtitle=f"heads ranked by: {self.ranked_by}; {self.n_pairs} {self.side} prompts, "
            f"{metric or self.metrics[0]}",
        )


def _first_there(moved: Float[np.ndarray, "line count"], share: float) -> np.ndarray:
    """The index of the first number of heads that bring a share of what the last number brings, per line."""
    whole = moved[:, -1:]
    return (moved * np.sign(whole) >= share * np.abs(whole)).argmax(-1)


@public
def head_curve(
    source: LensModel,
    target: LensModel,
    pairs: Pairs,
    *,
    ranking: Sequence[tuple[int, int]] | None = None,
    counts: Sequence[int] | None = None,
    draws: int = 19,
    matched: bool = False,
    positions: str = "all",
    side: str = "wrapped",
    metrics: Sequence[str | UserMetric] = ("logit_diff",),
    seed: int = 0,
    max_batch: int | None = None,
    progress: bool = True,
) -> HeadCurve:
    """Puts the outputs of the first heads of a ranking of one model into another together, and the other way.

    >>> import ctlens as ct
    >>> base, threat = ct.load_organism(), ct.threats.get("sycophancy")
    >>> trained = ct.train(base, threat.pairs(64), ct.ACT(), steps=16, progress=False).model
    >>> pairs = threat.pairs(16, split="heldout")
    >>> found = ct.analysis.head_curve(trained, base, pairs, counts=[4], draws=2, progress=False)
    >>> found.counts, found.values.shape  # quantities, metrics, orders, counts, pairs
    ((0, 4, 16), (2, 1, 3, 3, 16))

    Args:
        source: for example a trained model, in eval mode.
        target: for example its base, in eval mode.
        pairs: with good and bad answers on the side. `ctlens.pairs` makes them of two lists of texts.
        ranking: layer and head of every head of the model, each once, the first to be put in first. By default the
            heads whose attention from the last token to the wrapper differs most come first, see `attention_diff`.
            A ranking by the answers themselves is made on other pairs: on these it rises fast by chance too.
        counts: how many heads are put in together; none and all are always measured. By default every number, which
            costs two forward passes per head and order: name a few for a large model.
        draws: how many random orders of the heads there are.
        matched: swap, in each random order, every head of the ranking for one of the four or so whose outputs differ
            between the models by about as much, in place of any head.
        positions: `"last"`, `"content"`, `"wrapper"` or `"all"`, see `transplant`.
        side: `"wrapped"` or `"clean"`: the prompt of each pair that both models read.
        metrics: see `patch`; `"kl"` is measured from the model whose outputs are put in.
        seed: of the random orders.
        max_batch: pairs held at once; by default as many as fit.
        progress: show a progress bar.

    Raises:
        CtlensError: the models do not compare or are in training mode, an option is unknown, the ranking does not have
            every head once, or as `transplant` and `attention_diff`.
    """
    require_comparable(target, source)
    order = _by_attention(target, source, pairs, progress) if ranking is None else _checked(target, ranking)
    numbers = _checked_counts(counts, len(order))
    measures = named_metrics(metrics)
    prepared = same_prompts(target, pairs, side, (positions,))
    size = max_batch or fitting(target, max(len(pair.target) for pair in prepared))
    groups = [prepared[start : start + size] for start in range(0, len(prepared), size)]
    others = (
        _swapped(order, _alike((target, source), groups), draws, seed) if matched else _shuffled(order, draws, seed)
    )
    orders = [order, *others]
    subsets = list(dict.fromkeys(frozenset(heads[:count]) for heads in orders for count in numbers if count))
    with progress_bar(total=2 * len(groups) * len(subsets), desc="head curve", shown=progress, leave=False) as bar:
        found = [_both_ways((target, source), group, measures, subsets, bar) for group in groups]
    none = frozenset[HeadOfLayer]()
    cells = [[frozenset(heads[:count]) for count in numbers] for heads in orders]
    values = [[[[way.of[cell] for cell in row] for row in cells] for way in ways] for ways in found]
    return HeadCurve(
        values=np.moveaxis(np.concatenate(values, -1), 3, 1),
        unpatched=np.concatenate([[way.of[none] for way in ways] for ways in found], -1),
        source=np.concatenate([[way.source for way in ways] for ways in found], -1),
        metrics=tuple(measures),
        layers=tuple(layer for layer, _ in order),
        heads=tuple(head for _, head in order),
        counts=numbers,
        ranked_by=_BY_ATTENTION if ranking is None else _GIVEN,
        matched=matched,
        positions=positions,
        side=side,
        groups=groups_of(pairs),
    )


def _by_attention(target: LensModel, source: LensModel, pairs: Sequence[Pair], progress: bool) -> list[HeadOfLayer]:
    """The heads whose attention from the last token to the wrapper differs most come first; of equals, lower ones."""
    found = attention_diff(target, source, pairs, progress=progress)
    change = np.abs((found.after - found.before).mean(0))
    return sorted(_heads(target), key=lambda head: -change[head])


def _heads(model: LensModel) -> list[HeadOfLayer]:
    """Every head of a model, layer by layer."""
    return list(product(range(model.cfg.n_layers), range(model.cfg.n_heads)))


def _checked(model: LensModel, ranking: Sequence[HeadOfLayer]) -> list[HeadOfLayer]:
    """A given ranking, which has every head once."""
    given = [(int(layer), int(head)) for layer, head in ranking]
    known = _heads(model)
    odd = next((head for head in [*given, *known] if head not in known or given.count(head) != 1), None)
    if odd is not None:
        raise CtlensError(
            f"the ranking names head {odd[1]} of layer {odd[0]} {given.count(odd)} times, and the model has layers 0 "
            f"to {model.cfg.n_layers - 1} with heads 0 to {model.cfg.n_heads - 1}: name each of these heads once."
        )
    return given


def _checked_counts(counts: Sequence[int] | None, n_heads: int) -> tuple[int, ...]:
    """The numbers of heads that are put in together, none and all among them."""
    if counts is None:
        return tuple(range(n_heads + 1))
    for count in counts:
        if not 0 <= count <= n_heads:
            raise CtlensError(
                f"counts has {count}, but the model has {n_heads} heads: name numbers from 0 to {n_heads}."
            )
    return tuple(sorted({0, *map(int, counts), n_heads}))


def _shuffled(order: Sequence[HeadOfLayer], draws: int, seed: int) -> Iterator[list[HeadOfLayer]]:
    """The heads in random orders, which do not depend on the ranking."""
    heads = sorted(order)
    draw = np.random.default_rng(seed)
    for _ in range(draws):
        yield [heads[number] for number in draw.permutation(len(heads))]


def _swapped(
    order: Sequence[HeadOfLayer], alike: Sequence[Sequence[HeadOfLayer]], draws: int, seed: int
) -> Iterator[list[HeadOfLayer]]:
    """The ranking with each head swapped at random for one of its set."""
    draw = np.random.default_rng(seed)
    for _ in range(draws):
        swaps = {}
        for heads in alike:
            swaps |= {heads[one]: heads[other] for one, other in enumerate(draw.permutation(len(heads)))}
        yield [swaps[head] for head in order]


@torch.no_grad()
def _alike(models: Sequence[LensModel], groups: Sequence[Sequence[PatchPair]]) -> list[list[HeadOfLayer]]:
    """The heads in sets of about four whose outputs at the edited tokens differ by about as much between two models."""
    names = [resolve(model, _SITE) for model in models]
    squares = np.zeros((models[0].cfg.n_layers, models[0].cfg.n_heads))
    for group in groups:
        batch = patch_batch(group, next(models[0].parameters()).device)
        edited = torch.zeros_like(batch.target.side.mask).scatter(1, batch.target_at[:, 0], True)
        runs = [recorded(model, batch, named) for model, named in zip(models, names, strict=True)]
        for layer in range(len(squares)):
            states = [run.states[named[layer]] for run, named in zip(runs, names, strict=True)]
            moved = (states[0] - states[1]).double().square().sum(-1) * edited[..., None]
            squares[layer] += moved.sum((0, 1)).cpu().numpy()
    heads = sorted(_heads(models[0]), key=lambda head: squares[head])
    return [list(part) for part in _parts(heads, max(1, len(heads) // _ALIKE_HEADS))]


def _parts(heads: Sequence[HeadOfLayer], n: int) -> list[Sequence[HeadOfLayer]]:
    """Heads cut into parts of about equal size, in their order."""
    ends = np.linspace(0, len(heads), n + 1).round().astype(int).tolist()
    return [heads[start:end] for start, end in pairwise(ends)]


class _Way(NamedTuple):
    """One direction, of a group of pairs: the metrics of every subset of heads and of none, and of the other model."""

    of: dict[_Subset, Float[np.ndarray, "metric pair"]]
    source: Float[np.ndarray, "metric pair"]


def _both_ways(
    models: Sequence[LensModel],
    group: Sequence[PatchPair],
    measures: dict[str, Metric],
    subsets: Sequence[_Subset],
    bar: ProgressBar,
) -> list[_Way]:
    """The metrics of each of two models with outputs of the other."""
    batch = patch_batch(group, next(models[0].parameters()).device)
    runs = [recorded(model, batch, resolve(model, _SITE)) for model in models]
    return [
        _into(model, batch, measures, subsets, own, other, bar)
        for model, own, other in zip(models, runs, runs[::-1], strict=True)
    ]


@torch.no_grad()
def _into(
    model: LensModel,
    batch: PatchBatch,
    measures: dict[str, Metric],
    subsets: Sequence[_Subset],
    own: Recorded,
    other: Recorded,
    bar: ProgressBar,
) -> _Way:
    """The metrics of one model with the other's outputs."""

    def numbers(last: Tensor) -> Float[np.ndarray, "metric pair"]:
        return measured(measures, last, batch.target, other.last).cpu().numpy()

    found = {frozenset[HeadOfLayer](): numbers(own.last)}
    names = resolve(model, _SITE)
    side = batch.target.side
    for subset in subsets:
        with editing(model, _edits(batch, subset, names, other)):
            last = batch.target.at_last(run(model, side.tokens, side.needed_mask))
        require_finite(last, "a run with another model's heads")
        found[subset] = numbers(last)
        bar.update()
    return _Way(found, numbers(other.last))


def _edits(
    batch: PatchBatch, subset: _Subset, names: Sequence[str], other: Recorded
) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """Per hook name, what writes the other model's outputs of the heads of that layer."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in sorted(subset):
        by_layer.setdefault(layer, []).append(head)
    return {
        names[layer]: partial(_written, batch, heads, other.states[names[layer]]) for layer, heads in by_layer.items()
    }


def _written(batch: PatchBatch, heads: Sequence[int], source: Tensor, activation: Tensor) -> Tensor:
    """The activation with the source's at some heads, in the row of every pair."""
    pair, head = torch.cartesian_prod(torch.arange(len(activation)), torch.tensor(heads)).to(activation.device).T
    nothing = torch.zeros_like(pair)
    edited = activation.clone()
    write_of(_SITE)(batch, Jobs(nothing, pair, nothing, nothing, head), source, edited, pair, 0)
    return edited
