"""The field's files: pairs, prompts, facts and prefills as they were published, read row by row; nothing is skipped."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pandas as pd

from ctlens.core.errors import CtlensError
from ctlens.core.files import read_jsonl, write_text
from ctlens.data.chat import Turn
from ctlens.data.pairs import FIELDS, Pair, Prompt, pair_of, turns_of

_MESSAGE_FIELDS = (("reference_messages", "variant_messages"), ("unbiased_messages", "biased_messages"))
_JOINED_BY = ("_id", "id")
_PROMPT_FIELDS = ("prompt", "goal", "question")
_KNOWN = (
    "'clean' and 'wrapped', 'reference_messages' and 'variant_messages', 'unbiased_messages' and 'biased_messages', "
    "'prompt' and 'prefill' (CSV), or 'messages' in two files"
)
_OPTION = re.compile(r"^\(?([A-Z])\) (.+?)\s*$", re.MULTILINE)
_ANNOUNCED = re.compile(r"^(The best answer is: \(?|\()", re.IGNORECASE)

FileRow = Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """What a file holds.

    Attributes:
        pairs: in the order of the file.
        refused: per row that is no pair, where it is and why.
    """

    pairs: tuple[Pair, ...]
    refused: tuple[str, ...] = ()

    def all(self) -> list[Pair]:
        """The pairs of a file without refused rows.

        Raises:
            CtlensError: a row was refused, or there is none.
        """
        if self.refused:
            raise CtlensError(self.refused[0])
        if not self.pairs:
            raise CtlensError(f"the file holds no pairs: rows with {_KNOWN} are expected.")
        return list(self.pairs)


def load_pairs(path: str | Path, wrapped: str | Path | None = None) -> list[Pair]:
    """The pairs of a file, in whichever of the field's formats it is; raises where `read_pairs` refuses a row."""
    return read_pairs(path, wrapped).all()


def read_pairs(path: str | Path, wrapped: str | Path | None = None) -> Reading:
    """The pairs of a file, and why each other row is none.

    Formats, told by the fields of each row:
        - `clean` and `wrapped`, with the optional fields of `ctlens.data.pairs.FIELDS`: ctlens's own JSONL.
        - `reference_messages` and `variant_messages`, or `unbiased_messages` and `biased_messages`:
          conversations; a last message of the assistant is the answer, which becomes the target.
        - `messages` in two files, the clean and the wrapped one (*Consistency Training Along the
          Transformer Stack*, its code): joined by `_id` where rows have one, else row by row.
          Lettered options are found in the text, and `good` is the one that is answered.
        - `prompt` and `prefill` in a CSV: the wrapped prompt has the prefill as the assistant's turn.

    Args:
        path: JSONL, or CSV with a header.
        wrapped: the second file where clean and wrapped prompts are apart.

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
            pairs.append(_pair(row, where))
        except CtlensError as error:
            refused.append(str(error))
    return Reading(tuple(pairs), tuple(refused))


def read_rows(path: str | Path) -> list[tuple[str, FileRow]]:
    """The rows of a JSONL or CSV file, each after the words that say where it is.

    Raises:
        CtlensError: the file is missing, holds no rows, or is not what its name says.
    """
    path = Path(path)
    if path.suffix == ".csv":
        if not path.is_file():
            raise CtlensError(f"{path} does not exist: check the path.")
        try:
            table = pd.read_csv(path, keep_default_na=False, dtype=str)
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise CtlensError(f"{path} is no CSV with a header: {error}.") from None
        rows: list[tuple[str, FileRow]] = [
            (f"{path}, row {number}", row) for number, row in enumerate(table.to_dict("records"), start=1)
        ]
    else:
        rows = [(f"{path}, line {number}", row) for number, row in read_jsonl(path)]
    if not rows:
        raise CtlensError(f"{path} holds no rows: rows with {_KNOWN} are expected.")
    return rows


def load_prompts(path: str | Path) -> list[Prompt]:
    """The plain prompts of a file, to be put under wrappers: rows with `prompt`, `goal` or `question`, or `messages`.

    A last message of the assistant is the answer: it becomes `good`, and with lettered options
    before it, one of these.

    Raises:
        CtlensError: the file is missing or empty, or a row holds no prompt.
    """
    return [_plain_prompt(row, where) for where, row in read_rows(path)]


def load_facts(path: str | Path) -> list[tuple[Turn, Turn]]:
    """Questions and answers about a persona, from rows with `messages` of a user and an assistant.

    Raises:
        CtlensError: the file is missing or empty, or a row is not one question with its answer.
    """
    facts = []
    for where, row in read_rows(path):
        turns = turns_of(row.get("messages"), "messages", where)
        if [turn.role for turn in turns] != ["user", "assistant"]:
            raise CtlensError(f"{where}: a fact is one message of the user and the assistant's answer.")
        facts.append((turns[0], turns[1]))
    return facts


def load_prefills(path: str | Path) -> list[str]:
    """The distinct beginnings of answers in the column `prefill` of a CSV.

    Raises:
        CtlensError: the file is missing or empty, or a row has none.
    """
    texts = []
    for where, row in read_rows(path):
        if not str(row.get("prefill", "")).strip():
            raise CtlensError(f"{where}: the field 'prefill' is missing or blank.")
        texts.append(str(row["prefill"]))
    return list(dict.fromkeys(texts))


def save_messages(path: str | Path, pairs: Iterable[Pair]) -> None:
    """Writes pairs as `reference_messages` and `variant_messages`, the target as the assistant's last message."""
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
            "a prompt that ends in a prefill and has a target has no form in messages: save_pairs keeps it."
        )
    return [{"role": "assistant", "content": pair.target}]


