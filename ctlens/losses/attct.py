"""AttCT turns each head's attention on the wrapped prompt to the reference's on the clean prompt.

`L = weight * mean_l mean_{head,q} JSD(a_c[h,q,:], a_w[h,q,:])` over aligned queries and keys
(*Consistency Training Along the Transformer Stack*, arXiv 2606.05817). Attention to keys outside
the window (the wrapper, the BOS) is cut off; the option `keys` decides what happens to that mass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctlens.core.errors import CtlensError
from ctlens.core.types import Mask, Pattern, PerRow, Positions, widened
from ctlens.data.batch import Matched, PairBatch, Side
from ctlens.losses.base import Distance, Forwards, InternalLoss, check_option
from ctlens.losses.distances import LOG_FLOOR, jensen_shannon, kl_of_masses, squared_error

Heads: TypeAlias = Float[Tensor, "batch head clean_q clean_k"]
PatternRows: TypeAlias = Float[Tensor, "batch width head _"]
HEADS = ("each", "mean")
SINKS = ("kept", "dropped")
PATTERN_DISTANCES: Mapping[str, Distance] = {
    "jsd": jensen_shannon,
    "l2": squared_error,
    "mse": squared_error,
    "kl_clean_wrapped": kl_of_masses,
}


class RawKeys:
    """RawKeys compares rows that are cut to the window and sum to less than one, as published.

    Args:
        batch: the pairs.
        queries: aligned positions whose rows are compared.
        window: aligned positions that are keys.
        keeps_sink: the tokens that open both prompts are keys too.
    """

    def __init__(self, batch: PairBatch, queries: Matched, window: Matched, *, keeps_sink: bool) -> None:
        self.batch = batch
        self.queries = queries
        self.window = window
        self.keeps_sink = keeps_sink
        self.keys = with_opening(batch, window) if keeps_sink else window
        self.seen = seen_keys(queries, self.keys)

    def rows(self, clean: Heads, wrapped: Pattern) -> tuple[PatternRows, PatternRows]:
        """Takes the rows to compare from the patterns of one layer: the clean ones and the wrapped ones."""
        queries, keys = self.queries, self.keys
        return (
            self.finished(block_rows(clean, queries.clean, keys.clean, self.seen)),
            self.finished(block_rows(wrapped, queries.wrapped, keys.wrapped, self.seen)),
        )

    def n_keys(self) -> Int[Tensor, " batch"]:
        """Counts the entries of each pair's rows."""
        return self.keys.valid.sum(-1)

    @staticmethod
    def finished(block: PatternRows) -> PatternRows:
        """Returns the rows as they are: the mass outside the window is missing from them."""
        return block


class RenormalisedKeys(RawKeys):
    """RenormalisedKeys compares rows that are cut to the window and divided by their sum."""

    @staticmethod
    def finished(block: PatternRows) -> PatternRows:
        """Divides every row by its sum."""
        return block / block.sum(-1, keepdim=True).clamp(min=LOG_FLOOR)


class RestKeys(RawKeys):
    """RestKeys compares rows that are cut to the window, with one bucket more for the mass outside it."""

    def n_keys(self) -> Int[Tensor, " batch"]:
        """Counts the keys, and the bucket as one more."""
        return super().n_keys() + 1

    @staticmethod
    def finished(block: PatternRows) -> PatternRows:
        """Adds the bucket to the end of every row."""
        return torch.cat([block, (1 - block.sum(-1, keepdim=True)).clamp(min=0)], dim=-1)


class LiftedKeys(RawKeys):
    """LiftedKeys compares whole wrapped rows with the clean rows moved to the wrapped prompt's keys."""

    def rows(self, clean: Heads, wrapped: Pattern) -> tuple[PatternRows, PatternRows]:
        """Lifts the clean rows; the opening tokens count on neither side where the sink is dropped."""
        here, there = lifted_rows(clean, wrapped, self.queries, self.keys, self.seen)
        if self.keeps_sink:
            return here, there
        return here, there * ~opening_mask(self.batch, self.window)[:, None, None, :]


KEY_MODES: Mapping[str, type[RawKeys]] = {
    "raw": RawKeys,
    "renormalised": RenormalisedKeys,
    "rest": RestKeys,
    "lifted": LiftedKeys,
}


