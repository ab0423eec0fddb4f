"""Scoring: the log-probability that a model gives to continuations of a prompt, whole and token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from os.path import commonprefix
from typing import Any

import torch

from ctlens.core.errors import CtlensError
from ctlens.core.progress import progress_bar
from ctlens.core.types import LensModel
from ctlens.data.batch import pad, require_room
from ctlens.data.chat import render, with_answer
from ctlens.data.pairs import Prompt
from ctlens.models.kv_cache import (
    MAX_BATCH_TOKENS,
    Begin,
    Ids,
    NextLogits,
    Sequences,
    batches_by_length,
    begin,
    has_cache,
)

TIE = 1e-4  # nats; what the rounding of float32 may do to equal options in batches of other shapes


@dataclass(frozen=True)
class Choice:
    """A model's scores of the options of a multiple-choice question.

    Attributes:
        options: the answers, as the prompt names them.
        log_probabilities: of each whole option behind the prompt, in nats.
        lengths: tokens that were scored for it.
    """

    options: tuple[str, ...]
    log_probabilities: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def chosen(self) -> str | None:
        """The likeliest option; None where another is within `TIE` of it, so that their order decides nothing."""
        (best, option), (second, _), *_ = sorted(zip(self.log_probabilities, self.options, strict=True), reverse=True)
        return option if best - second > TIE else None

    @property
    def per_token(self) -> Choice:
        """The same by the mean log-probability of an option's tokens, by which long options are not at a loss."""
        means = tuple(total / length for total, length in zip(self.log_probabilities, self.lengths, strict=True))
        return Choice(self.options, means, self.lengths)

    def share(self, option: str | None) -> float:
        """The probability of one option among all of them; NaN for an option that is not there."""
        if option not in self.options:
            return float("nan")
        return float(torch.tensor(self.log_probabilities, dtype=torch.float64).softmax(0)[self.options.index(option)])


def choose(
    model: LensModel,
    prompts: Sequence[Prompt],
    *,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    progress: bool = False,
    begin: Begin = begin,
) -> list[Choice]:
    """Scores every option of multiple-choice prompts by the log-probability of all its tokens, not of the first alone.

    An option is tokenised together with the prompt. Where its beginning fuses with the prompt's end,
    what is scored begins at the token where the options and the prompt go apart, for all of them.

    Args:
        model: in eval mode, with a tokenizer.
        prompts: with options, each taken as it stands, with its leading space if it has one.
        max_batch_tokens: as of `continuation_logprobs`.
        progress: show a progress bar when it takes more than two seconds.
        begin: runs the prompts.

    Raises:
        CtlensError: the model is in training mode, a prompt has no options or does not fit the
            context, or an option is the beginning of another, which it would always beat.
    """
    asked = {prompt: _parts(model.tokenizer, prompt) for prompt in dict.fromkeys(prompts)}
    before, options = [ids for ids, _ in asked.values()], [given for _, given in asked.values()]
    passes = {"max_batch_tokens": max_batch_tokens, "progress": progress, "begin": begin}
    found = continuation_logprobs(model, before, options, **passes)
    choices = {
        prompt: Choice(prompt.options, tuple(map(sum, rows)), tuple(map(len, rows)))
        for prompt, rows in zip(asked, found, strict=True)
    }
    return [choices[prompt] for prompt in prompts]


def _parts(tokenizer: Any, prompt: Prompt) -> tuple[Ids, list[Ids]]:
    """The tokens of the prompt that come before those of all its options, and what follows with each."""
    if not prompt.options:
        raise CtlensError("a prompt has no options to choose from: give it options, or let the model answer freely.")
    rendered = render(tokenizer, prompt.turns)
    whole = [with_answer(tokenizer, rendered, option).ids for option in prompt.options]
    start = len(commonprefix([rendered.ids, *whole]))
    if not start:
        raise CtlensError("an option fuses with all of its prompt, so that no token predicts it: give a longer prompt.")
    rest = [ids[start:] for ids in whole]
    for (one, short), (other, long) in combinations(sorted(zip(prompt.options, rest, strict=True), key=_length), 2):
        if long[: len(short)] == short:
            raise CtlensError(
                f"the option {one!r} is the beginning of {other!r}, which it would always beat: "
                "close both, for example with a full stop."
            )
    return rendered.ids[:start], rest


