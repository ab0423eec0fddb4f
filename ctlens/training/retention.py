"""Retention is the KL to the reference on prompts that must not change, with the reference's own answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ctlens.core.config import generator
from ctlens.core.keeping import once
from ctlens.core.types import LensModel, Mask, Scalar
from ctlens.data.batch import Side, moved, pad, require_room
from ctlens.data.chat import render
from ctlens.data.pairs import Pair, Prompt
from ctlens.losses.distances import kl_divergence
from ctlens.models.generation import Ids, end_tokens, generate
from ctlens.models.hooks import run
from ctlens.models.parameters import fingerprint
from ctlens.training.config import TrainConfig
from ctlens.training.order import parts


class Retention:
    """Retention is a pool of token sequences on which the trained model is held to the reference.

    The prompts of every step are drawn in advance, so the reference runs only on those that a step uses, and
    only once.

    Args:
        reference: the model before training, in eval mode whenever it runs.
        prompts: the prompts to hold; each is followed by the reference's greedy answer.
        config: the settings of the training.

    Raises:
        CtlensError: a prompt does not fit the context.
    """

    def __init__(self, reference: LensModel, prompts: Sequence[Prompt], config: TrainConfig) -> None:
        self.reference = reference
        self.config = config
        self.prompts = list(dict.fromkeys(render(reference.tokenizer, prompt.turns).ids for prompt in prompts))
        for ids in self.prompts:
            require_room(len(ids) + config.max_new_tokens, reference.cfg.n_ctx, "a retention prompt with its answer")
        shape = (config.steps, (config.batch_size + 1) // 2)
        chosen = torch.randint(len(self.prompts), shape, generator=generator(config.seed, "retention"))
        fires = torch.rand(config.steps, generator=generator(config.seed, "retention ratio")) < config.retention_ratio
        self._chosen = chosen
        self._fires = fires
        self.answers: dict[int, Ids] = {}
        self._targets: dict[int, Tensor] = {}

    @property
    def size(self) -> int:
        """The number of prompts in a step's batch."""
        return self._chosen.shape[1]

    def prepare(self, progress: bool = False) -> None:
        """Lets the reference answer every prompt that the training will use, once.

        Args:
            progress: show a progress bar when it takes more than two seconds.
        """
        used = self._chosen[self._fires].unique().tolist()
        if not used or self.answers:
            return
        self.answers, self._targets = once(
            lambda: (
                fingerprint(self.reference),
                tuple(self.prompts),
                tuple(used),
                self.size,
                self.config.max_new_tokens,
                self.config.cache,
            ),
            lambda: self._answered(used, progress),
        )

    def _answered(self, used: Sequence[int], progress: bool) -> tuple[dict[int, Ids], dict[int, Tensor]]:
        """Lets the reference answer some prompts; with the cache, returns its logits on the answers' tokens too."""
        asked = [self.prompts[index] for index in used]
        ends = end_tokens(self.reference)
        given = generate(self.reference, asked, max_new_tokens=self.config.max_new_tokens, ends=ends, progress=progress)
        answers = dict(zip(used, given, strict=True))
        targets: dict[int, Tensor] = {}
        for start in range(0, len(used) if self.config.cache else 0, self.size):
            chunk = used[start : start + self.size]
            found = self._reference_logits(*self._sequences(chunk, answers))
            targets |= dict(zip(chunk, found.cpu().split([len(answers[i]) for i in chunk]), strict=True))
        return answers, targets

    def terms(
        self, model: LensModel, step: int, share: Callable[[Sequence[int]], Sequence[int]] = tuple
    ) -> Iterator[Scalar]:
        """Yields `KL(reference || model)` in nats on the batch of a step, averaged over the answers' tokens.

        It yields `accumulate` parts that sum to the term, and nothing at a step without it. The prompts' own
        tokens are left out: a chat model never has to predict them, and to hold its predictions there would
        hold the very activations that internal losses have to move.

        Args:
            model: the trained model.
            step: number of the step, from 1.
            share: takes this process's part of the batch's prompts; by default all.
        """
        if not self._fires[step - 1]:
            return
        chosen = self._chosen[step - 1].tolist()
        tokens = sum(len(self.answers[index]) for index in chosen)
        for part in parts(share(chosen), self.config.accumulate):
            side, decides = self._sequences(part, self.answers)
            if self.config.cache:
                target = moved(torch.cat([self._targets[index] for index in part]), side.tokens.device)
            else:
                target = self._reference_logits(side, decides)
            yield answers_divergence(model, side, decides, target) / tokens

    def _sequences(self, chosen: Sequence[int], answers: dict[int, Ids]) -> tuple[Side, Mask]:
        """Puts the answers behind their prompts, and marks on the CPU what predicts a token of an answer."""
        side = pad([self.prompts[index] + answers[index] for index in chosen])
        lengths = torch.tensor([len(self.prompts[index]) for index in chosen])
        positions = torch.arange(side.mask.shape[1] - 1)
        decides = side.mask[:, 1:] & (positions >= lengths[:, None] - 1)
        return side.to(next(self.reference.parameters()).device), decides

    @torch.no_grad()
    def _reference_logits(self, side: Side, decides: Mask) -> Float[Tensor, "token d_vocab"]:
        return logits_before(self.reference, side, decides)


def answers_divergence(model: LensModel, side: Side, decides: Mask, target: Float[Tensor, "token d_vocab"]) -> Scalar:
    """Sums `KL(target || model)` in nats over the positions that predict a token of an answer.

    Args:
        model: the trained model.
        side: prompts with their answers.
        decides: `[batch, pos - 1]`, the positions that predict a token of an answer.
        target: the reference's logits there.
    """
    return kl_divergence(target, logits_before(model, side, decides)).sum()


def logits_before(model: LensModel, side: Side, decides: Mask) -> Float[Tensor, "token d_vocab"]:
    """The logits at the positions that predict a token of an answer, in rows' order; nothing else is unembedded."""
    return run(model, side.tokens, logits_at=F.pad(decides, (0, 1)))[0]


def held_prompts(pairs: Sequence[Pair], extra: Sequence[Prompt] = ()) -> list[Prompt]:
    """Lists the prompts that a training holds: the pairs' clean prompts and benign twins, and the `extra` prompts."""
    own = [prompt for pair in pairs for prompt in (pair.clean, pair.benign) if prompt is not None]
    return [*own, *extra]
