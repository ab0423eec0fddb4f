"""A training that happened: its model, settings, history and environment, in memory and in one folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from ctlens import losses as loss_registry
from ctlens import plots
from ctlens.adapters import has_adapters, save_adapters
from ctlens.config import to_dict
from ctlens.errors import CtlensError, unknown
from ctlens.files import atomic_folder, read_json, write_json
from ctlens.losses import Loss
from ctlens.models import load_model, save_model
from ctlens.plots import Figure
from ctlens.training.config import TrainConfig, read_config
from ctlens.types import LensModel

COLUMNS = ("step", "name", "hook_point", "value")


@dataclass
class History:
    """Numbers of a training by step: losses, learning rate, gradient norm, and each loss at each hook point."""

    rows: list[tuple[int, str, str, float]] = field(default_factory=list)
    steps: int = 0

    def __len__(self) -> int:
        return self.steps

    def add(
        self,
        step: int,
        losses: Mapping[str, float],
        by_hook: Mapping[str, Mapping[str, float]],
        lr: float,
        grad_norm: float,
    ) -> None:
        """Appends one step."""
        overall = {**losses, "lr": lr, "grad_norm": grad_norm}
        self.rows += [(step, name, "", value) for name, value in overall.items()]
        self.rows += [(step, name, hook, value) for name, values in by_hook.items() for hook, value in values.items()]
        self.steps = step

    def to_dataframe(self) -> pd.DataFrame:
        """One row per number: `step`, `name`, `hook_point` (empty for a whole loss, weighted), `value`."""
        return pd.DataFrame(self.rows, columns=list(COLUMNS))

    def series(self, name: str) -> list[float]:
        """The values of one overall number, a step each, for example `series("total")`."""
        return [value for _, row_name, hook, value in self.rows if row_name == name and not hook]

    def by_hook(self, name: str) -> dict[str, list[float]]:
        """The unweighted values of one loss at each of its hook points, a step each."""
        curves: dict[str, list[float]] = {}
        for _, row_name, hook, value in self.rows:
            if row_name == name and hook:
                curves.setdefault(hook, []).append(value)
        return curves


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        model: the trained model, in eval mode; with its adapters if it was trained by a `LoRA`,
            merged once it is loaded from a folder.
        config: its settings.
        losses: what it was trained with; none for retention alone.
        history: the numbers of every step.
        environment: versions and platform.
    """

    model: LensModel
    config: TrainConfig
    losses: tuple[Loss, ...]
    history: History
    environment: Mapping[str, str]

    def save(self, folder: str | Path) -> Path:
        """Writes the run into a new folder, whole or not at all: config, history, environment and model.

        A model with adapters is written merged, and its adapters beside it in `adapters`.

        Raises:
            CtlensError: the folder exists and is not empty.
        """
        with atomic_folder(folder) as work:
            self.write(work)
        return Path(folder)

    def write(self, folder: Path) -> None:
        """Writes the run into an existing folder, for a caller that makes the whole appear at once."""
        losses = [loss_registry.to_config(loss) for loss in self.losses]
        write_json(folder / "config.json", {"training": to_dict(self.config), "losses": losses})
        write_json(folder / "environment.json", dict(self.environment))
        self.history.to_dataframe().to_csv(folder / "history.csv", index=False)
        (folder / "model").mkdir()
        save_model(self.model, folder / "model")
        if has_adapters(self.model):
            save_adapters(self.model, folder / "adapters")

    def figure(self, loss: str | None = None) -> Figure:
        """The weighted losses by step; or one loss, unweighted, at each of its hook points.

        Args:
            loss: the name of a loss that the run was trained with.

        Raises:
            CtlensError: the run was not trained with that loss.
        """
        steps = range(1, len(self.history) + 1)
        names = [kind.name for kind in self.losses]
        if loss is not None:
            if loss not in names:
                raise unknown("loss of this run", loss, names)
            title = f"At which depth does {plots.label(loss)} fall?"
            return plots.hook_history(steps, self.history.by_hook(loss), title)
        curves = {name: self.history.series(name) for name in names}
        if held := self.history.series("retention"):
            curves["KL to the reference"] = held
        return plots.history(steps, curves, "Does the training converge?")


def load_run(folder: str | Path, *, device: str | torch.device = "cpu") -> Run:
    """The run that `Run.save` wrote.

    Raises:
        CtlensError: the folder holds no run.
    """
    folder = Path(folder)
    if not (folder / "history.csv").is_file():
        raise CtlensError(f"{folder} is no run folder: history.csv is expected, as `ctlens train` writes it.")
    config = read_json(folder / "config.json")
    table = pd.read_csv(folder / "history.csv", keep_default_na=False)
    rows = [(int(step), str(name), str(hook), float(value)) for step, name, hook, value in table.to_numpy()]
    return Run(
        model=load_model(folder, device=device),
        config=read_config(config["training"]),
        losses=tuple(loss_registry.from_config(loss) for loss in config["losses"]),
        history=History(rows, max((row[0] for row in rows), default=0)),
        environment=read_json(folder / "environment.json"),
    )
