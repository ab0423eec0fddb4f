"""Contrasts: the good and the bad answer as two tokens after one prompt, whose logits are compared.

A `Contrast` serves analyses of one linear number, the difference of two logits: the logit lens, attribution,
patching, gradients. It takes one forward pass and can be differentiated, but of two long answers it sees only the
token at which they part. `steer` and `ablate` judge by the log-probabilities of whole answers instead, see
`ctlens.analysis.directions.edited_answers`. For answers of one token each, both are the same number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctlens.core.errors import CtlensError, located
from ctlens.core.progress import progress_bar
from ctlens.core.types import LensModel, PerRow
from ctlens.data.batch import EncodedPair, RowPositions, Side, pad, require_room
from ctlens.data.chat import Rendered, answer_ids, render
from ctlens.data.pairs import Pair, Prompt
from ctlens.models.generation import Ids
from ctlens.models.hooks import run

TokenPair = Int[Tensor, "batch 2"]


@dataclass(frozen=True)
class Contrast:
    """A prompt up to where its good and its bad answer part, and the next token of each.

    Answers that begin alike part only after their common tokens, which then belong to the prompt:
    else the difference would be that of a token with itself.

    Attributes:
        prompt: token ids.
        good, bad: token ids.
    """

    prompt: tuple[int, ...]
    good: int
    bad: int


def two_answers(tokenizer: Any, prompt: Prompt, asked: Rendered, whose: str, *, end: bool) -> tuple[Ids, Ids]:
    """The tokens of the good and of the bad answer behind a prompt.

    Args:
        tokenizer: the model's.
        prompt: with both answers.
        asked: the same prompt, rendered.
        whose: the prompt in words, for the refusal.
        end: closed by the tokenizer's end token, where it has one.

    Raises:
        CtlensError: it names no good or no bad answer, or both are the same, or as `answer_ids`.
    """
    if not prompt.good or not prompt.bad or prompt.good == prompt.bad:
        raise CtlensError(f"{whose} names no good and bad answer that differ: give both, or leave it out.")
    with located(whose):
        return answer_ids(tokenizer, asked, prompt.good, end=end), answer_ids(tokenizer, asked, prompt.bad, end=end)


def contrasts(model: LensModel, pairs: Sequence[Pair], side: str = "wrapped") -> list[Contrast]:
    """The contrast of every pair on one side.

    Args:
        model: for its tokenizer and context.
        pairs: with the good and the bad answer of that side.
        side: a prompt side of the pairs, see `ctlens.data.pairs.PROMPT_SIDES`.

    Raises:
        CtlensError: a pair lacks an answer or that side, both answers are the same, or a prompt is too long.
        UnknownWords: the tokenizer does not know a word of a prompt or of its answers.
    """
    found = []
    for number, pair in enumerate(pairs, start=1):
        prompt = pair.side(side)
        whose = f"the {side} prompt of pair {number}"
        if prompt is None:
            raise CtlensError(f"pair {number} has no {side} prompt: give one, or leave it out.")
        with located(whose):
            asked = render(model.tokenizer, prompt.turns)
        found.append(contrast_of(model, prompt, asked, whose))
    return found


def encoded_contrasts(model: LensModel, rows: Sequence[EncodedPair], side: str = "wrapped") -> list[Contrast]:
    """Finds the contrast of every encoded pair on one side, `"clean"` or `"wrapped"`; raises as `contrasts`."""
    return [
        contrast_of(model, getattr(row.pair, side), getattr(row, side), f"the {side} prompt of pair {number}")
        for number, row in enumerate(rows, start=1)
    ]


def contrast_of(model: LensModel, prompt: Prompt, asked: Rendered, whose: str) -> Contrast:
    """The contrast of one rendered prompt, which `whose` names in a refusal; raises as `contrasts`."""
    good, bad = two_answers(model.tokenizer, prompt, asked, whose, end=True)
    alike = _alike(good, bad)
    if alike == min(len(good), len(bad)):
        raise CtlensError(
            f"the answers of {whose} do not part, as one begins the other or both are equal: {prompt.good!r}, "
            f"{prompt.bad!r}; give answers that part."
        )
    begun = (*asked.ids, *good[:alike])
    require_room(len(begun), model.cfg.n_ctx, whose)
    return Contrast(begun, good[alike], bad[alike])


def up_to_contrast(tokenizer: Any, prompt: Prompt, asked: Rendered) -> Ids:
    """The tokens of a prompt up to where its answers part; the prompt's alone if it has no two answers that part."""
    if not prompt.good or not prompt.bad:
        return asked.ids
    good = answer_ids(tokenizer, asked, prompt.good)
    bad = answer_ids(tokenizer, asked, prompt.bad)
    alike = _alike(good, bad)
    return (*asked.ids, *good[:alike]) if alike < min(len(good), len(bad)) else asked.ids


def _alike(good: Ids, bad: Ids) -> int:
    """Counts the tokens that both answers share at their beginning."""
    return len(list(takewhile(lambda ends: ends[0] == ends[1], zip(good, bad, strict=False))))


@dataclass(frozen=True)
class ContrastBatch:
    """Contrasts as tensors.

    Attributes:
        side: the prompts, padded on the right.
        last: per row, the position that predicts the answers' tokens.
        answers: the good and the bad token of each row.
    """

    side: Side
    last: RowPositions
    answers: TokenPair

    def at_last(self, activation: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch ..."]:
        """The activation at the position that predicts the answers."""
        return activation[torch.arange(len(self.last), device=self.last.device), self.last]

    def logit_diff(self, logits: Float[Tensor, "batch d_vocab"]) -> PerRow:
        """The good token's logit minus the bad one's."""
        good, bad = logits.gather(-1, self.answers).unbind(-1)
        return good - bad


@torch.no_grad()
def logit_diffs(model: LensModel, batches: Iterable[ContrastBatch]) -> Float[np.ndarray, " prompt"]:
    """The logit difference, good answer minus bad, behind every prompt of some batches, from one pass over each."""
    found: list[np.ndarray] = []
    for batch in batches:
        logits = batch.at_last(run(model, batch.side.tokens, batch.side.needed_mask))
        found.append(batch.logit_diff(logits).float().cpu().numpy())
    return np.concatenate(found) if found else np.empty(0)


def contrast_batches(
    model: LensModel, items: Sequence[Contrast], batch_size: int, progress: bool
) -> Iterator[ContrastBatch]:
    """Yields contrasts in their order, as batches on the model's device."""
    device = next(model.parameters()).device
    for start in progress_bar(range(0, len(items), batch_size), desc="forward", shown=progress, leave=False):
        chosen = items[start : start + batch_size]
        last = torch.tensor([len(item.prompt) - 1 for item in chosen], device=device)
        answers = torch.tensor([(item.good, item.bad) for item in chosen], device=device)
        yield ContrastBatch(pad([item.prompt for item in chosen]).to(device), last, answers)
