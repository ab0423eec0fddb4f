"""Decoding of many prompts at once, from tokens to tokens: each prompt is run once, then one token per pass.

An answer does not depend on its batch-mates (`ctlens.models.kv_cache`). Where a model's key-value cache
cannot be used, every pass runs the whole sequences.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctlens.core.errors import CtlensError
from ctlens.core.limits import POSITIVE, PROBABILITY, require
from ctlens.core.progress import progress_bar
from ctlens.core.types import LensModel
from ctlens.data.chat import end_token
from ctlens.models.bridges import generation_config
from ctlens.models.kv_cache import MAX_BATCH_TOKENS, Begin, Ids, NextLogits, Sequences, batches_by_length, begin
from ctlens.models.sharding import in_step

NextTokens: TypeAlias = Int[Tensor, " batch"]
NextShares: TypeAlias = Float[Tensor, "batch d_vocab"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn instead of taken greedily.

    Attributes:
        generator: decides them; on the CPU, whatever the model's device.
        temperature: what logits are divided by before the softmax.
        top_p: tokens are drawn from the fewest that are this likely together, the nucleus
            (Holtzman et al. 2020, arXiv 1904.09751); 1 for all tokens.
    """

    generator: torch.Generator
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require(POSITIVE, temperature=self.temperature)
        require(PROBABILITY, top_p=self.top_p)

    def draw(self, logits: NextLogits) -> NextTokens:
        """Draws one token per row."""
        shares = next_shares(logits, self.temperature, self.top_p)
        return torch.multinomial(shares, 1, generator=self.generator)[:, 0].to(logits.device)


def next_shares(logits: NextLogits, temperature: float, top_p: float) -> NextShares:
    """The shares, on the CPU, by which the next token is drawn; those of a nucleus sum to less than 1."""
    shares = (logits.float() / temperature).softmax(-1).cpu()
    if top_p == 1:
        return shares
    ranked, tokens = shares.sort(-1, descending=True)
    likelier = ranked.cumsum(-1) - ranked
    return torch.zeros_like(shares).scatter(-1, tokens, ranked.where(likelier < top_p, 0.0))


@dataclass(frozen=True)
class Decoded:
    """A model's continuations of prompts.

    Attributes:
        answers: per prompt, the tokens that the model gave, with the end token where it gave one.
        first_probabilities: per prompt, the probability of each of its `first_tokens`.
    """

    answers: list[Ids]
    first_probabilities: list[tuple[float, ...]]


def end_tokens(model: LensModel) -> list[int]:
    """Lists the tokens that end a model's answer: the one that closes a turn, and all of its generation settings.

    Llama-3, Qwen2.5 and Phi-3 name several there; a chat template uses one of them.
    """
    named = getattr(generation_config(model), "eos_token_id", None)
    several = named if isinstance(named, Sequence) else [named]
    return sorted({end_token(model.tokenizer), *several} - {None})


def generate(
    model: LensModel,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int = 16,
    ends: Collection[int] = (),
    sampling: Sampling | None = None,
    progress: bool = False,
) -> list[Ids]:
    """Continues each prompt, as `decode`, and returns the answers alone."""
    found = decode(model, prompts, max_new_tokens=max_new_tokens, ends=ends, sampling=sampling, progress=progress)
    return found.answers


@torch.no_grad()
def decode(
    model: LensModel,
    prompts: Sequence[Ids],
    *,
    first_tokens: Sequence[Ids] | None = None,
    max_new_tokens: int = 16,
    ends: Collection[int] = (),
    sampling: Sampling | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    progress: bool = False,
    begin: Begin = begin,
) -> Decoded:
    """Continues each prompt, and says how likely the answer was to begin with given tokens.

    Hooks on the model see a prompt once and, where there is a cache, then one new token at a time;
    equal prompts that are decoded together are one prompt until their answers begin.

    Args:
        model: in eval mode.
        prompts: token ids, any lengths, no padding.
        first_tokens: per prompt, any number of tokens whose probability of opening the answer is
            wanted; they come from the pass that the answer needs anyway.
        max_new_tokens: an answer is cut here.
        ends: the tokens of which any closes an answer, as `end_tokens` lists them.
        sampling: draws the tokens; None takes the likeliest (greedy).
        max_batch_tokens: prompts are decoded together, in order of length, up to so many tokens with padding.
        progress: show a progress bar when it takes more than two seconds.
        begin: runs the prompts.

    Raises:
        CtlensError: the model is in training mode, a prompt is empty or leaves no room in the context.
    """
    if model.training:
        raise CtlensError("decoding needs the model in eval mode: call model.eval() first.")
    _check(prompts, max_new_tokens, model.cfg.n_ctx)
    wanted = first_tokens or [()] * len(prompts)
    answers: list[Ids] = [()] * len(prompts)
    probabilities: list[tuple[float, ...]] = [()] * len(prompts)
    together = list(batches_by_length(model, [len(prompt) for prompt in prompts], max_new_tokens, max_batch_tokens))
    with in_step(model):
        for batch in progress_bar(together, desc="answers", delay=2, leave=False, shown=progress):
            distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts[i] for i in batch))}
            sequences, logits = begin(model, list(distinct))
            if len(distinct) < len(batch):
                rows = torch.tensor([distinct[prompts[i]] for i in batch], device=logits.device)
                sequences.keep(rows)
                logits = logits[rows]
            first = _first_probabilities(logits, [wanted[i] for i in batch])
            continued = _continue(sequences, logits, max_new_tokens, ends, sampling)
            for i, answer, probability in zip(batch, continued, first, strict=True):
                answers[i] = answer
                probabilities[i] = probability
    return Decoded(answers, probabilities)


def _check(prompts: Sequence[Ids], max_new_tokens: int, n_ctx: int) -> None:
    longest = max(map(len, prompts), default=1)
    if longest + max_new_tokens > n_ctx:
        raise CtlensError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of {n_ctx}: "
            "shorten the prompt or lower max_new_tokens."
        )
    if any(not prompt for prompt in prompts):
        raise CtlensError("an empty prompt cannot be continued: give at least one token.")


def _first_probabilities(logits: NextLogits, wanted: Sequence[Ids]) -> list[tuple[float, ...]]:
    rows = [row for row, tokens in enumerate(wanted) for _ in tokens]
    columns = [token for tokens in wanted for token in tokens]
    found = iter(logits.float().softmax(-1)[rows, columns].tolist())
    return [tuple(next(found) for _ in tokens) for tokens in wanted]


def _continue(
    sequences: Sequences, logits: NextLogits, max_new_tokens: int, ends: Collection[int], sampling: Sampling | None
) -> list[Ids]:
    answers: list[list[int]] = [[] for _ in logits]
    running = list(range(len(answers)))
    closing = torch.tensor(sorted(ends), dtype=torch.long, device=logits.device)
    for remaining in reversed(range(max_new_tokens)):
        chosen = sampling.draw(logits) if sampling else logits.argmax(-1)
        for row, token in zip(running, chosen.tolist(), strict=True):
            answers[row].append(token)
        goes_on = ~torch.isin(chosen, closing)
        running = [row for row, goes in zip(running, goes_on.tolist(), strict=True) if goes]
        if not running or not remaining:
            break
        if not goes_on.all():
            sequences.keep(goes_on)
        chosen = chosen[goes_on]
        logits = sequences.extend(chosen[:, None], torch.ones_like(chosen))[:, -1]
    return [tuple(answer) for answer in answers]
