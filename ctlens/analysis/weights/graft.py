"""Where a training lives in the weights: one part of one model's weights put into a copy of another one, and back.

Parts are the blocks, and over all layers QK (queries and keys), OV (values and outputs), the MLPs, the norms, the
embedding and the unembedding; and each of those in every block. What each brings need not add up to the
whole effect, for parts act on each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ctlens import plots
from ctlens.analysis.base.contrast import ContrastBatch, contrasts, in_batches
from ctlens.analysis.base.forward import require_comparable
from ctlens.analysis.base.metrics import Metric, UserMetric, measured, named_metrics
from ctlens.analysis.base.positions import SIDES
from ctlens.analysis.exchange.exchange import QUANTITIES, WORDS, Exchange, curve, where, with_effect
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair
from ctlens.models.hooks import run
from ctlens.models.lora import has_adapters, merge_adapters
from ctlens.models.matrices import COMPONENTS, TIED, components
from ctlens.models.parameters import copy_model, present_parameters
from ctlens.models.weights import copy_weights
from ctlens.plots import Figure

BY = ("block", "component", "both")
EVERY, OUTSIDE = "all", "outside"
NAMES = {
    "qk": "QK", "ov": "OV", "mlp": "MLP", "norm": "norms", "embed": "embedding", "unembed": "unembedding",
    TIED: "embedding and unembedding",
}  # fmt: skip

Part: TypeAlias = tuple[int | str, str]
"""A block, `"all"` or `"outside"` the blocks; and a component or `"all"`."""


@dataclass(frozen=True)
class Graft(Exchange):
    """The answers of both models with parts of the other one's weights.

    Attributes:
        values, unpatched, source, metrics: see `Exchange`; a cell is a part.
        moved: how far the two models are apart in a part: the norm of the difference of the weights over the
            recipient's norm, `[part]`; 0 where they are equal, which needs no run.
        blocks: of each part its block, `"all"`, or `"outside"` for the norms outside the blocks.
        components: of each part one of `ctlens.models.matrices.COMPONENTS`, or `"all"`.
        side: of the pairs, whose prompts were read.
    """

    moved: Float[np.ndarray, " part"]
    blocks: tuple[int | str, ...]
    components: tuple[str, ...]
    side: str

    def cells(self) -> pd.DataFrame:
        """Block and component of every part, and how far the models are apart there."""
        return pd.DataFrame({"block": self.blocks, "component": self.components, "moved": self.moved})

    def figure(self, by: str | Sequence[str] = ("block", "component"), metric: str | None = None) -> Figure:
        """The shares in both directions; raises as `figure` of this module."""
        return figure({"donor": self}, by, metric)


def figure(
    results: Mapping[str, Graft],
    by: str | Sequence[str] = ("block", "component"),
    metric: str | None = None,
    *,
    smallest_gap: float | None = None,
    subtitle: str | None = None,
) -> Figure:
    """Several donors in one figure, a bar each; parts that are equal in all of them are left out.

    Args:
        results: by the donor's name; one whose effect is too small for a share is left out, with a note.
        by: which parts, any of `BY`.
        metric: by default the first.
        smallest_gap: see `Exchange.normalised`.
        subtitle: before the note.

    Raises:
        CtlensError: the parts or the metric were not measured, or no donor has an effect.
    """
    tables, note = with_effect(results, metric, smallest_gap)
    first = next(iter(results.values()))
    differ = np.any([result.moved > 0 for result in results.values()], axis=0)
    kinds = np.array([_kind(part) for part in zip(first.blocks, first.components, strict=True)])
    wanted = (by,) if isinstance(by, str) else tuple(by)
    for kind in wanted:
        if kind not in BY:
            raise unknown("kind of part", kind, BY)
    chosen = [at for kind in wanted for at in np.flatnonzero((kinds == kind) & differ)]
    if not chosen:
        raise CtlensError(f"no part by {' or '.join(wanted)} was measured that differs between the models.")
    names = [_name(first.blocks[at], first.components[at]) for at in chosen]
    breaks = [at for at in range(1, len(chosen)) if kinds[chosen[at]] != kinds[chosen[at - 1]]]
    panels = {
        WORDS[quantity]: {name: curve(where(table, quantity=quantity).iloc[chosen]) for name, table in tables.items()}
        for quantity in QUANTITIES
    }
    equal = [_name(first.blocks[at], first.components[at]) for at in np.flatnonzero(~differ & np.isin(kinds, wanted))]
    note = "; ".join(filter(None, (note, f"equal in both: {', '.join(equal)}" if equal else "")))
    what = f"weights of one part, {first.n_pairs} {first.side} prompts, {metric or first.metrics[0]}"
    words = {"subtitle": "; ".join(filter(None, (subtitle or what, note))), "y_title": "share of the effect"}
    return plots.graft_bars(names, panels, "Which weights does the training live in?", breaks=breaks, **words)


def _kind(part: Part) -> str:
    block, component = part
    return "block" if component == EVERY else "component" if block == EVERY else "both"


def _name(block: int | str, component: str) -> str:
    where = {EVERY: "", OUTSIDE: "outer "}.get(str(block), f"L{block} ")
    return (where + NAMES.get(component, "")).strip()


def graft(
    donor: LensModel,
    recipient: LensModel,
    pairs: Sequence[Pair],
    *,
    by: str | Sequence[str] = BY,
    side: str = "wrapped",
    metrics: Sequence[str | UserMetric] = ("logit_diff",),
    batch_size: int = 64,
    progress: bool = True,
) -> Graft:
    """Every part of the weights, exchanged between two models in both directions; neither is changed.

    >>> import ctlens as ct
    >>> base, threat = ct.load_organism(), ct.threats.get("sycophancy")
    >>> trained = ct.train(base, threat.pairs(64), ct.ACT(), steps=16, progress=False).model
    >>> found = ct.analysis.graft(trained, base, threat.pairs(16, split="heldout"), by="component", progress=False)
    >>> shares = found.normalised().query("quantity == 'sufficient'").set_index("component")["value"]
    >>> float(shares["embed"]), bool(0 < shares["qk"] < 1)  # embeddings are not trained
    (0.0, True)

    Args:
        donor: for example a trained model, in eval mode.
        recipient: for example its base, in eval mode.
        pairs: with good and bad answers on the side.
        by: which parts, one or several of `"block"`, each block; `"component"`, each component over all layers;
            and `"both"`, each component of each block and the norms outside the blocks.
        side: `"wrapped"` or `"clean"`: the prompt of each pair that is read.
        metrics: see `patch`; `"kl"` is measured from the model that is the source.
        batch_size: prompts a forward pass.
        progress: show a progress bar.

    Raises:
        CtlensError: the models do not compare, keep their weights under different names or their queries, keys and
            values in one matrix, or are in training mode; an option is unknown, or a pair has no answers.
    """
    require_comparable(donor, recipient)
    if side not in SIDES:
        raise unknown("side", side, SIDES)
    measures = named_metrics(metrics)
    copies = [_plain_copy(model) for model in (recipient, donor)]
    weights = [{name: value.data for name, value in present_parameters(model).items()} for model in copies]
    parts = _parts(copies, (by,) if isinstance(by, str) else tuple(by))
    moved = np.array([_distance(weights[0], weights[1], names) for names in parts.values()])
    rows = list(in_batches(recipient, contrasts(recipient, pairs, side), batch_size, progress=False))
    whole = [[_last(model, batch) for batch in rows] for model in copies]
    unpatched = [_measured(measures, whole[at], rows, whole[1 - at]) for at in (0, 1)]
    source = [_measured(measures, whole[1 - at], rows, whole[1 - at]) for at in (0, 1)]
    values = np.stack([np.stack([baseline] * len(parts), 1) for baseline in unpatched])
    changed = [(at, part) for at in (0, 1) for part in np.flatnonzero(moved)]
    for at, part in tqdm(changed, desc="grafts", disable=not progress, leave=False):
        with _grafted(weights[at], weights[1 - at], list(parts.values())[part]):
            found = [_last(copies[at], batch) for batch in rows]
        values[at, :, part] = _measured(measures, found, rows, whole[1 - at])
    blocks, kinds = zip(*parts, strict=True)
    return Graft(values, np.stack(unpatched), np.stack(source), tuple(measures), moved, blocks, kinds, side)


def _plain_copy(model: LensModel) -> LensModel:
    """A copy whose adapters, if there are any, are in its weights."""
    copied = copy_model(model)
    if has_adapters(copied):
        merge_adapters(copied)
    return copied


def _parts(models: Sequence[LensModel], by: Sequence[str]) -> dict[Part, list[str]]:
    """The names of the parameters of every part."""
    found, other = (components(model) for model in models)
    if found != other:
        raise CtlensError("the models keep their weights under different names: load both in the same way.")
    for kind in by:
        if kind not in BY:
            raise unknown("kind of part", kind, BY)
    numbers = sorted({block for block, _ in found.values() if block is not None})
    order = (*COMPONENTS[:-2], TIED, *COMPONENTS[-2:])
    places: list[Part] = [*((number, EVERY) for number in numbers), *((EVERY, name) for name in order)]
    places += [(place, name) for place in (*numbers, OUTSIDE) for name in COMPONENTS[:-2]]
    parts = {place: [name for name, item in found.items() if _inside(item, place)] for place in places}
    chosen = {place: names for place, names in parts.items() if names and _kind(place) in by}
    if not chosen:
        raise CtlensError(f"no part is named: choose at least one of {', '.join(BY)}.")
    return chosen


def _inside(item: tuple[int | None, str], part: Part) -> bool:
    """Whether a parameter of a block and a component belongs to a part."""
    block = OUTSIDE if item[0] is None else item[0]
    return part[0] in (EVERY, block) and part[1] in (EVERY, item[1])


def _distance(recipient: Mapping[str, Tensor], donor: Mapping[str, Tensor], names: Sequence[str]) -> float:
    apart, size = (
        sum(float(weight.double().square().sum()) for weight in chosen)
        for chosen in ([donor[name] - recipient[name] for name in names], [recipient[name] for name in names])
    )
    return (apart / size) ** 0.5 if apart else 0.0


@contextmanager
def _grafted(own: Mapping[str, Tensor], other: Mapping[str, Tensor], names: Sequence[str]) -> Iterator[None]:
    """Inside the block the named weights are the other model's."""
    kept = {name: own[name].clone() for name in names}
    targets = {name: own[name] for name in names}
    copy_weights(targets, {name: other[name] for name in names})
    try:
        yield
    finally:
        copy_weights(targets, kept)


@torch.no_grad()
def _last(model: LensModel, batch: ContrastBatch) -> Float[Tensor, "batch d_vocab"]:
    return batch.at_last(run(model, batch.side.tokens, batch.side.needed_mask))


def _measured(
    metrics: dict[str, Metric], logits: Sequence[Tensor], rows: Sequence[ContrastBatch], source: Sequence[Tensor]
) -> Float[np.ndarray, "metric pair"]:
    found = [measured(metrics, *of_batch) for of_batch in zip(logits, rows, source, strict=True)]
    return torch.cat(found, -1).cpu().numpy()
