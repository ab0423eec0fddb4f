"""The result of a patching sweep: every value of every pair, with its two baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ctlens import plots
from ctlens.analysis.base.result import beside
from ctlens.analysis.base.shares import CellValues, means, simultaneous_means
from ctlens.analysis.patching.measured import MeasuredRuns, pair_counts
from ctlens.core.clusters import WithInterval
from ctlens.core.errors import CtlensError
from ctlens.plots import Figure

PATCH_UNITS = {"logit_diff": "logits, good minus bad", "probability": "probability of the good token", "kl": "nats"}
GRADIENT = "gradient"
"""The path of a sweep that was estimated to first order."""
_QUESTIONS = {
    "denoising": "Where do the clean run's activations repair the wrapped run?",
    "noising": "Where do the wrapped run's activations break the clean run?",
}


@dataclass(frozen=True)
class Patching(MeasuredRuns):
    """The metrics of every patched run of a sweep over one site.

    Attributes:
        values: `[metric, layer, position, pair]`, for `z` and `pattern` with an axis of heads behind the layers;
            NaN where a pair has no such position.
        target: the metrics of the run that is patched, as it is, `[metric, pair]`.
        source: the metrics of the run whose activations are taken, `[metric, pair]`.
        metrics: their names.
        layers: the number of each layer.
        tokens: of each position, the token where all pairs have the same there, else `""`; the last
            position holds each pair's last aligned token.
        kinds: of each position, the kind of its token where all pairs have the same, else `""`; see
            `ctlens.data.token_kinds`.
        site: the hook point.
        direction: `"denoising"` or `"noising"`.
        positions: which tokens were patched: `"each"` by itself, or together `"last"`, `"content"` or `"all"`.
        window: of the alignment.
        path: how it was computed: `"suffix"`, `"hooks"` or `"gradient"`; `"hooks and suffix"` where some pairs went
            the one way and some the other.
    """

    values: Float[np.ndarray, "metric layer *head position pair"]
    target: Float[np.ndarray, "metric pair"]
    source: Float[np.ndarray, "metric pair"]
    metrics: tuple[str, ...]
    layers: tuple[int, ...]
    tokens: tuple[str, ...]
    kinds: tuple[str, ...]
    site: str
    direction: str
    positions: str
    window: str
    path: str

    @property
    def has_heads(self) -> bool:
        """True where each head was patched by itself."""
        return self.values.ndim == 5

    def to_dataframe(self) -> pd.DataFrame:
        """One row per metric, layer, head (where there are heads) and position.

        Returns:
            The mean `value` over the `n_pairs` that have the position and its 95 percent interval
            over topics and wrapper texts, `ci_low` and `ci_high`. A position counts from the end, -1 is the
            last; positions that were patched together go by their name.
        """
        tables = [self._table(name, means(self._cells(row), self.clusters)) for row, name in enumerate(self.metrics)]
        return pd.concat(tables, ignore_index=True)

    def top(self, k: int = 10, metric: str | None = None) -> pd.DataFrame:
        """Lists the `k` cells whose patch moves the run most, with intervals that hold for all cells at once.

        Args:
            k: how many.
            metric: by default the first.

        Returns:
            Rows as in `to_dataframe`, of which `value` is the change of the patched run, with intervals that hold for
            all cells at once (`ctlens.core.clusters.simultaneous_mean`), because the largest of many changes is large
            by chance too; with `cells`, how many were compared, and `differs`, whether the interval leaves out 0.

        Raises:
            CtlensError: the metric was not measured.
        """
        metric = self.metrics[0] if metric is None else metric
        row = self._row(metric)
        moved = self._changes(row)
        table = self._table(metric, simultaneous_means(moved, self.clusters))
        table = table.iloc[np.argsort(-np.nan_to_num(table["value"].abs().to_numpy()), kind="stable")[:k]]
        cells = int((~np.isnan(moved)).any(-1).sum())
        differs = (table["ci_low"] > 0) | (table["ci_high"] < 0)
        return table.assign(cells=cells, differs=differs).reset_index(drop=True)

    def figure(self, metric: str | None = None) -> Figure:
        """The mean change over pairs: layers or heads by positions; layers by heads if tokens are patched together.

        Args:
            metric: by default the first.

        Raises:
            CtlensError: the metric was not measured.
        """
        return _drawn({"": self}, metric)

    def compare(self, others: Mapping[str, Patching], *, label: str, metric: str | None = None) -> Figure:
        """Grids as `figure` draws them, under each other on one scale, so that an effect and its null compare.

        Args:
            others: sweeps of the same site and layers by label, for example those of benign twins; they may hold this
                one too, under its label.
            label: of this one.
            metric: by default the first.

        Raises:
            CtlensError: another sweep has this one's label, patches something else, or has not measured the metric.
        """
        return _drawn(beside(self, others, label), metric)

    def _cells(self, row: int) -> Float[np.ndarray, "cell pair"]:
        """One metric's values, NaN where a pair has none."""
        return self.values[row].reshape(-1, self.values.shape[-1])

    def _changes(self, row: int) -> CellValues:
        return self._cells(row) - self.target[row]

    def _table(self, metric: str, estimates: WithInterval) -> pd.DataFrame:
        """A row per cell: its labels, its number with the interval, and how many pairs have it."""
        value, low, high = estimates
        present = (~np.isnan(self._cells(self._row(metric)))).sum(-1)
        shape = self.values.shape[1:-1]
        names = range(-shape[-1], 0) if self.positions == "each" else [self.positions]
        rows = []
        for cell, (layer, *head, position) in enumerate(np.ndindex(shape)):
            labels = (self.layers[layer], *head, names[position], self.tokens[position])
            rows.append((metric, *labels, value[cell], low[cell], high[cell], present[cell]))
        heads = ["head"] if self.has_heads else []
        columns = ["metric", "layer", *heads, "position", "token", "value", "ci_low", "ci_high", "n_pairs"]
        return pd.DataFrame(rows, columns=columns)

    @property
    def _patched(self) -> tuple[object, ...]:
        """What was patched, which sweeps in one figure have in common."""
        return self.site, self.layers, self.direction, self.positions, self.window, self.values.shape[1:-2]

    def _grid(self, metric: str) -> Float[np.ndarray, "layer *head position"]:
        """The mean change over pairs."""
        return np.nanmean(self._changes(self._row(metric)), -1).reshape(self.values.shape[1:-1])


