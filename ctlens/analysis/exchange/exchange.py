"""The base of the results of cross-model patching and of weight swaps, which put something of one model into another.

Such an exchange goes both ways between a source model, for example a trained one, and a target model, for example its
base. The effect is the metric of the source less that of the target, both as they are, on the same prompts. If
activations or weights of the source are put into the target, a share of the effect appears there; if the target's are
put into the source, a share of it is lost. Both shares are needed: the first says what is sufficient, the second what
is left elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Float

from ctlens import plots
from ctlens.analysis.base.result import ResultOverPairs
from ctlens.analysis.base.shares import floor_of, means, require_gap, shares
from ctlens.core.clusters import WithInterval
from ctlens.core.errors import CtlensError, unknown
from ctlens.plots import Curve

EXCHANGE_QUANTITIES = ("sufficient", "lost")
"""The share of the effect that appears in the target, and the share that is lost in the source."""
QUANTITY_TITLES = {
    "sufficient": "source into target: share that appears",
    "lost": "target into source: share that is lost",
}
_KEPT = ("target keeps", "source keeps")
_E = TypeVar("_E", bound="Exchange")
Moved: TypeAlias = Float[np.ndarray, "*cell pair"]
"""The change of the metric by an exchange, in every cell."""


@dataclass(frozen=True)
class Exchange(ResultOverPairs, ABC):
    """The metrics of every pair with something of the one model in the other, in both directions.

    Attributes:
        values: of the changed runs, `[quantity, metric, ..., pair]`, quantities as in `EXCHANGE_QUANTITIES`; NaN where
            a pair lacks the cell.
        unpatched: of the run that is changed, as it is, `[quantity, metric, pair]`: first the target model's, then the
            source model's.
        source: of the run from which activations or weights come, `[quantity, metric, pair]`: first the source
            model's, then the target model's.
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
        """The table of all values: one row per quantity, metric and cell.

        Returns:
            The mean `value` of the changed runs over the `n_pairs` that have the cell and its 95
            percent interval over topics and wrapper texts, `ci_low` and `ci_high`, in the metric's unit; and
            the means of the two runs as they are, `unpatched` and `source`, see `Exchange`.
        """
        tables = []
        for index, quantity in enumerate(EXCHANGE_QUANTITIES):
            for row, metric in enumerate(self.metrics):
                found = self._flat(index, row)
                table = self._table(quantity, metric, found, means(found, self.clusters))
                unpatched = self.unpatched[index, row].mean()
                tables.append(table.assign(unpatched=unpatched, source=self.source[index, row].mean()))
        return pd.concat(tables, ignore_index=True)

    def normalised(self, metric: str | None = None, *, smallest_gap: float | None = None) -> pd.DataFrame:
        """The same table of one metric as shares of the effect, each a ratio of means over pairs.

        A share that is `"sufficient"` is 0 where the target answers as it is and 1 where it answers as the source. A
        share that is `"lost"` is 0 where the source answers as it is and 1 where it answers as the target: then
        nothing of the effect is left elsewhere.

        Args:
            metric: by default the first.
            smallest_gap: the smallest mean difference of source and target, in the metric's unit, of which a share
                says something; for a metric function of yours it must be given.

        Raises:
            CtlensError: the metric was not measured, or the models differ by less.
        """
        return self._shares(metric, smallest_gap, lambda moved: moved)

    def _shares(self, metric: str | None, smallest_gap: float | None, of: Callable[[Moved], Moved]) -> pd.DataFrame:
        """The table of `normalised`, of something that is made of the change of every run."""
        metric = self.metrics[0] if metric is None else metric
        row = self._row(metric)
        floor = floor_of(metric, smallest_gap)
        tables = []
        for index, quantity in enumerate(EXCHANGE_QUANTITIES):
            gap = self.source[index, row] - self.unpatched[index, row]
            require_gap(metric, gap, floor, "source and target")
            moved = of(self.values[index, row] - self.unpatched[index, row]).reshape(-1, self.n_pairs)
            tables.append(self._table(quantity, metric, moved, shares(moved, gap, floor, self.clusters)))
        return pd.concat(tables, ignore_index=True)

    def kept(
        self, base: Float[np.ndarray, " pair"], metric: str | None = None, *, smallest_gap: float | None = None
    ) -> pd.DataFrame:
        """Measures how much of its effect each of two trained models keeps with activations or weights of the other.

        Two models that behave alike have no effect between them to take shares of, but each has one over their common
        base: 1 is all of it, 0 is as the base. The quantities are `"target keeps"` and `"source keeps"`.

        Args:
            base: the metric of the base as it is, per pair; for example `unpatched[0, 0]` of the transplant from one
                of the two into the base.
            metric: by default the first; not `"kl"`, which is measured from the other model.
            smallest_gap: see `normalised`.

        Raises:
            CtlensError: the metric was not measured or is `"kl"`, or a model differs by less from the base.
        """
        metric = self.metrics[0] if metric is None else metric
        row = self._row(metric)
        floor = floor_of(metric, smallest_gap)
        if metric == "kl":
            raise CtlensError("kl is measured from the other model, not from the base: choose another metric.")
        tables = []
        for index, quantity in enumerate(_KEPT):
            gap = self.unpatched[index, row] - base
            require_gap(metric, gap, floor, f"{quantity.split()[0]} and base")
            left = self._flat(index, row) - base
            tables.append(self._table(quantity, metric, left, shares(left, gap, floor, self.clusters)))
        return pd.concat(tables, ignore_index=True)

    @property
    def n_pairs(self) -> int:
        """The number of pairs that were measured."""
        return self.values.shape[-1]

    def effect(self, metric: str | None = None) -> Float[np.ndarray, " pair"]:
        """The metric of the source model minus that of the target model, per pair."""
        row = self._row(self.metrics[0] if metric is None else metric)
        return self.source[0, row] - self.unpatched[0, row]

    def _row(self, metric: str) -> int:
        if metric not in self.metrics:
            raise unknown("measured metric", metric, self.metrics)
        return self.metrics.index(metric)

    def _flat(self, quantity: int, row: int) -> Float[np.ndarray, "cell pair"]:
        return self.values[quantity, row].reshape(-1, self.n_pairs)

    def _table(
        self, quantity: str, metric: str, found: Float[np.ndarray, "cell pair"], estimates: WithInterval
    ) -> pd.DataFrame:
        labels = {"quantity": quantity, "metric": metric, **self.cells()}
        numbers = dict(zip(("value", "ci_low", "ci_high"), estimates, strict=True))
        return pd.DataFrame({**labels, **numbers, "n_pairs": (~np.isnan(found)).sum(-1)})


