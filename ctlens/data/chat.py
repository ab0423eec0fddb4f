"""From chat turns to tokens: ids, the characters that each token covers, and where each turn's text lies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from jinja2 import TemplateError

from ctlens.core.errors import CtlensError

Span: TypeAlias = tuple[int, int]
"""Characters of a text, from the first index up to the second."""

_FIRST_SENTINEL = 0xE000
"""The first of Unicode's private characters, which stand for messages where a template's frame is looked for."""
_SENTINEL = chr(_FIRST_SENTINEL)


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: `"system"`, `"user"` or `"assistant"`.
        content: the text of the message.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Rendered:
    """A prompt as the model sees it.

    Attributes:
        text: the rendered characters.
        ids: one token id per position, at most one BOS, no padding.
        offsets: per position, the half-open character span in `text` (empty for an added BOS).
        contents: per turn, the half-open character span of its content in `text`.
        roles: per turn, who speaks.
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[Span, ...]
    contents: tuple[Span, ...]
    roles: tuple[str, ...] = ("user",)

    def positions(self, span: Span) -> tuple[int, ...]:
        """Token positions that share at least one character with the half-open character `span`."""
        start, end = span
        return tuple(i for i, (left, right) in enumerate(self.offsets) if left < min(end, right) and right > start)


Renderings: TypeAlias = dict[Any, "Rendered"]
"""What `render` returned before, by tokenizer, template and turns."""
_KEPT: ContextVar[Renderings | None] = ContextVar("renderings that are kept", default=None)


@contextmanager
def keeping(renderings: Renderings) -> Iterator[None]:
    """Renders equal turns once inside the block, and keeps them in `renderings`, where a later block finds them.

    It is for work that asks the same prompts again and again with tokenizers that nothing changes meanwhile, as
    the trainings of a study do. A token takes about 200 bytes.
    """
    before = _KEPT.set(renderings)
    try:
        yield
    finally:
        _KEPT.reset(before)


def render(tokenizer: Any, turns: tuple[Turn, ...]) -> Rendered:
    """Renders turns as the prompt that the model answers.

    With a chat template, the turns go through it and the generation prompt is added, unless the
    last turn is the assistant's: that one is a prefill, which the model continues. Without a
    template only a single user turn can be rendered; its text is used as it is, after one BOS
    where the tokenizer has one (TransformerLens's convention).

    Args:
        tokenizer: a fast HuggingFace tokenizer.
        turns: the conversation.

    Raises:
        CtlensError: there is no tokenizer, it is not a fast one, it has no template for several
            turns, or the template doubles the BOS, refuses the messages or rewrites one.
    """
    if tokenizer is None:
        raise CtlensError("the model has no tokenizer: load it from a folder that holds one, or pass tokenizer=.")
    if not getattr(tokenizer, "is_fast", False):
        raise CtlensError("a fast tokenizer is needed (character offsets): save the tokenizer as tokenizer.json.")
    kept = _KEPT.get()
    if kept is None:
        return _render(tokenizer, turns)
    known = (tokenizer, str(getattr(tokenizer, "chat_template", None)), turns)
    if known not in kept:
        kept[known] = _render(tokenizer, turns)
    return kept[known]


def _render(tokenizer: Any, turns: tuple[Turn, ...]) -> Rendered:
    if getattr(tokenizer, "chat_template", None):
        return _render_chat(tokenizer, turns)
    if len(turns) != 1 or turns[0].role != "user":
        raise CtlensError("the tokenizer has no chat template: give each prompt as one plain text, not as messages.")
    return _render_plain(tokenizer, turns[0].content)


def _render_plain(tokenizer: Any, text: str) -> Rendered:
    ids, offsets = _encode(tokenizer, text)
    if tokenizer.bos_token_id is not None and ids[:1] != (tokenizer.bos_token_id,):
        ids = (tokenizer.bos_token_id, *ids)
        offsets = ((0, 0), *offsets)
    return Rendered(text, ids, offsets, ((0, len(text)),))


def _render_chat(tokenizer: Any, turns: tuple[Turn, ...]) -> Rendered:
    text = _apply_template(tokenizer, turns)
    contents = _content_spans(tokenizer, turns, text)
    ids, offsets = _encode(tokenizer, text)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == (bos, bos):
        raise CtlensError("the chat template yields two BOS tokens: remove one from the template.")
    return Rendered(text, ids, offsets, contents, tuple(turn.role for turn in turns))


