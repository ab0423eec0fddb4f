"""The base of results of patching: metrics of patched runs beside those of the two runs as they are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float

from ctlens.analysis.base.result import ResultOverPairs
from ctlens.analysis.base.shares import CellValues, floor_of, require_gap, shares
from ctlens.core.clusters import WithInterval
from ctlens.core.errors import unknown


class MeasuredRuns(ResultOverPairs):
    """The base of results whose rows are patched runs: each row's change is a share of the gap between two runs.

    Attributes:
        target: the metrics of the run that is patched, as it is, `[metric, pair]`.
        source: the metrics of the run whose activations are taken, `[metric, pair]`.
        metrics: their names.
    """

    target: Float[np.ndarray, "metric pair"]
    source: Float[np.ndarray, "metric pair"]
    metrics: tuple[str, ...]

    @property
    def n_pairs(self) -> int:
        """The number of pairs."""
        return self.target.shape[-1]

    def normalised(self, metric: str | None = None, *, smallest_gap: float | None = None) -> pd.DataFrame:
        """The same table of one metric as a share of the gap: 0 is the unpatched run, 1 the source run.

        The share is a ratio of means over pairs, not a mean of ratios, so one pair with a small gap
        cannot carry it away. NaN where the pairs that have a row have no gap of their own.

        Args:
            metric: by default the first.
            smallest_gap: the smallest mean difference of source and target run, in the metric's unit, of which a
                share says something; for a metric function of yours it must be given.

        Raises:
            CtlensError: the metric was not measured, or the gap is smaller.
        """
        metric = self.metrics[0] if metric is None else metric
        row = self._row(metric)
        floor = floor_of(metric, smallest_gap)
        gap = self.source[row] - self.target[row]
        require_gap(metric, gap, floor, "source and target run")
        return self._table(metric, shares(self._changes(row), gap, floor, self.clusters))

    def _row(self, metric: str) -> int:
        if metric not in self.metrics:
            raise unknown("measured metric", metric, self.metrics)
        return self.metrics.index(metric)

    @abstractmethod
    def _changes(self, row: int) -> CellValues:
        """How far each row of the table moves one metric of the run, NaN for a pair that has no such row."""

    @abstractmethod
    def _table(self, metric: str, estimates: WithInterval) -> pd.DataFrame:
        """The rows by their labels, with their numbers and intervals."""


def pair_counts(results: Mapping[str, MeasuredRuns]) -> str:
    """How many pairs the results of one figure have, `"64"` or, where they differ, `"64 and 32"`."""
    return " and ".join(dict.fromkeys(str(result.n_pairs) for result in results.values()))
