"""Which tokens of a prompt an analysis reads or edits, and which segment of the prompt each token belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from ctlens.core.errors import CtlensError, unknown
from ctlens.core.types import Mask
from ctlens.data.alignment import align
from ctlens.data.batch import EncodedPair, PairBatch, Side, mark

PAIR_SIDES = ("clean", "wrapped")  # the sides that every pair has; the benign twin is not aligned
STATE_POSITIONS = ("last", "content", "wrapper")
ALIGNED_POSITIONS = STATE_POSITIONS[:2]
"""The positions with a clean counterpart."""
CHOSEN = "chosen"
"""The name of positions that a function of the user's chose."""
POSITIONS_IN_WORDS = {
    "last": "at the last token",
    "content": "at the content tokens",
    "wrapper": "at the wrapper's tokens",
    CHOSEN: "at the chosen tokens",
}
PositionsOf: TypeAlias = Callable[[EncodedPair, str], Sequence[int]]
"""A function that names at least one position in the prompt of a pair on one of `PAIR_SIDES`."""

SEGMENTS = ("wrapper", "content", "system", "answers", "bos", "rest")
SegmentMasks: TypeAlias = Bool[Tensor, "segment batch pos"]
Keys: TypeAlias = str | Callable[[EncodedPair], Sequence[int]]
"""One of `SEGMENTS`, or a function that names positions of the wrapped prompt of a pair."""


def segments(row: EncodedPair) -> dict[str, tuple[int, ...]]:
    """The positions of every segment of the wrapped prompt; empty where the prompt has no such segment.

    - `wrapper`: what the attack added, see `ctlens.data.alignment.wrapper_positions`.
    - `content`: the clean prompt's last message.
    - `system` and `answers`: all system messages, and all assistant messages before the last
      message; where the attack added them, they are wrapper too.
    - `bos`: the first token where no message holds it, the BOS if there is one. Attention that
      nothing else calls for rests on it.
    - `rest`: all tokens in none of these segments: the template's tokens and earlier user messages.
    """
    prompt = row.wrapped
    turns = row.pair.wrapped.turns
    messages = [prompt.positions(content) for content in prompt.contents]
    found = {
        "wrapper": row.wrapper,
        "content": align(row.clean, row.wrapped, "content").wrapped,
        "system": _of_role("system", messages, [turn.role for turn in turns]),
        "answers": _of_role("assistant", messages[:-1], [turn.role for turn in turns[:-1]]),
        "bos": (0,) if 0 not in chain(*messages) else (),
    }
    known = set(chain(*found.values()))
    return found | {"rest": tuple(position for position in range(len(prompt.ids)) if position not in known)}


def _of_role(role: str, messages: Sequence[tuple[int, ...]], roles: Sequence[str]) -> tuple[int, ...]:
    return tuple(chain(*(held for held, of in zip(messages, roles, strict=True) if of == role)))


def segment_masks(rows: Sequence[EncodedPair], side: Side) -> SegmentMasks:
    """True at the tokens of each of `SEGMENTS` in prompts that are padded on the right."""
    found = [segments(row) for row in rows]
    return torch.stack([mark(side.mask, [of_row[name] for of_row in found]) for name in SEGMENTS])


def key_positions(keys: Keys, row: EncodedPair) -> tuple[int, ...]:
    """The positions that `keys` names in a pair.

    Raises:
        CtlensError: the segment is unknown, or a pair has no such token or not that many.
    """
    if isinstance(keys, str) and keys not in SEGMENTS:
        raise unknown("keys", keys, SEGMENTS)
    found = segments(row)[keys] if isinstance(keys, str) else tuple(keys(row))
    if not found:
        raise CtlensError(f"a pair has no token in {keys if isinstance(keys, str) else 'the keys'}: leave it out.")
    if min(found) < 0 or max(found) >= len(row.wrapped.ids):
        raise CtlensError(
            f"a wrapped prompt has {len(row.wrapped.ids)} tokens: keys {found} are not all in it; name its positions."
        )
    return found


def token_segments(row: EncodedPair, side: str) -> tuple[str, ...]:
    """The segment of every token of the `"clean"` or the `"wrapped"` prompt: the first of `SEGMENTS` that holds it."""
    if side == "clean":
        row = replace(row, wrapped=row.clean, wrapper=(), pair=replace(row.pair, wrapped=row.pair.clean))
    found = segments(row)
    return tuple(next(name for name in SEGMENTS if position in found[name]) for position in range(len(row.wrapped.ids)))


def positions_mask(positions: str | PositionsOf, side: str, rows: Sequence[EncodedPair], batch: PairBatch) -> Mask:
    """True at the chosen tokens of every prompt, on one side.

    Raises:
        CtlensError: the positions are unknown, or a prompt has no token there.
    """
    if isinstance(positions, str) and positions not in STATE_POSITIONS:
        raise unknown("positions", positions, STATE_POSITIONS)
    if positions == "wrapper" and side == "clean":
        raise CtlensError("a clean prompt has no wrapper: choose side='wrapped' or other positions.")
    chosen = _chosen(positions, side, rows, batch)
    if not chosen.any(-1).all():
        raise CtlensError("a prompt has no token at these positions: leave its pair out or choose other positions.")
    return chosen


def _chosen(positions: str | PositionsOf, side: str, rows: Sequence[EncodedPair], batch: PairBatch) -> Mask:
    mask = batch.clean.mask if side == "clean" else batch.wrapped.mask
    if positions == "wrapper":
        return batch.wrapper
    if not isinstance(positions, str):
        return mark(mask, [positions(row, side) for row in rows])
    last = (batch.last_clean if side == "clean" else batch.last_prompt)[:, None]
    index = torch.arange(mask.shape[1], device=mask.device)
    if positions == "last":
        return index == last
    aligned = [row.alignments["shared"] for row in rows]
    return mark(mask, [getattr(alignment, side) for alignment in aligned]) & (index != last)
