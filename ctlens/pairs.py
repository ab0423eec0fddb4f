"""Prompts in pairs: the plain request, the same request under an attack, and the attack's benign twin."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctlens.chat import Turn
from ctlens.errors import CtlensError, unknown
from ctlens.files import read_jsonl, write_text

ARMS = ("wrapped", "clean", "benign")
REQUIRED = ("clean", "wrapped")
FIELDS = (*REQUIRED, "benign", "good", "bad", "benign_good", "benign_bad", "target", "shared", "labels")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """A prompt and the answers that count.

    Attributes:
        turns: the conversation up to the answer; a last assistant turn is a prefill.
        good: an answer that begins with these words is good; None when not known.
        bad: an answer that begins with these words is bad; None when not known.
    """

    turns: tuple[Turn, ...]
    good: str | None = None
    bad: str | None = None


@dataclass(frozen=True)
class Pair:
    """One item of consistency training.

    Attributes:
        clean: the plain request.
        wrapped: the same request under an attack.
        benign: the same wrapper around a harmless request, which must stay answered.
        target: the answer that BCT trains on the wrapped prompt; None lets the reference answer the clean one.
        shared: text that names the explicit alignment window, once on each side.
        labels: what is known of the item (wrapper, entity, ...), for grouping and probing.
    """

    clean: Prompt
    wrapped: Prompt
    benign: Prompt | None = None
    target: str | None = None
    shared: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def arm(self, name: str) -> Prompt | None:
        """The prompt of one arm: `"wrapped"`, `"clean"` or `"benign"` (None where the pair has no twin)."""
        if name not in ARMS:
            raise unknown("arm", name, ARMS)
        return getattr(self, name)


def prompt(text: str, good: str | None = None, bad: str | None = None) -> Prompt:
    """A prompt of one user turn."""
    return Prompt((Turn("user", text),), good, bad)


def load_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a JSONL file, one object per line.

    Fields: `clean` and `wrapped` (text, or a list of `{"role", "content"}` messages); optional
    `benign` (likewise), `good`, `bad`, `benign_good`, `benign_bad`, `target`, `shared` (text) and
    `labels` (an object of texts). See `Pair` for what they mean.

    Raises:
        CtlensError: the file is missing or empty, or a line is malformed; file and line are named.
    """
    pairs = [_pair(row, f"{path}, line {number}") for number, row in read_jsonl(path)]
    if not pairs:
        raise CtlensError(f"{path} holds no pairs: give one JSON object with 'clean' and 'wrapped' per line.")
    return pairs


def save_pairs(path: str | Path, pairs: Iterable[Pair]) -> None:
    """Writes pairs as JSONL that `load_pairs` reads back equal."""
    write_text(path, "".join(json.dumps(_row(pair), ensure_ascii=False) + "\n" for pair in pairs))


def _pair(row: Mapping[str, Any], where: str) -> Pair:
    for key in row:
        if key not in FIELDS:
            raise CtlensError(f"{where}: {unknown('field', key, FIELDS)} Put your own fields under 'labels'.")
    for key in REQUIRED:
        if key not in row:
            raise CtlensError(f"{where}: the field '{key}' is missing; 'clean' and 'wrapped' are expected.")
    texts = {key: _text(row.get(key), key, where) for key in FIELDS[3:-1]}
    labels = {} if row.get("labels") is None else row["labels"]
    if not isinstance(labels, dict):
        raise CtlensError(f"{where}: 'labels' is a {type(labels).__name__}, but an object is expected.")
    good, bad = texts["good"], texts["bad"]
    twin = row.get("benign")
    answers = texts["benign_good"], texts["benign_bad"]
    return Pair(
        clean=Prompt(_turns(row["clean"], "clean", where), good, bad),
        wrapped=Prompt(_turns(row["wrapped"], "wrapped", where), good, bad),
        benign=None if twin is None else Prompt(_turns(twin, "benign", where), *answers),
        target=texts["target"],
        shared=texts["shared"],
        labels={str(key): str(value) for key, value in labels.items()},
    )


def _text(value: Any, key: str, where: str) -> str | None:
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    raise CtlensError(f"{where}: '{key}' must be a text that is not blank.")


def _turns(value: Any, key: str, where: str) -> tuple[Turn, ...]:
    if isinstance(value, str) and value.strip():
        return (Turn("user", value),)
    if isinstance(value, list) and value:
        return tuple(_turn(message, key, where) for message in value)
    raise CtlensError(f"{where}: '{key}' must be a text that is not blank or a list of messages.")


def _turn(message: Any, key: str, where: str) -> Turn:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise CtlensError(f"{where}: a message of '{key}' must be an object with 'role' and 'content'.")
    if message["role"] not in ROLES or not isinstance(message["content"], str):
        raise CtlensError(f"{where}: a message of '{key}' needs a role of {', '.join(ROLES)} and a text as content.")
    return Turn(message["role"], message["content"])


def _row(pair: Pair) -> dict[str, Any]:
    if (pair.clean.good, pair.clean.bad) != (pair.wrapped.good, pair.wrapped.bad):
        raise CtlensError("a pair whose clean and wrapped prompts want different answers has no JSONL form.")
    row: dict[str, Any] = {key: _messages(getattr(pair, key)) for key in REQUIRED}
    optional: dict[str, Any] = {
        "good": pair.wrapped.good,
        "bad": pair.wrapped.bad,
        "target": pair.target,
        "shared": pair.shared,
    }
    if pair.benign:
        benign = {"benign": _messages(pair.benign), "benign_good": pair.benign.good, "benign_bad": pair.benign.bad}
        optional |= benign
    if pair.labels:
        optional["labels"] = dict(pair.labels)
    return row | {key: value for key, value in optional.items() if value is not None}


def _messages(item: Prompt) -> str | list[dict[str, str]]:
    turns: Sequence[Turn] = item.turns
    if len(turns) == 1 and turns[0].role == "user":
        return turns[0].content
    return [{"role": turn.role, "content": turn.content} for turn in turns]
