"""F2C trains the variants of a prompt to get the answer that most of them get (flip-flop consistency).

The variants are the wrapped prompts of the pairs that share a clean prompt. With `y` the answer that
the reference gives to more than half of them, the clean prompt voting too,
`L = weight * [ mean_t -log p(y_t | variant, y_<t) + align_weight * A ]`: consensus cross-entropy, and an
alignment of minority and less confident variants with confident voters of the majority (Hejabi et
al. 2025, arXiv 2510.14242). Their paper calls it an alignment of representations, but their code reads
no hidden state: there it is `A = mean_t KL( m_t || p(. | variant, y_<t) )`, with `m_t` the mean of the
teachers' distributions, without gradient. This module does the same among the variants of one batch.

The majority can be wrong: if the wrappers change most answers in the same way, the loss trains that change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ctlens.core.arguments import require_types
from ctlens.core.limits import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, require
from ctlens.core.types import ChosenRows, LensModel, PerRow
from ctlens.data.batch import PairBatch, moved
from ctlens.losses.base import OUTPUT, Forwards, Loss, at_positions
from ctlens.losses.bct import BCT

AnswerTokens: TypeAlias = Int[Tensor, "batch width"]
AnswerMask: TypeAlias = Bool[Tensor, "batch width"]
Together: TypeAlias = Bool[Tensor, "batch batch"]


@dataclass(frozen=True)
class F2C(Loss):
    """F2C is flip-flop consistency: consensus cross-entropy with an alignment of predictions.

    Attributes:
        weight: factor of the total.
        align_weight: factor of the alignment beside the cross-entropy; at 0 only the cross-entropy trains.
        teachers: the most variants of a prompt that are teachers; at least one variant is left to learn.
    """

    name: ClassVar[str] = "f2c"
    weight: float = 1.0
    align_weight: float = 0.1  # within the published 0.001 to 1; not tuned
    teachers: int = 2  # the least of the published 2 or more, because prompts here have few variants

    def __post_init__(self) -> None:
        require_types(self)
        require(POSITIVE, weight=self.weight)
        require(NOT_NEGATIVE, align_weight=self.align_weight)
        require(AT_LEAST_1, teachers=self.teachers)

    @property
    def answers(self) -> str:
        """The target of a pair without its own is the answer that most variants of its clean prompt get."""
        return "consensus"

    def hook_names(self, model: LensModel) -> list[str]:
        """Lists no hook point: the loss reads the logits."""
        return []

    def row_values(self, forwards: Forwards, hook_names: Sequence[str]) -> dict[str, PerRow]:
        """Measures the cross-entropy plus the weighted alignment per pair, in nats, averaged over the answer's tokens.

        Raises:
            CtlensError: a pair of the batch has no answer tokens.
        """
        surprise = BCT().row_values(forwards, hook_names)[OUTPUT]
        return {OUTPUT: surprise + self.align_weight * self._alignment(forwards, surprise.detach())}

    def _alignment(self, forwards: Forwards, surprise: PerRow) -> PerRow:
        """Measures how far each variant is from the teachers of its prompt: 0 for a teacher, and 0 without teachers."""
        positions, valid = answer_positions(forwards.batch)
        tokens = forwards.batch.wrapped.tokens.gather(1, positions + 1)
        log_p = at_positions(forwards.wrapped_logits, positions).log_softmax(-1)
        together = same_prompt(forwards.batch, tokens.masked_fill(~valid, -1))
        votes = ((log_p.argmax(-1) == tokens) | ~valid).all(-1)
        teachers = self.chosen(together, votes, surprise)
        shares = (together & teachers).to(log_p.dtype)
        shares /= shares.sum(-1, keepdim=True).clamp(min=1)
        mixture = torch.einsum("rt,twv->rwv", shares, log_p.detach().exp())
        divergence = (torch.xlogy(mixture, mixture) - mixture * log_p).sum(-1)
        learns = valid & ~teachers[:, None]
        return torch.where(learns, divergence, 0.0).sum(-1) / valid.sum(-1)

    def chosen(self, together: Together, votes: ChosenRows, surprise: PerRow) -> ChosenRows:
        """Chooses the teachers: the voters for a prompt's answer that find the answer least surprising.

        >>> prompts = torch.tensor([[True, True, True, False]] * 3 + [[False, False, False, True]])
        >>> votes, surprise = torch.tensor([True, True, False, True]), torch.tensor([0.2, 0.1, 0.3, 0.1])
        >>> F2C(teachers=1).chosen(prompts, votes, surprise)  # the last row is alone, so it has nobody to teach
        tensor([False,  True, False, False])
        """
        row = torch.arange(len(votes), device=votes.device)
        earlier = (surprise[:, None] == surprise) & (row < row[:, None])
        before = together & votes & ((surprise < surprise[:, None]) | earlier)
        return votes & (before.sum(-1) < (together.sum(-1) - 1).clamp(max=self.teachers))


def answer_positions(batch: PairBatch) -> tuple[AnswerTokens, AnswerMask]:
    """Finds, per row, the positions whose predictions are the answer's tokens, and which of them are real."""
    host = batch.at_host
    lengths = host.answer.sum(-1, keepdim=True)
    step = torch.arange(int(lengths.max()))
    valid = step < lengths
    positions = torch.where(valid, host.last_prompt[:, None] + step, 0)
    return moved(positions, batch.answer.device), moved(valid, batch.answer.device)


def same_prompt(batch: PairBatch, answers: AnswerTokens) -> Together:
    """Marks the pairs of rows that have the same clean prompt and the same answer."""
    key = torch.cat([batch.clean.tokens.masked_fill(~batch.clean.mask, -1), answers], 1)
    return (key[:, None] == key).all(-1)
