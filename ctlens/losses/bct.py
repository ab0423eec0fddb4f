"""BCT: the wrapped prompt is trained to get the answer that the clean prompt gets.

`L = weight * mean_t [ -log p(y_t | wrapped prompt, y_<t) ]`, with `y` the reference's greedy answer
to the clean prompt, or the pair's own target (Chua et al. 2024, arXiv 2403.05518).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ctlens.errors import CtlensError
from ctlens.losses.base import OUTPUT, Forwards, Loss, check_weight
from ctlens.types import LensModel, PerRow


@dataclass(frozen=True)
class BCT(Loss):
    """Bias-augmented consistency: cross-entropy on the answer.

    Attributes:
        weight: factor of the total.
        prompt: also train on the prompt's own tokens, as the published sycophancy runs do.
    """

    name: ClassVar[str] = "bct"
    weight: float = 1.0
    prompt: bool = False

    def __post_init__(self) -> None:
        check_weight(self.weight)

    @property
    def answers(self) -> str:
        """The reference's greedy answers, where a pair has no target of its own."""
        return "greedy"

    def hook_names(self, model: LensModel) -> list[str]:
        """None: the loss reads the logits."""
        return []

    def row_values(self, forwards: Forwards, hook_names: Sequence[str]) -> dict[str, PerRow]:
        """The cross-entropy per pair in nats, averaged over the tokens trained on.

        Raises:
            CtlensError: a pair of the batch has no answer tokens.
        """
        batch = forwards.batch
        if not batch.answer.any(-1).all():
            raise CtlensError("BCT needs an answer for every pair: give targets, or let the trainer generate them.")
        trained = batch.wrapped.mask[:, 1:] & batch.wrapped.mask[:, :-1] if self.prompt else batch.answer[:, 1:]
        log_p = forwards.wrapped_logits[:, :-1].log_softmax(-1)
        surprise = -log_p.gather(-1, batch.wrapped.tokens[:, 1:, None]).squeeze(-1)
        per_row = torch.where(trained, surprise, 0.0).sum(-1) / trained.sum(-1)
        return {OUTPUT: per_row}
