"""Which tokens of a wrapped prompt are what: the wrapper, the content, earlier messages, the first token."""

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
from ctlens.data.batch import EncodedPair, Side

SPANS = ("wrapper", "content", "system", "answers", "bos", "rest")
SpanMasks: TypeAlias = Bool[Tensor, "span batch pos"]
Keys: TypeAlias = str | Callable[[EncodedPair], Sequence[int]]
"""One of `SPANS`, or a function that names positions of the wrapped prompt of a pair."""


def spans(row: EncodedPair) -> dict[str, tuple[int, ...]]:
    """The positions of every span in the wrapped prompt; empty where the prompt has none.

    - `wrapper`: what the attack added, see `ctlens.data.alignment.wrapper_positions`.
    - `content`: the clean prompt's last message.
    - `system` and `answers`: all system messages, and all assistant messages before the last
      message; where the attack added them, they are wrapper too.
    - `bos`: the first token where no message holds it, the BOS if there is one. Attention that
      nothing else calls for rests on it.
    - `rest`: what is in none of these: the template's tokens and earlier user messages.
    """
    prompt, turns = row.wrapped, row.pair.wrapped.turns
    messages = [prompt.positions(span) for span in prompt.contents]
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


def span_masks(rows: Sequence[EncodedPair], side: Side) -> SpanMasks:
    """True at the tokens of each of `SPANS` in prompts that are padded on the right."""
    found = [spans(row) for row in rows]
    return torch.stack([marked(side.mask, [of_row[name] for of_row in found]) for name in SPANS])


def marked(mask: Mask, positions: Sequence[Sequence[int]]) -> Mask:
    """True at some positions of each prompt, in the shape of `mask`."""
    found = torch.zeros_like(mask)
    for row, of_row in zip(found, positions, strict=True):
        row[list(of_row)] = True
    return found


def key_positions(keys: Keys, row: EncodedPair) -> tuple[int, ...]:
    """The positions that `keys` names in a pair.

    Raises:
        CtlensError: the span is unknown, or a pair has no such token or not that many.
    """
    if isinstance(keys, str) and keys not in SPANS:
        raise unknown("span", keys, SPANS)
    found = spans(row)[keys] if isinstance(keys, str) else tuple(keys(row))
    if not found:
        raise CtlensError(f"a pair has no token in {keys if isinstance(keys, str) else 'the keys'}: leave it out.")
    if min(found) < 0 or max(found) >= len(row.wrapped.ids):
        raise CtlensError(f"a wrapped prompt has {len(row.wrapped.ids)} tokens: keys {found} are not all in it.")
    return found


def token_spans(row: EncodedPair, side: str) -> tuple[str, ...]:
    """Of every token of the `"clean"` or the `"wrapped"` prompt, the first of `SPANS` that holds it."""
    if side == "clean":
        row = replace(row, wrapped=row.clean, wrapper=(), pair=replace(row.pair, wrapped=row.pair.clean))
    found = spans(row)
    return tuple(next(name for name in SPANS if at in found[name]) for at in range(len(row.wrapped.ids)))
