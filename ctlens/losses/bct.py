"""BCT trains the model to answer the wrapped prompt as it answers the clean prompt.

Losses with three forms of target have this name; all targets come from the reference on the clean prompt:

- hard, `L = weight * mean_t [ -log p(y_t | wrapped prompt, y_<t) ]`, with `y` its greedy or sampled
  answer, or the pair's own target (Chua et al. 2024, arXiv 2403.05518);
- soft, `L = weight * T^2 * mean_t KL( p_ref(. | clean prompt, y_<t) || p(. | wrapped prompt, y_<t) )`,
  after the code of arXiv 2606.03810, which compares the last tokens of both sides even if they differ;
- prefill, `L = weight * T^2 * mean_j KL( p_ref(. | clean prompt) || p(. | prompt, prefill_<=j) )`: after
  any part of a forced beginning the model answers as if the beginning were absent (the code of the stack
  paper, arXiv 2606.05817, which also adds a tenth of a cross-entropy on refusals; that is left to the data here).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ctlens.core.arguments import require_types
from ctlens.core.errors import CtlensError
from ctlens.core.limits import POSITIVE, PROBABILITY, SHARE_OF_ALL, require
from ctlens.core.types import LensModel, PerRow, widened
from ctlens.data.batch import Matched, PairBatch
from ctlens.losses.base import OUTPUT, Forwards, Loss, check_option
from ctlens.losses.outputs import before_the_answer, output_distance, steps_within

TARGETS = ("greedy", "sampled", "soft", "prefill")
DISTRIBUTIONS = ("soft", "prefill")


@dataclass(frozen=True)
class BCT(Loss):
    """BCT is bias-augmented consistency: it compares outputs, never activations.

    Attributes:
        weight: factor of the total.
        prompt: also train on the prompt's own tokens, as the published sycophancy runs do; for hard targets.
        targets: `"greedy"` or `"sampled"` answers of the reference; `"soft"`,
            its distributions along the greedy answer; `"prefill"`, its distribution at the clean
            prompt's last token, at every token the attack put behind the clean prompt.
        temperature: for sampled targets, the temperature at which the reference's answers are drawn; for soft
            and prefill targets, the logits of both sides are divided by it and the loss multiplied by its square.
        top_p: sampled answers are drawn from the likeliest tokens that together have this probability.
        tail: also train on what the chat template writes behind an answer's end token, a line break in many
            templates, as code does that trains on whole rendered conversations; not for prefill targets.
        early: for prefill targets, take every position one earlier, from the prompt's last token to the
            prefill's last but one (the stack paper's code).
        confidence: for soft and prefill targets, leave out tokens whose target gives no answer this probability, see
            `ctlens.losses.outputs.output_distance`.
        sharpen: for soft and prefill targets, divides the target's logits alone.
    """

    name: ClassVar[str] = "bct"
    weight: float = 1.0
    prompt: bool = False
    targets: str = "greedy"
    temperature: float = 1.0
    top_p: float = 1.0
    tail: bool = False
    early: bool = False
    confidence: float = 0.0
    sharpen: float = 1.0

    def __post_init__(self) -> None:
        require_types(self)
        require(POSITIVE, weight=self.weight)
        check_option("targets of BCT", self.targets, TARGETS)
        require(POSITIVE, temperature=self.temperature)
        if self.prompt and self.targets in DISTRIBUTIONS:
            raise CtlensError(f"BCT has no {self.targets} targets for the prompt's own tokens: leave prompt off.")
        if self.temperature != 1 and self.targets == "greedy":
            raise CtlensError(
                f"temperature {self.temperature:g} has no effect on the greedy targets of BCT: leave it at 1."
            )
        require(PROBABILITY, top_p=self.top_p)
        if self.top_p != 1 and self.targets != "sampled":
            raise CtlensError(
                f"top_p {self.top_p:g} has no effect on the {self.targets} targets of BCT: leave it at 1."
            )
        if self.tail and self.targets == "prefill":
            raise CtlensError("BCT with prefill targets trains on no answer, so none has a tail: leave tail off.")
        require(SHARE_OF_ALL, confidence=self.confidence)
        require(POSITIVE, sharpen=self.sharpen)
        if (self.confidence or self.sharpen != 1) and self.targets not in DISTRIBUTIONS:
            raise CtlensError(
                f"confidence and sharpen have no effect on the {self.targets} targets of BCT, which are no "
                "distributions: leave them off."
            )
        if self.early and self.targets != "prefill":
            raise CtlensError(f"early has no effect on the {self.targets} targets of BCT: leave it off.")

    @property
    def answers(self) -> str:
        """The reference answers if a pair has no target of its own; prefill targets need no answer."""
        return {"soft": "greedy", "prefill": ""}.get(self.targets, self.targets)

    @property
    def drawn_at(self) -> tuple[float, float]:
        """Sampled answers are drawn once, before training, at the loss's own temperature and `top_p`."""
        return self.temperature, self.top_p

    @property
    def answer_tail(self) -> bool:
        """True if the loss also trains on the chat template's tail behind the answers."""
        return self.tail

    @property
    def answers_on_both_sides(self) -> bool:
        """True for soft targets: the reference's distributions are read along the answer to the clean prompt."""
        return self.targets == "soft"

    @property
    def needs_clean_logits(self) -> bool:
        """True for soft and prefill targets, which are the reference's distributions on the clean prompt."""
        return self.targets in DISTRIBUTIONS

    def hook_names(self, model: LensModel) -> list[str]:
        """Lists no hook point: the loss reads the logits."""
        return []

    def row_values(self, forwards: Forwards, hook_names: Sequence[str]) -> dict[str, PerRow]:
        """Measures the cross-entropy or divergence per pair in nats, averaged over the tokens trained on.

        Raises:
            CtlensError: a pair of the batch has no answer tokens; for soft targets, no answer behind the
                clean prompt; for prefill targets, no token of the attack behind the clean prompt.
        """
        if self.targets == "prefill":
            return {OUTPUT: self._divergence(forwards, _behind_the_prompt(forwards.batch, int(self.early)))}
        if not forwards.batch.at_host.answer.any(-1).all():
            raise CtlensError("BCT needs an answer for every pair: give targets, or let the trainer generate them.")
        if self.targets == "soft":
            return {OUTPUT: self._divergence(forwards, before_the_answer("BCT with soft targets", forwards.batch))}
        return {OUTPUT: self._surprise(forwards)}

    def _divergence(self, forwards: Forwards, matched: Matched) -> PerRow:
        return output_distance(
            "BCT",
            forwards,
            matched,
            temperature=self.temperature,
            confidence=self.confidence,
            sharpen=self.sharpen,
        )

    def _surprise(self, forwards: Forwards) -> PerRow:
        batch = forwards.batch
        trained = batch.wrapped.mask[:, 1:] & batch.wrapped.mask[:, :-1] if self.prompt else batch.answer[:, 1:]
        log_p = widened(forwards.wrapped_logits[:, :-1]).log_softmax(-1)
        surprise = -log_p.gather(-1, batch.wrapped.tokens[:, 1:, None]).squeeze(-1)
        return torch.where(trained, surprise, 0.0).sum(-1) / trained.sum(-1)


def _behind_the_prompt(batch: PairBatch, earlier: int = 0) -> Matched:
    """Matches each added token at the end of the wrapped prompt with the last token of the clean prompt.

    Args:
        batch: pairs whose wrapped prompts end in a prefill.
        earlier: by how many positions the wrapped side is taken before the added tokens.
    """
    device = batch.answer.device
    batch = batch.at_host
    kept = batch.wrapped.mask & ~batch.answer & ~batch.wrapper
    last_kept = torch.where(kept, torch.arange(kept.shape[1], device=kept.device), 0).amax(-1)
    lengths = batch.last_prompt - last_kept
    if not (lengths > 0).all():
        raise CtlensError(
            "BCT with prefill targets needs tokens of the attack behind the clean prompt, and a pair has none: "
            "its wrapped prompt must end in a prefill."
        )
    steps, valid = steps_within(lengths)
    behind = (last_kept[:, None] + 1 - earlier + steps) * valid
    return Matched(batch.last_clean[:, None] * valid, behind, valid).to(device)
