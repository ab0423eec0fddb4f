"""Measures: scalars of one model, named ones and functions of one's own, with their intervals.

A function of one's own takes a model and gives a number, or a number with the lower and the upper end of its interval,
or an array of one number per pair, of which the mean is taken and the interval made over topics and wrapper texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float

from ctlens.analysis.base.contrast import contrast_batches, contrasts, logit_diffs
from ctlens.analysis.base.metrics import divergence
from ctlens.analysis.base.result import clusters_in, groups_of
from ctlens.analysis.residual.shift import residual_shift
from ctlens.analysis.robustness.over_refusal import unanswered_by_pair
from ctlens.core.clusters import clustered_mean, clustered_rate
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair
from ctlens.models.hooks import run
from ctlens.threats import Judge, ask

PerPair: TypeAlias = Float[np.ndarray, " pair"]
Triple: TypeAlias = tuple[float, float, float]
MeasureFunction: TypeAlias = Callable[[LensModel], Any]
Measure: TypeAlias = str | MeasureFunction
"""A name among `MEASURES`, or a function of a model, see this module."""


@dataclass(frozen=True)
class MeasuredOn:
    """MeasuredOn is what named measures ask a model about.

    Attributes:
        base: the model before training, which some measures compare with; None where there is none.
        pairs: the pairs.
        judge: gives the verdicts; None judges by the answers that the prompts name.
        max_new_tokens: length of the longest answer, in tokens.
        batch_size: prompts per forward pass.
    """

    base: LensModel | None
    pairs: Sequence[Pair]
    judge: Judge | None
    max_new_tokens: int
    batch_size: int


class NamedMeasure(NamedTuple):
    """A measure with a name.

    Attributes:
        of: its value of each pair; NaN where a pair has none.
        words: what it counts, for the axis of a figure.
        is_rate: whether the values are 1 or 0.
        needs_base: whether it compares with the model before training.
    """

    of: Callable[[LensModel, MeasuredOn], PerPair]
    words: str
    is_rate: bool = False
    needs_base: bool = False


class ScalarOfModel(NamedTuple):
    """The value of a measure with the ends of its interval, NaN where it has none, and what it is made of.

    Attributes:
        value, low, high: over pairs.
        per_pair: the values of the pairs; None where the measure gave none.
    """

    value: float
    low: float
    high: float
    per_pair: PerPair | None = None


def _logit_diff(side: str, model: LensModel, asked: MeasuredOn) -> PerPair:
    rows = contrasts(model, asked.pairs, side)
    return logit_diffs(model, contrast_batches(model, rows, asked.batch_size, progress=False)).astype(float)


def _bad(model: LensModel, asked: MeasuredOn) -> PerPair:
    wrapped = [pair.wrapped for pair in asked.pairs]
    replies = ask(model, wrapped, max_new_tokens=asked.max_new_tokens, judge=asked.judge)
    return np.array([reply.verdict == "bad" for reply in replies], dtype=float)


def _gap_closed(model: LensModel, asked: MeasuredOn) -> PerPair:
    assert asked.base is not None
    shift = residual_shift(asked.base, model, asked.pairs, batch_size=asked.batch_size, progress=False)
    return shift.gap_closed[0].mean(-1).astype(float)  # the first positions are the last token


@torch.no_grad()
def _kl_clean(model: LensModel, asked: MeasuredOn) -> PerPair:
    assert asked.base is not None
    found = []
    rows = contrasts(model, asked.pairs, "clean")
    for batch in contrast_batches(model, rows, asked.batch_size, progress=False):
        here = batch.at_last(run(asked.base, batch.side.tokens, batch.side.needed_mask)).float()
        there = batch.at_last(run(model, batch.side.tokens, batch.side.needed_mask)).float()
        found.append(divergence(there, batch, here).cpu().numpy())
    return np.concatenate(found).astype(float)


MEASURES: dict[str, NamedMeasure] = {
    "logit_diff": NamedMeasure(lambda model, asked: _logit_diff("wrapped", model, asked), "good minus bad, wrapped"),
    "logit_diff_clean": NamedMeasure(lambda model, asked: _logit_diff("clean", model, asked), "good minus bad, clean"),
    "bad_rate": NamedMeasure(_bad, "bad answers, wrapped", is_rate=True),
    "over_refusal": NamedMeasure(
        lambda model, asked: unanswered_by_pair(model, asked.pairs, asked.judge, asked.max_new_tokens),
        "unanswered benign twins",
        is_rate=True,
    ),
    "gap_closed": NamedMeasure(_gap_closed, "share of the residual gap closed", needs_base=True),
    "kl_clean": NamedMeasure(_kl_clean, "KL to the base, clean, in nats", needs_base=True),
}
"""Logit differences and KL are those of the answer's token, `gap_closed` is at the last token, the mean of layers."""


