"""What a patching sweep found: every value of every pair, with its two baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from ctlens import plots
from ctlens.analysis.patching_metrics import SMALLEST_GAPS
from ctlens.analysis.result import Result
from ctlens.errors import CtlensError, unknown
from ctlens.intervals import bootstrap
from ctlens.plots import Figure

UNITS = {"logit_diff": "logits, good minus bad", "probability": "probability of the good token", "kl": "nats"}
QUESTIONS = {
    "denoising": "Where do the clean run's activations repair the wrapped run?",
    "noising": "Where do the wrapped run's activations break the clean run?",
}

Counts = Float[np.ndarray, " pair"]
Cells = Float[np.ndarray, " cell"]


@dataclass(frozen=True)
class Patching(Result):
    """The metrics of every patched run.

    Attributes:
        values: `[metric, layer, position, pair]`, for `z` and `pattern` with an axis of heads behind the layers;
            NaN where a pair has no such position.
        target: the run that is patched, as it is, `[metric, pair]`.
        source: the run whose activations are taken, `[metric, pair]`.
        metrics: their names.
        layers: the number of each layer.
        tokens: of each position, the token where all pairs have the same there, else `""`; the last
            position holds each pair's last aligned token.
        site: the hook point.
        direction: `"denoising"` or `"noising"`.
        positions: which ones were patched: `"each"`, or the name of the span.
        window: of the alignment.
        path: how it was computed: `"suffix"`, `"hooks"`, or both where some pairs went the one way and
            some the other.
    """

    values: Float[np.ndarray, "metric layer *head position pair"]
    target: Float[np.ndarray, "metric pair"]
    source: Float[np.ndarray, "metric pair"]
    metrics: tuple[str, ...]
    layers: tuple[int, ...]
    tokens: tuple[str, ...]
    site: str
    direction: str
    positions: str
    window: str
    path: str

    @property
    def has_heads(self) -> bool:
        """Whether each head was patched by itself."""
        return self.values.ndim == 5

    def to_dataframe(self) -> pd.DataFrame:
        """One row per metric, layer, head (where there are heads) and position.

        Returns:
            The mean `value` over the `n` pairs that have the position and its 95 percent bootstrap
            interval over pairs, `ci_low` and `ci_high`. A position counts from the end, -1 is the
            last; a span goes by its name.
        """
        return pd.concat([self._table(metric, self._mean(metric)) for metric in self.metrics], ignore_index=True)

    def normalised(self, metric: str | None = None, *, smallest_gap: float | None = None) -> pd.DataFrame:
        """The same table of one metric as a share of the gap: 0 is the unpatched run, 1 the source run.

        The share is a ratio of means over pairs, not a mean of ratios: one pair with a small gap
        cannot carry it away. NaN where the pairs that have a position have no gap of their own.

        Args:
            metric: by default the first.
            smallest_gap: mean distance of source and target run, in the metric's unit, from which a
                share says something; of a function of yours it must be given.

        Raises:
            CtlensError: the metric was not measured, or the gap is smaller.
        """
        metric = self.metrics[0] if metric is None else metric
        row = self._row(metric)
        floor = SMALLEST_GAPS.get(metric) if smallest_gap is None else smallest_gap
        if floor is None:
            raise CtlensError(f"metric {metric!r} is your own: say with smallest_gap= which gap is more than noise.")
        gap = self.source[row] - self.target[row]
        if not abs(gap.mean()) >= floor:
            raise CtlensError(
                f"{metric} differs by {gap.mean():.3g} between source and target run: "
                f"a share of less than {floor:g} is noise, read the values themselves."
            )
        cells, present = self._cells(row)
        moved = np.where(present, cells - self.target[row], 0)

        def share(counts: Counts) -> Cells:
            below = (present * gap) @ counts
            n = present @ counts
            return np.where(np.abs(below) >= floor * n, moved @ counts / below, np.nan)

        return self._table(metric, share)

    def figure(self, metric: str | None = None) -> Figure:
        """The mean change over pairs: layers by positions, heads by positions, or layers by heads for a span.

        Args:
            metric: by default the first.

        Raises:
            CtlensError: the metric was not measured.
        """
        metric = self.metrics[0] if metric is None else metric
        row = self._row(metric)
        cells, present = self._cells(row)
        moved = np.where(present, cells - self.target[row], 0)
        grid = (moved.sum(-1) / present.sum(-1)).reshape(self.values.shape[1:-1])
        subtitle = f"{self.site}, {self.values.shape[-1]} pairs; a cell is the change of the patched run's {metric}"
        words = {"unit": UNITS.get(metric, metric), "subtitle": subtitle}
        if self.has_heads and self.positions != "each":
            return plots.patched_heads(grid[..., 0], self.layers, QUESTIONS[self.direction], **words)
        rows = [f"L{layer}" for layer in self.layers]
        if self.has_heads:
            rows = [f"L{layer}H{head}" for layer in self.layers for head in range(grid.shape[1])]
        names = self.tokens if self.positions == "each" else (self.positions,)
        return plots.patched_positions(grid.reshape(len(rows), -1), rows, names, QUESTIONS[self.direction], **words)

    def _row(self, metric: str) -> int:
        if metric not in self.metrics:
            raise unknown("measured metric", metric, self.metrics)
        return self.metrics.index(metric)

    def _cells(self, row: int) -> tuple[Float[np.ndarray, "cell pair"], np.ndarray]:
        """One metric's values, 0 where a pair has none, and where it has one."""
        cells = self.values[row].reshape(-1, self.values.shape[-1])
        present = ~np.isnan(cells)
        return np.where(present, cells, 0), present

    def _mean(self, metric: str) -> Callable[[Counts], Cells]:
        cells, present = self._cells(self._row(metric))
        return lambda counts: cells @ counts / (present @ counts)

    def _table(self, metric: str, statistic: Callable[[Counts], Cells]) -> pd.DataFrame:
        """A statistic of every cell, given as a function of how often each pair counts, with its intervals."""
        n_pairs = self.values.shape[-1]
        row = self._row(metric)
        with np.errstate(invalid="ignore", divide="ignore"):
            value = statistic(np.ones(n_pairs))
            ends = bootstrap(
                lambda items: statistic(np.bincount(items, minlength=n_pairs).astype(float)).tolist(), n_pairs
            )
        present = self._cells(row)[1].sum(-1)
        shape = self.values.shape[1:-1]
        places = range(-shape[-1], 0) if self.positions == "each" else [self.positions]
        rows = []
        for number, (layer, *head, position) in enumerate(np.ndindex(shape)):
            where = (self.layers[layer], *head, places[position], self.tokens[position])
            rows.append((metric, *where, value[number], *ends[number], present[number]))
        heads = ["head"] if self.has_heads else []
        columns = ["metric", "layer", *heads, "position", "token", "value", "ci_low", "ci_high", "n"]
        return pd.DataFrame(rows, columns=columns)
