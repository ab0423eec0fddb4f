"""The result of joint patching: the metrics of the runs with all patches and with each alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from ctlens import plots
from ctlens.analysis.base.shares import CellValues, means
from ctlens.analysis.patching.measured import MeasuredRuns
from ctlens.analysis.patching.result import PATCH_UNITS
from ctlens.core.clusters import WithInterval
from ctlens.plots import Figure

ALL_TOGETHER = "all together"
SUM_OF_EACH = "sum of each alone"
INTERACTION = "interaction"


@dataclass(frozen=True)
class JointPatching(MeasuredRuns):
    """The result of `joint_patch`: the metrics of the runs with all patches together and with each alone.

    Attributes:
        values: `[metric, run, pair]`; in the first run all are patched, in the others each alone.
        target: the metrics of the run that is patched, as it is, `[metric, pair]`.
        source: the metrics of the run whose activations are taken, `[metric, pair]`.
        metrics: their names.
        patches: the name of each activation.
        direction: `"denoising"` or `"noising"`.
        positions: the tokens at which they were patched: `"last"`, `"content"` or `"all"`.
        window: of the alignment.
    """

    values: Float[np.ndarray, "metric run pair"]
    target: Float[np.ndarray, "metric pair"]
    source: Float[np.ndarray, "metric pair"]
    metrics: tuple[str, ...]
    patches: tuple[str, ...]
    direction: str
    positions: str
    window: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per metric and what is `patched`: all together, each alone, their sum, and the interaction.

        Returns:
            The mean `value` of the change from the run as it is over `n_pairs` pairs, and its 95 percent interval over
            topics and wrapper texts, `ci_low` and `ci_high`. The interaction is the change by all together less the
            sum of the changes by each alone; of one patch it is 0.
        """
        tables = [self._table(name, means(self._changes(row), self.clusters)) for row, name in enumerate(self.metrics)]
        return pd.concat(tables, ignore_index=True)

    def figure(self, metric: str | None = None) -> Figure:
        """The change by all patches together, by each alone, their sum, and the interaction, with intervals.

        Args:
            metric: by default the first.

        Raises:
            CtlensError: the metric was not measured.
        """
        metric = self.metrics[0] if metric is None else metric
        row = self._row(metric)
        gap = float((self.source[row] - self.target[row]).mean())
        unit = PATCH_UNITS.get(metric, metric)
        return plots.points(
            {"change": self._names},
            {"change": means(self._changes(row), self.clusters)},
            "Do they do more together than one by one?",
            x_title=f"change of the patched run ({unit})",
            marks={"as it is": 0.0, "the other run": gap},
            subtitle=f"{self.direction}, {self.positions} aligned tokens, {self.n_pairs} pairs",
        )

    @property
    def _names(self) -> tuple[str, ...]:
        return (ALL_TOGETHER, *self.patches, SUM_OF_EACH, INTERACTION)

    def _changes(self, row: int) -> CellValues:
        """The change of one metric from the run as it is, by each row of the table."""
        together, *alone = self.values[row] - self.target[row]
        total = np.sum(alone, 0)
        return np.stack([together, *alone, total, together - total])

    def _table(self, metric: str, estimates: WithInterval) -> pd.DataFrame:
        value, low, high = estimates
        numbers = {"value": value, "ci_low": low, "ci_high": high, "n_pairs": self.n_pairs}
        return pd.DataFrame({"metric": metric, "patched": self._names, **numbers})
