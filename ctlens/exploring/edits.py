"""The edit of a pair's wrapped prompt: another text in the message that holds the wrapper."""

from __future__ import annotations

from dataclasses import replace

from ctlens.core.errors import CtlensError
from ctlens.data.batch import EncodedPair
from ctlens.data.pairs import Pair

REQUEST = "{request}"
"""Stands in an edited message for the clean request."""
WHAT_IF = "what if"
"""The name of an edited wrapped prompt in tables and figures."""


def template_of(row: EncodedPair) -> str:
    """The message of the wrapper, with `{request}` where it holds the clean request once."""
    turn = row.pair.wrapped.turns[_turn_of_wrapper(row)]
    request = _request(row.pair, turn.role)
    once = request and turn.content.count(request) == 1
    return turn.content.replace(request, REQUEST) if once else turn.content


def edited_pair(row: EncodedPair, text: str) -> Pair:
    """A pair with another text in the message of the wrapper."""
    pair = row.pair
    number = _turn_of_wrapper(row)
    turns = list(pair.wrapped.turns)
    request = _request(pair, turns[number].role)
    if REQUEST in text and not request:
        raise CtlensError(
            f"the clean prompt has no {turns[number].role} message for {REQUEST} to stand for: leave it out."
        )
    turns[number] = replace(turns[number], content=text.replace(REQUEST, request))
    return replace(pair, wrapped=replace(pair.wrapped, turns=tuple(turns)))


def _turn_of_wrapper(row: EncodedPair) -> int:
    """The index of the wrapped prompt's last message with a token of the wrapper; of its last one if none has any."""
    held = [set(row.wrapped.positions(span)) & set(row.wrapper) for span in row.wrapped.contents]
    return max((number for number, found in enumerate(held) if found), default=len(held) - 1)


def _request(pair: Pair, role: str) -> str:
    """The clean prompt's last message of a role; empty where it has none."""
    return next((turn.content for turn in reversed(pair.clean.turns) if turn.role == role), "")
