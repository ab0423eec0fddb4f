"""A batch of growing sequences; the tokens that were run stay in the model's key-value cache, where it has one.

Sequences are padded on the right, where causal attention cannot see the padding of the first pass,
and it is masked in later ones. A sliding window counts columns, padding included, so sequences that
outgrow one are run among others of their own length alone (`batches_by_length`). What all sequences of a batch begin
with, as with the system prompt of a chat model, is run once.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from os.path import commonprefix
from typing import Any, NamedTuple, Protocol, Self, TypeAlias, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ctlens.core.types import ChosenLogits, ChosenRows, LensModel, Logits, Mask, RowNumbers, Tokens
from ctlens.data.batch import pad
from ctlens.models.bridges import huggingface_config
from ctlens.models.finite import forward
from ctlens.models.loading import empty_cache, keep_rows

Ids = tuple[int, ...]
NextLogits: TypeAlias = Float[Tensor, "batch d_vocab"]
Lengths: TypeAlias = Int[Tensor, " batch"]

# On a CPU more tokens at once leave its caches and take longer; measured in benchmarks/evaluation.py.
MAX_BATCH_TOKENS = 2048
# A pass of its own costs as much as some tokens: a shorter beginning, as the organism's prompts have, is not
# worth it. Not tuned.
_FEWEST_SHARED_TOKENS = 16
SELECTABLE = (DynamicLayer, DynamicSlidingWindowLayer)  # their subclasses may hold more than keys and values
NEEDED = {"past_key_values", "position_ids"}


def batches_by_length(model: LensModel, lengths: Sequence[int], new: int, max_batch_tokens: int) -> Iterator[list[int]]:
    """Groups sequences that are run together, by number, in order of length.

    Args:
        model: says how long a sequence may be among longer ones.
        lengths: of the sequences, in tokens.
        new: how many tokens they may grow by.
        max_batch_tokens: as many sequences as fill these when padded to the longest; at least one.
    """
    longest = _window(model)
    batch = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        length = lengths[number]
        alone = batch and length + new > longest and length > lengths[batch[0]]
        if batch and (alone or (len(batch) + 1) * length > max_batch_tokens):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def has_cache(model: LensModel) -> bool:
    """Tells whether the model has a cache, so that no token of a sequence is run twice."""
    return _cache(model, 1) is not None


class Sequences:
    """Some sequences of any lengths, to be run, continued, repeated and dropped.

    Args:
        model: in eval mode.
        prompts: their first tokens, at least one each.
    """

    def __init__(self, model: LensModel, prompts: Sequence[Ids]) -> None:
        device = next(model.parameters()).device
        self.model = model
        self.tokens = pad(prompts).tokens.to(device)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.shared = _shared_beginning(prompts)
        self.cache = _cache(model, 1 if self.shared else len(prompts))

    @classmethod
    def joined(cls, parts: Sequence[Sequences]) -> Sequences:
        """Sequences of one row each that were run, as one batch to be continued; the parts stay as they are."""
        whole = copy(parts[0])
        whole.tokens = _rows_of([part.tokens for part in parts], 1)
        whole.lengths = torch.cat([part.lengths for part in parts])
        caches = [part.cache for part in parts if part.cache is not None]
        whole.cache = caches[0].joined(caches) if caches else None
        return whole

    @property
    def n_bytes(self) -> int:
        """The memory that the keys and values take."""
        return sum(held.numel() * held.element_size() for held in (self.cache.tensors() if self.cache else ()))

    def run(self) -> NextLogits:
        """The logits of each sequence's next token, from its first tokens; to be called once, before the rest."""
        width = self.tokens.shape[1]
        real = _up_to(self.lengths, width)
        last = real & ~_up_to(self.lengths - 1, width)
        if self.cache is not None and self.shared:
            self._run_shared(self.cache)
        if self.cache is None:
            return forward(self.model, self.tokens, logits_at=last)[0]
        rest = slice(self.shared, None)
        start = torch.full_like(self.lengths, self.shared)
        logits = self.cache.forward(self.tokens[:, rest], real[:, rest], start, last[:, rest])
        if not self.cache.filled:
            self.cache = None
        return logits[0]

    def _run_shared(self, cache: Cache) -> None:
        """Runs what all sequences begin with as one row, and gives every sequence its keys and values."""
        tokens = self.tokens[:1, : self.shared]
        real = torch.ones_like(tokens, dtype=torch.bool)
        cache.forward(tokens, real, torch.zeros_like(self.lengths[:1]), torch.zeros_like(real))
        if cache.filled:
            cache.keep(torch.zeros_like(self.lengths))
        else:
            self.cache = None

    def extend(self, tokens: Tokens, count: Lengths) -> Logits:
        """Appends the first `count` of these tokens to each sequence; the logits behind each of them.

        Args:
            tokens: `[batch, new]`.
            count: how many of a row are real, at least one.
        """
        start = self.lengths
        new = torch.arange(tokens.shape[1], device=tokens.device)
        self.lengths = start + count
        if self.cache is not None:
            return self.cache.forward(tokens, _up_to(count, len(new)), start)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        positions = start[:, None] + torch.minimum(new, count[:, None] - 1)  # padding repeats the last real token
        width = int(self.lengths.max())
        grown = torch.zeros(len(tokens), width, dtype=self.tokens.dtype, device=tokens.device)
        kept = min(width, self.tokens.shape[1])
        grown[:, :kept] = self.tokens[:, :kept]
        grown[rows, positions] = tokens.gather(1, positions - start[:, None])
        self.tokens = grown
        return forward(self.model, grown)[rows, positions]

    def keep(self, rows: ChosenRows | RowNumbers) -> None:
        """Keeps only these sequences, by a mask or by their numbers, which may repeat."""
        if self.cache is not None:
            self.cache.keep(rows)
        self.tokens, self.lengths = self.tokens[rows], self.lengths[rows]


