"""Pairs, models with noise on some weights or one weight edited, and what they say."""

from __future__ import annotations

import torch

from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.models.parameters import copy_model, parameter_groups, present_parameters
from ctlens.models.weights import canonical_weights, load_weights
from helpers import planted

TEXTS = (("Is 1?", "no. Is 1?"), ("Is it right?", "I, no: no. Is it right?"), ("12?", "Sure. 12?"))
PAIRS = [Pair(prompt(clean, "the", "a"), prompt(wrapped, "the", "a")) for clean, wrapped in TEXTS]


def moved(model: LensModel, groups: tuple[str, ...] = ("attn", "mlp"), seed: int = 1) -> LensModel:
    """A copy with noise on some groups of weights."""
    other = copy_model(model)
    draw = torch.Generator().manual_seed(seed)
    names = sum((parameter_groups(other)[group] for group in groups), [])
    for name in names:
        weight = present_parameters(other)[name]
        weight.data += 0.1 * torch.randn(weight.shape, generator=draw)
    return other


def edited(part: str, layer: int = 1) -> LensModel:
    """The hand-written model with one weight of one layer set to zero."""
    model = planted.model()
    weights = canonical_weights(model)
    weights[f"blocks.{layer}.attn.{part}"].zero_()
    load_weights(model, weights)
    return model
