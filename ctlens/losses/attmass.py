"""AttMass keeps attention on the wrapped prompt off the tokens that the attack added.

`L = weight * mean_l mean_{h,q} sum_{k in wrapper} a_w[h,q,k]` over aligned queries. The mass is
between 0 and 1. The loss needs no clean pass: it says where attention should not be, and nothing about where
it should. It comes from the stack paper's code (arXiv 2606.05817), `WrapperEntropyRegularizationLoss`. There
the wrapper is every token outside the content, the BOS and the chat template's included, and every token is a
query (`outside=True`); here it is the tokens that the attack added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ctlens.core.errors import CtlensError
from ctlens.core.types import Mask, PerRow, widened
from ctlens.data.batch import Matched, PairBatch, moved
from ctlens.losses.base import Forwards, InternalLoss


@dataclass(frozen=True)
class AttMass(InternalLoss):
    """AttMass pushes attention to the wrapper towards zero.

    Queries in front of the wrapper cannot see it and count as 0. Behind a prefill the only queries are the
    answer's, so take `window="answer"` there.

    Attributes:
        weight: factor of the total; the default suits the shipped organism.
        per_key: divide by the number of suppressed tokens, so that a long wrapper weighs no more than a short one.
        outside: suppress every token of the prompt outside the window, the BOS and the chat template's among
            them, for every token of the prompt as a query (the stack paper's code, with `window="content"`).
        clean: must stay `"reference"`, because the loss has no clean side.
    """

    name: ClassVar[str] = "attmass"
    # Published is 1. As with AttCT, the raw value is small on the organism (docs/divergences.md); no search was made.
    weight: float = 20.0
    per_key: bool = False
    outside: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clean != "reference":
            raise CtlensError(f"AttMass has no clean side, so clean cannot be {self.clean!r}: leave it out.")

    @property
    def needs_clean_activations(self) -> bool:
        """The loss needs no clean activations, because its target is a mass of 0."""
        return False

    @property
    def mean_over_heads(self) -> bool:
        """True: the mass of each head is measured alone, and then averaged over heads."""
        return True

    @property
    def point(self) -> str:
        """The loss reads the attention weights after the softmax."""
        return "pattern"

    def row_values(self, forwards: Forwards, hook_names: Sequence[str]) -> dict[str, PerRow]:
        """Measures the mass on suppressed tokens per hook point and pair, averaged over heads and queries.

        Raises:
            CtlensError: a pair has no aligned query that can see an added token.
        """
        batch = forwards.batch
        queries, keys = self._outside(batch) if self.outside else self._attack(batch)
        counted = keys.sum(-1) if self.per_key else 1
        values: dict[str, PerRow] = {}
        for name in hook_names:
            pattern = widened(forwards.wrapped[name])
            mass = torch.einsum("bhqk,bk->bq", pattern, keys.to(pattern.dtype)) / pattern.shape[1]
            values[name] = queries.row_mean(mass.gather(1, queries.wrapped)) / counted
        return values

    def _attack(self, batch: PairBatch) -> tuple[Matched, Mask]:
        """The window's tokens as queries, and the tokens that the attack added as keys."""
        host = batch.at_host
        self._require_visible(host, host.matched[self.window])
        return batch.matched[self.window], batch.wrapper

    def _outside(self, batch: PairBatch) -> tuple[Matched, Mask]:
        """Every token of the wrapped prompt as a query, and those outside the window as keys."""
        device = batch.answer.device
        batch = batch.at_host
        prompt = batch.wrapped.mask & ~batch.answer
        every = torch.arange(prompt.shape[1], device=prompt.device).expand_as(prompt)
        matched = batch.matched[self.window]
        rows, columns = matched.valid.nonzero(as_tuple=True)
        inside = torch.zeros_like(prompt)
        inside[rows, matched.wrapped[rows, columns]] = True
        return Matched(every, every, prompt).to(device), moved(prompt & ~inside, device)

    def _require_visible(self, batch: PairBatch, matched: Matched) -> None:
        first_added = torch.where(batch.wrapper.any(-1), batch.wrapper.int().argmax(-1), batch.wrapper.shape[1])
        last_query = torch.where(matched.valid, matched.wrapped, 0).amax(-1)
        if not ((first_added < last_query) | ~matched.valid.any(-1)).all():
            raise CtlensError(
                "AttMass has nothing to suppress in a pair: the tokens of its attack are not found, or no token of "
                f"the window {self.window} comes after them; choose another window, or leave the pair out."
            )
