"""A run is a finished or interrupted training: its model, settings, history and environment, also as a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ctlens import losses as loss_registry
from ctlens import plots
from ctlens.core.config import from_dict, to_dict
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.files import write_json
from ctlens.core.public import public
from ctlens.core.reading import read_json
from ctlens.core.shown import Shown, shown
from ctlens.core.types import LensModel
from ctlens.losses import Loss
from ctlens.models.loading import load_model, save_model
from ctlens.models.lora import has_adapters, load_adapters, merge_adapters, save_adapters
from ctlens.models.parameters import copy_model
from ctlens.models.readback import require_written
from ctlens.models.sharding import folder_for, is_first
from ctlens.plots import Figure
from ctlens.training.calibrate import Calibration
from ctlens.training.config import TrainConfig
from ctlens.training.history import History
from ctlens.training.until import reached

ADAPTERS_FOLDER = "adapters"
"""The folder of a run with its adapters, as `ctlens.models.lora.save_adapters` writes them."""


@dataclass(frozen=True)
class Run(Shown):
    """Run is the result of one training.

    Attributes:
        model: the trained model, in eval mode. After a training by a `LoRA` it has its adapters, beside
            weights that it shares with the reference; loaded from a folder it has them merged.
        config: the settings of the training.
        losses: the losses of the training; empty if it trained on retention alone.
        history: the numbers of every step.
        environment: package versions and platform.
        calibration: the measurements before the first step; empty if no loss or setting needs them.
        identity: all that the training follows from, see `ctlens.training.checkpoint.identity`; empty for a run that
            an earlier ctlens saved.
    """

    model: LensModel
    config: TrainConfig
    losses: tuple[Loss, ...]
    history: History
    environment: Mapping[str, str]
    calibration: Calibration = Calibration()
    identity: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stopped(self) -> str:
        """The run ended for this reason: `"all steps"`, `"target reached"` (see `Until`) or `"interrupted"`."""
        if self.config.until and reached(self.config.until, self.history):
            return "target reached"
        return "all steps" if len(self.history) == self.config.steps else "interrupted"

    def described(self) -> dict[str, str]:
        """Says what was trained, how, how far, and the last value of every loss."""
        last = self.history.described()
        trained = self.config.trainable
        return {
            "losses": ", ".join(loss.name for loss in self.losses) or "retention alone",
            "steps": f"{len(self.history)} of {self.config.steps} ({self.stopped})",
            "last": ", ".join(f"{name} {value}" for name, value in last.items() if name not in ("steps", "lr")),
            "trained": ", ".join(trained) if isinstance(trained, tuple) else f"LoRA of rank {trained.rank}",
            "model": shown(self.model),
        }

    def save(self, folder: str | Path, *, adapters_only: bool = False) -> Path:
        """Writes the run into a new folder, whole or not at all: config, history, environment and model.

        A model with adapters is written merged, and its adapters beside it in `adapters`. The model is read back
        before the folder gets its name.

        Args:
            folder: the new folder.
            adapters_only: leave out the merged model, which is as large as the base; `load_run(folder, base=...)`
                puts the adapters onto it again.

        Raises:
            CtlensError: the folder exists and is not empty, another model would come back from it, or adapters alone
                are asked for and the model has none.
        """
        with folder_for(self.model, folder) as work:
            self.write(work, adapters_only=adapters_only)
        return Path(folder)

    def write(self, folder: Path, *, adapters_only: bool = False) -> None:
        """Writes the run into an existing folder, which the caller renames once all is there (see `save`)."""
        if adapters_only and not has_adapters(self.model):
            raise CtlensError("the run has no adapters, as it was not trained by a LoRA: leave adapters_only out.")
        losses = [loss_registry.to_config(loss) for loss in self.losses]
        config = {"training": to_dict(self.config), "losses": losses, "calibration": to_dict(self.calibration)}
        if is_first(self.model):
            write_json(folder / "config.json", {**config, "identity": dict(self.identity)})
            write_json(folder / "environment.json", dict(self.environment))
            self.history.save(folder / "history.csv")
        if not adapters_only:
            save_model(self.model, folder / "model")
            require_written(self.model, folder / "model")
        if has_adapters(self.model):
            save_adapters(self.model, folder / ADAPTERS_FOLDER)

    def figure(self, loss: str | None = None) -> Figure:
        """Draws the weighted losses by step; or one loss, unweighted, at each of its hook points.

        Args:
            loss: the name of a loss of the run; None draws all losses.

        Raises:
            CtlensError: the run was not trained with that loss.
        """
        names = [kind.name for kind in self.losses]
        if loss is not None:
            if loss not in names:
                raise unknown("loss of this run", loss, names)
            title = f"At which depth does {plots.label(loss)} fall?"
            return plots.hook_history(self.history.steps_of(loss), self.history.by_hook(loss), title)
        steps = range(1, len(self.history) + 1)
        return plots.history(steps, self.history.losses(names), "Does the training converge?")


def trained_model(folder: Path, base: LensModel) -> LensModel:
    """The model of a folder with adapters, merged onto a copy of the base; what both share is held once."""
    model = copy_model(base, share_weights=True)
    load_adapters(model, folder / ADAPTERS_FOLDER)
    merge_adapters(model)
    return model


def _merged(folder: Path, device: str | torch.device) -> LensModel:
    if not (folder / "model").is_dir() and (folder / ADAPTERS_FOLDER).is_dir():
        raise CtlensError(f"{folder} holds adapters alone: give the model that they belong to with base=.")
    return load_model(folder, device=device)


@public
def load_run(folder: str | Path, *, device: str | torch.device = "cpu", base: LensModel | None = None) -> Run:
    """Reads the run that `Run.save` wrote.

    Args:
        folder: of the run.
        device: where its model lives.
        base: the model before training, for a run that was saved as adapters alone: they are put onto a copy that
            shares its weights, where it lives.

    Raises:
        CtlensError: the folder holds no run, a file in it is damaged, or it holds adapters alone and the base is
            missing or another one.
    """
    folder = Path(folder)
    if not (folder / "history.csv").is_file():
        raise CtlensError(
            f"{folder} is no run folder, because it has no history.csv: name a folder that `ctlens train` wrote."
        )
    config = read_json(folder / "config.json", "training", "losses")
    if not isinstance(config["losses"], list):
        raise CtlensError(f"{folder / 'config.json'} does not list a run's losses: check that it is the right file.")
    return Run(
        model=trained_model(folder, base) if base is not None else _merged(folder, device),
        config=from_dict(TrainConfig, config["training"]),
        losses=tuple(loss_registry.from_config(loss) for loss in config["losses"]),
        history=History.load(folder / "history.csv"),
        environment=read_json(folder / "environment.json"),
        calibration=from_dict(Calibration, config.get("calibration", {})),
        identity=config.get("identity", {}),
    )
