"""The settings of one training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ctlens import threats
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
        steps: its length.
        losses: names of those that are active; the others are not even computed.
    """

    steps: int
    losses: tuple[str, ...]

    def __post_init__(self) -> None:
        require(AT_LEAST_1, steps=self.steps)
        if not self.losses or len(set(self.losses)) < len(self.losses):
            given = ", ".join(self.losses) or "none"
            raise CtlensError(f"the losses of a phase are {given}: name at least one loss, and each once.")


@dataclass(frozen=True)
class Until:
    """Until names a behaviour at which a training ends, so that methods can be compared at the same effect.

    Attributes:
        threat: its pairs are asked.
        metric: its rate on the wrapped prompts, see `ctlens.evaluate`.
        below: the training ends once the rate is under this, 0 to 1.
        split: the part of the threat's pairs that is asked.
        n_pairs: how many pairs are asked.
        every: steps between two looks; the first look is before the first step.
    """

    threat: str
    metric: str = "bad_rate"
    below: float = 0.1
    split: str = "heldout"
    n_pairs: int = 96
    every: int = 10

    EARLIER_NAMES: ClassVar[Mapping[str, str]] = {"items": "n_pairs"}

    def __post_init__(self) -> None:
        threats.get(self.threat)
        if self.split not in SPLITS:
            raise unknown("split", self.split, SPLITS)
        require(PROBABILITY, below=self.below)
        require(AT_LEAST_1, n_pairs=self.n_pairs, every=self.every)


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
    """TrainConfig is all of a training but the model, the pairs and the losses; a study has one for all methods.

    Attributes:
        steps: optimiser steps.
        batch_size: pairs a step, and half as many retention prompts.
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
            a `LoRA`, whose adapters are trained beside frozen weights. Embeddings, unembedding and
            norms are frozen by default; otherwise a large part of the fix is an edit of embeddings.
        max_new_tokens: longest answer the reference generates as a target, in tokens.
        seed: it decides everything that is drawn: the order of pairs, the retention prompts, dropout.
        retention_ratio: the probability that a step has the retention term, 0 to 1.
        phases: which losses are active when, one phase after the other; all of them always if empty.
        schedule: how the learning rate goes after the warm-up: `"linear"` falls to zero at the end, or the
            name of a class in `torch.optim.lr_scheduler`, whose steps count from the end of the warm-up.
        schedule_options: options of that class, for example `{"T_max": 90}` for `"CosineAnnealingLR"`.
        accumulate: how many parts a batch is worked off in, one after the other: the gradient of the
            whole batch in less memory.
        until: ends the training before its last step.
        window: the alignment window of every loss that reads one, in place of the losses' own; and all
            pairs must align in it, whatever the loss, so that every method trains on the same ones.
        calibrate: the norm that the gradient of each loss has before training: weights are replaced
            so that it has. None takes the weights as they are.
        cache: keep what the reference says on clean prompts, in memory on the CPU or in the cache folder
            of the training, so that it runs once a prompt. Without it runs again at every step.
        memory: what a step keeps for its gradient, one of `MEMORY`: `"all"`, which is fastest;
            `"layers"`, where losses on activations are worked out layer by layer as the forward pass
            goes, and again for the gradient; `"blocks"`, where the model's blocks are run again too.
            The losses are equal, and gradients up to rounding.
    """

    steps: int = 100
    batch_size: int = 32
    lr: float = 5e-4
    warmup: float = 0.1
    relative_eps: float = 0.5  # at torch's 1e-8 the retention-only control drifts on rounding noise
    weight_decay: float = 0.0
    clip: float = 1.0
    retention: float = 10.0
    trainable: tuple[str, ...] | LoRA = ("attn", "mlp")
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
        require_fields(self, _LIMITS)
        if self.accumulate > self.batch_size:
            raise CtlensError(f"a batch of {self.batch_size} pairs has no {self.accumulate} parts: lower accumulate.")
        planned = sum(phase.steps for phase in self.phases)
        if self.phases and planned != self.steps:
            raise CtlensError(f"the phases have {planned} steps together, but the training has {self.steps}.")
        if self.window is not None and self.window not in WINDOWS:
            raise unknown("alignment window", self.window, WINDOWS)
        if self.memory not in MEMORY:
            raise unknown("memory setting", self.memory, MEMORY)
        require_schedule(self.schedule, self.schedule_options, self.steps, self.warmup)

    def active(self, step: int, losses: Iterable[str]) -> list[str]:
        """Lists which of the losses are active in a step, counted from 1."""
        for phase in self.phases:
            if step <= phase.steps:
                return [name for name in losses if name in phase.losses]
            step -= phase.steps
        return list(losses)

    def require_phases_of(self, losses: Iterable[str]) -> None:
        """Raises a `CtlensError` unless every phase names some of these losses, and every loss is in a phase."""
        losses = list(losses)
        named = [name for phase in self.phases for name in phase.losses]
        for name in named:
            if name not in losses:
                raise unknown("loss in a phase", name, losses)
        for name in losses:
            if self.phases and name not in named:
                raise CtlensError(f"the loss {name} is in no phase: name it in one, or leave it out.")
