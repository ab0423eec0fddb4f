"""Prompts in pairs: a plain request, the same request under an attack, and the attack's benign twin."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ctlens.core.arguments import require_types
from ctlens.core.errors import CtlensError, unknown
from ctlens.data.chat import TOKENS, Turn

PROMPT_SIDES = ("wrapped", "clean", "benign")
_REQUIRED = ("clean", "wrapped")
_ANSWERS = ("good", "bad", "options")
FIELDS = (
    *_REQUIRED,
    "benign",
    *_ANSWERS,
    *(f"{prompt_side}_{name}" for prompt_side in ("clean", "benign") for name in _ANSWERS),
    "target",
    "shared",
    "labels",
)
"""The fields of ctlens's own JSONL, see `pair_of`."""
TOPICS = ("topic", "entity", "hazard", "verb", "persona", "subject")
"""Labels that say what a pair is about, the first that it has counts; pairs of one topic are not independent."""
CLUSTER_KINDS = ("topic", "wrapper")
"""What `clusters_of` tells of a pair."""
EVERY_WRAPPER = {"wrappers": "all"}
"""The label of pairs whose wrappers are all that there are, as the orders of options, and not a few of many."""
_LABEL = "labels."
"""Before the name of a label that has a field to itself."""
_ROLES = ("system", "user", "assistant", TOKENS)


@dataclass(frozen=True)
class Prompt:
    """A prompt, and which answers to it are good and bad.

    Attributes:
        turns: the conversation up to the answer; a last assistant turn is a prefill.
        good: an answer that begins with these words is good; None when not known.
        bad: an answer that begins with these words is bad; None when not known.
        options: all answers of a multiple-choice question, each in full, as it continues the prompt;
            `good` and `bad` are then two of them. Empty for an open question.
    """

    turns: tuple[Turn, ...]
    good: str | None = None
    bad: str | None = None
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_types(self)
        if len(set(self.options)) < len(self.options) or len(self.options) == 1:
            raise CtlensError(f"a question needs at least two options, all different, not {self.options}.")
        for answer in (self.good, self.bad):
            if self.options and answer is not None and answer not in self.options:
                raise CtlensError(
                    f"{answer!r} is not among the options of its question: write it as in {self.options}."
                )
        for name, answer in (("good", self.good), ("bad", self.bad)):
            if answer is not None and not answer.strip():
                raise CtlensError(f"the {name} answer of a prompt is blank: give a text, or leave it out.")


@dataclass(frozen=True)
class Pair:
    """A clean and a wrapped prompt that a model is trained to treat alike.

    Attributes:
        clean: the plain request.
        wrapped: the same request under an attack.
        benign: the same wrapper around a harmless request, which must stay answered.
        target: the answer that BCT trains on the wrapped prompt; None lets the reference answer the clean one.
        shared: texts that stand once on each side, in any order: the explicit alignment window. Where there are none,
            what both sides share is the clean request.
        labels: what is known of the pair (wrapper, entity, ...), for grouping and probing.
    """

    clean: Prompt
    wrapped: Prompt
    benign: Prompt | None = None
    target: str | None = None
    shared: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_types(self)

    def side(self, name: str) -> Prompt | None:
        """The prompt of one prompt side: `"wrapped"`, `"clean"` or `"benign"` (None where the pair has no twin)."""
        if name not in PROMPT_SIDES:
            raise unknown("prompt side", name, PROMPT_SIDES)
        return getattr(self, name)


def clusters_of(pair: Pair) -> tuple[str, str]:
    """What a pair goes together with: its topic and its wrapper text.

    The topic is one of its labels `TOPICS`, else its clean prompt. The wrapper is the label `wrapper`; it is empty
    without that label, and with the label `EVERY_WRAPPER`: then intervals are not over wrappers.
    """
    topic = next((pair.labels[name] for name in TOPICS if pair.labels.get(name)), short_digest(pair.clean))
    every = EVERY_WRAPPER.items() <= pair.labels.items()
    return topic, "" if every else pair.labels.get("wrapper", "")


def short_digest(*values: object) -> str:
    """A short text that tells values apart by how they print."""
    return hashlib.blake2b(repr(values).encode(), digest_size=6).hexdigest()


def prompt(text: str | Sequence[Mapping[str, str]], good: str | None = None, bad: str | None = None) -> Prompt:
    """Makes a prompt of one message of the user, or of a list of chat messages.

    >>> prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]).turns[1]
    Turn(role='user', content='Why?')

    Args:
        text: what the user says, or messages with `role` and `content`; a last one of the assistant is a prefill.
        good, bad: the answers that count as good and as bad, see `Prompt`.

    Raises:
        CtlensError: a message lacks its role or its content.
    """
    turns = (Turn("user", text),) if isinstance(text, str) else turns_of(text, "text", "a prompt")
    return Prompt(turns, good, bad)