def measures_by_label(measure: Measure | Mapping[str, Measure]) -> dict[str, Measure]:
    """Measures by label; a single one goes by its own name.

    Raises:
        CtlensError: there are none, or a name is unknown.
    """
    if isinstance(measure, Mapping):
        named = {str(label): one for label, one in measure.items()}
    else:
        named = {measure if isinstance(measure, str) else getattr(measure, "__name__", "measure"): measure}
    for one in named.values():
        if isinstance(one, str) and one not in MEASURES:
            raise unknown("measure", one, MEASURES)
    if not named:
        raise CtlensError("there is nothing to measure: name at least one measure.")
    return named


def scalar_of(measure: Measure, label: str, model: LensModel, asked: MeasuredOn) -> ScalarOfModel:
    """The value of a measure of a model, with its interval over topics and wrapper texts where it has values of pairs.

    Raises:
        CtlensError: it needs the base and there is none, no pair has it, or a function gave something else.
    """
    if isinstance(measure, str):
        named = MEASURES[measure]
        if named.needs_base and asked.base is None:
            raise CtlensError(f"{measure} compares with the model before training: give it with base=.")
        return _over_pairs(named.of(model, asked), label, asked.pairs, named.is_rate)
    found = measure(model)
    if isinstance(found, tuple):
        return ScalarOfModel(*_triple(found, label))
    try:
        values = np.asarray(found.detach().cpu() if isinstance(found, torch.Tensor) else found, dtype=float)
    except (TypeError, ValueError):
        raise CtlensError(f"the measure {label!r} gave a {type(found).__name__}, which is no number.") from None
    if values.ndim == 0 and np.isnan(values):
        raise CtlensError(f"the measure {label!r} gave {found}, which is no number.")
    if values.ndim == 0:
        return ScalarOfModel(float(values), np.nan, np.nan)
    if values.shape != (len(asked.pairs),):
        raise CtlensError(
            f"the measure {label!r} gave shape {values.shape}: a number, a number with both ends of its interval, or "
            f"one number for each of the {len(asked.pairs)} pairs is expected."
        )
    return _over_pairs(values, label, asked.pairs, is_rate=False)


def _triple(found: tuple[Any, ...], label: str) -> Triple:
    if len(found) != 3:
        raise CtlensError(f"the measure {label!r} gave {len(found)} numbers: give value, lower end and upper end.")
    try:
        value, low, high = map(float, found)
    except (TypeError, ValueError):
        raise CtlensError(f"the measure {label!r} gave {found!r:.60}, of which not all are numbers.") from None
    if low > value or value > high:
        raise CtlensError(f"the measure {label!r} gave {value:g}, outside of its interval from {low:g} to {high:g}.")
    return value, low, high


def _over_pairs(values: PerPair, label: str, pairs: Sequence[Pair], is_rate: bool) -> ScalarOfModel:
    known = ~np.isnan(values)
    if not known.any():
        raise CtlensError(f"no pair has {label}: give pairs with such prompts.")
    clusters = clusters_in(groups_of(pairs), known)
    if is_rate:
        rate, _, low, high = clustered_rate(values[known] == 1, clusters)
        return ScalarOfModel(rate, low, high, values)
    mean, low, high = clustered_mean(values[known], clusters)
    return ScalarOfModel(float(mean), float(low), float(high), values)