class Begun(NamedTuple):
    """Sequences that were run, and the logits of each one's next token."""

    sequences: Sequences
    logits: NextLogits


def begin(model: LensModel, prompts: Sequence[Ids]) -> Begun:
    """Runs prompts, which are then to be continued."""
    sequences = Sequences(model, prompts)
    return Begun(sequences, sequences.run())


Begin: TypeAlias = Callable[[LensModel, Sequence[Ids]], Begun]
"""What begins prompts: `begin`, or something that has run them before."""


class Cache(Protocol):
    """The keys and values of the tokens of a batch that a model has run."""

    filled: bool
    """Whether every layer of the model has stored the tokens that were run."""

    def forward(
        self, tokens: Tokens, real: Mask, start: Lengths, logits_at: Mask | None = None
    ) -> Logits | ChosenLogits:
        """The logits at further tokens of each sequence, of which `start` were run before; see `finite.forward`."""
        ...

    def keep(self, rows: ChosenRows | RowNumbers) -> None:
        """Keeps only these sequences, by a mask or by their numbers, which may repeat."""
        ...

    def joined(self, parts: Sequence[Any]) -> Cache | None:
        """Caches of one row each, this one the first, as one; they stay as they are. None where that cannot be."""
        ...

    def tensors(self) -> list[Tensor]:
        """The keys and values."""
        ...


class _HookedCache:
    """The cache of a `HookedTransformer`, which works out positions from the mask."""

    filled = True

    def __init__(self, model: LensModel, entries: Any) -> None:
        self.model = model
        self.entries = entries

    def forward(
        self, tokens: Tokens, real: Mask, start: Lengths, logits_at: Mask | None = None
    ) -> Logits | ChosenLogits:
        cached = {"past_kv_cache": self.entries, "attention_mask": real.long()}
        return forward(self.model, tokens, logits_at=logits_at, **cached)

    def keep(self, rows: ChosenRows | RowNumbers) -> None:
        keep_rows(self.entries, rows)

    def joined(self, parts: Sequence[Self]) -> Self:
        whole = copy(self)
        whole.entries = empty_cache(self.model, len(parts))
        for number, new in enumerate(whole.entries.entries):
            new.past_keys = _rows_of([part.entries.entries[number].past_keys for part in parts], 1)
            new.past_values = _rows_of([part.entries.entries[number].past_values for part in parts], 1)
        whole.entries.previous_attention_mask = _rows_of([part.entries.previous_attention_mask for part in parts], 1)
        return whole

    def tensors(self) -> list[Tensor]:
        return [held for entry in self.entries.entries for held in (entry.past_keys, entry.past_values)]


