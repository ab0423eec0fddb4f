"""The methods of an audit by name, and among them the regularisers, which train without labels.

They are the two of *Consistency Training Can Entrench Misalignment* (arXiv 2606.03810) beside its selectors. Each holds
a prompt of the pool to the other prompt of its pair. There the target is the model as it is being trained; a frozen one
stands beside it here, to tell the two apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ctlens.auditing.base import Method
from ctlens.auditing.selectors import SELECTORS, selector_named
from ctlens.core.arguments import require_types
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.public import public
from ctlens.data.pairs import Pair, Prompt
from ctlens.losses import ACT, KLCT, Loss, to_config


@dataclass(frozen=True)
class Regulariser(Method):
    """A regulariser is a method without labels: a loss that holds each prompt of the pool to the other of its pair.

    Attributes:
        name: what results call it.
        loss: the loss, such as `ct.ACT(clean="own")`; the other prompt of the pair is its clean side.
    """

    name: str
    loss: Loss

    def __post_init__(self) -> None:
        require_types(self)

    @property
    def trained_with(self) -> Loss:
        """The loss itself."""
        return self.loss

    def seen(self, pair: Pair) -> tuple[Prompt, ...]:
        """Both prompts.

        Raises:
            CtlensError: they are one and the same.
        """
        if pair.clean.turns == pair.wrapped.turns:
            raise CtlensError(
                f"{self.name!r} holds a prompt to the other one of its pair, and both are "
                f"{pair.clean.turns[-1].content[:60]!r}: give pairs of two phrasings, see ct.auditing.rephrased."
            )
        return pair.wrapped, pair.clean

    def trained_on(self, pairs: Sequence[Pair], labels: Mapping[Prompt, str | None]) -> list[Pair]:
        """The pairs as they are."""
        return list(pairs)

    def described(self) -> dict[str, Any]:
        """The loss with its options."""
        return to_config(self.loss)


# The formula of the paper, see `ctlens.losses.preset`; ACT at the weight of this package, which suits its organisms.
_SOFT_BCT = KLCT(window="suffix", distance="cross_entropy", clean="own")
_ACT = ACT(window="suffix", clean="own")
_BY_NAME: Mapping[str, Loss] = {
    "soft-bct-own": _SOFT_BCT,
    "soft-bct-reference": replace(_SOFT_BCT, clean="reference"),
    "act-own": _ACT,
    "act-reference": replace(_ACT, clean="reference"),
}
REGULARISERS = tuple(_BY_NAME)
"""The regularisers by name: soft BCT and ACT, held to the model itself or to the frozen reference."""


@public
def method_named(text: str, *, temperature: float = 1.0) -> Method:
    """Makes the method of a name: one of `REGULARISERS`, or what `selector_named` makes of it.

    Raises:
        CtlensError: no method has the name, or as of `selector_named`.
    """
    if text in _BY_NAME:
        return Regulariser(text, _BY_NAME[text])
    name = text.partition(":")[0]
    if name not in SELECTORS:
        raise unknown("selector or regulariser", name, (*SELECTORS, *REGULARISERS))
    return selector_named(text, temperature=temperature)


def resolved(methods: Sequence[str | Method], temperature: float) -> list[Method]:
    """Makes the methods of their names.

    Raises:
        CtlensError: there is none, one is unknown, or two have one name.
    """
    found = [
        method if isinstance(method, Method) else method_named(method, temperature=temperature) for method in methods
    ]
    if not found:
        raise CtlensError("there is no method: name at least one, for example 'greedy'.")
    named = [method.name for method in found]
    twice = [name for name in named if named.count(name) > 1]
    if twice:
        raise CtlensError(f"two methods are called {twice[0]!r}: give each a name of its own.")
    return found
