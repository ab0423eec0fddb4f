"""Rollouts: at every step the trained model answers prompts and a judge grades the answers, for RMCT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ctlens.core.config import generator
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel, PerRow
from ctlens.data.batch import EncodedPair, PairBatch, collate, require_room
from ctlens.data.pairs import Prompt
from ctlens.losses import RMCT, Forwards
from ctlens.models.generation import Ids, Sampling, end_tokens, generate
from ctlens.models.hooks import run
from ctlens.threats.base import judge
from ctlens.training.config import TrainConfig


@dataclass(frozen=True)
class Drawn:
    """Drawn holds the graded answers of one step.

    Attributes:
        batch: one row per answer, which stands behind its wrapped prompt; the answers to one prompt are
            neighbours.
        advantages: the advantage of each row's answer.
        gaps: for each row, the rate of bad answers to its wrapped prompt minus the rate on its clean prompt.
    """

    batch: PairBatch
    advantages: PerRow
    gaps: PerRow

    def seen_by(self, model: LensModel) -> Forwards:
        """Runs the model on the answers and keeps the graph; equal answers run once."""
        distinct, index = self.batch.wrapped.tokens.unique(dim=0, return_inverse=True)
        logits = run(model, distinct)[index]
        return Forwards(self.batch, {}, {}, logits, advantages=self.advantages, gaps=self.gaps)


class Rollouts:
    """Rollouts draws and grades answers to the wrapped prompts of a training.

    A step's answers depend only on the seed, the step, its pairs and the weights.

    Args:
        reference: the model before training, in eval mode.
        pairs: all pairs of the training.
        loss: decides the number of answers per prompt and computes their advantages.
        config: gives the length of the longest answer, and the seed.

    Raises:
        CtlensError: a pair names no bad answer, or a prompt with an answer does not fit the context.
    """

    def __init__(self, reference: LensModel, pairs: Sequence[EncodedPair], loss: RMCT, config: TrainConfig) -> None:
        self.loss = loss
        self.config = config
        self.tokenizer = reference.tokenizer
        self.ends = end_tokens(reference)
        for row in pairs:
            if row.pair.wrapped.bad is None or row.pair.clean.bad is None:
                raise CtlensError("RMCT counts bad answers, and a pair names none: give every pair a bad answer.")
            longest = max(len(row.wrapped.ids), len(row.clean.ids))
            require_room(longest + config.max_new_tokens, reference.cfg.n_ctx, "a prompt with its answer")
        self._clean_rates: dict[tuple[Ids, Prompt], float] = {}
        if loss.clean == "reference":
            draw = generator(config.seed, "rollouts", "reference")
            self._clean_rates = self._measured(reference, pairs, draw)

    def draw(self, model: LensModel, rows: Sequence[EncodedPair], step: int, *part: int) -> Drawn:
        """Draws the answers of one step to the wrapped prompts of some pairs.

        Args:
            model: the trained model, in eval mode.
            rows: the pairs of the step.
            step: number of the step, from 1.
            part: number of the part, if the step's pairs come in several parts.
        """
        draw = generator(self.config.seed, "rollouts", step, *part)
        answers = self._sampled(model, [row.wrapped.ids for row in rows], draw)
        bad = torch.stack([self._bad(row.pair.wrapped, given) for row, given in zip(rows, answers, strict=True)])
        clean = self._measured(model, rows, draw) if self.loss.clean == "own" else self._clean_rates
        clean_rates = torch.tensor([clean[row.clean.ids, row.pair.clean] for row in rows])
        gaps = (bad.mean(-1) - clean_rates).repeat_interleave(self.loss.rollouts)
        answered = [
            replace(row, answer=answer, clean_answer=(), alignments={})
            for row, given in zip(rows, answers, strict=True)
            for answer in given
        ]
        device = next(model.parameters()).device
        advantages = self.loss.advantages(bad, clean_rates).flatten()
        return Drawn(collate(answered).to(device), advantages.to(device), gaps.to(device))

    def _measured(
        self, model: LensModel, rows: Sequence[EncodedPair], draw: torch.Generator
    ) -> dict[tuple[Ids, Prompt], float]:
        """Measures the rate of bad answers to each clean prompt; prompts of the same tokens share their answers."""
        prompts = list(dict.fromkeys(row.clean.ids for row in rows))
        answers = dict(zip(prompts, self._sampled(model, prompts, draw), strict=True))
        asked = {(row.clean.ids, row.pair.clean) for row in rows}
        return {(ids, prompt): float(self._bad(prompt, answers[ids]).mean()) for ids, prompt in asked}

    def _sampled(self, model: LensModel, prompts: Sequence[Ids], draw: torch.Generator) -> list[list[Ids]]:
        """Draws `loss.rollouts` answers to each prompt."""
        count = self.loss.rollouts
        given = generate(
            model,
            [ids for ids in prompts for _ in range(count)],
            max_new_tokens=self.config.max_new_tokens,
            ends=self.ends,
            sampling=Sampling(draw),
        )
        return [given[start : start + count] for start in range(0, len(given), count)]

    def _bad(self, prompt: Prompt, answers: Sequence[Ids]) -> torch.Tensor:
        """Grades answers: 1 for a bad answer, 0 for any other."""
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return torch.tensor([float(judge(prompt, text) == "bad") for text in texts])
