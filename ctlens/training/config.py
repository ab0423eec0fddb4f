"""The settings of one training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ctlens import threats
from ctlens.core.arguments import require_types
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.limits import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, PROBABILITY, SHARE_OF_ALL, require, require_fields
from ctlens.data.alignment import WINDOWS
from ctlens.models.lora import LoRA
from ctlens.training.schedules import LINEAR, require_schedule
from ctlens.world import SPLITS

MEMORY = ("all", "layers", "blocks")


@dataclass(frozen=True)
class Phase:
    """Phase is a stretch of a training in which only some of its losses are active.

    Attributes:
        steps: how many steps it has.
        losses: names of the active losses; no other loss is even computed.
    """

    steps: int
    losses: tuple[str, ...]

    def __post_init__(self) -> None:
        require_types(self)
        require(AT_LEAST_1, steps=self.steps)
        if not self.losses or len(set(self.losses)) < len(self.losses):
            given = ", ".join(self.losses) or "none"
            raise CtlensError(f"the losses of a phase are {given}: name at least one loss, and each once.")


@dataclass(frozen=True)
class Until:
    """Until names a behaviour at which a training ends, so that methods can be compared at the same effect.

    Attributes:
        threat: the threat whose prompts the model is asked.
        metric: the rate of the wrapped prompts that is measured, see `ctlens.evaluate`.
        below: the training ends once the rate is below this, 0 to 1.
        split: the split of the threat's pairs.
        n_prompts: how many prompts the model is asked.
        every: steps between two measurements; the first is before the first step.
    """

    threat: str
    metric: str = "bad_rate"
    below: float = 0.1
    split: str = "heldout"
    n_prompts: int = 96
    every: int = 10

    EARLIER_NAMES: ClassVar[Mapping[str, str]] = {"items": "n_prompts"}

    def __post_init__(self) -> None:
        require_types(self)
        threats.get(self.threat)
        if self.split not in SPLITS:
            raise unknown("split", self.split, SPLITS)
        require(PROBABILITY, below=self.below)
        require(AT_LEAST_1, n_prompts=self.n_prompts, every=self.every)


_LIMITS = {
    "steps": AT_LEAST_1,
    "batch_size": AT_LEAST_1,
    "max_new_tokens": AT_LEAST_1,
    "accumulate": AT_LEAST_1,
    "lr": POSITIVE,
    "relative_eps": POSITIVE,
    "clip": POSITIVE,
    "calibrate": POSITIVE,
    "retention": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "warmup": SHARE_OF_ALL,
    "retention_ratio": PROBABILITY,
}


@dataclass(frozen=True)
class TrainConfig:
    """TrainConfig holds all settings of a training except its losses; a study has one for all methods.

    Attributes:
        steps: optimiser steps.
        batch_size: pairs per step; a step has half as many retention prompts.
        lr: peak learning rate of AdamW, reached after the warm-up.
        warmup: share of the steps in which the learning rate rises to its peak, 0 to 1.
        relative_eps: AdamW's eps as a share of `1 / sqrt(number of trained weights)`, the typical
            entry of a gradient of norm 1. Far above torch's 1e-8, so that a loss that is already
            zero does not turn rounding noise into full-sized steps: the retention-only control
            stays where it is.
        weight_decay: AdamW's own.
        clip: largest norm of the gradient.
        retention: weight of the KL divergence to the reference on prompts that must not change.
        trainable: what is trained: parameter groups, see `ctlens.models.parameters.parameter_groups`, or
            a `LoRA`, whose adapters are trained beside frozen weights. By default attention alone: where
            embeddings, norms and MLPs are trained too, half of a repair can be an edit of the words.
        max_new_tokens: length of the longest answer that the reference generates as a target, in tokens.
        seed: decides everything that is drawn: the order of pairs, the retention prompts, dropout.
        retention_ratio: the probability that a step has the retention term, 0 to 1.
        phases: the phases of the training, in order, each with its active losses; if empty, all losses are
            active at every step.
        schedule: the course of the learning rate after the warm-up: `"linear"` falls to zero at the end. Else
            the name of a class in `torch.optim.lr_scheduler`, whose steps count from the end of the warm-up.
        schedule_options: options of that class, for example `{"T_max": 90}` for `"CosineAnnealingLR"`.
        accumulate: number of parts that a batch is split into. They run one after the other, which gives the
            gradient of the whole batch in less memory.
        until: ends the training before its last step.
        window: the alignment window of every loss that reads one; it replaces the losses' own. A pair that does
            not align in it is left out, whatever the loss, so that every method trains on the same pairs.
        calibrate: the norm of every loss's gradient before training; the losses' weights are replaced by those
            that give it. None keeps the weights.
        cache: keep the reference's activations and logits on clean prompts, in memory on the CPU or in the
            cache folder of the training, so that the reference runs once per prompt; else it runs at every step.
        memory: what a step keeps for its gradient. `"all"` keeps everything and is fastest. `"layers"` computes
            losses on activations layer by layer during the forward pass, and again for the gradient.
            `"blocks"` also runs the model's blocks again. The losses are the same, and the gradients
            are up to rounding.
    """

    # These are the settings of a study, so that one training by itself is the study's condition of its loss. Those
    # without a reason beside them were chosen by eye.
    steps: int = 100
    batch_size: int = 16
    lr: float = 1e-3
    warmup: float = 0.1
    # At torch's eps of 1e-8 the retention-only control drifts on rounding noise; with 0.5 it stays at the base.
    relative_eps: float = 0.5
    weight_decay: float = 0.0
    clip: float = 1.0
    # In a prototype, without retention every other behaviour fell to 0%; 10 kept clean and benign answers at 100%.
    retention: float = 10.0
    trainable: tuple[str, ...] | LoRA = ("attn",)
    max_new_tokens: int = 16
    seed: int = 0
    retention_ratio: float = 1.0
    phases: tuple[Phase, ...] = ()
    schedule: str = LINEAR
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    until: Until | None = None
    window: str | None = None
    calibrate: float | None = None
    cache: bool = True
    memory: str = MEMORY[0]

    EARLIER_NAMES: ClassVar[Mapping[str, str]] = {"answer_tokens": "max_new_tokens"}

    def __post_init__(self) -> None:
        require_types(self)
        require_fields(self, _LIMITS)
        if self.accumulate > self.batch_size:
            raise CtlensError(
                f"a batch of {self.batch_size} pairs cannot be split into {self.accumulate} parts: lower accumulate."
            )
        planned = sum(phase.steps for phase in self.phases)
        if self.phases and planned != self.steps:
            raise CtlensError(
                f"the phases have {planned} steps together, but the training has {self.steps}: make them equal."
            )
        if self.window is not None and self.window not in WINDOWS:
            raise unknown("alignment window", self.window, WINDOWS)
        if self.memory not in MEMORY:
            raise unknown("memory setting", self.memory, MEMORY)
        require_schedule(self.schedule, self.schedule_options, self.steps, self.warmup)

    def active(self, step: int, losses: Iterable[str]) -> list[str]:
        """Lists the losses that are active in a step, counted from 1."""
        for phase in self.phases:
            if step <= phase.steps:
                return [name for name in losses if name in phase.losses]
            step -= phase.steps
        return list(losses)

    def require_phases_of(self, losses: Iterable[str]) -> None:
        """Raises a `CtlensError` unless the phases name only these losses, and each loss is in a phase."""
        losses = list(losses)
        named = [name for phase in self.phases for name in phase.losses]
        for name in named:
            if name not in losses:
                raise unknown("loss in a phase", name, losses)
        for name in losses:
            if self.phases and name not in named:
                raise CtlensError(f"the loss {name} is in no phase: name it in one, or leave it out.")
