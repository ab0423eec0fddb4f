"""KLCT: the next token after an aligned wrapped token is predicted as the reference predicts it on the clean prompt.

`L = weight * mean_t KL( p_ref(. | clean prompt up to t) || p(. | wrapped prompt up to t) )` in nats,
at temperature 1: BCT's level, the outputs, at an internal loss's tokens, so that the level and the
token window of a method can be told apart. No paper has it as it stands: the nearest are the prefill
loss in the code of the stack paper (arXiv 2606.05817), a KL in this direction that reuses the
distribution of one position, and BCT (Chua et al. 2024, arXiv 2403.05518), on sampled answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ctlens.alignment import WINDOWS
from ctlens.errors import CtlensError
from ctlens.losses.base import OUTPUT, Forwards, Loss, at_positions, check_option, check_weight
from ctlens.losses.distances import kl_divergence
from ctlens.types import LensModel, PerRow


@dataclass(frozen=True)
class KLCT(Loss):
    """Output consistency: the divergence of next-token distributions at aligned tokens.

    Attributes:
        window: the alignment window, see `ctlens.alignment.align`; `"last"` compares only the
            distributions of the answer's first token.
        weight: factor of the total.
    """

    name: ClassVar[str] = "klct"
    window: str = "shared"
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_option("alignment window", self.window, WINDOWS)
        check_weight(self.weight)

    @property
    def windows(self) -> tuple[str, ...]:
        """The alignment window the loss reads."""
        return (self.window,)

    @property
    def needs_clean_logits(self) -> bool:
        """Always: they are the target."""
        return True

    def hook_names(self, model: LensModel) -> list[str]:
        """None: the loss reads the logits."""
        return []

    def row_values(self, forwards: Forwards, hook_names: Sequence[str]) -> dict[str, PerRow]:
        """The divergence per pair in nats, averaged over aligned tokens; the clean side is detached.

        Raises:
            CtlensError: the reference's logits are not there.
        """
        if forwards.clean_logits is None:
            raise CtlensError("KLCT needs the reference's logits: give clean_logits to Forwards.")
        matched = forwards.batch.matched[self.window]
        clean = at_positions(forwards.clean_logits, matched.clean).detach()
        wrapped = at_positions(forwards.wrapped_logits, matched.wrapped)
        return {OUTPUT: matched.row_mean(kl_divergence(clean, wrapped))}
