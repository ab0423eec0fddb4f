"""The settings of one training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ctlens.adapters import LoRA
from ctlens.config import from_dict
from ctlens.errors import CtlensError


@dataclass(frozen=True)
class TrainConfig:
    """Everything about a training but the model, the pairs and the losses; equal for all methods of a study.

    Attributes:
        steps: optimiser steps.
        batch_size: pairs a step, and half as many retention prompts.
        lr: peak learning rate of AdamW, reached after the warm-up, falling to zero at the end.
        warmup: share of the steps that warm up, 0 to 1.
        relative_eps: AdamW's eps as a share of `1 / sqrt(number of trained weights)`, the typical
            entry of a gradient of norm 1. Far above torch's 1e-8, so that a loss that is already
            zero does not turn rounding noise into full-sized steps: the retention-only control
            stays where it is.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        retention: weight of the KL divergence to the reference on prompts that must not change.
        trainable: what is trained: parameter groups, see `ctlens.parameters.parameter_groups`, or
            a `LoRA`, whose adapters are trained beside frozen weights. Embeddings, unembedding and
            norms are frozen by default; otherwise a large part of the fix is an edit of embeddings.
        answer_tokens: longest answer the reference generates as a target, in tokens.
        seed: of the order of pairs and retention prompts.
    """

    steps: int = 100
    batch_size: int = 32
    lr: float = 5e-4
    warmup: float = 0.1
    relative_eps: float = 0.5
    weight_decay: float = 0.0
    clip: float = 1.0
    retention: float = 10.0
    trainable: tuple[str, ...] | LoRA = ("attn", "mlp")
    answer_tokens: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "answer_tokens"):
            if getattr(self, name) < 1:
                raise CtlensError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("lr", "relative_eps", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise CtlensError(f"{name} must be a positive number, not {getattr(self, name)}.")
        for name in ("retention", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise CtlensError(f"{name} must be zero or a positive number, not {getattr(self, name)}.")
        if not 0 <= self.warmup <= 1:
            raise CtlensError(f"warmup is a share of the steps, 0 to 1, not {self.warmup}.")

    def lr_factor(self, step: int) -> float:
        """The learning rate of a step (from 0) as a share of `lr`: linear warm-up, then linear decay to zero."""
        warm = self.warmup * self.steps
        if step < warm:
            return (step + 1) / (warm + 1)
        return (self.steps - step) / (self.steps - warm + 1)


def read_config(data: Mapping[str, Any]) -> TrainConfig:
    """The settings that `to_dict` gave; in them groups are a list and a `LoRA` is an object.

    Raises:
        CtlensError: as `from_dict`, or a setting makes no sense.
    """
    trainable = data.get("trainable")
    nested = {"trainable": from_dict(LoRA, trainable)} if isinstance(trainable, Mapping) else {}
    return from_dict(TrainConfig, {**data, **nested})