@dataclass(frozen=True)
class AttCT(InternalLoss):
    """AttCT is attention consistency: it compares attention patterns row by row.

    Attributes:
        weight: factor of the total; the default suits the shipped organism.
        distance: `"jsd"` in nats (as published), `"l2"` (squared, summed over keys), `"mse"` (the
            same over the number of keys) or `"kl_clean_wrapped"`, KL(clean || wrapped) in nats, see
            `kl_of_masses`.
        keys: `"raw"` keeps rows that sum to less than one (as published). `"renormalised"` divides them
            by that sum. `"rest"` adds one bucket that holds the mass outside the window, so that
            attention that leaves the window counts. `"lifted"` compares the whole wrapped row with the
            clean row moved to the keys of the wrapped prompt. A wrapped key without a clean twin gets the
            target 0, so this pushes attention to the wrapper to zero; choose it for `window="last"`, whose
            block is a single key.
        heads: `"each"` compares each head's pattern (the paper's text); `"mean"` compares the mean of the
            heads' patterns (the paper's code for jailbreaks).
        sink: whether the tokens that open both prompts, the BOS and attention sink among them, are keys
            beside the window's. `"kept"` makes them keys. `"dropped"` puts their mass outside: it is cut
            off, divided away, in the bucket of `"rest"`, or left out of both lifted rows. None follows
            `keys`: whole rows (`"lifted"`) keep them, windows do not.
    """

    name: ClassVar[str] = "attct"
    # Published is 1. Rows cut to the window hold little mass on the organism, so the raw divergence is small
    # (docs/divergences.md). No search was made.
    weight: float = 200.0
    distance: str = "jsd"
    keys: str = "raw"
    heads: str = "each"
    sink: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("distance of AttCT", self.distance, tuple(PATTERN_DISTANCES))
        check_option("keys of AttCT", self.keys, tuple(KEY_MODES))
        check_option("heads of AttCT", self.heads, HEADS)
        if self.sink is not None:
            check_option("sink of AttCT", self.sink, SINKS)
        if self.distance == "mse" and self.keys == "lifted":
            raise CtlensError("mse is a mean over the window's keys, and lifted rows are whole: give distance l2.")

    @property
    def point(self) -> str:
        """The loss reads the attention weights after the softmax."""
        return "pattern"

    @property
    def mean_over_heads(self) -> bool:
        """True unless heads are averaged before they are compared."""
        return self.heads == "each"

    @property
    def windows(self) -> tuple[str, ...]:
        """The loss reads the window of the queries, and that of the keys where it is another."""
        return tuple(dict.fromkeys((self.window, self._key_window)))

    @property
    def _key_window(self) -> str:
        """The keys are in this window; lifted rows are whole, so their keys are all the content."""
        return "shared" if self.keys == "lifted" and self.window != "explicit" else self.window

    @property
    def _keeps_sink(self) -> bool:
        return self.sink == "kept" or (self.sink is None and self.keys == "lifted")

    def row_values(self, forwards: Forwards, hook_names: Sequence[str]) -> dict[str, PerRow]:
        """Measures the distance per hook point and pair, averaged over heads and aligned queries."""
        matched = forwards.batch.matched
        queries = matched[self.window]
        mode = KEY_MODES[self.keys](forwards.batch, queries, matched[self._key_window], keeps_sink=self._keeps_sink)
        values: dict[str, PerRow] = {}
        for name in hook_names:
            clean = self._heads(forwards.clean[name].detach())
            wrapped = self._heads(forwards.wrapped[name])
            value = queries.row_mean(PATTERN_DISTANCES[self.distance](*mode.rows(clean, wrapped)).mean(-1))
            values[name] = value / mode.n_keys() if self.distance == "mse" else value
        return values

    def _heads(self, pattern: Pattern) -> Float[Tensor, "batch group q k"]:
        return pattern.mean(1, keepdim=True) if self.heads == "mean" else pattern


def query_rows(pattern: Pattern, queries: Positions) -> Float[Tensor, "batch width head k"]:
    """Takes the attention rows of given queries, `[batch, query, head, key]`, in float32 at least."""
    heads = pattern.shape[:2]
    starts = torch.arange(heads.numel(), device=pattern.device).unflatten(0, heads)[..., None] * pattern.shape[2]
    flat = (starts + queries[:, None]).flatten()  # one index: its backward pass is the fastest
    rows = pattern.flatten(0, 2).index_select(0, flat).unflatten(0, (*heads, -1))
    return widened(rows.transpose(1, 2))


