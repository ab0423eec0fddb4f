"""A checkpoint is an unfinished training in one file, from which it goes on as if it had never stopped.

The file holds the trained weights, the optimiser's moments and the history. Everything else, the order of
pairs, the draws and the schedule, follows from the settings and the step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ctlens import losses as loss_registry
from ctlens.core.config import to_dict
from ctlens.core.errors import CtlensError
from ctlens.core.files import atomic_file, digest_of
from ctlens.core.reading import json_object
from ctlens.core.types import LensModel
from ctlens.data.batch import EncodedPairs
from ctlens.losses import Loss
from ctlens.models.parameters import fingerprint
from ctlens.training.config import TrainConfig
from ctlens.training.history import History

CHECKPOINT_FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint is the state that a training goes on from.

    Attributes:
        parameters: the trained weights, in their order.
        moments: the state of AdamW, by the number of the parameter.
        history: the history of the steps taken.
    """

    parameters: list[Tensor]
    moments: dict[int, dict[str, Tensor]]
    history: History


def identity(
    reference: LensModel,
    pairs: EncodedPairs,
    held: Iterable[Sequence[int]],
    losses: Sequence[Loss],
    track: Sequence[Loss],
    config: TrainConfig,
) -> dict[str, str]:
    """Fingerprints the parts of a training; a training goes on only from a checkpoint with equal parts."""
    rows = [
        (row.clean.ids, row.wrapped.ids, row.answer, {name: (a.clean, a.wrapped) for name, a in row.alignments.items()})
        for row in pairs.rows
    ]
    return {
        "a reference with other weights": fingerprint(reference),
        "other pairs or other prompts to hold": digest_of([rows, list(held)]),
        "other losses": digest_of([[loss_registry.to_config(loss) for loss in group] for group in (losses, track)]),
        "other settings": digest_of(to_dict(config)),
    }


def write_checkpoint(
    folder: str | Path,
    parameters: Sequence[nn.Parameter],
    optimizer: Optimizer,
    history: History,
    of: Mapping[str, str],
) -> None:
    """Writes a checkpoint into a folder and replaces an earlier one, so that the folder has a whole one at any time."""
    names = list(dict.fromkeys((name, hook) for _, name, hook, _ in history.rows))
    number = {name: index for index, name in enumerate(names)}
    tensors = {f"parameter.{index}": value.detach() for index, value in enumerate(parameters)}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"moment.{index}.{name}": value for name, value in state.items()}
    tensors["history.step"] = torch.tensor([step for step, *_ in history.rows], dtype=torch.long)
    tensors["history.name"] = torch.tensor([number[name, hook] for _, name, hook, _ in history.rows], dtype=torch.long)
    tensors["history.value"] = torch.tensor([value for *_, value in history.rows], dtype=torch.double)
    with atomic_file(Path(folder) / CHECKPOINT_FILE) as temporary:
        known = {"of": dict(of), "steps": history.steps, "names": names}
        plain = {name: value.cpu().contiguous() for name, value in tensors.items()}
        save_file(plain, temporary, metadata={"ctlens": json.dumps(known)})


def read_checkpoint(folder: str | Path, of: Mapping[str, str]) -> Checkpoint:
    """Reads the checkpoint in a folder.

    Args:
        folder: the folder that `write_checkpoint` wrote to.
        of: the `identity` of the training that is to go on.

    Raises:
        CtlensError: the folder has no checkpoint, or a damaged one, or one of another training.
    """
    path = Path(folder) / CHECKPOINT_FILE
    if not path.is_file():
        raise CtlensError(f"{folder} holds no checkpoint of a training: {CHECKPOINT_FILE} is expected.")
    try:
        with safe_open(path, framework="pt") as file:
            known: dict[str, Any] = json_object((file.metadata() or {})["ctlens"], path, "of", "steps", "names")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CtlensError(f"{path} cannot be read as a checkpoint ({error}): remove it and train anew.") from None
    held = dict(known["of"])
    for part, value in of.items():
        if held.get(part) != value:
            raise CtlensError(f"the checkpoint in {folder} is of {part}: repeat the training as it was, or remove it.")
    steps = tensors.pop("history.step").tolist()
    numbers = tensors.pop("history.name").tolist()
    values = tensors.pop("history.value").tolist()
    rows = [(step, *known["names"][number], value) for step, number, value in zip(steps, numbers, values, strict=True)]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, index, *rest = name.split(".")
        if kind == "moment":
            moments.setdefault(int(index), {})[rest[0]] = value
    count = sum(name.startswith("parameter.") for name in tensors)
    return Checkpoint([tensors[f"parameter.{i}"] for i in range(count)], moments, History(rows, known["steps"]))
