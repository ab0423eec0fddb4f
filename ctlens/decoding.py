"""Decoding of many prompts at once, without a tokenizer call: each prompt is run once, then one token a pass.

Prompts of similar length are decoded together, and padding is masked from the tokens that follow, so an
answer does not depend on its batch-mates. HuggingFace models have HuggingFace's key-value cache, whose
sliding windows count places: they are padded on the left. Models made here are padded on the right; the
native bridge of TransformerLens 4.x, which has no cache, runs whole sequences in every pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import DynamicCache

from ctlens.batch import pad
from ctlens.errors import CtlensError
from ctlens.models import empty_cache, huggingface_config, keep_rows
from ctlens.types import ChosenRows, LensModel, Logits, Mask, RowNumbers, Tokens

Ids = tuple[int, ...]
NextLogits: TypeAlias = Float[Tensor, "batch d_vocab"]
NextTokens: TypeAlias = Int[Tensor, "batch"]

# On a CPU more tokens at once leave its caches and take longer; measured in benchmarks/evaluation.py.
TOKENS_A_PASS = 2048
NO_END = -1


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn instead of taken greedily.

    Attributes:
        generator: decides them; on the CPU, whatever the model's device.
        temperature: what logits are divided by before the softmax.
    """

    generator: torch.Generator
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise CtlensError(f"the temperature must be a positive number, not {self.temperature}.")

    def draw(self, logits: NextLogits) -> NextTokens:
        """One token a row."""
        shares = (logits.float() / self.temperature).softmax(-1).cpu()
        return torch.multinomial(shares, 1, generator=self.generator)[:, 0].to(logits.device)


@dataclass(frozen=True)
class Decoded:
    """What a model continues prompts with.

    Attributes:
        answers: per prompt, the tokens given, closed by the end token where the model gave it.
        first_probabilities: per prompt, the probability of each of its `first_tokens`.
    """

    answers: list[Ids]
    first_probabilities: list[tuple[float, ...]]


def generate(
    model: LensModel,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int = 16,
    end: int | None = None,
    sampling: Sampling | None = None,
    progress: bool = False,
) -> list[Ids]:
    """The answers of `decode` alone."""
    found = decode(model, prompts, max_new_tokens=max_new_tokens, end=end, sampling=sampling, progress=progress)
    return found.answers


@torch.no_grad()
def decode(
    model: LensModel,
    prompts: Sequence[Ids],
    *,
    first_tokens: Sequence[Ids] | None = None,
    max_new_tokens: int = 16,
    end: int | None = None,
    sampling: Sampling | None = None,
    tokens_a_pass: int = TOKENS_A_PASS,
    progress: bool = False,
) -> Decoded:
    """The continuation of each prompt, and how likely it was to begin with given tokens.

    Hooks on the model see a prompt once and, where there is a cache, then one new token at a time;
    equal prompts that are decoded together are one prompt until their answers begin.

    Args:
        model: in eval mode.
        prompts: token ids, any lengths, no padding.
        first_tokens: per prompt, any number of tokens whose probability of opening the answer is
            wanted; they come from the pass that the answer needs anyway.
        max_new_tokens: an answer is cut here.
        end: the token that closes an answer; None for none.
        sampling: draws the tokens; None takes the likeliest (greedy).
        tokens_a_pass: prompts are decoded together, in order of length, up to so many tokens with padding.
        progress: show a progress bar when it takes more than two seconds.

    Raises:
        CtlensError: the model is in training mode, a prompt is empty or leaves no room in the context.
    """
    if model.training:
        raise CtlensError("decoding needs the model in eval mode: call model.eval() first.")
    _check(prompts, max_new_tokens, model.cfg.n_ctx)
    wanted = first_tokens or [()] * len(prompts)
    answers: list[Ids] = [()] * len(prompts)
    probabilities: list[tuple[float, ...]] = [()] * len(prompts)
    batches = list(batches_of([len(prompt) for prompt in prompts], tokens_a_pass))
    for batch in tqdm(batches, desc="answers", delay=2, leave=False, disable=not progress):
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts[i] for i in batch))}
        sequences = _sequences(model, list(distinct))
        logits = sequences.run()
        if len(distinct) < len(batch):
            places = torch.tensor([distinct[prompts[i]] for i in batch], device=logits.device)
            logits = sequences.repeat(logits, places)
        first = _first_probabilities(logits, [wanted[i] for i in batch])
        continued = _continue(sequences, logits, max_new_tokens, NO_END if end is None else end, sampling)
        for i, answer, probability in zip(batch, continued, first, strict=True):
            answers[i], probabilities[i] = answer, probability
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


