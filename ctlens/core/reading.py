"""Reads JSON, JSONL and CSV strictly: a file holds what its name says, or one sentence says what is wrong and where.

Lines are read one by one, so that a file is never larger in memory than what it holds. Every reader of ctlens
goes through here; text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ctlens.core.errors import CtlensError

LINE_LIMIT = 4 * 2**20
"""The bytes of the longest line: over a million tokens, beyond any context; tokenising it takes 0.4 GB."""
_DEPTH_LIMIT = 32  # far beyond any file of ours, and far below Python's own limit
_DIGIT_LIMIT = 40  # the digits of the largest number of 128 bits, which some rows have as their id
_BYTE_ORDER_MARK = "\ufeff"
_CARRIAGE_RETURNS = "its lines end in carriage returns alone: save it with line feeds"


def text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yields the lines of a text file with their numbers from 1, each with its line end.

    Raises:
        CtlensError: the file is missing or cannot be read, or a line is too long or no text.
    """
    path = Path(path)
    with _opened(path) as file:
        for number, line in enumerate(iter(lambda: _read(path, file, LINE_LIMIT + 1), b""), start=1):
            if len(line) > LINE_LIMIT:
                raise CtlensError(f"{path}, line {number}: longer than {LINE_LIMIT} bytes: cut it into rows.")
            text = _decoded(path, line, number)
            yield number, text.removeprefix(_BYTE_ORDER_MARK) if number == 1 else text


def read_json(path: str | Path, *needed: str) -> dict[str, Any]:
    """Parses a JSON file that holds an object with named fields, `needed` among them.

    Raises:
        CtlensError: the file is missing, is not such JSON or lacks a field.
    """
    path = Path(path)
    with _opened(path) as file:
        text = _decoded(path, _read(path, file, -1)).removeprefix(_BYTE_ORDER_MARK)
    return json_object(text, path, *needed)


def json_object(text: str, path: str | Path, *needed: str) -> dict[str, Any]:
    """Parses a text of JSON in a file that holds an object with named fields, `needed` among them.

    Raises:
        CtlensError: it is not such JSON or lacks a field; the error names the file (`path`).
    """
    try:
        found = _parsed(text)
    except ValueError as error:
        raise CtlensError(f"{path} is {error}: check that it is the right file.") from None
    if missing := [name for name in needed if name not in found]:
        raise CtlensError(f"{path} lacks {', '.join(map(repr, missing))}: check that it is the right file.")
    return found


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) for every non-empty line of a JSONL file.

    Raises:
        CtlensError: the file is missing, or a line is not a JSON object (file and line are named).
    """
    for number, line in text_lines(path):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except ValueError as error:
            lone = "\r" in line.strip() and "Extra data" in str(error)
            expected = "; one object per line is expected" if str(error).startswith("not JSON") else ""
            reason = _CARRIAGE_RETURNS if lone else f"{error}{expected}"
            raise CtlensError(f"{path}, line {number}: {reason}.") from None
        yield number, row


def read_csv(path: str | Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (row number from 1, texts by column) for every row of a CSV file behind its header.

    Raises:
        CtlensError: the file is missing or no CSV with a header, or a row has too few or too many cells.
    """
    header, *rows = _cells(path, (line for _, line in text_lines(path)))
    for number, row in enumerate(rows, start=1):
        yield number, dict(zip(header, row, strict=True))


def _cells(path: str | Path, lines: Iterable[str]) -> Iterator[list[str]]:
    """Yields the header of a CSV file, and then the cells of every row, as many as the header has."""
    rows = csv.reader(lines, strict=True)
    try:
        header = next(rows, None)
        if not header or any("\0" in name for name in header):
            raise CtlensError(f"{path} is no CSV with a header: check its first line, or name a JSONL file .jsonl.")
        if twice := [name for name in header if header.count(name) > 1]:
            raise CtlensError(f"{path} has two columns {twice[0]!r}: rename one.")
        yield header
        for number, row in enumerate(filter(None, rows), start=1):
            if len(row) != len(header):
                raise CtlensError(f"{path}, row {number}: {len(row)} cells, but the header has {len(header)}.")
            if "\0" in "".join(row):
                raise CtlensError(f"{path}, row {number}: a NUL byte: check that the file is text.")
            yield row
    except csv.Error as error:
        reason = _CARRIAGE_RETURNS if "new-line" in str(error) else str(error)
        if "field limit" in reason:
            reason = f"a cell is longer than {csv.field_size_limit()} characters, which a line of JSON may be"
        raise CtlensError(
            f"{path}, line {rows.line_num}: no CSV with a header ({reason}); name a JSONL file .jsonl."
        ) from None


