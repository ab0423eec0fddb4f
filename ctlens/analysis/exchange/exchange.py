"""What was put from one model into the other and back: values, shares of the effect between the two, their intervals.

The effect is the difference of a metric between donor and recipient, both as they are, on the same
prompts. Something of the donor that is put into the recipient makes a share of it appear; the
same of the recipient put back into the donor makes a share of it disappear. Both are needed: the
first tells what is sufficient, the second what is left elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Float

from ctlens import plots
from ctlens.analysis.base.result import Result
from ctlens.analysis.base.shares import Estimates, floor_of, means, require_gap, shares
from ctlens.core.errors import CtlensError, unknown
from ctlens.plots import Curve

QUANTITIES = ("sufficient", "lost")
"""The share of the effect that appears in the recipient, and the share that is lost in the donor."""
WORDS = {
    "sufficient": "donor into recipient: share that appears",
    "lost": "recipient into donor: share that is lost",
}
KEPT = ("recipient keeps", "donor keeps")
"""The shares of each model's own effect over a third one that are left with the other's activations or weights."""
E = TypeVar("E", bound="Exchange")


@dataclass(frozen=True)
class Exchange(Result, ABC):
    """Base of the results: every value of every pair, in both directions.

    Attributes:
        values: the metrics of the changed runs, `[quantity, metric, ..., pair]`, quantities as in
            `QUANTITIES`; NaN where a pair lacks the cell.
        unpatched: of the run that is changed, as it is, `[quantity, metric, pair]`: the recipient's, then the donor's.
        source: of the other model's run, `[quantity, metric, pair]`: the donor's, then the recipient's.
        metrics: their names.
    """

    values: Float[np.ndarray, "quantity metric *cell pair"]
    unpatched: Float[np.ndarray, "quantity metric pair"]
    source: Float[np.ndarray, "quantity metric pair"]
    metrics: tuple[str, ...]

    @abstractmethod
    def cells(self) -> pd.DataFrame:
        """The labels of every cell, in the order of `values`."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per quantity, metric and cell.

        Returns:
            The mean `value` of the changed runs over the `n` pairs that have the cell and its 95
            percent bootstrap interval over pairs, `ci_low` and `ci_high`, in the metric's unit; and
            the means of the run as it is, `unpatched`, and of the other model's, `source`.
        """
        tables = []
        for number, quantity in enumerate(QUANTITIES):
            for row, metric in enumerate(self.metrics):
                found = self._flat(number, row)
                table = self._table(quantity, metric, found, means(found))
                baselines = {name: getattr(self, name)[number, row].mean() for name in ("unpatched", "source")}
                tables.append(table.assign(**baselines))
        return pd.concat(tables, ignore_index=True)

    def normalised(self, metric: str | None = None, *, smallest_gap: float | None = None) -> pd.DataFrame:
        """The same table of one metric as shares of the effect, each a ratio of means over pairs.

        Of `"sufficient"`, 0 is the recipient as it is and 1 the donor. Of `"lost"`, 0 is the donor as
        it is and 1 the recipient: nothing of the effect is left elsewhere.

        Args:
            metric: by default the first.
            smallest_gap: mean difference of donor and recipient, in the metric's unit, from which a
                share says something; of a function of yours it must be given.

        Raises:
            CtlensError: the metric was not measured, or the models differ by less.
        """
        metric = self.metrics[0] if metric is None else metric
        row, floor = self._row(metric), floor_of(metric, smallest_gap)
        tables = []
        for number, quantity in enumerate(QUANTITIES):
            gap = self.source[number, row] - self.unpatched[number, row]
            require_gap(metric, gap, floor, "donor and recipient")
            moved = self._flat(number, row) - self.unpatched[number, row]
            tables.append(self._table(quantity, metric, moved, shares(moved, gap, floor)))
        return pd.concat(tables, ignore_index=True)

    def kept(
        self, base: Float[np.ndarray, " pair"], metric: str | None = None, *, smallest_gap: float | None = None
    ) -> pd.DataFrame:
        """Of two trainings that do alike, how much of either's effect is left with the other's part: do they fit?

        Between models that behave alike there is no effect to take shares of. Each has one over
        their base: 1 is all of it, 0 is as the base. Quantities are `KEPT`.

        Args:
            base: of every pair, the metric of the base as it is, for example `unpatched[0, 0]` of the transplant
                from one of the two into the base.
            metric: by default the first; not `"kl"`, which is measured from the other model.
            smallest_gap: see `normalised`.

        Raises:
            CtlensError: the metric was not measured or is `"kl"`, or a model differs by less from the base.
        """
        metric = self.metrics[0] if metric is None else metric
        row, floor = self._row(metric), floor_of(metric, smallest_gap)
        if metric == "kl":
            raise CtlensError("kl is measured from the other model, not from the base: choose another metric.")
        tables = []
        for number, quantity in enumerate(KEPT):
            gap = self.unpatched[number, row] - base
            require_gap(metric, gap, floor, f"{quantity.split()[0]} and base")
            left = self._flat(number, row) - base
            tables.append(self._table(quantity, metric, left, shares(left, gap, floor)))
        return pd.concat(tables, ignore_index=True)

    @property
    def n_pairs(self) -> int:
        """How many pairs were measured."""
        return self.values.shape[-1]

    def effect(self, metric: str | None = None) -> Float[np.ndarray, " pair"]:
        """Of every pair, the metric of the donor minus that of the recipient."""
        row = self._row(self.metrics[0] if metric is None else metric)
        return self.source[0, row] - self.unpatched[0, row]

    def _row(self, metric: str) -> int:
        if metric not in self.metrics:
            raise unknown("measured metric", metric, self.metrics)
        return self.metrics.index(metric)

    def _flat(self, quantity: int, row: int) -> Float[np.ndarray, "cell pair"]:
        return self.values[quantity, row].reshape(-1, self.n_pairs)

    def _table(
        self, quantity: str, metric: str, found: Float[np.ndarray, "cell pair"], estimates: Estimates
    ) -> pd.DataFrame:
        labels = {"quantity": quantity, "metric": metric, **self.cells()}
        numbers = dict(zip(("value", "ci_low", "ci_high"), estimates, strict=True))
        return pd.DataFrame({**labels, **numbers, "n": (~np.isnan(found)).sum(-1)})


def with_effect(
    results: Mapping[str, E], metric: str | None, smallest_gap: float | None
) -> tuple[dict[str, pd.DataFrame], str]:
    """The shares of each result that has an effect, and a note on those that have none.

    Raises:
        CtlensError: none has an effect, the metric was not measured, or the results have different cells.
    """
    labels = [result.cells().drop(columns="moved", errors="ignore") for result in results.values()]
    if not all(of_one.equals(labels[0]) for of_one in labels):
        raise CtlensError("the results were measured at different places: draw each by itself.")
    small = {
        name: result.effect(metric).mean()
        for name, result in results.items()
        if abs(result.effect(metric).mean()) < floor_of(metric or result.metrics[0], smallest_gap)
    }
    chosen = [name for name in results if name not in small] or list(results)[:1]
    tables = {name: results[name].normalised(metric, smallest_gap=smallest_gap) for name in chosen}
    names = ", ".join(f"{plots.label(name)} ({effect:.2g})" for name, effect in small.items())
    return tables, f"not drawn, effect too small: {names}" if small else ""


def curve(table: pd.DataFrame) -> Curve:
    """The numbers of a table with their intervals."""
    value, low, high = (table[name].to_numpy() for name in ("value", "ci_low", "ci_high"))
    return value, low, high


def where(table: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """The rows of a table that have these labels."""
    return table.loc[np.all([table[name] == value for name, value in labels.items()], axis=0)]
