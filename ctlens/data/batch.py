"""Pairs as tensors: encode once, then any rows, of any lengths, in one batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctlens.core.errors import CtlensError, located
from ctlens.core.types import Mask, PerRow, Positions, Tokens
from ctlens.data.alignment import Alignment, align, opening, wrapper_positions
from ctlens.data.chat import Rendered, answer_ids, render
from ctlens.data.pairs import Pair

RowPositions: TypeAlias = Int[Tensor, " batch"]
CleanMask: TypeAlias = Bool[Tensor, "batch clean_pos"]
PaddingSide = Literal["right", "left"]
PADDING = 0
"""Stands where a shorter sequence has no token. No real position sees it, so that any token would do."""


@dataclass(frozen=True)
class EncodedPair:
    """A pair as tokens, with its alignment in each requested window.

    Attributes:
        pair: the texts.
        clean, wrapped: the two prompts.
        alignments: by window name.
        answer: tokens that follow the wrapped prompt, for losses on outputs; empty where there is no answer.
        wrapper: positions in the wrapped prompt that the attack added, see `wrapper_positions`.
        clean_answer: the same tokens where the answer follows the clean prompt too, else empty.
    """

    pair: Pair
    clean: Rendered
    wrapped: Rendered
    alignments: Mapping[str, Alignment]
    answer: tuple[int, ...] = ()
    wrapper: tuple[int, ...] = ()
    clean_answer: tuple[int, ...] = ()


@dataclass(frozen=True)
class EncodedPairs:
    """Encoded pairs, and how many pairs were left out.

    Attributes:
        rows: the pairs that align in every window.
        dropped: number of pairs left out, by reason.
    """

    rows: tuple[EncodedPair, ...]
    dropped: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.rows)

    def coverage(self, window: str) -> float:
        """The share of candidate tokens that were matched, over all kept pairs, 0 to 1."""
        alignments = [row.alignments[window] for row in self.rows]
        candidates = sum(alignment.candidates for alignment in alignments)
        return sum(len(alignment.clean) for alignment in alignments) / max(candidates, 1)

    def token_drops(self, window: str) -> dict[str, int]:
        """Number of candidate tokens without a match over all kept pairs, by reason."""
        total: Counter[str] = Counter()
        for row in self.rows:
            total.update(row.alignments[window].drops)
        return dict(total)

    def aligned(self, windows: Iterable[str]) -> EncodedPairs:
        """Keeps the pairs that align in all these windows, and counts the pairs that it leaves out."""
        windows = [window for window in windows if self.rows and window in self.rows[0].alignments]
        refusals = [next(filter(None, (row.alignments[name].refusal for name in windows)), "") for row in self.rows]
        rows = tuple(row for row, refusal in zip(self.rows, refusals, strict=True) if not refusal)
        dropped = Counter(self.dropped) + Counter(filter(None, refusals))
        if not rows and dropped:
            reason, count = dropped.most_common(1)[0]
            raise CtlensError(
                f"none of the {len(self)} pairs aligns ({count} times: {reason}); inspect the prompts or the window."
            )
        return EncodedPairs(rows, dict(dropped))

    def with_answers(self, answers: Sequence[tuple[int, ...]], *, both_sides: bool = False) -> EncodedPairs:
        """The same pairs with other answers.

        Args:
            answers: per pair, the tokens that follow the wrapped prompt.
            both_sides: they follow the clean prompt too; the pairs are then aligned in the window `answer`.
        """
        rows = [replace(row, answer=answer) for row, answer in zip(self.rows, answers, strict=True)]
        return replace(self, rows=tuple(map(_on_both_sides, rows) if both_sides else rows))

    def answered(self) -> EncodedPairs:
        """Keeps the pairs that have an answer, and counts the pairs that it leaves out."""
        rows = tuple(row for row in self.rows if row.answer)
        without = Counter({"no answer": len(self.rows) - len(rows)})
        return EncodedPairs(rows, dict(Counter(self.dropped) + without))


def encode(pairs: Iterable[Pair], tokenizer: Any, *, windows: Iterable[str] = ("shared",), n_ctx: int) -> EncodedPairs:
    """Tokenises and aligns pairs; a pair that does not align in every window is left out and counted.

    Args:
        pairs: what to encode.
        tokenizer: a fast HuggingFace tokenizer.
        windows: from `ctlens.data.alignment.WINDOWS`; `answer` waits for `EncodedPairs.with_answers`.
        n_ctx: the model's longest sequence, in tokens.

    Raises:
        CtlensError: there are no pairs, none of them aligns, or a prompt (with its target) is
            longer than the context.
        UnknownWords: the tokenizer does not know a word of a pair.
    """
    windows = tuple(windows)
    rows: list[EncodedPair] = []
    for number, pair in enumerate(pairs, start=1):
        with located(f"pair {number}"):
            row = encode_pair(pair, tokenizer, windows)
        require_room(len(row.clean.ids), n_ctx, f"the clean prompt of pair {number}")
        require_room(len(row.wrapped.ids) + len(row.answer), n_ctx, f"the wrapped prompt of pair {number}")
        rows.append(row)
    if not rows:
        raise CtlensError("there are no pairs: give at least one.")
    return EncodedPairs(tuple(rows), {}).aligned(windows)


def encode_pair(pair: Pair, tokenizer: Any, windows: Iterable[str]) -> EncodedPair:
    """Tokenises one pair, and aligns it or says why not in each of the windows; arguments as of `encode`."""
    windows = tuple(windows)
    clean = render(tokenizer, pair.clean.turns)
    wrapped = render(tokenizer, pair.wrapped.turns)
    of_prompts = (window for window in windows if window != "answer")
    alignments = {window: align(clean, wrapped, window, shared=pair.shared) for window in of_prompts}
    answer: tuple[int, ...] = ()
    if pair.target is not None:
        answer = answer_ids(tokenizer, wrapped, pair.target)
        if "answer" in windows and answer_ids(tokenizer, clean, pair.target) != answer:
            raise CtlensError(
                f"the target {pair.target!r} has other tokens behind the clean prompt than behind the wrapped one: let "
                "both prompts end alike."
            )
    return EncodedPair(pair, clean, wrapped, alignments, answer, wrapper_positions(clean, wrapped))


def _on_both_sides(row: EncodedPair) -> EncodedPair:
    behind = align(row.clean, row.wrapped, "answer", answer=row.answer)
    return replace(row, clean_answer=row.answer, alignments={**row.alignments, "answer": behind})


def require_room(length: int, n_ctx: int, what: str) -> None:
    """Raises a `CtlensError` where `length` tokens do not fit the context; `what` names them in it."""
    if length > n_ctx:
        raise CtlensError(f"{what} has {length} tokens, but the model's context is {n_ctx}: shorten it.")


@dataclass(frozen=True)
class Side:
    """The padded tokens of one side of a batch.

    Attributes:
        tokens: `[batch, pos]`.
        mask: True at real tokens.
        padding: where the padding is.
    """

    tokens: Tokens
    mask: Mask
    padding: PaddingSide

    @property
    def needed_mask(self) -> Mask | None:
        """The mask, or None where a model needs no mask: causal attention does not see padding on the right."""
        return self.mask if self.padding == "left" else None

    def to(self, device: torch.device | str) -> Side:
        """The same side on another device."""
        return replace(self, tokens=moved(self.tokens, device), mask=moved(self.mask, device))


@dataclass(frozen=True)
class Matched:
    """The aligned positions of a batch, one row per pair, padded to the widest.

    Attributes:
        clean, wrapped: `[batch, width]`, the positions on the two sides; 0 where not valid.
        valid: True at real entries; every row has at least one.
    """

    clean: Positions
    wrapped: Positions
    valid: Bool[Tensor, "batch width"]

    def row_mean(self, values: Float[Tensor, "batch width"]) -> PerRow:
        """The mean over each row's valid entries, so that a pair's weight does not depend on its batch-mates."""
        return torch.where(self.valid, values, 0).sum(-1) / self.valid.sum(-1)

    def to(self, device: torch.device | str) -> Matched:
        """The same positions on another device."""
        return Matched(moved(self.clean, device), moved(self.wrapped, device), moved(self.valid, device))


@dataclass(frozen=True)
class PairBatch:
    """A batch of pairs.

    Attributes:
        clean: the clean prompts, each followed by its pair's `clean_answer`.
        wrapped: the wrapped prompts, each followed by its pair's `answer`.
        answer: `[batch, pos]` on the wrapped side, True at answer tokens.
        matched: aligned positions by window.
        opening: per row, how many tokens open both prompts, see `ctlens.data.alignment.opening`.
        wrapper: `[batch, pos]` on the wrapped side, True at tokens that the attack added.
        clean_answer: `[batch, clean_pos]` on the clean side, True at answer tokens.
        made_as: the batch before `to` moved it; None where nothing did.
    """

    clean: Side
    wrapped: Side
    answer: Mask
    matched: Mapping[str, Matched]
    opening: RowPositions
    wrapper: Mask
    clean_answer: CleanMask
    made_as: PairBatch | None = None

    @property
    def at_host(self) -> PairBatch:
        """The batch where it was made: what decides a shape or an error is read there, and no GPU is waited for."""
        return self.made_as or self

    @property
    def last_prompt(self) -> RowPositions:
        """Per row, the position of the last token of the wrapped prompt, before any answer."""
        return _last(self.wrapped.mask & ~self.answer)

    @property
    def last_clean(self) -> RowPositions:
        """Per row, the position of the last token of the clean prompt, before any answer."""
        return _last(self.clean.mask & ~self.clean_answer)

    def to(self, device: torch.device | str) -> PairBatch:
        """The same batch on another device."""
        matched = {window: value.to(device) for window, value in self.matched.items()}
        return PairBatch(
            clean=self.clean.to(device),
            wrapped=self.wrapped.to(device),
            answer=moved(self.answer, device),
            matched=matched,
            opening=moved(self.opening, device),
            wrapper=moved(self.wrapper, device),
            clean_answer=moved(self.clean_answer, device),
            made_as=self.at_host,
        )


def moved(values: Tensor, device: torch.device | str) -> Tensor:
    """Moves a tensor; one that goes to a GPU is on its way when this returns, and nobody waits for it."""
    return values.to(device, non_blocking=torch.device(device).type == "cuda")


def pad(sequences: Sequence[Sequence[int]], padding: PaddingSide = "right", *, token: int = PADDING) -> Side:
    """Puts token sequences of any lengths into one padded side.

    Args:
        sequences: at least one.
        padding: where the padding goes.
        token: what the padding is.
    """
    width = max(map(len, sequences))
    tokens = torch.full((len(sequences), width), token, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        start = 0 if padding == "right" else width - len(sequence)
        tokens[row, start : start + len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, start : start + len(sequence)] = True
    return Side(tokens, mask, padding)


def collate(rows: Sequence[EncodedPair], padding: PaddingSide = "right") -> PairBatch:
    """Makes one batch of encoded pairs of any lengths.

    Raises:
        CtlensError: there are no rows.
    """
    if not rows:
        raise CtlensError("a batch needs at least one pair.")
    clean = pad([row.clean.ids + row.clean_answer for row in rows], padding)
    wrapped = pad([row.wrapped.ids + row.answer for row in rows], padding)
    answer = mark(wrapped.mask, [_behind(row.wrapped, row.answer) for row in rows])
    clean_answer = mark(clean.mask, [_behind(row.clean, row.clean_answer) for row in rows])
    wrapper = mark(wrapped.mask, [row.wrapper for row in rows])
    return PairBatch(
        clean=clean,
        wrapped=wrapped,
        answer=answer,
        matched={window: _matched(rows, window, clean, wrapped) for window in rows[0].alignments},
        opening=torch.tensor([opening(row.clean, row.wrapped) for row in rows]),
        wrapper=wrapper,
        clean_answer=clean_answer,
    )


def _behind(prompt: Rendered, answer: Sequence[int]) -> range:
    """The positions of an answer that follows the prompt."""
    return range(len(prompt.ids), len(prompt.ids) + len(answer))


def mark(real: Mask, positions: Sequence[Sequence[int]]) -> Mask:
    """Marks some positions of each row.

    >>> real = torch.tensor([[False, True, True], [True, True, True]])
    >>> mark(real, [(0,), (0, 2)]).int().tolist()
    [[0, 1, 0], [1, 0, 1]]

    Args:
        real: True at real tokens, which stand together; the padding may be on either side.
        positions: per row, counted from its first real token.

    Returns:
        In the shape of `real`, True at those positions that are real tokens.
    """
    starts = first_real(real).tolist()
    rows = [row for row, of_row in enumerate(positions) for _ in of_row]
    columns = [starts[row] + position for row, of_row in enumerate(positions) for position in of_row]
    marked = torch.zeros_like(real)
    marked[rows, columns] = True
    return marked & real


def first_real(real: Mask) -> RowPositions:
    """Finds the index of each row's first real token."""
    return real.int().argmax(-1)


def _last(marked: Mask) -> RowPositions:
    """Per row, the last position that is marked."""
    return torch.where(marked, torch.arange(marked.shape[1], device=marked.device), 0).amax(-1)


def _matched(rows: Sequence[EncodedPair], window: str, clean: Side, wrapped: Side) -> Matched:
    alignments = [row.alignments[window] for row in rows]
    clean_positions = pad([alignment.clean for alignment in alignments])
    wrapped_positions = pad([alignment.wrapped for alignment in alignments])
    return Matched(_in_batch(clean_positions, clean), _in_batch(wrapped_positions, wrapped), clean_positions.mask)


def _in_batch(positions: Side, prompts: Side) -> Positions:
    """Positions that were counted from each prompt's first token, counted from the start of its row in a batch."""
    return torch.where(positions.mask, positions.tokens + first_real(prompts.mask)[:, None], 0)