def read_columns(path: str | Path) -> dict[str, list[str]]:
    """Reads the columns of a table of ours as texts, by name; they are empty where the file has a header alone.

    Raises:
        CtlensError: as `read_csv`, or the file ends within a row.
    """
    lines = [line for _, line in text_lines(path)]
    if lines and not lines[-1].endswith("\n"):
        raise CtlensError(f"{path}, line {len(lines)}: the file ends within a row: it was cut off.")
    header, *rows = _cells(path, lines)
    columns = zip(*rows, strict=True) if rows else ((),) * len(header)
    return {name: list(texts) for name, texts in zip(header, columns, strict=True)}


def typed(
    columns: Mapping[str, Sequence[str]], kinds: Mapping[str, Callable[[str], Any]], path: str | Path
) -> dict[str, list[Any]]:
    """Reads the texts of a table's columns as what they stand for.

    Args:
        columns: the texts, from `read_columns`.
        kinds: the columns that the table must have: `str`, `whole_number`, `known_number` or `number_or_nan`.
        path: of the table, for the error.

    Raises:
        CtlensError: a column is missing, or a cell holds something else than its column.
    """
    if missing := [name for name in kinds if name not in columns]:
        raise CtlensError(f"{path} lacks the columns {', '.join(missing)}: check that it is the right file.")
    found: dict[str, list[Any]] = {}
    for name, kind in kinds.items():
        try:
            found[name] = list(map(kind, columns[name]))
        except ValueError:
            _refuse_cell(columns[name], kind, f"{path}, row {{}}: '{name}' is {{!r}}, but a number is expected.")
    return found


def whole_number(text: str) -> int:
    """Reads a whole number."""
    if "_" in text:
        raise ValueError
    return int(text)


def known_number(text: str) -> float:
    """Reads a number that is there, every digit of it."""
    if "_" in text or math.isnan(value := float(text)):
        raise ValueError
    return value


def number_or_nan(text: str) -> float:
    """Reads a number that may not have been measured: an empty cell is NaN."""
    return known_number(text) if text else math.nan


def _refuse_cell(texts: Sequence[str], kind: Callable[[str], Any], sentence: str) -> NoReturn:
    """Raises for the first cell that is not of its kind."""
    for row, text in enumerate(texts, start=1):
        try:
            kind(text)
        except ValueError:
            raise CtlensError(sentence.format(row, text)) from None
    raise AssertionError("a cell was refused before")


def _opened(path: Path) -> BinaryIO:
    if not path.is_file():
        raise CtlensError(f"{path} does not exist or is no file: check the path.")
    try:
        return path.open("rb")
    except OSError as error:
        raise CtlensError(f"{path} cannot be read ({error.strerror}): check the path.") from None


def _read(path: Path, file: BinaryIO, limit: int) -> bytes:
    """The next line up to a number of bytes, or all that is left where the limit is negative."""
    try:
        return file.readline(limit) if limit > 0 else file.read()
    except OSError as error:
        raise CtlensError(f"{path} cannot be read ({error.strerror}): check the path.") from None


def _decoded(path: Path, content: bytes, line: int = 1) -> str:
    """The text of bytes that begin at a line."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line += content[: error.start].count(b"\n")
        raise CtlensError(
            f"{path} is not UTF-8 text in line {line} ({error.reason}): save it as UTF-8 first."
        ) from None


def _parsed(text: str) -> dict[str, Any]:
    """Parses one JSON object.

    Raises:
        ValueError: it is none; its words follow "is" or the place of the text.
    """
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_int=_integer)
        _require_plain(found, 0)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError(f"refused (nested more than {_DEPTH_LIMIT} levels deep)") from None
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}, but an object with named fields is expected")
    return found


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(fields)
    if len(found) < len(fields):
        names = [name for name, _ in fields]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"refused (the field {twice!r} stands twice)")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"refused ({name} is no number of JSON)")


def _integer(text: str) -> int:
    if (digits := len(text.lstrip("-"))) > _DIGIT_LIMIT:
        raise ValueError(f"refused (a whole number of {digits} digits)")
    return int(text)


def _require_plain(value: Any, depth: int) -> None:
    """Refuses what JSON can write and nothing behind it can hold: half characters, infinite numbers, deep nests."""
    if depth > _DEPTH_LIMIT:
        raise RecursionError
    if isinstance(value, str):
        if not value.isascii():
            _require_characters(value)
    elif isinstance(value, dict):
        for name, entry in value.items():
            _require_characters(name)
            _require_plain(entry, depth + 1)
    elif isinstance(value, list):
        for entry in value:
            _require_plain(entry, depth + 1)
    elif isinstance(value, float) and math.isinf(value):
        raise ValueError("refused (a number too large)")


def _require_characters(text: str) -> None:
    """Refuses half of a character, as `\\ud83d` without its other half, which no tokenizer and no file can take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise ValueError(f"refused (half a character, {half}: write the whole one)") from None
