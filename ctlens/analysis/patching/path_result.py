"""The result of path patching: the metrics of every run in which one path was patched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from ctlens import plots
from ctlens.analysis.base.result import beside
from ctlens.analysis.base.shares import CellValues, means
from ctlens.analysis.patching.measured import MeasuredRuns, pair_counts
from ctlens.analysis.patching.result import PATCH_UNITS
from ctlens.core.clusters import WithInterval
from ctlens.core.errors import CtlensError, unknown
from ctlens.plots import Figure

PATH_TO_LOGITS = "logits"
"""The receiver that is the logits."""
_QUESTIONS = {
    "denoising": "Whose output on the clean prompt repairs the wrapped run by way of {} alone?",
    "noising": "Whose output on the wrapped prompt breaks the clean run by way of {} alone?",
}


@dataclass(frozen=True)
class PathPatching(MeasuredRuns):
    """The result of `path_patch`: the metrics of every run in which one path was patched.

    Attributes:
        values: `[metric, receiver, layer, sender, pair]`; NaN where the sender is not in front of the receiver.
        target: the metrics of the run that is patched, as it is, `[metric, pair]`.
        source: the metrics of the run whose activations are taken, `[metric, pair]`.
        metrics: their names.
        receivers: their names.
        layers: the number of each sender's layer.
        senders: `"H0"` and so on for the heads, and `"MLP"`.
        direction: `"denoising"` or `"noising"`.
        positions: the tokens at which the sender's output was another: `"last"`, `"content"` or `"all"`.
        window: of the alignment.
    """

    values: Float[np.ndarray, "metric receiver layer sender pair"]
    target: Float[np.ndarray, "metric pair"]
    source: Float[np.ndarray, "metric pair"]
    metrics: tuple[str, ...]
    receivers: tuple[str, ...]
    layers: tuple[int, ...]
    senders: tuple[str, ...]
    direction: str
    positions: str
    window: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per metric and path: `receiver`, `layer` and `sender`.

        Returns:
            The mean `value` over `n_pairs` pairs and its 95 percent interval over topics and wrapper texts, `ci_low`
            and `ci_high`.
        """
        tables = [self._table(name, means(self._paths(row), self.clusters)) for row, name in enumerate(self.metrics)]
        return pd.concat(tables, ignore_index=True)

    def figure(self, receiver: str | None = None, metric: str | None = None) -> Figure:
        """The mean change over pairs by each sender of one receiver: layers by heads and the MLP.

        Args:
            receiver: by default the first.
            metric: by default the first.

        Raises:
            CtlensError: the receiver or the metric was not measured.
        """
        return _drawn({"": self}, receiver, metric)

    def compare(
        self, others: Mapping[str, PathPatching], *, label: str, receiver: str | None = None, metric: str | None = None
    ) -> Figure:
        """Grids as `figure` draws them, under each other on one scale, so that an effect and its null compare.

        Args:
            others: the same paths by label, for example of benign twins; they may hold this one too, under its label.
            label: of this one.
            receiver: by default the first.
            metric: by default the first.

        Raises:
            CtlensError: another result has this one's label, another direction or other layers, or the receiver or the
                metric was not measured.
        """
        return _drawn(beside(self, others, label), receiver, metric)

    @property
    def _there(self) -> Bool[np.ndarray, "receiver layer sender"]:
        return ~np.isnan(self.values[0]).any(-1)

    def _paths(self, row: int) -> Float[np.ndarray, "path pair"]:
        """One metric's values of the paths that there are."""
        return self.values[row][self._there]

    def _changes(self, row: int) -> CellValues:
        return self._paths(row) - self.target[row]

    def _table(self, metric: str, estimates: WithInterval) -> pd.DataFrame:
        """A row per path."""
        value, low, high = estimates
        rows = [
            (metric, self.receivers[receiver], self.layers[layer], self.senders[sender], *numbers)
            for (receiver, layer, sender), *numbers in zip(np.argwhere(self._there), value, low, high, strict=True)
        ]
        columns = ["metric", "receiver", "layer", "sender", "value", "ci_low", "ci_high"]
        return pd.DataFrame(rows, columns=columns).assign(n_pairs=self.n_pairs)

    def _grid(self, receiver: str, metric: str) -> Float[np.ndarray, "layer sender"]:
        """The mean change over pairs, by sender."""
        row = self._row(metric)
        if receiver not in self.receivers:
            raise unknown("receiver", receiver, self.receivers)
        return (self.values[row, self.receivers.index(receiver)] - self.target[row]).mean(-1)


def _drawn(results: Mapping[str, PathPatching], receiver: str | None, metric: str | None) -> Figure:
    """The grids of one receiver: layers by heads and the MLP."""
    first = next(iter(results.values()))
    for name, result in results.items():
        if (result.direction, result.layers, result.senders) != (first.direction, first.layers, first.senders):
            raise CtlensError(
                f"result {name!r} has another direction or other layers: compare those that patch the same."
            )
    metric = first.metrics[0] if metric is None else metric
    receiver = first.receivers[0] if receiver is None else receiver
    grids = {name: result._grid(receiver, metric) for name, result in results.items()}
    there = np.asarray(first._there[first.receivers.index(receiver)].any(-1))
    title = _QUESTIONS[first.direction].format("the logits" if receiver == PATH_TO_LOGITS else receiver)
    subtitle = f"{pair_counts(results)} pairs; a cell is the change of the patched run's {metric}"
    layers = [layer for layer, kept in zip(first.layers, there, strict=True) if kept]
    words: dict[str, Any] = {"unit": PATCH_UNITS.get(metric, metric), "subtitle": subtitle}
    return plots.patched_heads({name: grid[there] for name, grid in grids.items()}, layers, title, mlps=True, **words)
