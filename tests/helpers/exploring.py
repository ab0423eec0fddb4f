"""An exploration of the organism beside a copy with noise on its weights, and a count of the passes of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from ctlens import load_organism, threats
from ctlens.core.types import LensModel
from ctlens.exploring import Exploration, explore
from ctlens.models.parameters import copy_model

PAIRS = threats.get("sycophancy").pairs(3, split="heldout")


def noisy(model: LensModel) -> LensModel:
    """A copy with noise on its weights, which answers otherwise."""
    copy = copy_model(model)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=draw) * parameter.requires_grad
    return copy


def explored() -> Exploration:
    """A new exploration of three pairs and two models."""
    base = load_organism()
    return explore({"base": base, "act": noisy(base)}, PAIRS)


@contextmanager
def counted(*models: LensModel) -> Iterator[list[None]]:
    """Lists an entry per forward pass of the models inside the block."""
    passes: list[None] = []
    handles = [cast(Any, model).register_forward_pre_hook(lambda *_: passes.append(None)) for model in models]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
