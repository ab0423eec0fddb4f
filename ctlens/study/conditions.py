"""What a study trains: the methods that it compares, conditions that cross level and window, and controls.

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

METHOD, CROSSED, CONTROL = ROLES = ("method", "crossed condition", "control")
INTERNAL, OUTPUT = LEVELS = ("internal", "output")
ATTACKED, HARMLESS, ORDINARY = "attacked", "harmless", "ordinary"
LAST = "last"
METHODS = ("act", "mlpct", "attct", "bct")
RETENTION, PERTURBED = "retention", "perturbed"
EVERYTHING = "_all"


@dataclass(frozen=True)
class Condition:
    """One way to train.

    Attributes:
        loss: the name of a loss; empty for retention alone.
        role: one of `ROLES`.
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
        """The pairs that it trains on.

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
    "klct": Condition("klct", CROSSED, OUTPUT),
    "klct_last": Condition("klct", CROSSED, OUTPUT, LAST),
    "act_last": Condition("act", CROSSED, INTERNAL, LAST),
}
CONTROLS: Mapping[str, Condition] = {
    RETENTION: Condition("", CONTROL),
    "sft": Condition("bct", CONTROL, data=ORDINARY),
    "harmless_act": Condition("act", CONTROL, data=HARMLESS),
    "harmless_bct": Condition("bct", CONTROL, data=HARMLESS),
}
ABLATED: Mapping[str, Condition] = {
    **{f"{name}{EVERYTHING}": Condition(name, CROSSED, trainable=GROUPS) for name in METHODS},
    f"{RETENTION}{EVERYTHING}": Condition("", CONTROL, trainable=GROUPS),
}
"""All parameters trained, embeddings and norms too."""
BESIDE = (*CROSSED_CONDITIONS, *(name for name in CONTROLS if name != RETENTION))
"""What is trained beside the methods and the null where models are looked into."""


def get(name: str) -> Condition:
    """The condition with this name: a crossed condition, a control, or any loss, which is a method.

    >>> get("bct").level, get("act").level, get("klct_last").window, get("harmless_act").data
    ('output', 'internal', 'last', 'harmless')

    Raises:
        CtlensError: nothing is called that.
    """
    known = {**CROSSED_CONDITIONS, **CONTROLS, **ABLATED}
    if name in known:
        return known[name]
    if name not in loss_registry.names():
        raise unknown("method or condition", name, [*loss_registry.names(), *known])
    return Condition(name, METHOD, INTERNAL if issubclass(loss_registry.LOSSES[name], InternalLoss) else OUTPUT)


def require_methods(names: Sequence[str]) -> None:
    """Raises a `CtlensError` unless every name is that of a loss, and there once."""
    for name in names:
        loss_registry.get(name)
    if len(set(names)) < len(names):
        raise CtlensError(f"methods must name each once, not {', '.join(names)}.")


@torch.no_grad()
def perturbed(base: LensModel, trained: Sequence[LensModel], seed: int) -> LensModel:
    """A copy of a model with Gaussian noise on every matrix, as long as the trainings' updates are on average.

    Args:
        base: the model before training; left as it is.
        trained: what became of it, at least one.
        seed: of the noise.
    """
    noisy, before, after = copy_model(base), present_weights(base), [present_weights(model) for model in trained]
    for name, parameter in present_parameters(noisy).items():
        lengths = [float((weights[name] - before[name]).norm()) for weights in after]
        noise = torch.randn(parameter.shape, generator=generator(seed, "perturbed", name)).to(parameter)
        parameter += noise * (sum(lengths) / len(lengths) / noise.norm())
    return noisy
