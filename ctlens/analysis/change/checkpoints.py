"""Checkpoints: models by the number of steps that they were trained, loaded one at a time.

They are folders, of ctlens, HuggingFace or PEFT, or models in memory. The step is the number at the end of a folder's
name, as in `checkpoint-500`; of a run it is how many steps its history has. A run that kept models on its way has them
in `steps/25`, `steps/50`, ..., whole or as adapters alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.models.loading import load_model
from ctlens.models.sources import is_peft
from ctlens.training.history import History
from ctlens.training.kept import STEPS_FOLDER
from ctlens.training.run import ADAPTERS_FOLDER, trained_model

CheckpointSource: TypeAlias = str | PathLike[str] | LensModel
_HISTORY = "history.csv"
Checkpoints: TypeAlias = str | PathLike[str] | Sequence[str | PathLike[str]] | Mapping[int, CheckpointSource]
"""A run or a folder of checkpoints, several folders, or sources of models by step."""


class KeptModel(NamedTuple):
    """A checkpoint: the step that it was kept at, and what loads its model."""

    step: int
    load: Callable[[], LensModel]


def kept(checkpoints: Checkpoints, base: LensModel | None, device: str) -> list[KeptModel]:
    """The checkpoints by rising step, none of them loaded yet.

    Args:
        checkpoints: where they are.
        base: the model that adapters belong to.
        device: where loaded models live.

    Raises:
        CtlensError: there are none, a folder's name and history tell no step, or two are of one step.
    """
    if isinstance(checkpoints, Mapping):
        for step in checkpoints:
            if not isinstance(step, Integral):
                raise CtlensError(f"checkpoints in a dictionary go by their step, a whole number, not by {step!r}.")
        by_step = [(int(step), source) for step, source in checkpoints.items()]
    else:
        single = isinstance(checkpoints, str | PathLike)
        folders = _inside(Path(checkpoints)) if single else [Path(folder) for folder in checkpoints]
        by_step = [(_step_of(folder), folder) for folder in folders]
    if not by_step:
        raise CtlensError("there are no checkpoints: give at least one.")
    steps = [step for step, _ in by_step]
    if len(set(steps)) < len(steps):
        twice = next(step for step in steps if steps.count(step) > 1)
        raise CtlensError(f"two checkpoints are of step {twice}: give each step once, by number in a dictionary.")
    in_order = sorted(by_step, key=lambda entry: entry[0])
    return [KeptModel(step, partial(_loaded, source, base, device)) for step, source in in_order]


def _inside(folder: Path) -> list[Path]:
    """The folders in a folder whose names end in a number; of a run those of the steps that it kept, and its end."""
    if not folder.is_dir():
        raise CtlensError(f"{folder} is no folder: name one that holds checkpoints.")
    is_run = (folder / _HISTORY).is_file()
    held = folder / STEPS_FOLDER if is_run and (folder / STEPS_FOLDER).is_dir() else folder
    found = [path for path in held.iterdir() if path.is_dir() and _number(path)]
    if is_run and _step_of(folder) not in map(_step_of, found):
        found.append(folder)
    if not found:
        raise CtlensError(f"{folder} holds no checkpoints: folders whose names end in a step are expected.")
    return found


def _number(folder: Path) -> str:
    ending = re.search(r"\d+$", folder.name)
    return ending.group() if ending else ""


def _step_of(folder: Path) -> int:
    if (folder / _HISTORY).is_file():
        return len(History.load(folder / _HISTORY))
    if not _number(folder):
        raise CtlensError(f"{folder} does not end in a step: give the checkpoints by step, in a dictionary.")
    return int(_number(folder))


def _loaded(source: CheckpointSource, base: LensModel | None, device: str) -> LensModel:
    if isinstance(source, LensModel):
        return source
    folder = Path(source)
    if not (folder / "model").is_dir() and (folder / ADAPTERS_FOLDER).is_dir():
        if base is None:
            raise CtlensError(f"{folder} holds adapters alone: give the model that they belong to with base=.")
        return trained_model(folder, base)
    return load_model(source, base=base if is_peft(folder) else None, device=device)