def _drawn(results: Mapping[str, Patching], metric: str | None) -> Figure:
    """The grids of sweeps of one site: layers or heads by positions; layers by heads if tokens are patched together."""
    first = next(iter(results.values()))
    for name, result in results.items():
        if result._patched != first._patched:
            raise CtlensError(
                f"sweep {name!r} has another site, direction, window, layers or positions: compare sweeps that patch "
                "the same."
            )
    metric = first.metrics[0] if metric is None else metric
    grids = {name: result._grid(metric) for name, result in results.items()}
    tokens = "each token by itself" if first.positions == "each" else f"{first.positions} aligned tokens together"
    order = ", to first order" if first.path == GRADIENT else ""
    subtitle = f"{first.site}, {tokens}, {pair_counts(results)} pairs; the change of the patched run's {metric}{order}"
    words: dict[str, Any] = {"unit": PATCH_UNITS.get(metric, metric), "subtitle": subtitle}
    title = _QUESTIONS[first.direction]
    if first.has_heads and first.positions != "each":
        return plots.patched_heads({name: grid[..., 0] for name, grid in grids.items()}, first.layers, title, **words)
    rows = [f"L{layer}" for layer in first.layers]
    if first.has_heads:
        rows = [f"L{layer}H{head}" for layer in first.layers for head in range(first.values.shape[2])]
    drawn = {}
    for name, result in results.items():
        tokens = result.tokens if result.positions == "each" else (result.positions,)
        drawn[name] = plots.PatchedTokens(grids[name].reshape(len(rows), -1), tokens, result.kinds)
    return plots.patched_positions(drawn, rows, title, **words)
