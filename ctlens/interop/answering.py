"""Requests of a tool to a model: many at once, each with its own settings, answered as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from ctlens.core.errors import CtlensError
from ctlens.core.public import at_work
from ctlens.core.types import LensModel
from ctlens.data.chat import Turn, render
from ctlens.data.pairs import Prompt
from ctlens.models.adopt import adopt
from ctlens.models.finite import forward
from ctlens.models.generation import Ids, Sampling, end_tokens, generate
from ctlens.models.scoring import choose

LONGEST = 2048
"""The longest answer, in tokens, to a request that names no length; what Inspect gives a HuggingFace model."""

StopReason = Literal["stop", "max_tokens", "model_length"]


@dataclass(frozen=True)
class AnswerRequest:
    """A request is a conversation that a model is to continue, and how.

    Attributes:
        turns: the conversation; a last assistant turn is the beginning of the answer.
        options: where there are any, the likeliest of these texts is the answer.
        max_new_tokens: length of the longest answer; None for `LONGEST`, or what the context holds.
        temperature: 0 takes the likeliest token.
        top_p: tokens are drawn from the fewest that are this likely together.
        seed: with one, the answer depends on the request alone; without, draws are new each time.
        stops: texts before which the answer ends.
        top_logprobs: how many of the likeliest tokens are scored beside the answer's own; None scores nothing.
    """

    turns: tuple[Turn, ...]
    options: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None


class TokenScore(NamedTuple):
    """A token with its log-probability at temperature 1, in nats, and the likeliest tokens in its position."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Answer:
    """An answer to a request.

    Attributes:
        text: without special tokens, and without white space at its ends.
        tokens: of the answer, with the end token where there is one.
        n_prompt_tokens: length of the rendered conversation.
        stop: why it ends: by itself or before a stop text, at the length asked for, or where the context ends.
        scores: of each token; None where none were asked for.
        shares: of each option, its probability among them.
    """

    text: str
    tokens: Ids
    n_prompt_tokens: int
    stop: StopReason
    scores: tuple[TokenScore, ...] | None = None
    shares: tuple[float, ...] = ()


def answer_requests(model: LensModel, requests: Sequence[AnswerRequest]) -> list[Answer]:
    """Answers requests; those of equal settings are decoded together.

    Args:
        model: in eval mode, with a tokenizer.
        requests: any number, see `checked`.

    Raises:
        CtlensError: a conversation cannot be rendered or leaves no room for an answer.
    """
    adopt(model)
    found: dict[int, Answer] = {}
    with at_work(model):
        chosen = [number for number, request in enumerate(requests) if request.options]
        found |= zip(chosen, _chosen(model, [requests[number] for number in chosen]), strict=True)
        groups: dict[tuple[object, ...], list[int]] = {}
        for number, request in enumerate(requests):
            if number not in found:
                alone = number if request.temperature and request.seed is not None else None
                settings = (_limit(model, request), request.temperature, request.top_p, alone)
                groups.setdefault(settings, []).append(number)
        for numbers in groups.values():
            found |= zip(numbers, _continued(model, [requests[number] for number in numbers]), strict=True)
    return [found[number] for number in range(len(requests))]


def request_ids(model: LensModel, request: AnswerRequest) -> Ids:
    """The tokens of a request's conversation.

    Raises:
        CtlensError: it cannot be rendered, or fills the context.
    """
    ids = render(model.tokenizer, request.turns).ids
    if len(ids) >= model.cfg.n_ctx:
        raise CtlensError(f"the prompt has {len(ids)} tokens and the context {model.cfg.n_ctx}: shorten the prompt.")
    return ids


def _limit(model: LensModel, request: AnswerRequest) -> int:
    """The tokens that an answer may have."""
    return min(request.max_new_tokens or LONGEST, model.cfg.n_ctx - len(request_ids(model, request)))


def _chosen(model: LensModel, requests: Sequence[AnswerRequest]) -> list[Answer]:
    """The likeliest option of each request, as `ctlens.evaluate` chooses; no text where two are equally likely."""
    found = []
    for request, choice in zip(
        requests, choose(model, [Prompt(request.turns, options=request.options) for request in requests]), strict=True
    ):
        shares = tuple(choice.share(option) for option in choice.options)
        found.append(Answer(choice.chosen or "", (), len(request_ids(model, request)), "stop", shares=shares))
    return found


def _continued(model: LensModel, requests: Sequence[AnswerRequest]) -> list[Answer]:
    """Continues conversations of equal settings."""
    first = requests[0]
    sampling = None
    if first.temperature:
        draws = torch.Generator()
        draws.seed() if first.seed is None else draws.manual_seed(first.seed)
        sampling = Sampling(draws, first.temperature, first.top_p)
    prompts = [request_ids(model, request) for request in requests]
    ends = end_tokens(model)
    limit = _limit(model, first)
    answers = generate(model, prompts, max_new_tokens=limit, ends=ends, sampling=sampling)
    return [
        _ended(model, request, ids, tokens, limit)
        for request, ids, tokens in zip(requests, prompts, answers, strict=True)
    ]


def _ended(model: LensModel, request: AnswerRequest, ids: Ids, tokens: Ids, limit: int) -> Answer:
    """An answer, cut before the first of its stop texts."""
    text = _text(model, tokens)
    stop: StopReason = "stop"
    if tokens[-1] not in end_tokens(model):
        stop = "max_tokens" if limit in (request.max_new_tokens, LONGEST) else "model_length"
    starts = [text.index(end) for end in request.stops if end in text]
    if starts:
        stop = "stop"
        kept = range(1, len(tokens) + 1)
        tokens = tokens[: next(n for n in kept if any(end in _text(model, tokens[:n]) for end in request.stops))]
        text = text[: min(starts)]
    scores = None
    if request.top_logprobs is not None:
        scores = _scores(model, ids, tokens, request.top_logprobs)
    return Answer(text.strip(), tokens, len(ids), stop, scores)


def _text(model: LensModel, tokens: Ids) -> str:
    return model.tokenizer.decode(tokens, skip_special_tokens=True)


@torch.no_grad()
def _scores(model: LensModel, ids: Ids, tokens: Ids, n_top: int) -> tuple[TokenScore, ...]:
    """The scores of an answer's tokens, from one pass over all that is in front of the last."""
    row = torch.tensor([ids + tokens[:-1]], device=next(model.parameters()).device)
    predicting = torch.arange(row.shape[1], device=row.device)[None] >= len(ids) - 1
    found = forward(model, row, logits_at=predicting)[0].float().log_softmax(-1)
    likeliest = found.topk(n_top, dim=-1)
    scores = []
    for position, token in enumerate(tokens):
        best = zip(likeliest.indices[position].tolist(), likeliest.values[position].tolist(), strict=True)
        top = tuple((_token(model, one), value) for one, value in best)
        scores.append(TokenScore(_token(model, token), float(found[position, token]), top))
    return tuple(scores)


def _token(model: LensModel, token: int) -> str:
    return model.tokenizer.decode([token], clean_up_tokenization_spaces=False)
