"""From chat turns to tokens: ids, the characters that each token covers, and where each turn's text lies."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from ctlens.core.arguments import require_types
from ctlens.core.errors import CtlensError
from ctlens.core.keeping import once
from ctlens.data.spelling import Span, require_known, spaces, spell

_FIRST_SENTINEL = 0xE000
"""The first of Unicode's private characters, which stand for messages where a template's frame is looked for."""
_SENTINEL = chr(_FIRST_SENTINEL)
TEMPLATE_DATE = datetime(2024, 7, 26)
"""The day that chat templates take for today; the one that Llama-3's own templates fall back on.

A template that writes the date of its clock would give a training other prompts when it is resumed the next day, and
two evaluations other prompts on two days.
"""
_DATE_PARTS = {f"%{code}": TEMPLATE_DATE.strftime(f"%{code}") for code in "aAbBcdHIjmMpSUwWxXyYzZ"} | {
    "%-d": str(TEMPLATE_DATE.day),
    "%-m": str(TEMPLATE_DATE.month),
    "%F": f"{TEMPLATE_DATE:%Y-%m-%d}",
}
_REPLACED = "".join(f" | replace({code!r}, {part!r})" for code, part in _DATE_PARTS.items())
_STOPPED_CLOCK = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACED} }}}}{{% endmacro %}}\n"
"""A Jinja macro in the place of HuggingFace's clock, which takes no other: functions do not reach a template."""
TOKENS = "tokens"
"""The role of a prompt that is given as token ids: its only turn, with the ids as text and spaces between them."""
_SHOWN = 30
"""Characters of a prompt or an answer that an error shows."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: `"system"`, `"user"` or `"assistant"`; or `TOKENS`.
        content: the text of the message.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        require_types(self)


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


def render(tokenizer: Any, turns: tuple[Turn, ...]) -> Rendered:
    """Renders turns as the prompt that the model answers.

    With a chat template, the turns go through it and the generation prompt is added, unless the
    last turn is the assistant's: that one is a prefill, which the model continues. Of several named
    templates it is the one called "default", and today is always `TEMPLATE_DATE`. Without a
    template only a single user turn can be rendered; its text is used as it is, after one BOS
    where the tokenizer has one (TransformerLens's convention). A prompt of token ids is taken as it is.

    Args:
        tokenizer: a fast HuggingFace tokenizer.
        turns: the conversation.

    Raises:
        CtlensError: there is no tokenizer, it is not a fast one, it has no template for several
            turns or several of which none is the default, or the template doubles the BOS, refuses
            the messages or rewrites one; or token ids are not those of their own text.
        UnknownWords: the tokenizer does not know a word of a message.
    """
    if tokenizer is None:
        raise CtlensError("the model has no tokenizer: load it from a folder that holds one, or pass tokenizer=.")
    if not getattr(tokenizer, "is_fast", False):
        raise CtlensError("a fast tokenizer is needed (character offsets): save the tokenizer as tokenizer.json.")
    return once(lambda: (tokenizer, str(chat_template(tokenizer)), turns), lambda: _render(tokenizer, turns))


def _render(tokenizer: Any, turns: tuple[Turn, ...]) -> Rendered:
    if turns[0].role == TOKENS:
        return _of_ids(tokenizer, turns)
    if chat_template(tokenizer):
        text = _apply_template(tokenizer, turns)
        contents = _content_spans(tokenizer, turns, text)
    elif len(turns) != 1 or turns[0].role != "user":
        raise CtlensError("the tokenizer has no chat template: give each prompt as one plain text, not as messages.")
    else:
        text = turns[0].content
        contents = ((0, len(text)),)
    return _read(tokenizer, text, contents, tuple(turn.role for turn in turns))


def _of_ids(tokenizer: Any, turns: tuple[Turn, ...]) -> Rendered:
    """A prompt of token ids, which its text must give again, as alignment and answers are found in the text."""
    given = turns[0].content.split()
    if len(turns) > 1 or not all(token.isdecimal() and int(token) < len(tokenizer) for token in given):
        raise CtlensError(
            f"a prompt of token ids is one turn of numbers below {len(tokenizer)}, the size of the vocabulary: give "
            "the ids alone."
        )
    ids = tuple(map(int, given))
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    found, offsets = spell(tokenizer, text)
    if found != ids:
        raise CtlensError(
            f"the token ids of {text[:_SHOWN]!r} are not those that the tokenizer gives this text: give the text, or "
            "ids of this model's own tokenizer."
        )
    return Rendered(text, ids, offsets, (_message_in(tokenizer, text),))


def _message_in(tokenizer: Any, text: str) -> Span:
    """Where the message lies in a rendered prompt of one turn of the user; all of a text that is no such prompt."""
    if chat_template(tokenizer):
        special = str(tokenizer.special_tokens_map)
        before, _, behind = _frame(tokenizer, chat_template(tokenizer), special, ("user",)).partition(_SENTINEL)
        if text.startswith(before) and text.endswith(behind) and len(before) + len(behind) < len(text):
            return len(before), len(text) - len(behind)
    return 0, len(text)


def chat_template(tokenizer: Any) -> str | None:
    """Finds the chat template of a tokenizer, of several named ones the default; None where there is none.

    Raises:
        CtlensError: there are several and none is called "default".
    """
    found = getattr(tokenizer, "chat_template", None)
    if not isinstance(found, dict):
        return found or None
    if "default" not in found:
        raise CtlensError(
            f"the tokenizer has several chat templates ({', '.join(sorted(found))}) and none is called default: "
            "set tokenizer.chat_template to one of them."
        )
    return found["default"]


def _read(tokenizer: Any, text: str, contents: tuple[Span, ...], roles: tuple[str, ...]) -> Rendered:
    """Tokenises a rendered text, of which `contents` were written by people and not by the template."""
    ids, offsets = spell(tokenizer, text)
    require_known(tokenizer, text, (ids, offsets), contents)
    bos = tokenizer.bos_token_id
    if chat_template(tokenizer):
        if bos is not None and ids[:2] == (bos, bos):
            raise CtlensError("the chat template yields two BOS tokens: remove one from the template.")
    elif bos is not None and ids[:1] != (bos,):
        ids = (bos, *ids)
        offsets = ((0, 0), *offsets)
    return Rendered(text, ids, offsets, contents, roles)


def _apply_template(tokenizer: Any, turns: tuple[Turn, ...], *, closed: bool = False) -> str:
    """The conversation as the model continues it; if `closed`, as it ends, with nothing to continue."""
    prefill = turns[-1].role == "assistant" and not closed
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    template = chat_template(tokenizer) or ""
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=_STOPPED_CLOCK + template if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=not prefill and not closed,
            continue_final_message=prefill,
        )
    except Exception as error:  # a template is a program of somebody else's, which may raise anything
        reason = (str(error) or type(error).__name__).split("\n")[0]
        advice = "; put the system text in front of the first user message" if _has_system(turns) else ""
        raise CtlensError(f"the chat template refuses these messages: {reason}{advice}") from None


def _has_system(turns: tuple[Turn, ...]) -> bool:
    return any(turn.role == "system" for turn in turns)


def _content_spans(tokenizer: Any, turns: tuple[Turn, ...], text: str) -> tuple[Span, ...]:
    """Finds each message in `text`: a second rendering, of one private character per message, shows the frame."""
    sentinels = _sentinels(len(turns))
    special = str(tokenizer.special_tokens_map)
    frame = _frame(tokenizer, chat_template(tokenizer), special, tuple(turn.role for turn in turns))
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


def _sentinels(count: int) -> list[str]:
    return [chr(_FIRST_SENTINEL + index) for index in range(count)]


@lru_cache(maxsize=64)
def _frame(tokenizer: Any, template: str | None, special: str, roles: tuple[str, ...]) -> str:
    """A conversation between these roles of which each message is one private character.

    `template` and the special tokens decide it and can be changed on a tokenizer, so the cache keys on them too.
    """
    return _apply_template(tokenizer, tuple(map(Turn, roles, _sentinels(len(roles)))))


def token_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Tokenises a text without adding special tokens."""
    return spell(tokenizer, text)[0]


def end_token(tokenizer: Any) -> int | None:
    """Finds the token that closes an assistant's answer; None where the tokenizer has none.

    It is the special token that the chat template puts behind an assistant's message, and the EOS
    where the template puts none: Gemma's turns end in `<end_of_turn>`, and no answer ends in its EOS.
    """
    closing = _turn_end(tokenizer, chat_template(tokenizer), tokenizer.eos_token)
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
    if not chat_template(tokenizer):
        return ()
    turns = (Turn("user", "a"), Turn("assistant", _SENTINEL))
    behind = _apply_template(tokenizer, turns, closed=True).partition(_SENTINEL)[2].lstrip()
    closing, *tail = token_ids(tokenizer, behind) or (None,)
    return tuple(tail) if closing == end_token(tokenizer) else ()


def answer_ids(tokenizer: Any, prompt: Rendered, answer: str, *, end: bool = True) -> tuple[int, ...]:
    """Finds the tokens that an answer has behind its prompt, not those of a text by itself.

    SentencePiece puts a space before a text by itself, and so begins it with another token than there is in the
    middle of a text.

    Args:
        tokenizer: the one that rendered the prompt.
        prompt: from `render`.
        answer: the assistant's words, see `with_answer`.
        end: close it by the tokenizer's `end_token`, where it has one.

    Raises:
        CtlensError: the answer's beginning and the prompt's end are one token.
        UnknownWords: the tokenizer does not know a word of the answer.
    """
    ids = _behind(tokenizer, prompt, answer)
    if ids is None:
        raise CtlensError(
            f"the answer {answer[:_SHOWN]!r} fuses with the end of its prompt, {prompt.text[-_SHOWN:]!r}, into "
            "one token: begin the answer with a space, or end the prompt without one."
        )
    closing = end_token(tokenizer) if end else None
    return ids if closing is None else (*ids, closing)


def opening_token(tokenizer: Any, prompt: Rendered, answer: str) -> int | None:
    """Finds the first token of `answer_ids`; None where the answer fuses with its prompt, or has no token.

    Raises:
        UnknownWords: the tokenizer does not know a word of the answer.
    """
    return next(iter(_behind(tokenizer, prompt, answer) or ()), None)


def _behind(tokenizer: Any, prompt: Rendered, answer: str) -> tuple[int, ...] | None:
    """The tokens of an answer behind those of its prompt; None where the prompt has other tokens with the answer."""

    def found() -> tuple[int, ...] | None:
        ids = with_answer(tokenizer, prompt, answer).ids
        return ids[len(prompt.ids) :] if ids[: len(prompt.ids)] == prompt.ids else None

    return once(lambda: (tokenizer, str(chat_template(tokenizer)), prompt.text, prompt.roles, answer), found)


def with_answer(tokenizer: Any, prompt: Rendered, answer: str) -> Rendered:
    """Tokenises a prompt and the answer behind it as one text, in which the answer is one more message.

    The answer is taken as it stands, but for the space that many chat templates put between their generation
    prompt and an answer, and that tokenizers of whole words need between any two.

    Raises:
        UnknownWords: the tokenizer does not know a word of the answer.
    """
    between = "" if answer[:1].isspace() else _space_before_answers(tokenizer, prompt)
    text = prompt.text + between + answer
    span = (len(text) - len(answer), len(text))
    return _read(tokenizer, text, (span,), ("assistant",))


def _space_before_answers(tokenizer: Any, prompt: Rendered) -> str:
    if spaces(tokenizer) == "separators":
        return " "
    return "" if prompt.roles[-1] == "assistant" else _turn_begin(tokenizer, chat_template(tokenizer))


@lru_cache(maxsize=16)
def _turn_begin(tokenizer: Any, template: str | None) -> str:
    """The white space that a chat template puts between its generation prompt and the assistant's message."""
    if not template:
        return ""
    asked = (Turn("user", "a"),)
    try:
        prompt = _apply_template(tokenizer, asked)
        whole = _apply_template(tokenizer, (*asked, Turn("assistant", _SENTINEL), *asked))
    except CtlensError:  # a template that wants other conversations
        return ""
    before = whole.partition(_SENTINEL)[0].removeprefix(prompt)
    return before if before.isspace() else ""
