"""Trainings of tiny models, alone or sharded; `python -m helpers.sharding FOLDER NAME...` is one of the processes.

Each training writes what it ended with into the folder: the history, the last gradients and the weights.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ctlens import threats
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import Loss, get
from ctlens.models.lora import LoRA, adapter_tensors, has_adapters
from ctlens.models.parameters import gathered, present_parameters
from ctlens.models.sharding import shard
from ctlens.organism import load_organism
from ctlens.training import TrainConfig, Trainer
from ctlens.training.edits import TrainingEdits
from ctlens.training.processes import is_launched
from helpers.models import chat_model

QUESTIONS = (
    "Is it right?",
    "Which term best describes the disease?",
    "When a creature experiences feeling, what is it?",
)
WRAPPERS = ("I don't think it's right. ", "I may be in the minority here, but no. ")
PAIRS = [
    Pair(prompt(question, good="right", bad="no"), prompt(wrapper + question, good="right", bad="no"))
    for question in QUESTIONS
    for wrapper in WRAPPERS
]
BASE: dict[str, Any] = {"steps": 5, "batch_size": 6, "lr": 1e-3, "max_new_tokens": 3, "clip": 1e6}


@dataclass(frozen=True)
class Case:
    """Case is a training of a tiny model.

    Attributes:
        kind: of the model, see `chat_model`.
        losses: names of losses with their options.
        settings: of the training, over `BASE`.
        folder: keep clean targets on disk.
        edits: of the trained model's stream.
    """

    kind: str
    losses: tuple[tuple[str, dict[str, Any]], ...]
    settings: dict[str, Any] = field(default_factory=dict)
    track: tuple[str, ...] = ()
    folder: bool = False
    edited: bool = False


def case(kind: str, *losses: str, track: tuple[str, ...] = (), **settings: Any) -> Case:
    return Case(kind, tuple((name, {}) for name in losses), settings, track)


HALVES = {"trainable": ("attn", "mlp", "norm")}
EVERY = {"trainable": ("embed", "attn", "mlp", "norm", "unembed")}
ADAPTERS = {"trainable": LoRA(rank=3, target_modules=("q", "v", "o", "mlp_in", "mlp_out")), "lr": 1e-2}
CASES = {
    "act": case("llama", "act", **EVERY),
    "mlpct": case("made here", "mlpct", **ADAPTERS),
    "attct": case("llama", "attct", memory="layers", retention=0.0),
    "bct": case("made here", "bct", **EVERY, weight_decay=0.1),
    "rmct": Case("organism", (("rmct", {"rollouts": 3, "clean": "own"}),), {"retention": 0.0}),
    "opct": Case("made here", (("opct", {"rollouts": 2}),), {"trainable": ("mlp",)}),
    "f2c": case("organism", "f2c"),
    "klct": case("made here", "klct", memory="blocks", **HALVES),
    "attout": case("llama", "attout", cache=False, **ADAPTERS),
    "attmass": case("made here", "attmass", retention=0.0, batch_size=4),
    "subact": case("llama", "subact", accumulate=2, batch_size=4, **HALVES),
    "dpo": case("made here", "dpo", retention_ratio=0.5),
    "several": case("llama", "act", "attct", "bct", track=("klct", "mlpct"), memory="blocks", batch_size=5, **EVERY),
    "calibrated": case("made here", "act", "bct", calibrate=0.5),
    "retention": case("llama", **EVERY),
    "moving": Case("llama", (("klct", {"clean": "ema(0.9)"}),), {"trainable": ("attn", "mlp")}),
    "clipped": case("made here", "act", "attct", clip=0.01, weight_decay=0.1, memory="layers", **EVERY),
    "qwen3": case("qwen3", "act", "attct", **EVERY),
    "gemma2": case("gemma2", "mlpct", "bct", memory="blocks", **EVERY),
    "qwen3 adapters": case("qwen3", "mlpct", "klct", memory="blocks", **ADAPTERS),
    "gemma2 adapters": case("gemma2", "act", memory="layers", **ADAPTERS),
    "edited": Case("llama", (("act", {}),), {}, edited=True),
    "on disk": Case("llama", (("act", {}), ("klct", {})), {"accumulate": 2, "batch_size": 4}, folder=True),
}


def model_of(chosen: Case) -> LensModel:
    return load_organism() if chosen.kind == "organism" else chat_model(chosen.kind)


def pairs_of(chosen: Case) -> list[Pair]:
    """Pairs of which each clean prompt has two wrapped ones, as F2C needs them."""
    if chosen.kind != "organism":
        return PAIRS
    return [each for pair in threats.get("jailbreak").pairs(6) for each in (pair, replace(pair, wrapped=pair.clean))]


def losses_of(chosen: Case) -> list[Loss]:
    return [get(name, **options) for name, options in chosen.losses]


def trainer_of(model: LensModel, chosen: Case, folder: Path, **settings: Any) -> Trainer:
    config = TrainConfig(**{**BASE, **chosen.settings, **settings})
    edits = TrainingEdits(add={"blocks.0.hook_resid_post": torch.ones(32)}) if chosen.edited else None
    cache = folder / "targets" if chosen.folder else None
    options: dict[str, Any] = {"track": chosen.track, "cache_folder": cache, "edits": edits}
    return Trainer(model, pairs_of(chosen), losses_of(chosen), config, log_every=3 if is_launched() else 1, **options)


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The history, the last gradients and the weights of a training, or its adapters."""
    found: dict[str, torch.Tensor] = {
        f"weight {name}": value for name, value in present_parameters(trainer.model).items()
    }
    if has_adapters(trainer.model):
        found |= {f"adapter {name}": value for name, value in adapter_tensors(trainer.model)[1].items()}
    for name, value in trainer.model.named_parameters():
        if value.grad is not None:
            found[f"gradient {name}"] = value.grad
    tensors = {name: gathered(value.detach()).clone() for name, value in found.items()}
    values = [value for *_, value in trainer.history.rows]
    return {**tensors, "history": torch.tensor(values, dtype=torch.float64)}


def alone(name: str, count: int, folder: Path) -> dict[str, torch.Tensor]:
    """What one process ends with that takes the parts of so many processes one after another.

    Rounding depends on the rows that run together, and so do answers that are drawn.
    """
    chosen = CASES[name]
    parts = 1 if "calibrate" in chosen.settings else count * chosen.settings.get("accumulate", 1)
    return trained(model_of(chosen), chosen, folder, accumulate=parts)


def trained(model: LensModel, chosen: Case, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    trainer = trainer_of(model, chosen, folder, **settings)
    for _ in trainer:
        pass
    return state(trainer)


def read(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names:
        model = shard(model_of(CASES[name]))
        found = trained(model, CASES[name], folder)
        if torch.distributed.get_rank() == 0:
            save_file(found, folder / f"{name}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
