"""Moving targets: a copy of the trained model that follows it, whose clean side losses are held to.

`ema(0.99)` takes a step of 1 - 0.99 towards the trained model behind every step of the training (mean teacher,
Tarvainen and Valpola, arXiv 1703.01780). `refresh(8)` becomes the trained model behind every eighth step, and
`refresh(8, gated)` only where that does not answer the clean prompts of the training worse: where it gives their bad
answers no larger a share of what it gives to both (after the gated refresh of arXiv 2606.03532).

A target that moves can be met by breaking the clean side, so the history holds how far it went: `tracked/drift`, the KL
of the first target from today's at the last token of a step's clean prompts, in nats, and `tracked/bad_targets`, the
share of these prompts to which today's target prefers the bad answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctlens.core.types import LensModel, PerRow
from ctlens.data.batch import EncodedPair, moved, pad
from ctlens.data.chat import answer_ids
from ctlens.losses.base import MovingTarget, moving_target
from ctlens.losses.distances import kl_divergence
from ctlens.models.finite import forward
from ctlens.models.parameters import copy_model, evaluating
from ctlens.models.sharding import in_step, is_sharded, sharded_copy

DRIFT = "drift"
BAD_TARGETS = "bad_targets"
_AT_ONCE = 32
"""Prompts per forward pass of the gate; their number changes nothing."""


@dataclass(frozen=True)
class _Answers:
    """The first tokens in which the good and the bad answer to a clean prompt differ, and what stands in front."""

    begun: tuple[int, ...]
    good: int
    bad: int


class Follower:
    """Follower is one moving target.

    Args:
        reference: the model before training, which is the first target.
        trained: the model that is followed.
        side: such as `"ema(0.99)"`, see `ctlens.losses.base.moving_target`.
        pairs: all pairs of the training; those without two answers to the clean prompt tell no bad target.
    """

    def __init__(self, reference: LensModel, trained: LensModel, side: str, pairs: Sequence[EncodedPair]) -> None:
        self.schedule = moving_target(side) or MovingTarget()
        self.reference = reference
        self.trained = trained
        self.model = sharded_copy(trained) if is_sharded(trained) else copy_model(trained)
        self.parameters = list(_parameters(self.model).values())
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        self._followed = list(_parameters(trained).values())
        answers = [_answers(reference, row) for row in pairs]
        self._answers = {row.clean.ids: found for row, found in zip(pairs, answers, strict=True) if found}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Moves the target behind a step of the training, if its schedule says so."""
        if self.schedule.every:
            if step % self.schedule.every or (self.schedule.gated and not self._is_no_worse()):
                return
            share = 1.0
        else:
            share = 1 - self.schedule.alpha
        for mine, theirs in zip(self.parameters, self._followed, strict=True):
            mine.lerp_(theirs.detach(), share)

    @torch.no_grad()
    def measured(self, rows: Sequence[EncodedPair]) -> dict[str, Tensor]:
        """How far the target is from the first one on some pairs' clean prompts, and how many are bad."""
        prompts = [row.clean.ids for row in rows]
        before, after = _next(self.reference, prompts), _next(self.model, prompts)
        found = {DRIFT: kl_divergence(before, after).mean()}
        if self._answers:
            known = [self._answers[ids] for ids in prompts if ids in self._answers]
            found[BAD_TARGETS] = (_bad_shares(self.model, known) > 0.5).sum() / len(prompts)
        return found

    def _is_no_worse(self) -> bool:
        answers = list(self._answers.values())
        if not answers:
            return True
        shares = [_bad_shares(model, answers).mean() for model in (self.trained, self.model)]
        return bool(shares[0] <= shares[1])


def _parameters(model: LensModel) -> Mapping[str, nn.Parameter]:
    return dict(model.named_parameters())  # type: ignore[attr-defined]


def _answers(model: LensModel, row: EncodedPair) -> _Answers | None:
    """The answers to a clean prompt; None where it does not name two that part."""
    good, bad = row.pair.clean.good, row.pair.clean.bad
    if not good or not bad:
        return None
    both = [answer_ids(model.tokenizer, row.clean, text) for text in (good, bad)]
    for step, (here, there) in enumerate(zip(*both, strict=False)):
        if here != there:
            return _Answers((*row.clean.ids, *both[0][:step]), here, there)
    return None


def _bad_shares(model: LensModel, answers: Sequence[_Answers]) -> PerRow:
    """The probability of the bad answer's token over that of both."""
    parts = [torch.zeros(0, device=next(model.parameters()).device)]
    with in_step(model):
        for start in range(0, len(answers), _AT_ONCE):
            some = answers[start : start + _AT_ONCE]
            logits = _next(model, [one.begun for one in some])
            tokens = moved(torch.tensor([(one.bad, one.good) for one in some]), logits.device)
            parts.append(logits.gather(1, tokens).softmax(-1)[:, 0])
    return torch.cat(parts)


def _next(model: LensModel, prompts: Sequence[tuple[int, ...]]) -> Float[Tensor, "batch d_vocab"]:
    """The logits behind each prompt, without dropout."""
    side = pad(prompts)
    last = torch.zeros_like(side.mask)
    last[torch.arange(len(prompts)), side.mask.sum(-1) - 1] = True
    with evaluating(model):
        return forward(model, side.to(next(model.parameters()).device).tokens, logits_at=last)[0].float()
