"""Rollouts: at every step the trained model answers prompts, for losses that learn from its own answers.

RMCT grades the answers by a judge; OPCT lets the reference read them behind the clean prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ctlens.core.config import generator
from ctlens.core.errors import CtlensError
from ctlens.core.types import CleanLogits, LensModel, Logits, PerRow, Tokens
from ctlens.data.batch import EncodedPair, PairBatch, collate, require_room
from ctlens.data.pairs import Prompt
from ctlens.losses import OPCT, RMCT, Forwards, Loss
from ctlens.losses.rmct import SIMILARITIES
from ctlens.models.generation import Ids, Sampling, end_tokens, generate
from ctlens.models.hooks import run
from ctlens.threats.base import judge
from ctlens.training.config import TrainConfig


class Answered(Protocol):
    """Answered holds the answers of one step, ready for the trained model to run on them."""

    def seen_by(self, model: LensModel) -> Forwards:
        """Runs the model on the answers and keeps the graph."""
        ...


@dataclass(frozen=True)
class Drawn:
    """Drawn holds the graded answers of one step.

    Attributes:
        batch: one row per answer, which stands behind its wrapped prompt; the answers to one prompt are
            neighbours.
        advantages: the advantage of each row's answer.
        gaps: for each row, the rate of bad answers to its wrapped prompt minus the rate on its clean prompt; or one
            minus its answers' agreement with those to the other variants.
    """

    batch: PairBatch
    advantages: PerRow
    gaps: PerRow

    def seen_by(self, model: LensModel) -> Forwards:
        """Runs the model on the answers and keeps the graph; equal answers run once."""
        logits = _run_once(model, self.batch.wrapped.tokens)
        return Forwards(self.batch, {}, {}, logits, advantages=self.advantages, gaps=self.gaps)


@dataclass(frozen=True)
class Reread:
    """Reread holds the answers of one step, with what the reference says along them behind the clean prompts.

    Attributes:
        batch: one row per answer, which stands behind both prompts; the answers to one prompt are neighbours.
        clean_logits: the reference's, on the clean prompts with the answers.
    """

    batch: PairBatch
    clean_logits: CleanLogits

    def seen_by(self, model: LensModel) -> Forwards:
        """Runs the model on the answers and keeps the graph; equal answers run once."""
        return Forwards(self.batch, {}, {}, _run_once(model, self.batch.wrapped.tokens), self.clean_logits)


def _run_once(model: LensModel, tokens: Tokens) -> Logits:
    """The logits of sequences, of which equal ones run once."""
    distinct, index = tokens.unique(dim=0, return_inverse=True)
    return run(model, distinct)[index]


class Rollouts(ABC):
    """Rollouts draws answers to the wrapped prompts of a training.

    A step's answers depend only on the seed, the step, its pairs and the weights.

    Args:
        reference: the model before training, in eval mode.
        pairs: all pairs of the training.
        count: the number of answers per prompt.
        config: gives the length of the longest answer, and the seed.
        temperature: at which answers are sampled.

    Raises:
        CtlensError: a prompt with an answer does not fit the context.
    """

    def __init__(
        self,
        reference: LensModel,
        pairs: Sequence[EncodedPair],
        count: int,
        config: TrainConfig,
        temperature: float = 1.0,
    ) -> None:
        self.count = count
        self.config = config
        self.temperature = temperature
        self.ends = end_tokens(reference)
        for row in pairs:
            longest = max(len(row.wrapped.ids), len(row.clean.ids))
            require_room(longest + config.max_new_tokens, reference.cfg.n_ctx, "a prompt with its answer")

    @abstractmethod
    def draw(self, model: LensModel, rows: Sequence[EncodedPair], step: int, *part: int) -> Answered:
        """Draws the answers of one step to the wrapped prompts of some pairs.

        Args:
            model: the trained model, in eval mode.
            rows: the pairs of the step.
            step: number of the step, from 1.
            part: number of the part, if the step's pairs come in several parts.
        """

    def of_step(self, step: int, *part: int) -> torch.Generator:
        """The generator that decides the answers of one step, or of a part of it."""
        return generator(self.config.seed, "rollouts", step, *part)

    def sampled(self, model: LensModel, prompts: Sequence[Ids], draw: torch.Generator) -> list[list[Ids]]:
        """Draws `count` answers to each prompt."""
        given = generate(
            model,
            [ids for ids in prompts for _ in range(self.count)],
            max_new_tokens=self.config.max_new_tokens,
            ends=self.ends,
            sampling=Sampling(draw, self.temperature),
        )
        return [given[start : start + self.count] for start in range(0, len(given), self.count)]


class RereadRollouts(Rollouts):
    """RereadRollouts draws answers and lets the reference read each of them behind the clean prompt, for OPCT.

    Args:
        reference: the model before training, in eval mode.
        pairs: all pairs of the training.
        loss: decides the number of answers per prompt and their temperature.
        config: as of `Rollouts`.

    Raises:
        CtlensError: as `Rollouts`.
    """

    def __init__(self, reference: LensModel, pairs: Sequence[EncodedPair], loss: OPCT, config: TrainConfig) -> None:
        super().__init__(reference, pairs, loss.rollouts, config, loss.temperature)
        self.reference = reference

    def draw(self, model: LensModel, rows: Sequence[EncodedPair], step: int, *part: int) -> Reread:
        """Draws the answers of one step, see `Rollouts.draw`."""
        answers = self.sampled(model, [row.wrapped.ids for row in rows], self.of_step(step, *part))
        answered = [
            replace(row, answer=answer, clean_answer=answer, alignments={})
            for row, given in zip(rows, answers, strict=True)
            for answer in given
        ]
        batch = collate(answered).to(next(model.parameters()).device)
        with torch.no_grad():
            return Reread(batch, _run_once(self.reference, batch.clean.tokens))


class GradedRollouts(Rollouts):
    """GradedRollouts draws and grades answers, for RMCT.

    Args:
        reference: the model before training, in eval mode.
        pairs: all pairs of the training.
        loss: decides the number of answers per prompt and computes their advantages.
        config: as of `Rollouts`.

    Raises:
        CtlensError: as `Rollouts`; or a pair names no bad answer, or for agreement no two share a clean prompt.
    """

    def __init__(self, reference: LensModel, pairs: Sequence[EncodedPair], loss: RMCT, config: TrainConfig) -> None:
        super().__init__(reference, pairs, loss.rollouts, config)
        self.loss = loss
        self.tokenizer = reference.tokenizer
        self._clean_rates: dict[tuple[Ids, Prompt], float] = {}
        if loss.reward == "agreement":
            if len({row.clean.ids for row in pairs}) == len({row.wrapped.ids for row in pairs}):
                raise CtlensError(
                    "no two pairs share a clean prompt, so no answers can agree: give several wrapped prompts per "
                    "clean prompt."
                )
            return
        for row in pairs:
            if row.pair.wrapped.bad is None or row.pair.clean.bad is None:
                raise CtlensError("RMCT counts bad answers, and a pair names none: give every pair a bad answer.")
        if loss.clean == "reference":
            draw = generator(config.seed, "rollouts", "reference")
            self._clean_rates = self._measured(reference, pairs, draw)

    def draw(self, model: LensModel, rows: Sequence[EncodedPair], step: int, *part: int) -> Drawn:
        """Draws the answers of one step, see `Rollouts.draw`."""
        draw = self.of_step(step, *part)
        answers = self.sampled(model, [row.wrapped.ids for row in rows], draw)
        advantages, gaps = self._rewarded(model, rows, answers, draw)
        answered = [
            replace(row, answer=answer, clean_answer=(), alignments={})
            for row, given in zip(rows, answers, strict=True)
            for answer in given
        ]
        device = next(model.parameters()).device
        gaps = gaps.repeat_interleave(self.count)
        return Drawn(collate(answered).to(device), advantages.flatten().to(device), gaps.to(device))

    def _rewarded(
        self, model: LensModel, rows: Sequence[EncodedPair], answers: Sequence[Sequence[Ids]], draw: torch.Generator
    ) -> tuple[Float[Tensor, "prompt rollout"], Float[Tensor, " prompt"]]:
        """The advantage of each answer, and the gap of each prompt."""
        if self.loss.reward == "agreement":
            agreement = self._agreement(rows, answers)
            return self.loss.centred(agreement), 1 - agreement.mean(-1)
        bad = torch.stack([self._bad(row.pair.wrapped, given) for row, given in zip(rows, answers, strict=True)])
        clean = self._measured(model, rows, draw) if self.loss.clean == "own" else self._clean_rates
        clean_rates = torch.tensor([clean[row.clean.ids, row.pair.clean] for row in rows])
        return self.loss.advantages(bad, clean_rates), bad.mean(-1) - clean_rates

    def _agreement(
        self, rows: Sequence[EncodedPair], answers: Sequence[Sequence[Ids]]
    ) -> Float[Tensor, "prompt rollout"]:
        """The mean similarity of each answer to all answers to other variants; 1 where the step has no other."""
        alike = SIMILARITIES[self.loss.similarity]
        texts = [self.tokenizer.batch_decode(given, skip_special_tokens=True) for given in answers]
        found = torch.ones(len(rows), self.count)
        for number, row in enumerate(rows):
            others = [
                text
                for other, given in zip(rows, texts, strict=True)
                if other.clean.ids == row.clean.ids and other.wrapped.ids != row.wrapped.ids
                for text in given
            ]
            if others:
                own = [sum(alike(text, other) for other in others) / len(others) for text in texts[number]]
                found[number] = torch.tensor(own)
        return found

    def _measured(
        self, model: LensModel, rows: Sequence[EncodedPair], draw: torch.Generator
    ) -> dict[tuple[Ids, Prompt], float]:
        """Measures the rate of bad answers to each clean prompt; prompts of the same tokens share their answers."""
        prompts = list(dict.fromkeys(row.clean.ids for row in rows))
        answers = dict(zip(prompts, self.sampled(model, prompts, draw), strict=True))
        asked = {(row.clean.ids, row.pair.clean) for row in rows}
        return {(ids, prompt): float(self._bad(prompt, answers[ids]).mean()) for ids, prompt in asked}

    def _bad(self, prompt: Prompt, answers: Sequence[Ids]) -> torch.Tensor:
        """Grades answers: 1 for a bad answer, 0 for any other."""
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return torch.tensor([float(judge(prompt, text) == "bad") for text in texts])


def rollouts_of(
    loss: Loss, reference: LensModel, pairs: Sequence[EncodedPair], config: TrainConfig
) -> GradedRollouts | RereadRollouts | None:
    """The rollouts of a loss that learns from the model's own answers; None for any other loss.

    Raises:
        CtlensError: as the rollouts of the loss.
    """
    if isinstance(loss, RMCT):
        return GradedRollouts(reference, pairs, loss, config)
    return RereadRollouts(reference, pairs, loss, config) if isinstance(loss, OPCT) else None
