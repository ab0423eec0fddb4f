"""The conditions of a study: the methods that it compares, losses that cross level and window, and controls.

A method differs from another in more than one respect at once: BCT compares outputs *at the answer*,
ACT compares the residual stream *at every aligned token*. The crossed conditions take the two apart: KL between
outputs at the same tokens as ACT, and both at the last token alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ctlens import losses as loss_registry
from ctlens.analysis.probing.tasks import neutral_pairs
from ctlens.core.config import generator
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, Prompt
from ctlens.losses import Loss
from ctlens.losses.base import InternalLoss
from ctlens.models.parameters import GROUPS, copy_model, present_parameters, present_weights

METHOD = "method"
CROSSED = "crossed condition"
CONTROL = "control"
CONDITION_ROLES = (METHOD, CROSSED, CONTROL)
INTERNAL_LEVEL = "internal"
OUTPUT_LEVEL = "output"
LOSS_LEVELS = (INTERNAL_LEVEL, OUTPUT_LEVEL)
ATTACKED = "attacked"
HARMLESS = "harmless"
ORDINARY = "ordinary"
LAST_TOKEN = "last"
"""The alignment window that holds the last token of the prompt alone."""
DEFAULT_METHODS = ("act", "mlpct", "attct", "bct")
"""The methods that a study compares where none are named."""
RETENTION = "retention"
PERTURBED = "perturbed"
"""The name of the base with noise on its weights, as long as the methods' updates."""
FINE_TUNED = "sft"
"""The name of the control that is fine-tuned on its own answers to ordinary requests."""
SHAM = "sham"
"""The name of the base with that control's update, made as long as the methods' updates."""
DERIVED = (PERTURBED, SHAM)
"""The models that are not trained but made from finished trainings."""
ALL_PARAMETERS = "_all"
"""The ending of the name of a condition that trains every parameter group."""


@dataclass(frozen=True)
class Condition:
    """One way to train a model.

    Attributes:
        loss: the name of a loss; empty for retention alone.
        role: one of `CONDITION_ROLES`.
        level: `"internal"` or `"output"`, what the loss compares; empty for a control.
        window: of the tokens, where it is not the study's.
        data: `"attacked"`: the pairs of the threat; `"harmless"`: these with neutral words in place of
            the attack, as many tokens; `"ordinary"`: requests of other kinds, on both sides of a pair.
        trainable: parameter groups, where they are not the study's.
        options: of the loss, those that are not its own.
    """

    loss: str
    role: str
    level: str = ""
    window: str | None = None
    data: str = ATTACKED
    trainable: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def losses(self) -> list[Loss]:
        """The loss in a list; an empty one for retention alone."""
        return [loss_registry.get(self.loss, **self.options)] if self.loss else []

    def pairs(self, attacked: Sequence[Pair], ordinary: Sequence[Prompt], tokenizer: object) -> list[Pair]:
        """The pairs that the condition trains on.

        Args:
            attacked: pairs of the threat.
            ordinary: other requests, without any wrapper.
            tokenizer: of the model.

        Raises:
            CtlensError: no neutral text has as many tokens as an attack.
        """
        if self.data == HARMLESS:
            return neutral_pairs(attacked, tokenizer)
        if self.data == ORDINARY:
            return [Pair(prompt, prompt) for prompt in ordinary]
        return list(attacked)