def _pair(row: FileRow, where: str) -> Pair:
    if "clean" in row or "wrapped" in row:
        return pair_of(row, where)
    for names in _MESSAGE_FIELDS:
        if all(name in row for name in names):
            clean, wrapped = (_split(row, name, where) for name in names)
            return _of_sides(clean, wrapped, {}, where)
    if "prompt" in row and "prefill" in row:
        request = Turn("user", _given(row, "prompt", where))
        forced = Turn("assistant", _given(row, "prefill", where))
        kind = str(row.get("prefill_type", ""))
        return Pair(Prompt((request,)), Prompt((request, forced)), labels={"wrapper": kind} if kind else {})
    if "messages" in row:
        raise CtlensError(f"{where}: 'messages' are one side of a pair: name the file of the wrapped prompts too.")
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
    """Two files row by row, or by the id that all rows have."""
    key = next((key for key in _JOINED_BY if all(key in row for _, row in (*clean, *wrapped))), None)
    refused: list[str] = []
    if key is None:
        if len(clean) != len(wrapped):
            raise CtlensError(
                f"{path} has {len(clean)} rows and {other} {len(wrapped)}: rows without an id are paired in order."
            )
        matches = list(zip(clean, wrapped, strict=True))
    else:
        sides = [_by_id(rows, key, refused) for rows in (clean, wrapped)]
        matches = [(place, sides[1][name]) for name, place in sides[0].items() if name in sides[1]]
        for here, there in (sides, sides[::-1]):
            alone = [where for name, (where, _) in here.items() if name not in there]
            refused += [f"{where}: no row of the other file has its {key}." for where in alone]
    pairs: list[Pair] = []
    for (where, row), (there, twin) in matches:
        try:
            clean_side, wrapped_side = _split(row, "messages", where), _split(twin, "messages", there)
            labels = {name: str(twin[name]) for name in ("label", *_JOINED_BY) if name in twin}
            pairs.append(_of_sides(clean_side, wrapped_side, labels, where))
        except CtlensError as error:
            refused.append(str(error))
    return Reading(tuple(pairs), tuple(refused))


def _by_id(rows: Sequence[tuple[str, FileRow]], key: str, refused: list[str]) -> dict[str, tuple[str, FileRow]]:
    counts = Counter(str(row[key]) for _, row in rows)
    refused += [f"{where}: several rows have its {key}." for where, row in rows if counts[str(row[key])] > 1]
    return {str(row[key]): (where, row) for where, row in rows if counts[str(row[key])] == 1}


Side = tuple[tuple[Turn, ...], str | None]


def _split(row: FileRow, name: str, where: str) -> Side:
    """The turns of a conversation up to its answer, and the answer."""
    turns = turns_of(row.get(name), name, where)
    if turns[-1].role != "assistant":
        return turns, None
    if len(turns) == 1:
        raise CtlensError(f"{where}: '{name}' holds an answer without a question.")
    return turns[:-1], turns[-1].content


def _of_sides(clean: Side, wrapped: Side, labels: Mapping[str, str], where: str) -> Pair:
    """The target is the answer on the wrapped side, which BCT trains; both answers must be one where both are given."""
    (clean_turns, reply), (wrapped_turns, target) = clean, wrapped
    if clean_turns == wrapped_turns:
        raise CtlensError(f"{where}: the clean and the wrapped prompt are the same: there is nothing to train.")
    answer = reply if target is None else target
    sides = []
    for turns, given in ((clean_turns, reply), (wrapped_turns, target)):
        good, options = _options(turns[-1].content, answer if given is None else given)
        sides.append(Prompt(turns, good, None, options))
    return Pair(sides[0], sides[1], target=answer, labels=dict(labels))


def _options(text: str, answer: str | None) -> tuple[str | None, tuple[str, ...]]:
    """The answer that is right and all options, each as it continues the prompt; nothing where they cannot be told.

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
        turns, answer = _split(row, "messages", where)
        good, options = _options(turns[-1].content, answer)
        return Prompt(turns, good, None, options)
    name = next((name for name in _PROMPT_FIELDS if name in row), None)
    if name is None:
        raise CtlensError(f"{where}: no prompt; one of {', '.join(_PROMPT_FIELDS)} or 'messages' is expected.")
    return Prompt((Turn("user", _given(row, name, where)),))


def _given(row: FileRow, name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise CtlensError(f"{where}: '{name}' must be a text that is not blank.")
    return value
