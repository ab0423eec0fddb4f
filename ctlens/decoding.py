"""Greedy decoding of many prompts at once, without a tokenizer call and without a KV cache.

Prompts are padded on the right, where causal attention cannot see the padding, so an answer
does not depend on its batch-mates. There is no KV cache because the native bridge of
TransformerLens has none and returns no error when asked for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ctlens.errors import CtlensError
from ctlens.types import LensModel

Ids = tuple[int, ...]


@torch.no_grad()
def generate(
    model: LensModel,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int = 16,
    end: int | None = None,
    batch_size: int = 128,
    progress: bool = False,
) -> list[Ids]:
    """The greedy continuation of each prompt, closed by the end token where the model gave it.

    Args:
        model: in eval mode.
        prompts: token ids, any lengths, no padding.
        max_new_tokens: an answer is cut here.
        end: the token that closes an answer; None for none.
        batch_size: prompts decoded together, in order of length.
        progress: show a progress bar when it takes more than two seconds.

    Raises:
        CtlensError: the model is in training mode, a prompt is empty or leaves no room in the context.
    """
    if model.training:
        raise CtlensError("decoding needs the model in eval mode: call model.eval() first.")
    _check(prompts, max_new_tokens, model.cfg.n_ctx)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Ids] = {}
    chunks = list(_chunks(order, batch_size))
    for chunk in tqdm(chunks, desc="answers", delay=2, leave=False, disable=not progress):
        continued = _continue(model, [prompts[i] for i in chunk], max_new_tokens, end)
        answers.update(zip(chunk, continued, strict=True))
    return [answers[i] for i in range(len(prompts))]


def _check(prompts: Sequence[Ids], max_new_tokens: int, n_ctx: int) -> None:
    longest = max(map(len, prompts), default=1)
    if longest + max_new_tokens > n_ctx:
        raise CtlensError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of {n_ctx}: "
            "shorten the prompt or lower max_new_tokens."
        )
    if any(not prompt for prompt in prompts):
        raise CtlensError("an empty prompt cannot be continued: give at least one token.")


def _chunks(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _continue(model: LensModel, prompts: list[Ids], max_new_tokens: int, end: int | None) -> list[Ids]:
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = torch.zeros(len(prompts), int(lengths.max()) + max_new_tokens, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    rows = torch.arange(len(prompts), device=device)
    for _ in range(max_new_tokens):
        active = rows[running]
        used = tokens[active, : int(lengths[active].max())]
        chosen = _last_logits(model, used, lengths[active]).argmax(-1)
        tokens[active, lengths[active]] = chosen
        lengths[active] += 1
        if end is not None:
            running[active] = chosen != end
        if not running.any():
            break
    return [tuple(tokens[row, len(prompts[row]) : int(lengths[row])].tolist()) for row in range(len(prompts))]


def _last_logits(model: LensModel, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    logits: Any = model(tokens)
    return logits[torch.arange(len(tokens), device=tokens.device), lengths - 1]
