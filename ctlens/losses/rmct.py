"""RMCT brings the rate of bad answers to the wrapped prompt to the rate on the clean prompt, by reinforcement.

For answers `y_i` that the trained model gives to one wrapped prompt, `t_i = 1` where the answer is bad
and 0 elsewhere, `p = mean_i t_i`, and `p_clean` the rate on the clean prompt:
`r_i = -(p - p_clean) (t_i - p)`, `L = weight * mean_i [ -r_i sum_t log p(y_it | wrapped prompt, y_i<t) ]`
(rate matching, arXiv 2606.02211). In the limit of many answers its gradient is that of half the squared
gap, `(p - p_clean)^2 / 2`; with `n` of them it is `(1 - 1/n) (p - p_clean + (1 - 2p)/n) grad p` in
expectation, which adds a small pull towards the commoner behaviour. Each batch of answers serves one step,
so the ratio of importance sampling is 1, and clipping it (PPO) would change nothing.

With `reward="agreement"` no answer is judged: that of an answer is its mean similarity to the answers that the model
gives to the other variants of the prompt, wrapped prompts with the same clean one, and `L` is the policy gradient on
it, less its mean over the variant's own answers (PS-GRPO, arXiv 2510.04392, without its term for labelled answers). It
is the label-free control: agreement alone may as well settle on the bad answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ctlens.core.arguments import require_types
from ctlens.core.errors import CtlensError
from ctlens.core.limits import POSITIVE, require
from ctlens.core.types import LensModel, PerRow
from ctlens.losses.base import CLEAN_SIDES, OUTPUT, Forwards, Loss, check_option
from ctlens.losses.outputs import answer_log_p

PerRollout: TypeAlias = Float[Tensor, "prompt rollout"]
PerPrompt: TypeAlias = Float[Tensor, " prompt"]
STANDARDISE = ("none", "per_item")
REWARDS = ("rates", "agreement")
# If all answers to a prompt get the same verdict, their rewards have no spread. Below this spread they count as 0.
SPREAD_FLOOR = 1e-8


def words_f1(one: str, other: str) -> float:
    """The harmonic mean of the shares of each text's words that the other has, case aside.

    >>> words_f1("It is Paris", "paris it was"), words_f1("a a b", "a"), words_f1("", "")
    (0.6666666666666666, 0.5, 1.0)
    """
    here, there = Counter(one.lower().split()), Counter(other.lower().split())
    total = here.total() + there.total()
    return 2 * (here & there).total() / total if total else 1.0


SIMILARITIES: Mapping[str, Callable[[str, str], float]] = {
    "exact": lambda one, other: float(one.split() == other.split()),
    "f1": words_f1,
}
"""How alike two answers are, 0 to 1, by the names of `RMCT.similarity`."""


@dataclass(frozen=True)
class RMCT(Loss):
    """RMCT is rate matching: a policy gradient on sampled answers, see `ctlens.training.rollouts`.

    Attributes:
        weight: factor of the total; the default suits the shipped organism.
        rollouts: answers sampled for each prompt of a step, at temperature 1.
        standardise: `"none"`, or `"per_item"`: the rewards of each prompt to mean 0 and standard
            deviation 1, as published. The size of the gap is then lost; only its sign is left.
        clean: the model whose rate on the clean prompts is matched: the `"reference"`, estimated once, or
            `"own"` for the trained model, estimated from new answers at every step, as published.
        reward: `"rates"`, or `"agreement"` with the answers to the other variants of the prompt, which needs several
            pairs with one clean prompt.
        similarity: of two answers, for the agreement: `"exact"`, 1 where both are the same text, or `"f1"`, that of
            their words.
    """

    name: ClassVar[str] = "rmct"
    # Published are 128 answers to each of 4 prompts; 8 to each of 32 suit the organism (docs/divergences.md), without a
    # search. The weight was chosen by `benchmarks/choose_rivals.py`, for rates.
    weight: float = 40.0
    rollouts: int = 8
    standardise: str = "none"
    clean: str = "reference"
    reward: str = "rates"
    similarity: str = "exact"

    def __post_init__(self) -> None:
        require_types(self)
        require(POSITIVE, weight=self.weight)
        check_option("standardisation", self.standardise, STANDARDISE)
        check_option("clean side", self.clean, CLEAN_SIDES)
        check_option("reward of RMCT", self.reward, REWARDS)
        check_option("similarity of answers", self.similarity, tuple(SIMILARITIES))
        if self.reward == "agreement" and self.clean == "own":
            raise CtlensError("agreement among variants reads no clean prompt: leave clean at 'reference'.")
        if self.reward == "rates" and self.similarity != "exact":
            raise CtlensError(f"similarity {self.similarity!r} has no effect on rates: leave it at 'exact'.")
        if self.rollouts < 2:
            raise CtlensError(
                f"rollouts must be at least 2, not {self.rollouts}: one answer cannot differ from a mean."
            )

    @property
    def clean_side(self) -> str:
        """The rate of this model on the clean prompts is matched."""
        return self.clean

    @property
    def answers(self) -> str:
        """The trained model answers anew at every step."""
        return "rollouts"

    @property
    def keeps_variants(self) -> bool:
        """True where the answers to the variants of a prompt are compared with each other."""
        return self.reward == "agreement"

    @property
    def makes_rows(self) -> bool:
        """True: the rows are the sampled answers."""
        return True

    def hook_names(self, model: LensModel) -> list[str]:
        """Lists no hook point: the loss reads the logits."""
        return []

    def advantages(self, bad: PerRollout, clean_rates: PerPrompt) -> PerRollout:
        """Computes the advantage of each answer; it depends on the answers to the same prompt only.

        >>> RMCT(rollouts=2).advantages(torch.tensor([[1.0, 0.0]]), torch.tensor([0.1]))  # -0.4 * (1 - 0.5), ...
        tensor([[-0.2000,  0.2000]])

        Args:
            bad: 1 for a bad answer and 0 for any other; grades between 0 and 1 work too.
            clean_rates: the rate to match, for each prompt.
        """
        rates = bad.mean(-1, keepdim=True)
        return self._standardised(-(rates - clean_rates[:, None]) * (bad - rates))

    def centred(self, agreement: PerRollout) -> PerRollout:
        """Computes the advantage of each answer from its agreement with those to the other variants.

        >>> RMCT(rollouts=2, reward="agreement").centred(torch.tensor([[0.5, 1.0]]))
        tensor([[-0.2500,  0.2500]])
        """
        return self._standardised(agreement - agreement.mean(-1, keepdim=True))

    def _standardised(self, rewards: PerRollout) -> PerRollout:
        if self.standardise == "none":
            return rewards
        spread = rewards.std(-1, correction=0, keepdim=True)
        return torch.where(spread < SPREAD_FLOOR, 0.0, rewards / spread.clamp(min=SPREAD_FLOOR))

    def row_values(self, forwards: Forwards, hook_names: Sequence[str]) -> dict[str, PerRow]:
        """Measures half the squared gap of the rates, or what agreement lacks, with the policy gradient as gradient.

        The value of a policy gradient's surrogate means nothing, so the value is that on which the gradient descends.

        Raises:
            CtlensError: the batch has no sampled answers.
        """
        if forwards.advantages is None or forwards.gaps is None:
            raise CtlensError("RMCT needs sampled answers, which only a training draws: use ct.train or a Trainer.")
        surrogate = -forwards.advantages * answer_log_p(forwards.wrapped_logits, forwards.batch)
        value = forwards.gaps if self.reward == "agreement" else forwards.gaps.square() / 2
        return {OUTPUT: value + (surrogate - surrogate.detach())}