def _length(option: tuple[str, Ids]) -> int:
    return len(option[1])


@torch.no_grad()
def continuation_logprobs(
    model: LensModel,
    prompts: Sequence[Ids],
    continuations: Sequence[Sequence[Ids]],
    *,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    progress: bool = False,
    begin: Begin = begin,
) -> list[list[tuple[float, ...]]]:
    """The log-probability of every token of every continuation, given the prompt and those before it, in nats.

    Where the model has a key-value cache, a prompt is run once for all its continuations.

    Args:
        model: in eval mode.
        prompts: token ids, any lengths, no padding.
        continuations: per prompt, any number of token sequences, at least one token each.
        max_batch_tokens: prompts are run together, in order of length, up to so many tokens with padding.
        progress: show a progress bar when it takes more than two seconds.
        begin: runs the prompts.

    Returns:
        Per prompt, per continuation, one number per token.

    Raises:
        CtlensError: the model is in training mode, a prompt or continuation is empty, or both do not fit the context.
    """
    if model.training:
        raise CtlensError("scoring needs the model in eval mode: call model.eval() first.")
    if not all(prompts) or not all(all(given) for given in continuations):
        raise CtlensError("a prompt and a continuation need at least one token each: leave the empty ones out.")
    longest = [max(map(len, given), default=0) for given in continuations]
    for ids, new in zip(prompts, longest, strict=True):
        require_room(len(ids) + new, model.cfg.n_ctx, "a prompt with its option")
    copies = 1 if has_cache(model) else max(map(len, continuations), default=1)
    lengths = [len(ids) for ids in prompts]
    together = list(batches_by_length(model, lengths, max(longest, default=0), max_batch_tokens // max(copies, 1)))
    found: list[list[tuple[float, ...]]] = [[] for _ in prompts]
    for batch in progress_bar(together, desc="options", delay=2, leave=False, shown=progress):
        sequences, logits = begin(model, [prompts[i] for i in batch])
        rows = _batch_logprobs(sequences, logits, [continuations[i] for i in batch])
        for i, values in zip(batch, rows, strict=True):
            found[i] = values
    return found


def _batch_logprobs(
    sequences: Sequences, logits: NextLogits, continuations: Sequence[Sequence[Ids]]
) -> list[list[tuple[float, ...]]]:
    first = logits.float().log_softmax(-1)
    longer = [(row, ids) for row, given in enumerate(continuations) for ids in given if len(ids) > 1]
    rest = iter(_rest_logprobs(sequences, [row for row, _ in longer], [ids for _, ids in longer]) if longer else ())
    return [
        [(float(first[row, ids[0]]), *(next(rest) if len(ids) > 1 else ())) for ids in given]
        for row, given in enumerate(continuations)
    ]


def _rest_logprobs(sequences: Sequences, rows: Sequence[int], continuations: Sequence[Ids]) -> list[list[float]]:
    """The log-probabilities of all tokens but the first of continuations of these rows."""
    device = sequences.tokens.device
    sequences.keep(torch.tensor(rows, device=device))
    known = pad([ids[:-1] for ids in continuations]).to(device)
    wanted = pad([ids[1:] for ids in continuations]).to(device)
    logits = sequences.extend(known.tokens, known.mask.sum(-1))
    found = logits.float().log_softmax(-1).gather(-1, wanted.tokens[..., None])[..., 0]
    return [values[: len(ids) - 1] for values, ids in zip(found.tolist(), continuations, strict=True)]