def with_effect(
    results: Mapping[str, _E],
    metric: str | None,
    smallest_gap: float | None,
    shares_of: Callable[..., pd.DataFrame] = Exchange.normalised,
) -> tuple[dict[str, pd.DataFrame], str]:
    """The shares of each result that has an effect, and a note on the results that have none.

    Args:
        results: by label.
        metric: by default the first.
        smallest_gap: see `Exchange.normalised`.
        shares_of: makes the table of a result; it takes what `Exchange.normalised` takes.

    Raises:
        CtlensError: none has an effect, the metric was not measured, or the results have different cells.
    """
    labels = [result.cells().drop(columns="moved", errors="ignore") for result in results.values()]
    if not all(of_one.equals(labels[0]) for of_one in labels):
        raise CtlensError("the results have different layers, positions or parts: draw each by itself.")
    small = {}
    for name, result in results.items():
        effect = result.effect(metric).mean()
        if abs(effect) < floor_of(metric or result.metrics[0], smallest_gap):
            small[name] = effect
    chosen = [name for name in results if name not in small] or list(results)[:1]
    tables = {name: shares_of(results[name], metric, smallest_gap=smallest_gap) for name in chosen}
    names = ", ".join(f"{plots.label(name)} ({effect:.2g})" for name, effect in small.items())
    return tables, f"not drawn, effect too small: {names}" if small else ""


def curve(table: pd.DataFrame) -> Curve:
    """Reads the values of a table and the two ends of their intervals."""
    return table["value"].to_numpy(), table["ci_low"].to_numpy(), table["ci_high"].to_numpy()


def rows_with(table: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """Picks the rows of a table that have these labels."""
    return table.loc[np.all([table[name] == value for name, value in labels.items()], axis=0)]
