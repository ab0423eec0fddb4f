"""A checkpoint is an unfinished training in one file, from which it goes on as if it had never stopped.

The file holds the trained weights, the optimiser's moments and the history. Everything else, the order of
pairs, the draws and the schedule, follows from the settings and the step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ctlens import losses as loss_registry
from ctlens.core.config import first_difference, to_dict
from ctlens.core.errors import CtlensError
from ctlens.core.files import atomic_file, digest_of, sweep_folder, writing
from ctlens.core.reading import json_object
from ctlens.core.types import LensModel
from ctlens.data.chat import render
from ctlens.data.pairs import Pair, Prompt
from ctlens.losses import Loss
from ctlens.models.parameters import fingerprint, same_fingerprint
from ctlens.training.config import TrainConfig
from ctlens.training.edits import TrainingEdits
from ctlens.training.history import History
from ctlens.training.prepare import in_window

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
    pairs: Sequence[Pair],
    retain: Sequence[Prompt],
    losses: Sequence[Loss],
    track: Sequence[Loss],
    config: TrainConfig,
    edits: TrainingEdits | None = None,
) -> dict[str, Any]:
    """Describes all that a training follows from, ready for JSON; arguments as of `Trainer`, before any preparation.

    `edits` is there where the stream is edited. A training goes on only from a checkpoint of an equal identity
    (`require_same`), and has finished only as a run of an equal one. The reference's answers are not part of it: they
    follow from the rest.
    """
    trained = [in_window(loss, config.window) for loss in losses]
    tracked = [in_window(loss, config.window) for loss in track]
    sides = [[pair.clean, pair.wrapped, *([pair.benign] if pair.benign else [])] for pair in pairs]
    prompts = [[render(reference.tokenizer, prompt.turns).ids for prompt in group] for group in (*sides, retain)]
    # Some losses judge answers, for which the answers that a prompt names count, too.
    answers = [[(prompt.good, prompt.bad, prompt.options) for prompt in group] for group in sides]
    texts = [(pair.target, pair.shared) for pair in pairs]
    return {
        "reference": fingerprint(reference),
        "pairs": digest_of([prompts, answers, texts]),
        "losses": {
            "trained": [loss_registry.to_config(loss) for loss in trained],
            "tracked": [loss_registry.to_config(loss) for loss in tracked],
        },
        "settings": to_dict(config),
        **({"edits": _digest_of_edits(edits)} if edits else {}),
    }


def _digest_of_edits(edits: TrainingEdits) -> str:
    parts = {"project_out": edits.project_out, "add": edits.add}
    return digest_of({part: {name: value.tolist() for name, value in given.items()} for part, given in parts.items()})


_OTHER = {
    "reference": "a reference with other weights",
    "pairs": "other pairs or other prompts to hold",
    "losses": "other losses",
    "settings": "other settings",
    "edits": "other edits of the stream",
}


def require_same(there: Mapping[str, Any], here: Mapping[str, Any], subject: str, advice: str) -> None:
    """Refuses to take one training for another.

    Args:
        there: the `identity` in a file.
        here: the `identity` of the training that is asked for.
        subject: what holds the first, for the sentence.
        advice: what to do, for the sentence.

    Raises:
        CtlensError: they differ; the sentence says in what.
    """
    if same_fingerprint(there.get("reference"), here["reference"]):
        there = {**there, "reference": here["reference"]}
    for part, words in _OTHER.items():
        if found := first_difference(there.get(part), here.get(part), part):
            raise CtlensError(f"{subject} is of {words} ({found}): {advice}")


def write_checkpoint(
    folder: str | Path,
    parameters: Sequence[nn.Parameter],
    optimizer: Optimizer,
    history: History,
    of: Mapping[str, Any],
) -> None:
    """Writes a checkpoint into a folder and replaces an earlier one, so that the folder has a whole one at any time.

    Raises:
        UnwritableError: the system refuses it; the earlier checkpoint is left as it was.
    """
    names = list(dict.fromkeys((name, hook) for _, name, hook, _ in history.rows))
    number = {name: index for index, name in enumerate(names)}
    tensors = {f"parameter.{index}": value.detach() for index, value in enumerate(parameters)}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"moment.{index}.{name}": value for name, value in state.items()}
    tensors["history.step"] = torch.tensor([step for step, *_ in history.rows], dtype=torch.long)
    tensors["history.name"] = torch.tensor([number[name, hook] for _, name, hook, _ in history.rows], dtype=torch.long)
    tensors["history.value"] = torch.tensor([value for *_, value in history.rows], dtype=torch.double)
    plain = {name: value.cpu().contiguous() for name, value in tensors.items()}
    known = json.dumps({"of": dict(of), "steps": history.steps, "names": names})
    metadata = {"ctlens": known, "checksum": _checksum(known, plain)}
    with atomic_file(_path(folder)) as temporary:
        save_file(plain, temporary, metadata=metadata)


def has_checkpoint(folder: str | Path) -> bool:
    """Tells whether `write_checkpoint` has written a checkpoint into a folder."""
    return _path(folder).is_file() or bool(sharded_checkpoints(folder))


def sharded_name(steps: int) -> str:
    """The name of the folder with the checkpoint of a sharded training, see `ctlens.training.sharded_checkpoint`."""
    return f"sharded-{steps}"


def sharded_checkpoints(folder: str | Path) -> list[Path]:
    """Lists the checkpoints of a sharded training in a folder, by step."""
    return sorted(Path(folder).glob("sharded-[0-9]*"), key=lambda path: int(path.name.partition("-")[2]))


def remove_checkpoint(folder: str | Path) -> None:
    """Removes a checkpoint, and its folder if it holds nothing else."""
    path = _path(folder)
    with writing(path):
        sweep_folder(path.parent)
        path.unlink(missing_ok=True)
        for sharded in sharded_checkpoints(folder):
            shutil.rmtree(sharded)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()


def read_checkpoint(folder: str | Path, of: Mapping[str, Any]) -> Checkpoint:
    """Reads the checkpoint in a folder.

    Args:
        folder: the folder that `write_checkpoint` wrote to.
        of: the `identity` of the training that is to go on.

    Raises:
        CtlensError: the folder has no checkpoint, or a damaged one, or one of another training.
    """
    path = _path(folder)
    if sharded_checkpoints(folder):
        raise CtlensError(f"the checkpoint in {folder} is of a sharded training: go on with --shard, or remove it.")
    if not has_checkpoint(folder):
        raise CtlensError(f"{folder} holds no checkpoint of a training: {CHECKPOINT_FILE} is expected.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            known = json_object(metadata["ctlens"], path, "of", "steps", "names")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if metadata.get("checksum") != _checksum(metadata["ctlens"], tensors):
            raise ValueError("its checksum is another, so that it was damaged")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CtlensError(f"{path} cannot be read as a checkpoint ({error}): remove it and train anew.") from None
    require_same(known["of"], of, f"the checkpoint in {folder}", "repeat the training as it was, or remove it.")
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


def _path(folder: str | Path) -> Path:
    return Path(folder) / CHECKPOINT_FILE


def _checksum(known: str, tensors: Mapping[str, Tensor]) -> str:
    """Sums up a checkpoint's content by CRC-32, against damage: it costs a fraction of the writing."""
    total = crc32(known.encode())
    for name, value in sorted(tensors.items()):
        total = crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), total)
        total = crc32(value.reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"
