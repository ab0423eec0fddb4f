"""The conditions of a study: the methods that it compares, losses that cross level and window, and controls.

A method differs from another in more than one respect at once: BCT compares outputs *at the answer*,
ACT compares the residual stream *at every aligned token*. The crossed conditions take the two apart: KL between
outputs at the same tokens as ACT, and both at the last token alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

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
    """

    loss: str
    role: str
    level: str = ""
    window: str | None = None
    data: str = ATTACKED
    trainable: tuple[str, ...] | None = None

    def losses(self) -> list[Loss]:
        """The loss in a list; an empty one for retention alone."""
        return [loss_registry.get(self.loss)] if self.loss else []

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
CONTROLS: Mapping[str, Condition] = {
    RETENTION: Condition("", CONTROL),
    "sft": Condition("bct", CONTROL, data=ORDINARY),
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
    """The condition with this name: a crossed condition, a control, or any loss, which is a method.

    >>> condition_named("bct").level, condition_named("klct_last").window, condition_named("harmless_act").data
    ('output', 'last', 'harmless')

    Raises:
        CtlensError: nothing is called that.
    """
    known = {**CROSSED_CONDITIONS, **CONTROLS, **ABLATED}
    if name in known:
        return known[name]
    if name not in loss_registry.names():
        raise unknown("method or condition", name, [*loss_registry.names(), *known])
    internal = issubclass(loss_registry.LOSSES[name], InternalLoss)
    return Condition(name, METHOD, INTERNAL_LEVEL if internal else OUTPUT_LEVEL)


def require_methods(names: Sequence[str]) -> None:
    """Checks that every name is that of a loss and is given once; raises a `CtlensError` if not."""
    for name in names:
        loss_registry.get(name)
    if len(set(names)) < len(names):
        raise CtlensError(f"a method is named twice ({', '.join(names)}): name each once.")


@torch.no_grad()
def perturbed(base: LensModel, trained: Sequence[LensModel], seed: int) -> LensModel:
    """A copy of a model with Gaussian noise on every matrix, as long as the trainings' updates are on average.

    Args:
        base: the model before training; left as it is.
        trained: models trained from it, at least one.
        seed: of the noise.
    """
    noisy = copy_model(base)
    before = present_weights(base)
    after = [present_weights(model) for model in trained]
    for name, parameter in present_parameters(noisy).items():
        lengths = [float((weights[name] - before[name]).norm()) for weights in after]
        noise = torch.randn(parameter.shape, generator=generator(seed, "perturbed", name)).to(parameter)
        parameter += noise * (sum(lengths) / len(lengths) / noise.norm())
    return noisy