def pair_of(row: Mapping[str, Any], where: str) -> Pair:
    """Makes a pair of one row of ctlens's own JSONL.

    Fields: `clean` and `wrapped` (text, or a list of `{"role", "content"}` messages); optional
    `benign` (likewise), `good`, `bad` (texts) and `options` (a list of texts), with `clean_` before
    them where the clean prompt's answers are not those of the wrapped one, and with `benign_`; `target` (text),
    `shared` (a text or a list of texts) and `labels` (an object of texts or whole numbers; or a field each, as
    `labels.topic`, which a table can hold). See `Pair` and `Prompt` for what they mean.

    Args:
        row: the fields.
        where: the words that say in an error where the row is.

    Raises:
        CtlensError: the row is malformed.
    """
    labels = {key: value for key, value in row.items() if str(key).startswith(_LABEL)}
    for key in row:
        if key not in FIELDS and key not in labels:
            raise CtlensError(
                f"{where}: {unknown('field', key, FIELDS)} A field of your own is a label: {_LABEL}{key}."
            )
    if labels and row.get("labels"):
        raise CtlensError(f"{where}: 'labels' and {next(iter(labels))!r} both hold labels: write all of them one way.")
    if not all(map(_named_label, labels)):
        raise CtlensError(f"{where}: the field {_LABEL!r} names no label: write it as {_LABEL}topic.")
    without = [key for key in row if str(key).startswith("benign_") and row.get("benign") is None]
    if without and row[without[0]] is not None:
        raise CtlensError(f"{where}: {without[0]!r} is there and 'benign' is not: give the benign prompt too.")
    for key in _REQUIRED:
        if key not in row:
            raise CtlensError(f"{where}: the field '{key}' is missing; 'clean' and 'wrapped' are expected.")
    apart = any(f"clean_{name}" in row for name in _ANSWERS)
    return Pair(
        clean=_prompt(row, "clean", "clean_" if apart else "", where),
        wrapped=_prompt(row, "wrapped", "", where),
        benign=None if row.get("benign") is None else _prompt(row, "benign", "benign_", where),
        target=_text(row, "target", where),
        shared=_texts(row.get("shared"), "shared", where),
        labels=labels_of({_named_label(key): value for key, value in labels.items()} or row.get("labels"), where),
    )


def _named_label(key: str) -> str:
    """The name of the label that has a field to itself."""
    return key.removeprefix(_LABEL)


def labels_of(value: Any, where: str) -> dict[str, str]:
    """Makes the labels of a pair of a field: an object of texts and whole numbers, which become texts; null is none.

    Raises:
        CtlensError: it is something else; the error names the row (`where`).
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CtlensError(f"{where}: 'labels' is a {type(value).__name__}, but an object is expected.")
    for name, label in value.items():
        if type(label) not in (str, int):
            raise CtlensError(
                f"{where}: the label {name!r} is {label!r}, but a text or a whole number is expected: put it in quotes."
            )
    return {name: str(label) for name, label in value.items()}


def _prompt(row: Mapping[str, Any], prompt_side: str, prefix: str, where: str) -> Prompt:
    good = _text(row, f"{prefix}good", where)
    bad = _text(row, f"{prefix}bad", where)
    options = _texts(row.get(f"{prefix}options"), f"{prefix}options", where)
    try:
        return Prompt(turns_of(row[prompt_side], prompt_side, where), good, bad, options)
    except CtlensError as error:
        raise CtlensError(str(error) if where in str(error) else f"{where}: {error}") from None


def _text(row: Mapping[str, Any], key: str, where: str) -> str | None:
    value = row.get(key)
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    raise CtlensError(f"{where}: '{key}' must be a text that is not blank, not {value!r:.40}.")


def _texts(value: Any, key: str, where: str) -> tuple[str, ...]:
    """The texts of a field: a list of them, null for none, and for the field `shared` one text by itself."""
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) and key == "shared" else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise CtlensError(f"{where}: '{key}' must be a list of texts that are not blank.")
    return tuple(texts)


def turns_of(value: Any, key: str, where: str) -> tuple[Turn, ...]:
    """Makes turns of a field: a text, which the user says, or a list of messages.

    Raises:
        CtlensError: the field holds neither; the error names the row (`where`) and the field (`key`).
    """
    if isinstance(value, str) and value.strip():
        return (Turn("user", value),)
    if isinstance(value, list) and value:
        return tuple(_turn(message, key, where) for message in value)
    raise CtlensError(f"{where}: '{key}' must be a text that is not blank or a list of messages.")


def _turn(message: Any, key: str, where: str) -> Turn:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise CtlensError(f"{where}: a message of '{key}' must be an object with 'role' and 'content' alone.")
    content = _content(message["content"])
    if message["role"] not in _ROLES or not isinstance(content, str):
        raise CtlensError(
            f"{where}: a message of '{key}' needs a role of {', '.join(_ROLES)} and a text as content, or a list of "
            f"parts of type text; here are {message['role']!r} and a {type(message['content']).__name__}."
        )
    return Turn(message["role"], content)


def _content(content: Any) -> Any:
    """The text of a message whose content is a list of parts, where all of them are texts; else the content as it is.

    >>> _content([{"type": "text", "text": "Is it "}, {"type": "text", "text": "red?"}])
    'Is it red?'
    """
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    written = [text for text in texts if isinstance(text, str)]
    return "".join(written) if len(written) == len(content) else content


def row_of(pair: Pair) -> dict[str, Any]:
    """The row of ctlens's own JSONL of which `pair_of` makes the pair."""
    row: dict[str, Any] = {key: _messages(getattr(pair, key)) for key in _REQUIRED}
    row |= _answers(pair.wrapped, "")
    if _answers(pair.clean, "") != _answers(pair.wrapped, ""):
        row |= _answers(pair.clean, "clean_") or {"clean_good": None}
    if pair.benign:
        row |= {"benign": _messages(pair.benign), **_answers(pair.benign, "benign_")}
    rest = {"target": pair.target, "shared": list(pair.shared) or None, "labels": dict(pair.labels) or None}
    return row | {key: value for key, value in rest.items() if value is not None}


def _answers(side: Prompt, prefix: str) -> dict[str, Any]:
    """The answers that the side names, by the fields that hold them."""
    named = {"good": side.good, "bad": side.bad, "options": list(side.options) or None}
    return {prefix + name: value for name, value in named.items() if value is not None}


def _messages(item: Prompt) -> str | list[dict[str, str]]:
    turns: Sequence[Turn] = item.turns
    if len(turns) == 1 and turns[0].role == "user":
        return turns[0].content
    return [{"role": turn.role, "content": turn.content} for turn in turns]