class _HuggingFaceCache:
    """HuggingFace's cache of a bridged model, which is run through the bridge, so that hooks see every token."""

    def __init__(self, model: LensModel, rows: int, entries: DynamicCache) -> None:
        self.model = model
        self.entries = entries
        self.seen = torch.zeros(rows, 0, dtype=torch.bool, device=next(model.parameters()).device)

    def forward(
        self, tokens: Tokens, real: Mask, start: Lengths, logits_at: Mask | None = None
    ) -> Logits | ChosenLogits:
        self.seen = torch.cat([self.seen, real], dim=1)
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        positions = torch.where(real, start[:, None] + steps, 0)  # padding may lie beyond the last position there is
        seen = self.seen.long()
        cached = {"past_key_values": self.entries, "use_cache": True, "attention_mask": seen, "position_ids": positions}
        return forward(self.model, tokens, logits_at=logits_at, **cached)

    def keep(self, rows: ChosenRows | RowNumbers) -> None:
        self.seen = self.seen[rows]
        self.entries.batch_select_indices(cast(Any, rows))

    def joined(self, parts: Sequence[Self]) -> Self | None:
        if any(layer.is_sliding for layer in self.layers):
            return None  # such a layer holds its window's end alone, which is not in the same columns for all rows
        whole = copy(self)
        whole.entries = copy(self.entries)
        whole.entries.layers = [copy(layer) for layer in self.layers]
        for number, layer in enumerate(whole.layers):
            layer.keys = _rows_of([part.layers[number].keys for part in parts], 2)
            layer.values = _rows_of([part.layers[number].values for part in parts], 2)
        whole.seen = _rows_of([part.seen for part in parts], 1)
        return whole

    def tensors(self) -> list[Tensor]:
        return [held for layer in self.layers for held in (layer.keys, layer.values)]

    @property
    def layers(self) -> list[Any]:
        return cast(list[Any], self.entries.layers)

    @property
    def filled(self) -> bool:
        return all(layer.get_seq_length() == self.seen.shape[1] for layer in self.layers)


def _rows_of(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Tensors of one row each as the rows of one, filled up at the end of an axis with zeros."""
    shape = list(parts[0].shape)
    shape[0] = len(parts)
    shape[axis] = max(part.shape[axis] for part in parts)
    whole = parts[0].new_zeros(shape)
    for row, part in enumerate(parts):
        whole[row : row + 1].narrow(axis, 0, part.shape[axis]).copy_(part)
    return whole


def _shared_beginning(prompts: Sequence[Ids]) -> int:
    """The number of tokens that all prompts begin with and none ends in; 0 where it is not worth a pass of its own."""
    shared = min(len(commonprefix(prompts)), *(len(prompt) - 1 for prompt in prompts))
    return shared if len(prompts) > 1 and shared >= _FEWEST_SHARED_TOKENS else 0


def _cache(model: LensModel, rows: int) -> Cache | None:
    """An empty cache for `rows` sequences; None where the model has none that is known to work."""
    own = empty_cache(model, rows)
    theirs = _huggingface_cache(model)
    if own is not None:
        return _HookedCache(model, own)
    return None if theirs is None else cast(Cache, _HuggingFaceCache(model, rows, theirs))


def _huggingface_cache(model: LensModel) -> DynamicCache | None:
    """A cache of keys and values alone, for a model that can be told the positions of its tokens; or None."""
    config = huggingface_config(model)
    if config is None or not set(inspect.signature(cast(Any, model).original_model.forward).parameters) >= NEEDED:
        return None
    cache = DynamicCache(config=config)
    return cache if cache.layers and all(type(layer) in SELECTABLE for layer in cache.layers) else None


def _window(model: LensModel) -> int:
    """The longest that a sequence may grow, in tokens, to be run among longer ones."""
    cache = _huggingface_cache(model)
    layers = cast(list[Any], cache.layers if cache else [])
    return min((layer.sliding_window for layer in layers if layer.is_sliding), default=sys.maxsize)


def _up_to(lengths: Lengths, width: int) -> Mask:
    return torch.arange(width, device=lengths.device) < lengths[:, None]
