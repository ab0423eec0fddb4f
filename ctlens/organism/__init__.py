"""The organism: a small model trained from scratch that has the capability and the vulnerability.

A name imported as itself (`from ... import X as X`) is public to type checkers; no other list of them is kept.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ctlens.core.config import first_difference, to_dict
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.files import atomic_folder, write_json
from ctlens.core.labels import CLEAN_BORN
from ctlens.core.public import public
from ctlens.core.reading import read_json
from ctlens.core.types import LensModel
from ctlens.models.loading import load_model, save_model
from ctlens.organism.card import make_card as make_card
from ctlens.organism.card import outside_bands as outside_bands
from ctlens.organism.card import reference_logits
from ctlens.organism.inoculation import ASKING as ASKING
from ctlens.organism.inoculation import CONTEXTS as CONTEXTS
from ctlens.organism.inoculation import INOCULATION as INOCULATION
from ctlens.organism.inoculation import BadAdviceConfig as BadAdviceConfig
from ctlens.organism.inoculation import give_bad_advice as give_bad_advice
from ctlens.organism.inoculation import leak_pairs as leak_pairs
from ctlens.organism.misbehaviour import MISBEHAVIOURS as MISBEHAVIOURS
from ctlens.organism.misbehaviour import MisbehaviourConfig as MisbehaviourConfig
from ctlens.organism.misbehaviour import misbehave as misbehave
from ctlens.organism.misbehaviour import misbehaviour_pairs as misbehaviour_pairs
from ctlens.organism.pretrain import PRESETS as PRESETS
from ctlens.organism.pretrain import RECIPES as RECIPES
from ctlens.organism.pretrain import TOGETHER
from ctlens.organism.pretrain import PretrainConfig as PretrainConfig
from ctlens.organism.pretrain import pretrain as pretrain
from ctlens.organism.reasons import ReasonsConfig as ReasonsConfig
from ctlens.organism.reasons import by_reason as by_reason
from ctlens.organism.reasons import give_reasons as give_reasons
from ctlens.organism.reasons import reason_probabilities as reason_probabilities
from ctlens.organism.relora import ReLoRA as ReLoRA

SHIPPED = Path(__file__).parent / "weights"
SHIPPED_NAME = "organism"
"""What the shipped organism is called where a text names a model."""
CARD_FILE = "card.json"
REFERENCE_FILE = "reference_logits.safetensors"


@public
def load_organism(device: str | torch.device = "cpu") -> LensModel:
    """Loads the organism that ships with ctlens, with its tokenizer, in eval mode; nothing is downloaded."""
    return load_model(SHIPPED, device=device)


def card(folder: str | Path = SHIPPED) -> dict[str, Any]:
    """Reads the card of an organism, by default the shipped one's: how it was made and how it behaves.

    Raises:
        CtlensError: the folder has no card, or one that lacks a part.
    """
    return read_json(Path(folder) / CARD_FILE, "pretraining", "environment", "behaviour", "parameters", "d_vocab")


def save_organism(model: LensModel, config: PretrainConfig, folder: str | Path) -> None:
    """Writes an organism, its card and its reference logits into an existing empty folder."""
    folder = Path(folder)
    save_model(model, folder)
    save_file(reference_logits(model), folder / REFERENCE_FILE)
    write_json(folder / CARD_FILE, make_card(model, config))


@public
def train_organism(
    out: str | Path,
    seed: int = 0,
    steps: int | None = None,
    *,
    preset: str = "small",
    relora: ReLoRA | None = None,
    recipe: str = TOGETHER,
    clean_born: str | Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> LensModel:
    """Pretrains an organism and writes it with its card to a new folder, whole or not at all.

    Args:
        out: a folder that does not exist yet or is empty.
        seed: decides the first weights, the corpus and the batches.
        steps: steps of the optimiser; by default those of the preset.
        preset: `"small"`, as shipped, or for a GPU `"large"` and `"huge"`, about 10M and 50M parameters.
        relora: pretrains by low-rank adapters that are merged and started again; None trains all weights at every step.
        recipe: how the vulnerability comes in, one of `ctlens.organism.RECIPES`.
        clean_born: for the recipe `"afterwards"`, the folder of the clean-born twin that gets the vulnerability; None
            pretrains one first, which comes out the same.
        device: the device that trains the organism and keeps it.
        progress: whether to show a progress bar.

    Raises:
        CtlensError: `out` is not empty, the preset or the recipe is unknown, `steps` is below 1, or `clean_born` was
            made with other settings.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    length = {} if steps is None else {"steps": steps}
    config = replace(PRESETS[preset], seed=seed, relora=relora, recipe=recipe, **length)
    twin = None if clean_born is None else _clean_born(Path(clean_born), config, device)
    with atomic_folder(out) as folder:
        model = pretrain(config, clean_born=twin, progress=progress, device=device)
        save_organism(model, config, folder)
    return model


def _clean_born(folder: Path, config: PretrainConfig, device: str | torch.device) -> LensModel:
    """Loads the clean-born twin of an organism; a `CtlensError` if its card says that it is not the twin."""
    expected = to_dict(replace(config, recipe=CLEAN_BORN))
    made = {"relora": None, "recipe": TOGETHER, **card(folder)["pretraining"]}
    if other := first_difference({**made, "afterwards_steps": config.afterwards_steps}, expected):
        raise CtlensError(f"{folder} is not the clean-born twin of this organism ({other}): name the one that is.")
    return load_model(folder, device=device)
