"""OPCT brings the model's own answers to the wrapped prompt to what the reference would say to the clean one.

The model answers the wrapped prompt itself, `y ~ p(. | wrapped)`. With the log-ratio at every token of the answer,
`d_t = log p(y_t | wrapped, y_<t) - log p_ref(y_t | clean, y_<t)`, the advantage of a token is
`A_t = -sum_{s >= t} discount^(s - t) d_s`, and `L = weight * mean_i sum_t [ -A_it log p(y_it | wrapped, y_i<t) ]`
(on-policy consistency training, arXiv 2605.21834, where the weight is the factor of the advantages). At a discount of 1
its gradient is, in expectation, that of `KL( p(y | wrapped) || p_ref(y | clean) )` over whole answers. At 0, as
published, it is that of the divergence of every next token behind the answers drawn, which are held fixed.

The estimator `"full"` takes the sum over the vocabulary in place of the token that was drawn, at every position of the
answer: `sum_t KL( p(. | wrapped, y_<t) || p_ref(. | clean, y_<t) )` with the gradient through the model's distribution
alone, and for a discount above 0 the later tokens' divergences as the advantage of a token. It has the same expectation
and less variance.

BCT is its off-policy twin: it trains the reference's answers behind the wrapped prompt, this loss the model's own.
Unlike the losses on activations it is a training of its own where clean and wrapped prompt are equal: there it holds
the model to its reference on its own answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ctlens.core.arguments import require_types
from ctlens.core.errors import CtlensError
from ctlens.core.limits import POSITIVE, SHARE_OF_ALL, require
from ctlens.core.types import LensModel, PerRow
from ctlens.losses.base import OUTPUT, Forwards, Loss, at_positions, check_option
from ctlens.losses.distances import kl_divergence
from ctlens.losses.outputs import before_the_answer

PerToken: TypeAlias = Float[Tensor, "batch width"]
_ESTIMATORS = ("sampled", "full")
_CORRECTIONS = ("none", "ratio", "clip")
_CLIPPED_BY = 0.2  # PPO's usual range of the ratio, on either side of 1; not tuned


@dataclass(frozen=True)
class OPCT(Loss):
    """OPCT is on-policy output consistency: the model learns from its own answers, see `ctlens.training.rollouts`.

    Attributes:
        weight: factor of the total, and so of the advantages; the default is the published one.
        rollouts: answers sampled for each prompt of a step.
        estimator: `"sampled"`, as published, or `"full"`, the sum over the vocabulary.
        discount: of the log-ratios of later tokens, 0 to 1.
        temperature: at which answers are sampled; log-probabilities are those at 1.
        correction: for answers sampled at another temperature than 1, which do not come from the distribution that is
            trained: `"ratio"`, each token's importance ratio as factor of its advantage; `"clip"`, the ratio held
            between 0.8 and 1.2 as in PPO; or `"none"`.
    """

    name: ClassVar[str] = "opct"
    weight: float = 2.0
    rollouts: int = 4
    estimator: str = "sampled"
    discount: float = 0.0
    temperature: float = 1.0
    correction: str = "none"

    def __post_init__(self) -> None:
        require_types(self)
        require(POSITIVE, weight=self.weight)
        require(POSITIVE, temperature=self.temperature)
        check_option("estimator of OPCT", self.estimator, _ESTIMATORS)
        check_option("correction of OPCT", self.correction, _CORRECTIONS)
        if self.rollouts < 1:
            raise CtlensError(f"rollouts must be at least 1, not {self.rollouts}.")
        require(SHARE_OF_ALL, discount=self.discount)
        if self.correction != "none" and self.temperature == 1:
            raise CtlensError(
                f"answers sampled at temperature 1 need no correction: leave {self.correction!r} off, or set the "
                "temperature."
            )
        if self.correction != "none" and self.estimator == "full":
            raise CtlensError(
                "the full estimator weighs no drawn token, so there is no ratio to correct: leave it off."
            )

    @property
    def answers(self) -> str:
        """The trained model answers anew at every step."""
        return "rollouts"

    @property
    def makes_rows(self) -> bool:
        """True: the rows are the sampled answers."""
        return True

    def hook_names(self, model: LensModel) -> list[str]:
        """Lists no hook point: the loss reads the logits."""
        return []

    def row_values(self, forwards: Forwards, hook_names: Sequence[str]) -> dict[str, PerRow]:
        """Measures the divergence from the reference along each answer in nats, with the policy gradient as gradient.

        The value is the sum of the log-ratios, or of the divergences; that of the surrogate means nothing.

        Raises:
            CtlensError: the batch has no answers behind both prompts, or no logits on the clean side.
        """
        if forwards.clean_logits is None:
            raise CtlensError("OPCT needs sampled answers, which only a training draws: use ct.train or a Trainer.")
        matched = before_the_answer("OPCT", forwards.batch)
        valid = matched.valid
        logits = at_positions(forwards.wrapped_logits, matched.wrapped)
        target = at_positions(forwards.clean_logits, matched.clean).detach()
        drawn = forwards.batch.wrapped.tokens.gather(1, (matched.wrapped + 1) * valid)
        log_p = _of_drawn(logits, drawn)
        if self.estimator == "full":
            divergences = torch.where(valid, kl_divergence(logits, target), 0.0)
            later = self._returns(-divergences.detach()) + divergences.detach()
            surrogate = torch.where(valid, -later * log_p, 0.0).sum(-1) if self.discount else torch.zeros(())
            return {OUTPUT: divergences.sum(-1) + (surrogate - surrogate.detach())}
        ratios = torch.where(valid, log_p - _of_drawn(target, drawn), 0.0).detach()
        surrogate = torch.where(valid, self._surrogate(self._returns(-ratios), log_p, logits, drawn), 0.0).sum(-1)
        return {OUTPUT: ratios.sum(-1) + (surrogate - surrogate.detach())}

    def _returns(self, rewards: PerToken) -> PerToken:
        """The discounted sum of each token's reward and those behind it; at a discount of 0 its own.

        >>> OPCT(discount=0.5)._returns(torch.tensor([[1.0, 2.0, 4.0]]))
        tensor([[3., 4., 4.]])
        """
        steps = torch.arange(rewards.shape[1], device=rewards.device)
        behind = steps[:, None] - steps[None]  # how far a reward (row) is behind a token (column)
        factors = torch.where(behind >= 0, self.discount ** behind.clamp(min=0).to(rewards), 0.0)
        return rewards @ factors

    def _surrogate(
        self, advantages: PerToken, log_p: PerToken, logits: Float[Tensor, "batch width k"], drawn: Tensor
    ) -> PerToken:
        """What is differentiated: its gradient is that of the log-probabilities, each times its advantage."""
        if self.correction == "none":
            return -advantages * log_p
        ratio = (log_p - _of_drawn(logits.detach() / self.temperature, drawn)).exp()
        if self.correction == "ratio":
            return -advantages * ratio
        held = ratio.clamp(1 - _CLIPPED_BY, 1 + _CLIPPED_BY)
        return -torch.minimum(advantages * ratio, advantages * held)


def _of_drawn(logits: Float[Tensor, "batch width k"], drawn: Tensor) -> PerToken:
    """The log-probability of the drawn token at every position, in nats."""
    return logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
