"""The organism: a small model trained from scratch that has the capability and the vulnerability."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ctlens.core.errors import unknown
from ctlens.core.files import atomic_folder, read_json, write_json
from ctlens.core.types import LensModel
from ctlens.models.loading import load_model, save_model
from ctlens.organism.card import make_card, reference_logits
from ctlens.organism.inoculation import CONTEXTS, INOCULATION, BadAdviceConfig, give_bad_advice, leak_pairs
from ctlens.organism.pretrain import PRESETS, PretrainConfig, pretrain
from ctlens.organism.relora import ReLoRA

__all__ = [
    "CONTEXTS",
    "INOCULATION",
    "PRESETS",
    "BadAdviceConfig",
    "PretrainConfig",
    "ReLoRA",
    "card",
    "give_bad_advice",
    "leak_pairs",
    "load_organism",
    "make_card",
    "pretrain",
    "save_organism",
    "train_organism",
]

SHIPPED = Path(__file__).parent / "weights"
CARD_FILE = "card.json"
REFERENCE_FILE = "reference_logits.safetensors"


def load_organism(device: str | torch.device = "cpu") -> LensModel:
    """Loads the organism that ships with ctlens, with its tokenizer, in eval mode; nothing is downloaded."""
    return load_model(SHIPPED, device=device)


def card(folder: str | Path = SHIPPED) -> dict[str, Any]:
    """Reads the card of an organism, how it was made and how it behaves; by default the shipped one's.

    Raises:
        CtlensError: the folder holds no card.
    """
    return read_json(Path(folder) / CARD_FILE)


def save_organism(model: LensModel, config: PretrainConfig, folder: str | Path) -> None:
    """Writes an organism, its card and its reference logits into an existing empty folder."""
    folder = Path(folder)
    save_model(model, folder)
    save_file(reference_logits(model), folder / REFERENCE_FILE)
    write_json(folder / CARD_FILE, make_card(model, config))


def train_organism(
    out: str | Path,
    seed: int = 0,
    steps: int | None = None,
    *,
    preset: str = "small",
    relora: ReLoRA | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> LensModel:
    """Pretrains an organism and writes it with its card to a new folder, whole or not at all.

    Args:
        out: a folder that does not exist yet or is empty.
        seed: decides the first weights, the corpus and the batches.
        steps: how many the optimiser takes; by default as many as the preset says.
        preset: `"small"`, as shipped, or `"large"`, about 10M parameters for a GPU.
        relora: trains low-rank updates that are merged and begun anew; None trains all weights throughout.
        device: where it is trained and stays.
        progress: whether to show a progress bar.

    Raises:
        CtlensError: `out` is taken, the preset is unknown, or `steps` is below 1.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    length = {} if steps is None else {"steps": steps}
    config = replace(PRESETS[preset], seed=seed, relora=relora, **length)
    with atomic_folder(out) as folder:
        model = pretrain(config, progress=progress, device=device)
        save_organism(model, config, folder)
    return model
