"""The numbers of a training, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import nan
from pathlib import Path

import pandas as pd

_COLUMNS = ("step", "name", "hook_name", "value")


@dataclass
class History:
    """History holds a training's numbers by step: losses, learning rate, gradient norm, each loss at each hook point.

    Not every number is there at every step: a loss outside its phase is not, nor is the retention
    term where it was not drawn, nor a rate between two looks at the behaviour.

    Attributes:
        rows: step, name, hook point (empty for an overall number) and value.
        steps: how many were taken.
    """

    rows: list[tuple[int, str, str, float]] = field(default_factory=list)
    steps: int = 0

    def __len__(self) -> int:
        return self.steps

    def add(
        self, step: int, overall: Mapping[str, float], by_hook: Mapping[str, Mapping[str, float]] | None = None
    ) -> None:
        """Appends numbers seen at a step."""
        self.rows += [(step, name, "", value) for name, value in overall.items()]
        for name, values in (by_hook or {}).items():
            self.rows += [(step, name, hook, value) for hook, value in values.items()]
        self.steps = max(step, self.steps)

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulates one row per number: `step`, `name`, `hook_name` (empty for a whole loss, weighted), `value`.

        A loss that was only tracked is called `tracked/` and its name, and is unweighted.
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
        """Lists the weighted losses of these names and the retention term, one value per step, as figures name them."""
        labels = {**{name: name for name in names}, "retention": "KL to the reference"}
        return {shown: self.every_step(name) for name, shown in labels.items() if self.series(name)}

    def has(self, step: int, name: str) -> bool:
        """Tells whether an overall number was seen at a step."""
        return step in self._overall(name)

    def steps_of(self, name: str) -> list[int]:
        """Lists the steps that have an overall number."""
        return list(self._overall(name))

    def by_hook(self, name: str) -> dict[str, list[float]]:
        """Lists the unweighted values of one loss at each of its hook points, one at each of its steps."""
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
        """Reads the history that `save` wrote."""
        # Python reads every digit of a float, pandas may not.
        table = pd.read_csv(path, keep_default_na=False, converters={"value": float})
        rows = [(int(step), str(name), str(hook), float(value)) for step, name, hook, value in table.to_numpy()]
        return History(rows, max((row[0] for row in rows), default=0))