def batches_of(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Numbers of prompts in order of length, as many as fill `tokens` when padded to the longest; at least one."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        if batch and (len(batch) + 1) * lengths[number] > tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _first_probabilities(logits: NextLogits, wanted: Sequence[Ids]) -> list[tuple[float, ...]]:
    rows = [row for row, tokens in enumerate(wanted) for _ in tokens]
    columns = [token for tokens in wanted for token in tokens]
    found = iter(logits.float().softmax(-1)[rows, columns].tolist())
    return [tuple(next(found) for _ in tokens) for tokens in wanted]


def _continue(
    sequences: _Sequences, logits: NextLogits, max_new_tokens: int, end: int, sampling: Sampling | None
) -> list[Ids]:
    answers: list[list[int]] = [[] for _ in logits]
    running = list(range(len(answers)))
    for remaining in reversed(range(max_new_tokens)):
        chosen = sampling.draw(logits) if sampling else logits.argmax(-1)
        for row, token in zip(running, chosen.tolist(), strict=True):
            answers[row].append(token)
        goes_on = chosen != end
        running = [row for row, goes in zip(running, goes_on.tolist(), strict=True) if goes]
        if not running or not remaining:
            break
        sequences.keep(goes_on)
        logits = sequences.extend(chosen[goes_on])
    return [tuple(answer) for answer in answers]


def _sequences(model: LensModel, prompts: Sequence[Ids]) -> _Sequences:
    return _Sequences(model, prompts) if huggingface_config(model) is None else _HuggingFaceSequences(model, prompts)


class _Sequences:
    """Growing sequences of one batch, padded on the right, with a cache of what was run where the model has one."""

    def __init__(self, model: LensModel, prompts: Sequence[Ids]) -> None:
        device = next(model.parameters()).device
        self.model = model
        self.tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.cache = empty_cache(model, len(prompts))

    def run(self) -> NextLogits:
        """The logits of each row's next token, from all its tokens."""
        tokens = self.tokens[:, : int(self.lengths.max())]
        logits = self._forward(tokens, torch.arange(tokens.shape[1], device=tokens.device) < self.lengths[:, None])
        return logits[torch.arange(len(tokens), device=tokens.device), self.lengths - 1]

    def extend(self, chosen: NextTokens) -> NextLogits:
        """Appends a token to each row; the logits of the next one."""
        if self.cache is not None:
            return self._forward(chosen[:, None], torch.ones_like(chosen[:, None], dtype=torch.bool))[:, -1]
        self.tokens = torch.cat([self.tokens, torch.zeros_like(chosen[:, None])], dim=1)
        self.tokens[torch.arange(len(chosen), device=chosen.device), self.lengths] = chosen
        self.lengths += 1
        return self.run()

    def repeat(self, logits: NextLogits, places: RowNumbers) -> NextLogits:
        """Puts copies of the rows at these places; the logits go with them."""
        if self.cache is not None:
            keep_rows(self.cache, places)
        self.tokens, self.lengths = self.tokens[places], self.lengths[places]
        return logits[places]

    def keep(self, rows: ChosenRows) -> None:
        """Drops the other rows."""
        if rows.all():
            return
        if self.cache is not None:
            keep_rows(self.cache, rows)
        self.tokens, self.lengths = self.tokens[rows], self.lengths[rows]

    def _forward(self, tokens: Tokens, real: Mask) -> Logits:
        cached: dict[str, Any] = {"past_kv_cache": self.cache, "attention_mask": real.long()}
        return self.model(tokens, **(cached if self.cache is not None else {}))


class _HuggingFaceSequences(_Sequences):
    """The same for a HuggingFace model: padded on the left, with HuggingFace's cache, whatever its layers keep."""

    def __init__(self, model: LensModel, prompts: Sequence[Ids]) -> None:
        side = pad(prompts, "left").to(next(model.parameters()).device)
        self.model, self.tokens, self.mask = model, side.tokens, side.mask
        self.cache = DynamicCache(config=huggingface_config(model))

    def run(self) -> NextLogits:
        return self._at(self.tokens, (self.mask.cumsum(-1) - 1).clamp(min=0))[:, -1]

    def extend(self, chosen: NextTokens) -> NextLogits:
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        return self._at(chosen[:, None], self.mask.sum(-1, keepdim=True) - 1)[:, -1]

    def repeat(self, logits: NextLogits, places: RowNumbers) -> NextLogits:
        self.cache.batch_select_indices(places)
        self.mask = self.mask[places]
        return logits[places]

    def keep(self, rows: ChosenRows) -> None:
        if not rows.all():
            self.repeat(rows, rows.nonzero()[:, 0])

    def _at(self, tokens: Tokens, position: Tokens) -> Logits:
        options = {"past_key_values": self.cache, "use_cache": True, "position_ids": position}
        return self.model(tokens, attention_mask=self.mask.long(), **options)
