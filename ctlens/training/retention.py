"""Holding behaviour that should not change: KL to the reference on prompts and the reference's own answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ctlens.batch import pad, require_room
from ctlens.chat import render
from ctlens.decoding import Ids, generate
from ctlens.hooks import run
from ctlens.losses.distances import kl_divergence
from ctlens.pairs import Pair, Prompt
from ctlens.types import LensModel, Scalar


class Retention:
    """A pool of token sequences on which the trained model is held to the reference.

    Args:
        reference: the model before training, in eval mode.
        prompts: what to hold; each is followed by the reference's greedy answer, generated when it
            is first drawn.
        answer_tokens: longest answer, in tokens.

    Raises:
        CtlensError: a prompt does not fit the context.
    """

    def __init__(self, reference: LensModel, prompts: Sequence[Prompt], answer_tokens: int) -> None:
        self.reference, self.answer_tokens = reference, answer_tokens
        self.prompts = list(dict.fromkeys(render(reference.tokenizer, prompt.turns).ids for prompt in prompts))
        self._answers: dict[int, Ids] = {}
        for ids in self.prompts:
            require_room(len(ids) + answer_tokens, reference.cfg.n_ctx, "a retention prompt with its answer")

    def loss(self, model: LensModel, batch_size: int, draw: torch.Generator) -> Scalar:
        """`KL(reference || model)` in nats on a random batch, averaged over the answers' tokens.

        The prompts' own tokens are left out: a chat model is never asked to predict them, and holding
        its guesses there would hold the very activations that internal losses are to move.

        Args:
            model: the trained model.
            batch_size: sequences, drawn with replacement.
            draw: decides which.
        """
        chosen = torch.randint(len(self.prompts), (batch_size,), generator=draw).tolist()
        device = next(model.parameters()).device
        side = pad([self.prompts[index] + self.answer(index, chosen) for index in chosen]).to(device)
        lengths = torch.tensor([len(self.prompts[index]) for index in chosen], device=device)
        decides = side.mask[:, 1:] & (torch.arange(side.mask.shape[1] - 1, device=device) >= lengths[:, None] - 1)
        with torch.no_grad():
            target = run(self.reference, side.tokens)[:, :-1][decides]
        return kl_divergence(target, run(model, side.tokens)[:, :-1][decides]).mean()

    def answer(self, index: int, together: Iterable[int] = ()) -> Ids:
        """The reference's answer to one prompt; those to the prompts drawn `together` are generated with it."""
        missing = sorted({index, *together} - self._answers.keys())
        if index in missing:
            end = self.reference.tokenizer.eos_token_id
            asked = [self.prompts[number] for number in missing]
            given = generate(self.reference, asked, max_new_tokens=self.answer_tokens, end=end)
            self._answers.update(zip(missing, given, strict=True))
        return self._answers[index]


def held_prompts(pairs: Sequence[Pair], extra: Sequence[Prompt] = ()) -> list[Prompt]:
    """The prompts a training holds: the pairs' clean prompts and benign twins, and `extra` ones."""
    own = [prompt for pair in pairs for prompt in (pair.clean, pair.benign) if prompt is not None]
    return [*own, *extra]
