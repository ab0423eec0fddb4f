"""DPO prefers the reference's answer to the clean prompt over the bad answer, behind the wrapped prompt.

With `a(y) = log p(y | wrapped) - log p_ref(y | wrapped)`, summed over the tokens of an answer, the reference's answer
`y` to the clean prompt and the bad answer `b`, `L = weight * mean [ -log sigmoid( beta (a(y) - a(b)) ) ]` (direct
preference optimisation, Rafailov et al. 2023, arXiv 2305.18290, equation 7). No consistency method, it is the rival
that most published looks inside compare with. Unlike those methods it is told the bad answer, and it holds the model to
its reference on the *wrapped* prompt, whose answer is the bad one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from ctlens.core.arguments import require_types
from ctlens.core.errors import CtlensError
from ctlens.core.limits import POSITIVE, require
from ctlens.core.types import LensModel, PerRow
from ctlens.losses.base import OUTPUT, Forwards, Loss
from ctlens.losses.outputs import answer_log_p


@dataclass(frozen=True)
class DPO(Loss):
    """DPO is a preference for one answer over another, see `ctlens.training.preferences`.

    Attributes:
        weight: factor of the total; the default was chosen by `benchmarks/choose_rivals.py`.
        beta: of the difference of log-ratios; the larger, the nearer the model stays to its reference. The default is
            the usual one and was not searched for.
    """

    name: ClassVar[str] = "dpo"
    weight: float = 1.0
    beta: float = 0.1

    def __post_init__(self) -> None:
        require_types(self)
        require(POSITIVE, weight=self.weight)
        require(POSITIVE, beta=self.beta)

    @property
    def answers(self) -> str:
        """The reference answers the clean prompt, if a pair has no target of its own; that answer is preferred."""
        return "greedy"

    @property
    def makes_rows(self) -> bool:
        """True: each pair becomes two rows, one per answer."""
        return True

    def hook_names(self, model: LensModel) -> list[str]:
        """Lists no hook point: the loss reads the logits."""
        return []

    def row_values(self, forwards: Forwards, hook_names: Sequence[str]) -> dict[str, PerRow]:
        """Measures the negative log-probability of the preference, per pair, in nats.

        The rows with the preferred answers come first, then as many with the bad ones in the same order.

        Raises:
            CtlensError: `forwards` lacks what the reference gives the answers.
        """
        if forwards.reference_log_p is None:
            raise CtlensError("DPO needs both answers of each pair, which only a training lays out: use ct.train.")
        gained = answer_log_p(forwards.wrapped_logits, forwards.batch) - forwards.reference_log_p
        preferred, bad = gained.chunk(2)
        return {OUTPUT: -logsigmoid(self.beta * (preferred - bad))}
