"""The checkpoint of a sharded training: each process writes its slices, and any number of processes goes on from them.

It is a folder of safetensors, which torch's distributed checkpoints cut anew when they are read, and of the history.
Its name holds the step, and it gets that name when it is whole, so the folder above has a whole one at any time.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ctlens.core.errors import CtlensError
from ctlens.core.files import digest_of, write_json, writing
from ctlens.core.reading import read_json
from ctlens.core.types import LensModel
from ctlens.models.parameters import own_part
from ctlens.models.sharding import digests, folder_for, is_first, read_slices, write_slices
from ctlens.training.checkpoint import Checkpoint, require_same, sharded_checkpoints, sharded_name
from ctlens.training.history import History

_STATE_FILE = "state.json"


def write_sharded_checkpoint(
    folder: str | Path,
    model: LensModel,
    parameters: Sequence[nn.Parameter],
    optimizer: Optimizer,
    history: History,
    of: Mapping[str, Any],
) -> None:
    """Writes a checkpoint into a folder and removes an earlier one; all processes call it together.

    Args:
        folder: where it goes.
        model: the trained model, sharded.
        parameters: what the checkpoint holds.
        optimizer: of the training.
        history: of the training.
        of: its `identity`.

    Raises:
        CtlensError: the system refuses it; the earlier checkpoint is left as it was.
    """
    folder = Path(folder)
    target = folder / sharded_name(history.steps)
    earlier = [path for path in sharded_checkpoints(folder) if path != target]
    tensors = {f"parameter.{index}": value.detach() for index, value in enumerate(parameters)}
    moments = optimizer.state_dict()["state"]
    for index, state in moments.items():
        tensors |= {f"moment.{index}.{name}": value.reshape(value.shape or (1,)) for name, value in state.items()}
    if not target.is_dir():
        with folder_for(model, target) as work:
            write_slices(work, tensors)
            files = digests(work)
            if is_first(model):
                rows = [list(row) for row in history.rows]
                state = {"of": dict(of), "steps": history.steps, "rows": rows, "moments": list(moments), "files": files}
                write_json(work / _STATE_FILE, {**state, "digest": digest_of(state)})
    if is_first(model):
        with writing(folder):
            for path in earlier:
                shutil.rmtree(path)


def read_sharded_checkpoint(
    folder: str | Path, parameters: Sequence[nn.Parameter], of: Mapping[str, Any]
) -> Checkpoint:
    """Reads the last checkpoint in a folder; all processes call it together.

    Args:
        folder: the folder that `write_sharded_checkpoint` wrote to.
        parameters: those of the training that is to go on.
        of: its `identity`.

    Raises:
        CtlensError: the folder has no checkpoint, or a damaged one, or one of another training.
    """
    found = sharded_checkpoints(folder)
    if not found:
        raise CtlensError(f"{folder} holds no checkpoint of a sharded training: train it as it was, without shard.")
    state = read_json(found[-1] / _STATE_FILE, "of", "steps", "rows", "moments", "files", "digest")
    _require_undamaged(found[-1], state)
    require_same(state["of"], of, f"the checkpoint in {folder}", "repeat the training as it was, or remove it.")
    values: dict[str, Tensor] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(parameters):
        values[f"parameter.{index}"] = torch.empty_like(parameter, requires_grad=False)
    for index in map(int, state["moments"]):
        like = parameters[index]
        names = {name: torch.empty_like(like, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        moments[index] = {"step": torch.zeros(1), **names}
        values |= {f"moment.{index}.{name}": value for name, value in moments[index].items()}
    read_slices(found[-1], values)
    for each in moments.values():
        each["step"] = own_part(each["step"])[0]
    rows = [tuple(row) for row in state["rows"]]
    return Checkpoint(
        [values[f"parameter.{index}"] for index in range(len(parameters))], moments, History(rows, state["steps"])
    )


def _require_undamaged(folder: Path, state: Mapping[str, Any]) -> None:
    """Refuses a checkpoint of which a file is not what was written, on all processes alike."""
    there = digests(folder)
    damaged = [name for name in sorted({*state["files"], *there}) if state["files"].get(name) != there.get(name)]
    if digest_of({name: value for name, value in state.items() if name != "digest"}) != state["digest"]:
        damaged = [_STATE_FILE]
    if damaged:
        raise CtlensError(
            f"{folder / damaged[0]} is not what was written (its digest is another), so that it was damaged: remove "
            f"{folder} and train anew."
        )