def seen_keys(queries: Matched, keys: Matched) -> Bool[Tensor, "batch width key"]:
    """Marks the keys of each query: all, but those that one side has in front of the query and the other behind it.

    There are such keys where the sides hold the aligned texts in different orders. A query has no attention to what is
    behind it, so that no training could make both sides alike there.
    """
    behind = keys.clean[:, None] > queries.clean[..., None]
    return keys.valid[:, None] & (behind == (keys.wrapped[:, None] > queries.wrapped[..., None]))


def block_rows(
    pattern: Pattern,
    queries: Positions,
    keys: Int[Tensor, "batch key"],
    seen: Bool[Tensor, "batch width key"],
) -> Float[Tensor, "batch width head key"]:
    """Takes attention from given queries to given keys, `[batch, query, head, key]`, zero at keys that are not seen.

    Args:
        pattern: attention weights after the softmax, `[batch, head, q, k]`.
        queries, keys: positions of each row.
        seen: which of the keys count for a query.
    """
    rows = query_rows(pattern, queries)
    return rows.gather(-1, keys[:, None, None, :].expand(*rows.shape[:3], -1)) * seen[:, :, None, :]


def lifted_rows(
    clean: Float[Tensor, "batch head clean_q clean_k"],
    wrapped: Pattern,
    queries: Matched,
    keys: Matched,
    seen: Bool[Tensor, "batch width key"],
) -> tuple[Float[Tensor, "batch width head k"], Float[Tensor, "batch width head k"]]:
    """Moves the clean rows to the wrapped keys, zero where a key has no twin, and takes the wrapped rows as they are.

    Args:
        clean, wrapped: attention weights after the softmax, `[batch, head, q, k]`.
        queries: aligned positions whose rows are taken.
        keys: aligned positions between which mass is moved; clean mass elsewhere is left out.
        seen: which of them count for a query, see `seen_keys`.
    """
    there = query_rows(wrapped, queries.wrapped)
    mass = block_rows(clean, queries.clean, keys.clean, seen)
    targets = keys.wrapped[:, None, None, :].expand_as(mass)
    return torch.zeros_like(there).scatter_add(-1, targets, mass), there


def with_opening(batch: PairBatch, matched: Matched) -> Matched:
    """Puts the tokens that open both prompts, the attention sink among them, in front of the aligned positions."""
    front = _opening_keys(batch, matched)
    return Matched(
        torch.cat([front.clean, matched.clean], 1),
        torch.cat([front.wrapped, matched.wrapped], 1),
        torch.cat([front.valid, matched.valid], 1),
    )


def opening_mask(batch: PairBatch, matched: Matched) -> Mask:
    """Marks the positions of the wrapped prompts that `with_opening` puts in front."""
    front = _opening_keys(batch, matched)
    marked = torch.zeros(batch.wrapped.tokens.shape, dtype=torch.int, device=front.valid.device)
    return marked.scatter_add(1, front.wrapped, front.valid.int()).bool()


def _opening_keys(batch: PairBatch, matched: Matched) -> Matched:
    steps = torch.arange(int(batch.at_host.opening.max()), device=batch.opening.device)
    clean, in_front = _opening(batch.clean, steps, matched.clean, matched.valid)
    wrapped, in_front_too = _opening(batch.wrapped, steps, matched.wrapped, matched.valid)
    return Matched(clean, wrapped, (steps < batch.opening[:, None]) & in_front & in_front_too)


def _opening(
    side: Side, steps: Int[Tensor, " step"], positions: Positions, valid: Bool[Tensor, "batch width"]
) -> tuple[Int[Tensor, "batch step"], Bool[Tensor, "batch step"]]:
    """Finds the first positions of each row's real tokens, and which of them are in front of the aligned ones."""
    width = side.tokens.shape[1]
    first = (side.mask.int().argmax(1)[:, None] + steps).clamp(max=width - 1)
    return first, first < positions.masked_fill(~valid, width).amin(1)[:, None]
