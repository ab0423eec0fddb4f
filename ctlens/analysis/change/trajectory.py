"""A trajectory: scalars of a model over its training, or along the line through its weights before and after.

It takes the checkpoints that a training kept, ours or other people's, one model in memory at a time; or a `WeightLine`,
whose amounts below 0 reverse the training and above 1 amplify it. What is measured is a name among `MEASURES` or any
function of a model.

A value whose measure gives one number per pair has its interval over topics and wrapper texts, and so has its change
since the start, in which each pair is compared with itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from ctlens import plots
from ctlens.analysis.base.forward import require_comparable
from ctlens.analysis.base.result import ResultOverPairs, beside, groups_of
from ctlens.analysis.change.checkpoints import Checkpoints, CheckpointSource, KeptModel, kept
from ctlens.analysis.change.line import WeightLine
from ctlens.analysis.change.measures import MEASURES, Measure, MeasuredOn, ScalarOfModel, measures_by_label, scalar_of
from ctlens.core.clusters import Clusters, clustered_mean, paired_difference
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.keeping import keeping
from ctlens.core.progress import progress_bar
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.models.loading import load_model
from ctlens.plots import Curve, CurvePanel, Figure
from ctlens.threats import Judge

STEP = "step"
AMOUNT = "amount"
_X_TITLES = {STEP: "step of training", AMOUNT: "share of the way from base to trained"}
_TITLES = {
    STEP: "How does it change over training?",
    AMOUNT: "How does it change from base to trained, and beyond?",
}
_MARKED = {STEP: (), AMOUNT: (0.0, 1.0)}


@dataclass(frozen=True)
class Trajectory(ResultOverPairs):
    """The result of `trajectory`: every measure of every model, in their order.

    Attributes:
        value, low, high: `[measure, x]`, and the ends of the 95 percent interval; NaN where a measure has none.
        per_pair: by measure, its value of each pair, `[x, pair]`; only of the measures that have such.
        x: the step or the amount of each model.
        over: which of the two it is, `"step"` or `"amount"`.
        measures: their labels.
        rates: the labels of those whose values of pairs are 1 or 0.
        words: what each measure counts.
    """

    value: Float[np.ndarray, "measure x"]
    low: Float[np.ndarray, "measure x"]
    high: Float[np.ndarray, "measure x"]
    per_pair: Mapping[str, Float[np.ndarray, "x pair"]]
    x: tuple[float, ...]
    over: str
    measures: tuple[str, ...]
    rates: tuple[str, ...]
    words: tuple[str, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per measure and model.

        Returns:
            The `step` or the `amount`, the `value` with `ci_low` and `ci_high`, and the `change` since the start with
            `change_low` and `change_high`, where each pair is compared with itself; NaN where a measure has no values
            of pairs. The start is at 0, or the first model where there is none. `n_pairs` counts what a value is of.
        """
        tables = []
        for number, measure in enumerate(self.measures):
            change, low, high = self._change(number)
            pairs = self.per_pair.get(measure)
            columns = {
                "measure": measure,
                self.over: self.x,
                "value": self.value[number],
                "ci_low": self.low[number],
                "ci_high": self.high[number],
                "change": change,
                "change_low": low,
                "change_high": high,
                "n_pairs": 0 if pairs is None else int((~np.isnan(pairs[0])).sum()),
            }
            tables.append(pd.DataFrame(columns))
        return pd.concat(tables, ignore_index=True)

    def figure(self) -> Figure:
        """Draws the measures over steps or amounts, a panel per measure."""
        return _drawn({"model": self})

    def compare(self, others: Mapping[str, Trajectory], *, label: str) -> Figure:
        """Draws this trajectory beside those of other trainings, a panel per measure and a line per training.

        Args:
            others: by label, of the same measures at the same steps or amounts.
            label: of this one.

        Raises:
            CtlensError: another has this label, or other measures, steps or amounts.
        """
        drawn = beside(self, others, label)
        for name, other in drawn.items():
            if (other.x, other.over, other.measures) != (self.x, self.over, self.measures):
                raise CtlensError(
                    f"{name!r} does not compare with {label!r}: measure the same at the same {self.over}s."
                )
        return _drawn(drawn)

    def curve(self, measure: str) -> Curve:
        """A measure by step or amount with its interval.

        Raises:
            CtlensError: it was not measured.
        """
        if measure not in self.measures:
            raise unknown("measure", measure, self.measures)
        number = self.measures.index(measure)
        return self.value[number], self.low[number], self.high[number]

    def _change(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The change since the start with its interval, `[x]` each."""
        measure = self.measures[number]
        start = self.x.index(0.0) if 0.0 in self.x else 0
        nothing = np.full(len(self.x), np.nan)
        if measure not in self.per_pair:
            return self.value[number] - self.value[number, start], nothing, nothing
        known = ~np.asarray(np.isnan(self.per_pair[measure]).any(0))
        values = self.per_pair[measure][:, known]
        clusters = self.clusters(known) or Clusters.alone(int(known.sum()))
        change = values - values[start]
        if measure not in self.rates:
            return clustered_mean(change.T, clusters)
        low, high = np.array(
            [paired_difference((row > 0).astype(float), (row < 0).astype(float), clusters) for row in change]
        ).T
        low[start], high[start] = 0.0, 0.0  # compared with itself, and no rate of changes
        return change.mean(-1), low, high


def _drawn(trajectories: Mapping[str, Trajectory]) -> Figure:
    """Draws one panel per measure, a line per trajectory."""
    first = next(iter(trajectories.values()))
    panels = {
        measure: CurvePanel({name: one.curve(measure) for name, one in trajectories.items()}, words)
        for measure, words in zip(first.measures, first.words, strict=True)
    }
    marks = " Dotted: the base at 0, the trained model at 1." if first.over == AMOUNT else ""
    n_pairs = max((values.shape[1] for values in first.per_pair.values()), default=0)
    return plots.curve_panels(
        first.x,
        panels,
        _TITLES[first.over],
        x_title=_X_TITLES[first.over],
        caption=f"Lines are values, bands their 95% intervals.{marks}",
        marked=_MARKED[first.over],
        subtitle=f"{n_pairs} pairs" if n_pairs else None,
    )


class _Way(NamedTuple):
    """The models in their order, each loaded or put together when it is asked for.

    Attributes:
        over: what `x` counts, `"step"` or `"amount"`.
        base: the model before training; None where it is not known.
        x: the step or the amount of each model.
        models: one after another.
    """

    over: str
    base: LensModel | None
    x: tuple[float, ...]
    models: Iterator[LensModel]


@public
@keeping()
def trajectory(
    checkpoints: WeightLine | Checkpoints,
    pairs: Pairs,
    measure: Measure | Mapping[str, Measure] = "logit_diff",
    *,
    base: CheckpointSource | None = None,
    judge: Judge | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 64,
    device: str = "cpu",
    progress: bool = True,
) -> Trajectory:
    """Measures a model over its training, or along the line through its weights before and after.

    >>> import ctlens as ct
    >>> base, threat = ct.load_organism(), ct.threats.get("jailbreak")
    >>> trained = ct.train(base, threat.pairs(64), ct.BCT(), steps=16, progress=False).model
    >>> line = ct.analysis.WeightLine(base, trained, at=(0.0, 1.0, 2.0))
    >>> found = ct.trajectory(line, threat.pairs(16, split="heldout"), "bad_rate", progress=False)
    >>> found.to_dataframe()["value"].is_monotonic_decreasing
    True

    Args:
        checkpoints: models of a training: a folder whose folders end in their step, several folders, or folders, names
            on the hub and models by step; or a `WeightLine`.
        pairs: which the measures ask. `ctlens.pairs` makes them of two lists of texts.
        measure: a name among `ctlens.analysis.change.measures.MEASURES`, or a function of a model, which gives a
            number, a tuple of a number and both ends of its interval, or one number per pair; or several by label.
        base: the model before training: step 0, what some measures compare with, and what adapters belong to.
        judge: gives the verdicts, see `ctlens.threats.Judge`; by default the answers that the prompts name decide.
        max_new_tokens: length of the longest answer, in tokens.
        batch_size: prompts per forward pass.
        device: where loaded models live.
        progress: show a progress bar.

    Raises:
        CtlensError: a checkpoint cannot be loaded or tells no step, models do not compare or are in training mode, a
            measure is unknown, needs the base or gives something else, or no pair has it.
    """
    named = measures_by_label(measure)
    way = _way(checkpoints, base, device)
    asked = MeasuredOn(way.base, pairs, judge, max_new_tokens, batch_size)
    found: dict[str, list[ScalarOfModel]] = {label: [] for label in named}
    first = way.base
    with progress_bar(total=len(way.x), desc="trajectory", shown=progress, leave=False) as bar:
        for model in way.models:
            first = model if first is None else first
            require_comparable(first, model)
            for label, one in named.items():
                found[label].append(scalar_of(one, label, model, asked))
            bar.update()
    per_pair = {label: [one.per_pair for one in of_label] for label, of_label in found.items()}
    known = {label: one for label, one in named.items() if isinstance(one, str)}
    return Trajectory(
        value=np.array([[one.value for one in of_label] for of_label in found.values()]),
        low=np.array([[one.low for one in of_label] for of_label in found.values()]),
        high=np.array([[one.high for one in of_label] for of_label in found.values()]),
        per_pair={
            label: np.stack([row for row in rows if row is not None])
            for label, rows in per_pair.items()
            if all(row is not None for row in rows)
        },
        x=way.x,
        over=way.over,
        measures=tuple(named),
        rates=tuple(label for label, one in known.items() if MEASURES[one].is_rate),
        words=tuple(MEASURES[known[label]].words if label in known else label for label in named),
        groups=groups_of(pairs),
    )


def _way(checkpoints: WeightLine | Checkpoints, base: CheckpointSource | None, device: str) -> _Way:
    if isinstance(checkpoints, WeightLine):
        if base is not None:
            raise CtlensError("a line has its own base: leave base= out.")
        return _Way(AMOUNT, checkpoints.base, checkpoints.at, checkpoints.models())
    start = base if base is None or isinstance(base, LensModel) else load_model(base, device=device)
    files = kept(checkpoints, start, device)
    if start is not None and files[0].step > 0:
        files = [KeptModel(0, lambda: start), *files]
    return _Way(STEP, start, tuple(float(file.step) for file in files), (file.load() for file in files))