def _apply_template(tokenizer: Any, turns: tuple[Turn, ...], *, closed: bool = False) -> str:
    """The conversation as the model continues it; if `closed`, as it ends, with nothing to continue."""
    prefill = turns[-1].role == "assistant" and not closed
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not prefill and not closed, continue_final_message=prefill
        )
    except (TemplateError, ValueError) as error:
        reason = str(error).split("\n")[0]
        advice = "; put the system text in front of the first user message" if _has_system(turns) else ""
        raise CtlensError(f"the chat template refuses these messages: {reason}{advice}") from None


def _has_system(turns: tuple[Turn, ...]) -> bool:
    return any(turn.role == "system" for turn in turns)


def _content_spans(tokenizer: Any, turns: tuple[Turn, ...], text: str) -> tuple[Span, ...]:
    """Finds each message in `text`: a second rendering, of one private character per message, shows the frame."""
    sentinels = [chr(_FIRST_SENTINEL + index) for index in range(len(turns))]
    frame = _apply_template(tokenizer, tuple(Turn(t.role, s) for t, s in zip(turns, sentinels, strict=True)))
    for contents in ([t.content for t in turns], [t.content.strip() for t in turns]):
        spans = []
        built = ""
        rest = frame
        for sentinel, content in zip(sentinels, contents, strict=True):
            before, found, rest = rest.partition(sentinel)
            if not found:
                break
            spans.append((len(built) + len(before), len(built) + len(before) + len(content)))
            built += before + content
        if len(spans) == len(turns) and built + rest == text:
            return tuple(spans)
    raise CtlensError(
        "the chat template rewrites or reorders messages, so their tokens cannot be located: give the tokenizer a "
        "template that keeps them as they are."
    )


def _encode(tokenizer: Any, text: str) -> tuple[tuple[int, ...], tuple[Span, ...]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return tuple(encoded["input_ids"]), tuple((start, end) for start, end in encoded["offset_mapping"])


def token_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Tokenises a text without adding special tokens."""
    return _encode(tokenizer, text)[0]


def end_token(tokenizer: Any) -> int | None:
    """Finds the token that closes an assistant's answer; None where the tokenizer has none.

    It is the special token that the chat template puts behind an assistant's message, and the EOS
    where the template puts none: Gemma's turns end in `<end_of_turn>`, and no answer ends in its EOS.
    """
    closing = _turn_end(tokenizer, getattr(tokenizer, "chat_template", None), tokenizer.eos_token)
    return tokenizer.eos_token_id if closing is None else closing


@lru_cache(maxsize=16)
def _turn_end(tokenizer: Any, template: str | None, eos: str | None) -> int | None:
    """The special token behind an assistant's message.

    `template` and `eos` decide it and can be changed on a tokenizer, so the cache keys on them too.
    """
    if not template:
        return None
    turns = (Turn("user", "a"), Turn("assistant", _SENTINEL), Turn("user", "a"))
    try:
        behind = token_ids(tokenizer, _apply_template(tokenizer, turns).partition(_SENTINEL)[2].lstrip())
    except CtlensError:  # a template that wants other conversations
        return None
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return behind[0] if behind[:1] and behind[0] in special else None


def turn_tail(tokenizer: Any) -> tuple[int, ...]:
    """Finds the tokens that the chat template writes behind the `end_token` of a conversation's last answer.

    It is a line break in many templates; nothing where there is no template, or no end token in front of it.
    """
    if not getattr(tokenizer, "chat_template", None):
        return ()
    turns = (Turn("user", "a"), Turn("assistant", _SENTINEL))
    behind = _apply_template(tokenizer, turns, closed=True).partition(_SENTINEL)[2].lstrip()
    closing, *tail = token_ids(tokenizer, behind) or (None,)
    return tuple(tail) if closing == end_token(tokenizer) else ()


def answer_ids(tokenizer: Any, answer: str, *, end: bool = True) -> tuple[int, ...]:
    """Tokenises an assistant's answer, and closes it by the tokenizer's `end_token`, where it has one, if `end`."""
    ids = token_ids(tokenizer, answer)
    closing = end_token(tokenizer) if end else None
    return ids if closing is None else (*ids, closing)
