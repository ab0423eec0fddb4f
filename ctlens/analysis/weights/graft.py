"""Weight swaps: one part of one model's weights is put into a copy of another model, and the other way.

They ask where in the weights a training lives. Parts are the blocks; over all layers QK (queries and keys), OV (values
and outputs), the MLPs, the norms, the embedding and the unembedding; and each of those in every block. The shares of
the parts need not add up to the whole effect, for parts act on each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ctlens import plots
from ctlens.analysis.base.contrast import ContrastBatch, contrast_batches, contrasts
from ctlens.analysis.base.forward import require_comparable
from ctlens.analysis.base.metrics import Metric, UserMetric, measured, named_metrics
from ctlens.analysis.base.positions import PAIR_SIDES
from ctlens.analysis.base.result import beside, groups_of
from ctlens.analysis.exchange.exchange import (
    EXCHANGE_QUANTITIES,
    QUANTITY_TITLES,
    Exchange,
    curve,
    rows_with,
    with_effect,
)
from ctlens.analysis.weights.last_logits import SwappedModel
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.progress import progress_bar
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.models.lora import merged_copy
from ctlens.models.matrices import COMPONENTS, TIED, components
from ctlens.models.parameters import present_parameters
from ctlens.models.weights import copy_weights
from ctlens.plots import Figure

PART_KINDS = ("block", "component", "both")
"""Each block; each component over all blocks; each component of each block, and the norms outside the blocks."""
_EVERY = "all"
_OUTSIDE = "outside"
_COMPONENT_NAMES = {
    "qk": "QK",
    "ov": "OV",
    "mlp": "MLP",
    "norm": "norms",
    "embed": "embedding",
    "unembed": "unembedding",
    TIED: "embedding and unembedding",
}

WeightPart: TypeAlias = tuple[int | str, str]
"""A block, `"all"` or `"outside"` the blocks; and a component or `"all"`."""


@dataclass(frozen=True)
class Graft(Exchange):
    """The result of weight swaps: what each of two models answers with parts of the other's weights.

    Attributes:
        values, unpatched, source, metrics: see `Exchange`; a cell is a part.
        moved: how far the two models are apart in a part: the norm of the difference of the weights over the
            norm of the target's, `[part]`; 0 where they are equal, which needs no run.
        blocks: of each part its block, `"all"`, or `"outside"` for the norms outside the blocks.
        components: of each part one of `ctlens.models.matrices.COMPONENTS`, or `"all"`.
        side: `"wrapped"` or `"clean"`, the side of the pairs whose prompts both models read.
    """

    moved: Float[np.ndarray, " part"]
    blocks: tuple[int | str, ...]
    components: tuple[str, ...]
    side: str

    @property
    def parts(self) -> tuple[WeightPart, ...]:
        """Block and component of every part."""
        return tuple(zip(self.blocks, self.components, strict=True))

    def cells(self) -> pd.DataFrame:
        """Block and component of every part, and how far the models are apart there."""
        return pd.DataFrame({"block": self.blocks, "component": self.components, "moved": self.moved})

    def figure(
        self,
        by: str | Sequence[str] = ("block", "component"),
        metric: str | None = None,
        *,
        smallest_gap: float | None = None,
    ) -> Figure:
        """The shares in both directions, a bar per part; parts that are equal in both models are left out.

        Args:
            by: which parts, one or several of `PART_KINDS`.
            metric: by default the first.
            smallest_gap: see `Exchange.normalised`.

        Raises:
            CtlensError: the parts or the metric were not measured, or there is no effect.
        """
        return _drawn({"source": self}, by, metric, smallest_gap)

    def compare(
        self,
        others: Mapping[str, Graft],
        *,
        label: str,
        by: str | Sequence[str] = ("block", "component"),
        metric: str | None = None,
        smallest_gap: float | None = None,
        subtitle: str | None = None,
    ) -> Figure:
        """The shares of several source models in one figure, a bar per model and part, this model first.

        Args:
            others: weight swaps with other source models, by label; they may hold this one too, under its label. A
                model whose effect is too small for a share is left out, with a note.
            label: of this source model.
            by: which parts, one or several of `PART_KINDS`; parts that are equal in all models are left out.
            metric: by default the first.
            smallest_gap: see `Exchange.normalised`.
            subtitle: one line under the title, in front of the notes.

        Raises:
            CtlensError: another result has this one's label, the parts or the metric were not measured, or no model
                has an effect.
        """
        return _drawn(beside(self, others, label), by, metric, smallest_gap, subtitle)


class _ShownParts(NamedTuple):
    """The parts that a figure shows, as indices among all: those that differ, a group per kind, and the equal ones."""

    differing: list[list[int]]
    equal: list[int]


def _drawn(
    results: Mapping[str, Graft],
    by: str | Sequence[str],
    metric: str | None,
    smallest_gap: float | None,
    subtitle: str | None = None,
) -> Figure:
    """A panel per direction, with a bar per part and result."""
    tables, note = with_effect(results, metric, smallest_gap)
    first = next(iter(results.values()))
    shown = _shown_parts(list(results.values()), (by,) if isinstance(by, str) else tuple(by))
    panels = {
        QUANTITY_TITLES[quantity]: {
            name: curve(rows_with(table, quantity=quantity).iloc[list(chain(*shown.differing))])
            for name, table in tables.items()
        }
        for quantity in EXCHANGE_QUANTITIES
    }
    prompts = f"weights of one part, {first.n_pairs} {first.side} prompts, {metric or first.metrics[0]}"
    equal = ", ".join(_part_name(first.parts[index]) for index in shown.equal)
    notes = (subtitle or prompts, note, f"equal in both: {equal}" if equal else "")
    return plots.graft_bars(
        [[_part_name(first.parts[index]) for index in group] for group in shown.differing],
        panels,
        "Which weights does the training live in?",
        y_title="share of the effect",
        subtitle="; ".join(filter(None, notes)),
    )


def _shown_parts(results: Sequence[Graft], by: Sequence[str]) -> _ShownParts:
    """The parts of the chosen kinds; a part differs if the models differ there in any of the results."""
    for kind in by:
        if kind not in PART_KINDS:
            raise unknown("kind of part", kind, PART_KINDS)
    differ = np.any([result.moved > 0 for result in results], axis=0)
    kinds = [_kind(part) for part in results[0].parts]
    differing = [[index for index, found in enumerate(kinds) if found == kind and differ[index]] for kind in by]
    if not any(differing):
        raise CtlensError(
            f"no part by {' or '.join(by)} was measured and differs between the models: choose another kind."
        )
    equal = [index for index, kind in enumerate(kinds) if kind in by and not differ[index]]
    return _ShownParts(differing, equal)


def _kind(part: WeightPart) -> str:
    block, component = part
    if component == _EVERY:
        return "block"
    if block == _EVERY:
        return "component"
    return "both"


def _part_name(part: WeightPart) -> str:
    block, component = part
    prefix = {_EVERY: "", _OUTSIDE: "outer "}.get(str(block), f"L{block} ")
    return (prefix + _COMPONENT_NAMES.get(component, "")).strip()


@public
def graft(
    source: LensModel,
    target: LensModel,
    pairs: Pairs,
    *,
    by: str | Sequence[str] = PART_KINDS,
    side: str = "wrapped",
    metrics: Sequence[str | UserMetric] = ("logit_diff",),
    batch_size: int = 64,
    progress: bool = True,
) -> Graft:
    """Weight swaps: every part of one model's weights put into a copy of another model, and the other way.

    >>> import ctlens as ct
    >>> base, threat = ct.load_organism(), ct.threats.get("sycophancy")
    >>> trained = ct.train(base, threat.pairs(64), ct.ACT(), steps=16, progress=False).model
    >>> found = ct.analysis.graft(trained, base, threat.pairs(16, split="heldout"), by="component", progress=False)
    >>> shares = found.normalised().query("quantity == 'sufficient'").set_index("component")["value"]
    >>> float(shares["embed"]), bool(0 < shares["qk"] < 1)  # embeddings are not trained
    (0.0, True)

    Args:
        source: for example a trained model, in eval mode.
        target: for example its base, in eval mode.
        pairs: with good and bad answers on the side. `ctlens.pairs` makes them of two lists of texts.
        by: which parts, one or several of `"block"`, each block; `"component"`, each component over all layers;
            and `"both"`, each component of each block and the norms outside the blocks.
        side: `"wrapped"` or `"clean"`: the prompt of each pair that both models read.
        metrics: see `patch`; `"kl"` is measured from the model whose weights are put in.
        batch_size: prompts per forward pass.
        progress: show a progress bar.

    Raises:
        CtlensError: the models do not compare, keep their weights under different names or their queries, keys and
            values in one matrix, or are in training mode; an option is unknown, or a pair has no answers.
    """
    require_comparable(target, source)
    if side not in PAIR_SIDES:
        raise unknown("side", side, PAIR_SIDES)
    measures = named_metrics(metrics)
    copies = [merged_copy(model) for model in (target, source)]
    weights = [{name: value.data for name, value in present_parameters(model).items()} for model in copies]
    parts = _parts(copies, (by,) if isinstance(by, str) else tuple(by))
    moved = np.array([_distance(weights[0], weights[1], names) for names in parts.values()])
    rows = list(contrast_batches(target, contrasts(target, pairs, side), batch_size, progress=False))
    answering = [[SwappedModel(model, batch) for batch in rows] for model in copies]
    whole = [[swapped.plain for swapped in of_model] for of_model in answering]
    # Of the two directions, 0 changes the target and 1 the source; the other model is whole[1 - direction].
    unpatched = [_measured(measures, whole[direction], rows, whole[1 - direction]) for direction in (0, 1)]
    other = [_measured(measures, whole[1 - direction], rows, whole[1 - direction]) for direction in (0, 1)]
    values = np.stack([np.stack([baseline] * len(parts), 1) for baseline in unpatched])
    swaps = [(direction, part) for direction in (0, 1) for part in np.flatnonzero(moved)]
    for direction, part in progress_bar(swaps, desc="weight swaps", shown=progress, leave=False):
        block, _ = list(parts)[part]
        with _swapped(weights[direction], weights[1 - direction], list(parts.values())[part]):
            found = [one.changed_in(block if isinstance(block, int) else None) for one in answering[direction]]
        values[direction, :, part] = _measured(measures, found, rows, whole[1 - direction])
    blocks, kinds = zip(*parts, strict=True)
    return Graft(
        values=values,
        unpatched=np.stack(unpatched),
        source=np.stack(other),
        metrics=tuple(measures),
        moved=moved,
        blocks=blocks,
        components=kinds,
        side=side,
        groups=groups_of(pairs),
    )


def _parts(models: Sequence[LensModel], by: Sequence[str]) -> dict[WeightPart, list[str]]:
    """The names of the parameters of every part."""
    found = components(models[0])
    if found != components(models[1]):
        raise CtlensError("the models keep their weights under different names: load both in the same way.")
    for kind in by:
        if kind not in PART_KINDS:
            raise unknown("kind of part", kind, PART_KINDS)
    numbers = sorted({block for block, _ in found.values() if block is not None})
    inner = COMPONENTS[:-2]  # all but the embedding and the unembedding, which no block has
    every: list[WeightPart] = [(number, _EVERY) for number in numbers]
    every += [(_EVERY, name) for name in (*inner, TIED, *COMPONENTS[-2:])]
    every += [(block, name) for block in (*numbers, _OUTSIDE) for name in inner]
    parts = {part: [name for name, owner in found.items() if _inside(owner, part)] for part in every}
    chosen = {part: names for part, names in parts.items() if names and _kind(part) in by}
    if not chosen:
        raise CtlensError(f"no part is named: choose at least one of {', '.join(PART_KINDS)}.")
    return chosen


def _inside(owner: tuple[int | None, str], part: WeightPart) -> bool:
    """Tells whether a parameter of a block and a component belongs to a part."""
    block = _OUTSIDE if owner[0] is None else owner[0]
    return part[0] in (_EVERY, block) and part[1] in (_EVERY, owner[1])


def _distance(target: Mapping[str, Tensor], source: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """The norm of the difference over the norm of the target's weights; 0 where they are equal."""
    apart = _square([source[name] - target[name] for name in names])
    return (apart / _square([target[name] for name in names])) ** 0.5 if apart else 0.0


def _square(weights: Sequence[Tensor]) -> float:
    return sum(float(weight.double().square().sum()) for weight in weights)


@contextmanager
def _swapped(own: Mapping[str, Tensor], other: Mapping[str, Tensor], names: Sequence[str]) -> Iterator[None]:
    """Puts the other model's named weights in, for the time of a with block."""
    kept = {name: own[name].clone() for name in names}
    targets = {name: own[name] for name in names}
    copy_weights(targets, {name: other[name] for name in names})
    try:
        yield
    finally:
        copy_weights(targets, kept)


def _measured(
    metrics: dict[str, Metric], logits: Sequence[Tensor], rows: Sequence[ContrastBatch], source: Sequence[Tensor]
) -> Float[np.ndarray, "metric pair"]:
    found = [measured(metrics, *of_batch) for of_batch in zip(logits, rows, source, strict=True)]
    return torch.cat(found, -1).cpu().numpy()
