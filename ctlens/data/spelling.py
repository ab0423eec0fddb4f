"""Spelling: the tokens of a text, the characters that each stands for, and the words that no token stands for."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from ctlens.core.errors import UnknownWords

Span: TypeAlias = tuple[int, int]
"""Characters of a text, from the first index up to the second."""
Spelled: TypeAlias = tuple[tuple[int, ...], tuple[Span, ...]]
"""The tokens of a text, and the characters of each."""

_BYTE_OF_SPACE = "Ġ"
"""How byte-level vocabularies write a space."""
_SPACE_OF_SENTENCEPIECE = "▁"
_NOBODYS = "\U0010fffd"
"""A private character that no vocabulary holds."""
_INVISIBLE = "CMZ"
"""Unicode's classes of control characters, marks that are put on letters, and spaces, which tokenizers may drop."""
_SHOWN = 60
"""Characters of a text that an error shows."""


def spell(tokenizer: Any, text: str) -> Spelled:
    """Tokenises a text without adding special tokens; every token's span holds its spaces too.

    Raises:
        UnknownWords: the tokenizer cannot read it, for example half of a character.
    """
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UnknownWords(f"the tokenizer cannot read {text[:_SHOWN]!r} ({error}): write it in other words.") from None
    spans = [(start, end) for start, end in encoded["offset_mapping"]]
    if spaces(tokenizer) == "trimmed":
        spans = [_untrimmed(text, token, span) for token, span in zip(encoded.tokens(), spans, strict=True)]
    return tuple(encoded["input_ids"]), tuple(spans)


@lru_cache(maxsize=16)
def spaces(tokenizer: Any) -> Literal["spelled", "trimmed", "separators"]:
    """Tells what a space between two words is.

    Returns:
        `"spelled"` where it is part of a token, `"trimmed"` where it is and the tokenizer's spans leave it out (as
        byte-level post-processors do by default), `"separators"` where it is in no token.
    """
    try:
        encoded = tokenizer("a a", add_special_tokens=False, return_offsets_mapping=True)
    except Exception:  # a vocabulary of whole words without one for those that it does not know
        return "separators"
    if any(start <= 1 < end for start, end in encoded["offset_mapping"]):
        return "spelled"
    return "trimmed" if any(_BYTE_OF_SPACE in token for token in encoded.tokens()) else "separators"


def _untrimmed(text: str, token: str, span: Span) -> Span:
    """The characters of a token of a byte-level vocabulary, with the spaces that its span leaves out.

    >>> _untrimmed("so   it is", "ĠĠ", (4, 4)), _untrimmed("so   it is", "Ġit", (5, 7))
    ((2, 4), (4, 7))
    """
    start, end = span
    spaced = token.replace(_BYTE_OF_SPACE, " ")
    covered = text[start:end]
    if covered in (token, spaced):
        return span
    before = _leading(spaced) - _leading(covered)
    behind = _leading(spaced[::-1]) - _leading(covered[::-1])
    found_before = before > 0 and text[:start].endswith(spaced[:before])
    if found_before:
        start -= before
    all_found = found_before and not spaced.strip()  # a token of spaces alone begins and ends with the same ones
    if behind > 0 and not all_found and text[end:].startswith(spaced[-behind:]):
        end += behind
    return start, end


def _leading(text: str) -> int:
    """Counts the spaces that a text begins with."""
    return len(text) - len(text.lstrip())


def require_known(tokenizer: Any, text: str, spelled: Spelled, written: Sequence[Span]) -> None:
    """Refuses a text of which a model would see some characters as an unknown word, or not at all.

    Args:
        tokenizer: the one that spelled the text.
        text: the characters.
        spelled: its tokens.
        written: the parts of it that people wrote; what a chat template writes around them is not looked at.

    Raises:
        UnknownWords: there are such characters in these parts.
    """
    unknown = [(word, span) for span in written for word in _unknown_words(tokenizer, text, spelled, span)]
    if not unknown:
        return
    words = list(dict.fromkeys(text[slice(*word)].strip() for word, _ in unknown))
    named = ", ".join(map(repr, words[:3])) + (f" and {len(words) - 3} more" if words[3:] else "")
    (first, _), (start, end) = unknown[0]
    begin = max(first - _SHOWN // 2, start)
    raise UnknownWords(
        f"the tokenizer does not know {named} in {text[begin : min(begin + _SHOWN, end)]!r}: give the model that this "
        "text was written for (--model), or write it in words that this one knows."
    )


def _unknown_words(tokenizer: Any, text: str, spelled: Spelled, part: Span) -> Iterator[Span]:
    """Yields the characters, in a part of a text, that no token of their own stands for."""
    unknown = _unknown_tokens(tokenizer)
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    allowed = tokenizer.unk_token if tokenizer.unk_token_id in marks else None  # GPT-2 has one token for all of them
    start, end = part
    reached = start
    for token, (left, right) in zip(*spelled, strict=True):
        if left >= end or right <= start:
            continue
        if left > reached:
            yield from _left_out(text, reached, left)
        if token in unknown and text[left:right].strip() != allowed:
            yield left, right
        reached = max(reached, right)
    if end > reached:
        yield from _left_out(text, reached, end)


def _left_out(text: str, start: int, end: int) -> Iterator[Span]:
    """Yields the word around characters that no token covers, unless tokenizers may drop all of them.

    The whole word, because where a tokenizer drops one of its characters, the spans of the others are shifted.
    """
    if any(unicodedata.category(character)[0] not in _INVISIBLE for character in text[start:end]):
        yield text.rfind(" ", 0, start) + 1, end + len(text[end:].partition(" ")[0])


@lru_cache(maxsize=16)
def _unknown_tokens(tokenizer: Any) -> frozenset[int]:
    """The tokens that stand for what a tokenizer does not know; none where it spells everything in bytes.

    A tokenizer may not name its own in `unk_token`, so it is asked for a character that no vocabulary holds.
    """
    try:
        asked = tokenizer(_NOBODYS, add_special_tokens=False)
    except Exception:  # it has no token for what it does not know, and refuses such a text itself
        return frozenset()
    found = {token for token in asked["input_ids"] if tokenizer.convert_ids_to_tokens(token) != _SPACE_OF_SENTENCEPIECE}
    return frozenset({tokenizer.unk_token_id, *(found if len(found) == 1 else ())} - {None})
