"""The field's file formats: pairs, prompts, facts and prefills are read as they were published.

Files are read row by row. A row that cannot be read is reported or raised, never skipped.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple, TypeAlias

from ctlens.core.errors import CtlensError
from ctlens.core.files import write_text
from ctlens.core.public import public
from ctlens.core.reading import read_csv, read_jsonl
from ctlens.data.chat import Turn
from ctlens.data.pairs import FIELDS, Pair, Prompt, labels_of, pair_of, turns_of

_MESSAGE_FIELDS = (("reference_messages", "variant_messages"), ("unbiased_messages", "biased_messages"))
_JOINED_BY = ("_id", "id")
_PROMPT_FIELDS = ("prompt", "goal", "question")
_KNOWN = (
    "'clean' and 'wrapped', 'reference_messages' and 'variant_messages', 'unbiased_messages' and 'biased_messages', "
    "'prompt' and 'prefill' (CSV), or 'messages' in two files"
)
_OPTION = re.compile(r"^\(?([A-Z])\) (.+?)\s*$", re.MULTILINE)
_ANNOUNCED = re.compile(r"^(The best answer is: \(?|\()", re.IGNORECASE)

FileRow: TypeAlias = Mapping[str, Any]
"""The fields of one row of a file, by name."""


@dataclass(frozen=True)
class Reading:
    """The pairs of a file and the rows that could not be read as pairs.

    Attributes:
        pairs: in the order of the file.
        refused: one message per rejected row, which says where the row is and why it was rejected.
    """

    pairs: tuple[Pair, ...]
    refused: tuple[str, ...] = ()

    def all(self) -> list[Pair]:
        """Gives the pairs where every row of the file is one.

        Raises:
            CtlensError: a row was rejected, or the file holds no pairs.
        """
        if self.refused:
            raise CtlensError(self.refused[0])
        if not self.pairs:
            raise CtlensError(f"the file holds no pairs: rows with {_KNOWN} are expected.")
        return list(self.pairs)


@public
def load_pairs(path: str | Path, wrapped: str | Path | None = None) -> list[Pair]:
    """Reads the pairs of a file in any of the formats of `read_pairs`; raises where that rejects a row."""
    return read_pairs(path, wrapped).all()


def read_pairs(path: str | Path, wrapped: str | Path | None = None) -> Reading:
    """Reads the pairs of a file, and says of every other row why it is not a pair.

    The fields of a row tell its format:
        - `clean` and `wrapped`, with the optional fields of `ctlens.data.pairs.FIELDS`: ctlens's own JSONL.
        - `reference_messages` and `variant_messages`, or `unbiased_messages` and `biased_messages`:
          conversations; a last message of the assistant is the answer, which becomes the target.
        - `messages` in two files, the clean and the wrapped one (*Consistency Training Along the
          Transformer Stack*, its code): joined by `_id` where rows have one, else row by row.
          Lettered options are found in the text, and `good` is the one that is answered.
        - `prompt` and `prefill` in a CSV: the wrapped prompt has the prefill as the assistant's turn.

    Args:
        path: JSONL, or CSV with a header.
        wrapped: the second file, where clean and wrapped prompts are in a file each.

    Raises:
        CtlensError: a file is missing, empty or not of a known format.
    """
    rows = read_rows(path)
    if wrapped is not None:
        return _joined(path, rows, wrapped, read_rows(wrapped))
    pairs: list[Pair] = []
    refused: list[str] = []
    for where, row in rows:
        try:
            pairs.append(pair_of_row(row, where))
        except CtlensError as error:
            refused.append(str(error))
    return Reading(tuple(pairs), tuple(refused))


def read_rows(path: str | Path) -> list[tuple[str, FileRow]]:
    """Reads the rows of a JSONL or CSV file, each with the words that say where it is (`"a.csv, row 3"`).

    Raises:
        CtlensError: the file is missing, holds no rows, or does not hold what its name says.
    """
    path = Path(path)
    rows: list[tuple[str, FileRow]]
    if path.suffix == ".csv":
        rows = [(f"{path}, row {number}", _filled(row)) for number, row in read_csv(path)]
    else:
        rows = [(f"{path}, line {number}", row) for number, row in read_jsonl(path)]
    if not rows:
        raise CtlensError(f"{path} holds no rows: rows with {_KNOWN} are expected.")
    return rows


def _filled(row: Mapping[str, str]) -> FileRow:
    """A row of a table without its blank cells: every row has a cell in every column."""
    return {name: text for name, text in row.items() if text.strip()}


@public
def load_prompts(path: str | Path) -> list[Prompt]:
    """Reads plain prompts, to be put under wrappers, from rows with `prompt`, `goal` or `question`, or `messages`.

    Beside a `prompt` may stand its `good` and its `bad` answer. Where the last message is the assistant's, it is the
    answer and becomes `good`. Lettered options in the question are found, and the answer is then one of them.

    Raises:
        CtlensError: the file is missing or empty, or a row holds no prompt.
    """
    return [_plain_prompt(row, where) for where, row in read_rows(path)]


@public
def load_facts(path: str | Path) -> list[tuple[Turn, Turn]]:
    """Reads questions and answers about a persona, from rows with `messages` of a user and an assistant.

    Raises:
        CtlensError: the file is missing or empty, or a row is not one question with its answer.
    """
    facts = []
    for where, row in read_rows(path):
        turns = turns_of(row.get("messages"), "messages", where)
        if [turn.role for turn in turns] != ["user", "assistant"]:
            roles = ", ".join(turn.role for turn in turns)
            raise CtlensError(
                f"{where}: 'messages' are of {roles}; a fact is one question of the user and the assistant's answer."
            )
        facts.append((turns[0], turns[1]))
    return facts


@public
def load_prefills(path: str | Path) -> list[str]:
    """Reads the beginnings of answers in the column `prefill` of a CSV, each once.

    Raises:
        CtlensError: the file is missing or empty, or a row has no prefill.
    """
    texts = []
    for where, row in read_rows(path):
        if not str(row.get("prefill", "")).strip():
            raise CtlensError(f"{where}: the field 'prefill' is missing or blank: write the beginning of an answer.")
        texts.append(str(row["prefill"]))
    return list(dict.fromkeys(texts))


def save_messages(path: str | Path, pairs: Iterable[Pair]) -> None:
    """Writes pairs as `reference_messages` and `variant_messages`; a pair's target is the assistant's last message."""
    names = _MESSAGE_FIELDS[0]
    rows = [
        {
            name: [*({"role": turn.role, "content": turn.content} for turn in side.turns), *_answered(pair, side)]
            for name, side in zip(names, (pair.clean, pair.wrapped), strict=True)
        }
        for pair in pairs
    ]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _answered(pair: Pair, side: Prompt) -> list[dict[str, str]]:
    if pair.target is None:
        return []
    if side.turns[-1].role == "assistant":
        raise CtlensError(
            "a prompt that ends in a prefill and has a target cannot be written as messages: use save_pairs instead."
        )
    return [{"role": "assistant", "content": pair.target}]


def pair_of_row(row: FileRow, where: str) -> Pair:
    """Makes a pair of one row in any of the formats of `read_pairs`.

    Args:
        row: the fields.
        where: the words that say in an error where the row is.

    Raises:
        CtlensError: the row is malformed, or of no known format.
    """
    if "clean" in row or "wrapped" in row:
        return pair_of(row, where)
    for names in _MESSAGE_FIELDS:
        if all(name in row for name in names):
            clean = _split(row, names[0], where)
            wrapped = _split(row, names[1], where)
            return _of_sides(clean, wrapped, {}, where)
    if "prompt" in row and "prefill" in row:
        request = Turn("user", _given(row, "prompt", where))
        forced = Turn("assistant", _given(row, "prefill", where))
        kind = {"wrapper": row["prefill_type"]} if row.get("prefill_type") else {}
        return Pair(Prompt((request,)), Prompt((request, forced)), labels=labels_of(kind, where))
    if "messages" in row:
        raise CtlensError(f"{where}: 'messages' hold one side of a pair: name the file of the wrapped prompts too.")
    if any(name in row for name in (*_PROMPT_FIELDS, "prefill")):
        raise CtlensError(f"{where}: a prompt or a prefill alone is no pair: put prompts under wrappers (`wrap`).")
    if set(row) & set(FIELDS):
        return pair_of(row, where)  # which says what is missing
    raise CtlensError(
        f"{where}: no known format; the fields are {', '.join(map(str, row))}, but {_KNOWN} are expected."
    )


def _joined(
    path: str | Path, clean: Sequence[tuple[str, FileRow]], other: str | Path, wrapped: Sequence[tuple[str, FileRow]]
) -> Reading:
    """Joins the rows of two files by the id that all of them have, or else in order."""
    key = next((key for key in _JOINED_BY if all(key in row for _, row in (*clean, *wrapped))), None)
    refused: list[str] = []
    if key is not None:
        matches = _matched_by_id(clean, wrapped, key, refused)
    elif len(clean) == len(wrapped):
        matches = list(zip(clean, wrapped, strict=True))
    else:
        raise CtlensError(
            f"{path} has {len(clean)} rows and {other} {len(wrapped)}: "
            "give every row an id, or both files equally many rows."
        )
    pairs: list[Pair] = []
    for (where, row), (there, twin) in matches:
        try:
            clean_side = _split(row, "messages", where)
            wrapped_side = _split(twin, "messages", there)
            labels = labels_of({name: twin[name] for name in ("label", *_JOINED_BY) if name in twin}, there)
            pairs.append(_of_sides(clean_side, wrapped_side, labels, where))
        except CtlensError as error:
            refused.append(str(error))
    return Reading(tuple(pairs), tuple(refused))


def _matched_by_id(
    clean: Sequence[tuple[str, FileRow]], wrapped: Sequence[tuple[str, FileRow]], key: str, refused: list[str]
) -> list[tuple[tuple[str, FileRow], tuple[str, FileRow]]]:
    """The rows of both files that have one id; the others are added to `refused`."""
    clean_rows = _by_id(clean, key, refused)
    wrapped_rows = _by_id(wrapped, key, refused)
    for rows, others in ((clean_rows, wrapped_rows), (wrapped_rows, clean_rows)):
        alone = [where for name, (where, _) in rows.items() if name not in others]
        refused += [f"{where}: no row of the other file has its {key}." for where in alone]
    return [(row, wrapped_rows[name]) for name, row in clean_rows.items() if name in wrapped_rows]


def _by_id(rows: Sequence[tuple[str, FileRow]], key: str, refused: list[str]) -> dict[str, tuple[str, FileRow]]:
    counts = Counter(str(row[key]) for _, row in rows)
    refused += [f"{where}: several rows have its {key}." for where, row in rows if counts[str(row[key])] > 1]
    return {str(row[key]): (where, row) for where, row in rows if counts[str(row[key])] == 1}


class _Conversation(NamedTuple):
    """The turns of a conversation up to its answer, and the answer where it has one."""

    turns: tuple[Turn, ...]
    answer: str | None

    def prompt(self, other_answer: str | None) -> Prompt:
        """The prompt, whose good answer is the conversation's own or else the other side's."""
        good, options = _options(self.turns[-1].content, other_answer if self.answer is None else self.answer)
        return Prompt(self.turns, good, None, options)


def _split(row: FileRow, name: str, where: str) -> _Conversation:
    turns = turns_of(row.get(name), name, where)
    if turns[-1].role != "assistant":
        return _Conversation(turns, None)
    if len(turns) == 1:
        raise CtlensError(f"{where}: '{name}' holds an answer without a question: put the user's message before it.")
    return _Conversation(turns[:-1], turns[-1].content)


def _of_sides(clean: _Conversation, wrapped: _Conversation, labels: Mapping[str, str], where: str) -> Pair:
    """Makes a pair; its target, which BCT trains, is the answer on the wrapped side or else that on the clean side."""
    if clean.turns == wrapped.turns:
        raise CtlensError(f"{where}: the clean and the wrapped prompt are the same: there is nothing to train.")
    target = clean.answer if wrapped.answer is None else wrapped.answer
    return Pair(clean.prompt(target), wrapped.prompt(target), target=target, labels=dict(labels))


def _options(text: str, answer: str | None) -> tuple[str | None, tuple[str, ...]]:
    """The right answer and all options, each as it continues the prompt; no options where the text does not list them.

    >>> _options("Is it?\\n(A) yes\\n(B) no\\nThe best answer is: (", "B) no")
    ('B) no', ('A) yes', 'B) no'))
    >>> _options("Is it?\\n(A) yes\\n(B) no", "The best answer is: (B) no")
    ('The best answer is: (B) no', ('The best answer is: (A) yes', 'The best answer is: (B) no'))
    """
    listed = _OPTION.findall(text)
    letters = "".join(letter for letter, _ in listed)
    if answer is None or len(listed) < 2 or not ascii_uppercase.startswith(letters):
        return answer, ()
    opening = announced[0] if (announced := _ANNOUNCED.match(answer)) else ""
    options = tuple(f"{opening}{letter}) {option}" for letter, option in listed)
    chosen = [option for option in options if option.rstrip(". ") == answer.rstrip(". ")]
    return (chosen[0], options) if len(chosen) == 1 and len(set(options)) == len(options) else (answer, ())


def _plain_prompt(row: FileRow, where: str) -> Prompt:
    if "messages" in row:
        return _split(row, "messages", where).prompt(None)
    name = next((name for name in _PROMPT_FIELDS if name in row), None)
    if name is None:
        raise CtlensError(f"{where}: no prompt; one of {', '.join(_PROMPT_FIELDS)} or 'messages' is expected.")
    answers = {side: _given(row, side, where) for side in ("good", "bad") if row.get(side)}
    return Prompt((Turn("user", _given(row, name, where)),), answers.get("good"), answers.get("bad"))


def _given(row: FileRow, name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise CtlensError(f"{where}: '{name}' must be a text that is not blank.")
    return value