CROSSED_CONDITIONS: Mapping[str, Condition] = {
    "klct": Condition("klct", CROSSED, OUTPUT_LEVEL),
    "klct_last": Condition("klct", CROSSED, OUTPUT_LEVEL, LAST_TOKEN),
    "act_last": Condition("act", CROSSED, INTERNAL_LEVEL, LAST_TOKEN),
}
VARIANTS: Mapping[str, Condition] = {
    "opct_full": Condition("opct", METHOD, OUTPUT_LEVEL, options={"estimator": "full"}),
    "subact_random": Condition("subact", METHOD, INTERNAL_LEVEL, options={"part": "random"}),
    "subact_rest": Condition("subact", METHOD, INTERNAL_LEVEL, options={"part": "rest"}),
    "rmct_agreement": Condition("rmct", METHOD, OUTPUT_LEVEL, options={"reward": "agreement", "weight": 2.5}),
    "act_ema": Condition("act", METHOD, INTERNAL_LEVEL, options={"clean": "ema(0.99)"}),
    "klct_sharp": Condition("klct", METHOD, OUTPUT_LEVEL, options={"sharpen": 0.4}),
}
"""Further methods: a loss with options that are not its own, chosen by `benchmarks/choose_rivals.py`."""
CONTROLS: Mapping[str, Condition] = {
    RETENTION: Condition("", CONTROL),
    FINE_TUNED: Condition("bct", CONTROL, data=ORDINARY),
    "harmless_act": Condition("act", CONTROL, data=HARMLESS),
    "harmless_bct": Condition("bct", CONTROL, data=HARMLESS),
}
ABLATED: Mapping[str, Condition] = {
    **{f"{name}{ALL_PARAMETERS}": Condition(name, CROSSED, trainable=GROUPS) for name in DEFAULT_METHODS},
    f"{RETENTION}{ALL_PARAMETERS}": Condition("", CONTROL, trainable=GROUPS),
}
"""The methods and the null with every parameter trained, embeddings and norms too."""
EXTRA_CONTROLS = tuple(name for name in CONTROLS if name != RETENTION)
"""The controls that are trained beside retention alone."""
EXTRA_CONDITIONS = (*CROSSED_CONDITIONS, *EXTRA_CONTROLS)
"""The conditions that a study trains beside the methods and the null, on the threats whose models it analyses."""


def condition_named(name: str) -> Condition:
    """The condition with this name: a crossed condition, a control, a variant, or any loss, which is a method.

    >>> condition_named("bct").level, condition_named("klct_last").window, condition_named("harmless_act").data
    ('output', 'last', 'harmless')

    Raises:
        CtlensError: nothing is called that.
    """
    known = {**CROSSED_CONDITIONS, **VARIANTS, **CONTROLS, **ABLATED}
    if name in known:
        return known[name]
    if name not in loss_registry.names():
        raise unknown("method or condition", name, [*loss_registry.names(), *known])
    internal = issubclass(loss_registry.LOSSES[name], InternalLoss)
    return Condition(name, METHOD, INTERNAL_LEVEL if internal else OUTPUT_LEVEL)


def require_methods(names: Sequence[str]) -> None:
    """Checks that every name is that of a loss or a variant and is given once; raises a `CtlensError` if not."""
    for name in names:
        if name not in VARIANTS and name not in loss_registry.names():
            raise unknown("loss", name, [*loss_registry.names(), *VARIANTS])
    if len(set(names)) < len(names):
        raise CtlensError(f"a method is named twice ({', '.join(names)}): name each once.")


def perturbed(base: LensModel, trained: Sequence[LensModel], seed: int) -> LensModel:
    """A copy of a model with Gaussian noise on every matrix, as long as the trainings' updates are on average.

    Args:
        base: the model before training; left as it is.
        trained: models trained from it, at least one.
        seed: of the noise.
    """
    weights = present_weights(base).items()
    noise = {name: torch.randn(weight.shape, generator=generator(seed, PERTURBED, name)) for name, weight in weights}
    return _moved_as_far(base, trained, noise)


def sham(base: LensModel, trained: Sequence[LensModel], other: LensModel) -> LensModel:
    """A copy of a model moved along a fine-tuning on other data, on every matrix as far as the trainings on average.

    A fine-tuning on ordinary requests moves the weights little, so that it is a weak null for what a training does by
    its mere length. This one is as long, and goes where gradients of ordinary data lead.

    Args:
        base: the model before training; left as it is.
        trained: models trained from it, at least one.
        other: the model that was fine-tuned from it on other data; a matrix that it left alone stays as it is.
    """
    before = present_weights(base)
    return _moved_as_far(base, trained, {name: after - before[name] for name, after in present_weights(other).items()})


@torch.no_grad()
def _moved_as_far(base: LensModel, trained: Sequence[LensModel], directions: Mapping[str, Tensor]) -> LensModel:
    """A copy of a model with each matrix moved in its direction, by the mean length of the trainings' updates."""
    moved = copy_model(base)
    before = present_weights(base)
    after = [present_weights(model) for model in trained]
    for name, parameter in present_parameters(moved).items():
        direction = directions[name].to(parameter)
        if length := float(direction.norm()):
            lengths = [float((weights[name] - before[name]).norm()) for weights in after]
            parameter += direction * (sum(lengths) / len(lengths) / length)
    return moved
