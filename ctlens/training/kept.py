"""The models of a training on its way, kept in the folder of its run: `steps/25`, `steps/50`, ...

While the training runs they lie beside the run, because a run is written whole or not at all, and its folder takes them
in at the end.
"""

from __future__ import annotations

import os
from pathlib import Path

from ctlens.core.types import LensModel
from ctlens.models.loading import save_model
from ctlens.models.lora import has_adapters, save_adapters
from ctlens.models.sharding import folder_for
from ctlens.training.run import ADAPTERS_FOLDER

STEPS_FOLDER = "steps"
"""The folder of a run with the models of the steps that were kept, each in a folder with the number of the step."""


def partial_folder(out: Path) -> Path:
    """The folder beside that of a run in which an unfinished training lies."""
    return out.with_name(out.name + ".partial")


def keep_model(model: LensModel, step: int, out: Path) -> None:
    """Keeps the model of a step, or of one with adapters these alone; one that is kept already stays.

    Args:
        model: as `Trainer.model` is behind that step.
        step: its number.
        out: the folder that the run will have.
    """
    folder = partial_folder(out) / STEPS_FOLDER / str(step)
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_for(model, folder) as work:
        if has_adapters(model):
            save_adapters(model, work / ADAPTERS_FOLDER)
        else:
            save_model(model, work)


def take_in(out: Path) -> None:
    """Moves the kept models into the folder of their finished run."""
    held = partial_folder(out) / STEPS_FOLDER
    if held.is_dir():
        os.replace(held, out / STEPS_FOLDER)
        if not any(held.parent.iterdir()):
            held.parent.rmdir()
