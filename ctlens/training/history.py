"""The numbers of a training, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import nan
from pathlib import Path

import pandas as pd

from ctlens.core.reading import number_or_nan, read_columns, typed, whole_number
from ctlens.core.shown import Shown

_COLUMNS = ("step", "name", "hook_name", "value")


@dataclass
class History(Shown):
    """History holds a training's numbers by step: losses, learning rate, gradient norm, each loss at each hook point.

    Some numbers exist only at some steps: a loss in its phases, the retention term at the steps it was drawn
    for, and a rate at the steps it was measured at.

    Attributes:
        rows: step, name, hook name (empty for an overall number) and value.
        steps: number of steps taken.
    """

    rows: list[tuple[int, str, str, float]] = field(default_factory=list)
    steps: int = 0

    def __len__(self) -> int:
        return self.steps

    def described(self) -> dict[str, str]:
        """Says how many steps there are, and the last value of every overall number."""
        last = {name: value for _, name, hook, value in self.rows if not hook}
        return {"steps": str(self.steps), **{name: f"{value:.4g}" for name, value in last.items()}}

    def add(
        self, step: int, overall: Mapping[str, float], by_hook: Mapping[str, Mapping[str, float]] | None = None
    ) -> None:
        """Appends the numbers of a step."""
        self.rows += [(step, name, "", value) for name, value in overall.items()]
        for name, values in (by_hook or {}).items():
            self.rows += [(step, name, hook, value) for hook, value in values.items()]
        self.steps = max(step, self.steps)

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulates one row per number: `step`, `name`, `hook_name` (empty for a whole loss, weighted), `value`.

        The name of a loss that was only tracked begins with `tracked/`, and its value is unweighted.
        """
        return pd.DataFrame(self.rows, columns=list(_COLUMNS))

    def series(self, name: str) -> list[float]:
        """Lists the values of one overall number at the steps that have it, for example `series("total")`."""
        return list(self._overall(name).values())

    def every_step(self, name: str) -> list[float]:
        """Lists the values of one overall number, one per step from 1 on; NaN where a step has none."""
        found = self._overall(name)
        return [found.get(step, nan) for step in range(1, self.steps + 1)]

    def losses(self, names: Iterable[str]) -> dict[str, list[float]]:
        """Lists the weighted losses of these names and the retention term by their figure labels, a value per step."""
        labels = {**{name: name for name in names}, "retention": "KL to the reference"}
        return {shown: self.every_step(name) for name, shown in labels.items() if self.series(name)}

    def has(self, step: int, name: str) -> bool:
        """Tells whether an overall number was seen at a step."""
        return step in self._overall(name)

    def steps_of(self, name: str) -> list[int]:
        """Lists the steps that have an overall number."""
        return list(self._overall(name))

    def by_hook(self, name: str) -> dict[str, list[float]]:
        """Lists the unweighted values of one loss at each of its hook points, one value per step."""
        curves: dict[str, list[float]] = {}
        for _, row_name, hook, value in self.rows:
            if row_name == name and hook:
                curves.setdefault(hook, []).append(value)
        return curves

    def _overall(self, name: str) -> dict[int, float]:
        return {step: value for step, row_name, hook, value in self.rows if row_name == name and not hook}

    def save(self, path: Path) -> None:
        """Writes the rows as CSV."""
        self.to_dataframe().to_csv(path, index=False)

    @staticmethod
    def load(path: Path) -> History:
        """Reads the history that `save` wrote.

        Raises:
            CtlensError: the file is missing or damaged.
        """
        kinds = {"step": whole_number, "name": str, "hook_name": str, "value": number_or_nan}
        columns = typed(read_columns(path), kinds, path)
        rows = list(zip(*(columns[name] for name in _COLUMNS), strict=True))
        return History(rows, max(columns["step"], default=0))
