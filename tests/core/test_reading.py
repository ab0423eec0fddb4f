"""A file is what its name says, or one sentence names the file, the line and the reason."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.hostile import BYTES, MARK, OBJECTS
from hypothesis import given, settings
from hypothesis import strategies as st

from ctlens.core.errors import CtlensError
from ctlens.core.reading import (
    LINE_LIMIT,
    known_number,
    number_or_nan,
    read_columns,
    read_csv,
    read_json,
    read_jsonl,
    text_lines,
    typed,
    whole_number,
)


@pytest.mark.parametrize("kind", OBJECTS)
def test_bytes_that_are_no_object_are_named_with_file_and_line(tmp_path: Path, kind: str) -> None:
    content, reason = OBJECTS[kind]
    (tmp_path / "x.json").write_bytes(content)
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n\n' + content + b'\n{"a": 1}\n')

    with pytest.raises(CtlensError) as whole_file:
        read_json(tmp_path / "x.json")
    with pytest.raises(CtlensError) as line:
        list(read_jsonl(tmp_path / "x.jsonl"))

    assert str(whole_file.value).startswith(f"{tmp_path}/x.json is {reason}")
    assert str(line.value).startswith(f"{tmp_path}/x.jsonl, line 3: {reason}")


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_that_are_no_text_are_named_with_file_and_line(tmp_path: Path, kind: str) -> None:
    content, reason = BYTES[kind]
    (tmp_path / "x").write_bytes(b"{}\n\n" + content)

    for read in (read_json, lambda path: list(read_jsonl(path)), lambda path: list(read_csv(path))):
        with pytest.raises(CtlensError) as found:
            read(tmp_path / "x")
        assert str(found.value) == f"{tmp_path}/x is not UTF-8 text in line 3 ({reason}): save it as UTF-8 first."


@pytest.mark.parametrize("name", ["absent", "folder", "device", "pipe"])
def test_what_is_no_file_is_not_read(tmp_path: Path, name: str) -> None:
    path = Path("/dev/zero") if name == "device" else tmp_path / name
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")

    for read in (read_json, lambda path: list(read_jsonl(path)), lambda path: list(read_csv(path))):
        with pytest.raises(CtlensError, match=f"{path} does not exist or is no file"):
            read(path)


def test_jsonl_counts_lines_from_one_and_skips_blank_ones(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(MARK + '{"a": 1}\r\n\n  \n{"a": "one\u2028line"}'.encode())
    assert list(read_jsonl(tmp_path / "x.jsonl")) == [(1, {"a": 1}), (4, {"a": "one\u2028line"})]


def test_lines_that_end_in_carriage_returns_alone_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\r{"a": 2}\r')
    (tmp_path / "x.csv").write_bytes(b"a,b\r1,2\r")
    for name, read in (("x.jsonl", read_jsonl), ("x.csv", read_csv)):
        with pytest.raises(CtlensError, match=rf"{name}, line [01]: .*carriage returns alone.*line feeds"):
            list(read(tmp_path / name))


def test_a_whole_character_a_mark_and_every_finite_number_are_read(tmp_path: Path) -> None:
    row = {"a": "\U0001f600 é", "b": [1.5, -(10**39), True, None], "c": {"d": []}}
    for content in (json.dumps(row).encode(), MARK + json.dumps(row, ensure_ascii=False).encode()):
        (tmp_path / "x").write_bytes(content)
        assert read_json(tmp_path / "x") == row == dict(read_jsonl(tmp_path / "x"))[1]


def test_a_field_that_is_needed_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(CtlensError, match="x.json lacks 'b', 'c'"):
        read_json(tmp_path / "x.json", "a", "b", "c")


def test_a_long_line_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"a": "' + b"x" * LINE_LIMIT + b'"}\n')
    with pytest.raises(CtlensError, match=r"x\.jsonl, line 2: longer than 4194304 bytes"):
        list(read_jsonl(tmp_path / "x.jsonl"))
    (tmp_path / "y.jsonl").write_bytes(b'{"a": "' + b"x" * (LINE_LIMIT - 10) + b'"}')
    assert len(dict(read_jsonl(tmp_path / "y.jsonl"))[1]["a"]) == LINE_LIMIT - 10


_PROGRAM = """
import resource, sys
from ctlens.core.errors import CtlensError
from ctlens.core.reading import read_jsonl
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(sum(1 for _ in read_jsonl(sys.argv[1])))
except CtlensError:
    print("refused")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.processes
@pytest.mark.parametrize("rows", [1, 20_000])
def test_a_file_of_50_mb_takes_little_memory_as_one_line_and_as_many(tmp_path: Path, rows: int) -> None:
    line = b'{"a": "' + b"x" * (50_000_000 // rows) + b'"}\n'
    (tmp_path / "x.jsonl").write_bytes(line * rows)

    done = subprocess.run([sys.executable, "-c", _PROGRAM, tmp_path / "x.jsonl"], capture_output=True, text=True)

    answer, kilobytes = done.stdout.split()
    assert answer == ("refused" if rows == 1 else str(rows))
    assert int(kilobytes) < 40_000  # a line of four megabytes, a few times; the file has fifty


TABLES = {
    "empty": (b"", "is no CSV with a header"),
    "an empty header": (b"\n1,2\n", "is no CSV with a header"),
    "a NUL in the header": (b"a\0,b\n1,2\n", "is no CSV with a header"),
    "a column twice": (b"a,b,a\n1,2,3\n", "has two columns 'a'"),
    "too few cells": (b"a,b\n1,2\n3\n", "row 2: 1 cells, but the header has 2"),
    "too many cells": (b"a,b\n1,2\n3,4,5\n", "row 2: 3 cells, but the header has 2"),
    "an open quote": (b'a,b\n1,"2\n3,4\n', "line 3: no CSV with a header (unexpected end of data)"),
    "a text behind a quote": (b'a,b\n1,"2"x\n', "line 2: no CSV with a header (',' expected after '\"')"),
    "a cell without end": (b"a,b\n1," + b"x" * 200_000, "line 2: no CSV with a header (a cell is longer than 131072"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_that_is_none_is_named(tmp_path: Path, kind: str) -> None:
    content, reason = TABLES[kind]
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(CtlensError) as found:
        list(read_csv(tmp_path / "x.csv"))
    assert str(found.value).startswith(f"{tmp_path}/x.csv") and reason in str(found.value)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5), ends=st.sampled_from(["\n", "\r\n"]))
def test_what_csv_writes_is_read(tmp_path_factory: Any, rows: list[tuple[str, str]], ends: str) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator=ends, quoting=csv.QUOTE_ALL).writerows([("a", "é"), *rows])
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    path.write_bytes(text.getvalue().encode())
    assert [(row["a"], row["é"]) for _, row in read_csv(path)] == rows


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (whole_number, "-3", -3),
        (known_number, "0.1", 0.1),
        (known_number, "-inf", -math.inf),
        (number_or_nan, "1e-3", 1e-3),
        (str, "nan", "nan"),
    ],
)
def test_a_cell_is_read_as_what_it_stands_for(kind: Callable[[str], Any], text: str, value: Any) -> None:
    assert typed({"a": ["1", text]}, {"a": kind}, "x.csv")["a"][1] == value
    assert math.isnan(typed({"a": [""]}, {"a": number_or_nan}, "x.csv")["a"][0])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (whole_number, "1.0"),
        (whole_number, ""),
        (whole_number, "1_0"),
        (known_number, ""),
        (known_number, "nan"),
        (known_number, "x"),
        (known_number, "1_0"),
        (number_or_nan, "NaN"),
        (number_or_nan, "abc"),
    ],
)
def test_a_cell_that_holds_something_else_is_named(tmp_path: Path, kind: Callable[[str], Any], text: str) -> None:
    (tmp_path / "x.csv").write_text(f'a,b\n1,1\n2,"{text}"\n')
    with pytest.raises(CtlensError) as found:
        typed(read_columns(tmp_path / "x.csv"), {"a": whole_number, "b": kind}, tmp_path / "x.csv")
    assert str(found.value) == f"{tmp_path}/x.csv, row 2: 'b' is {text!r}, but a number is expected."


def test_a_table_without_rows_has_its_columns_and_one_that_lacks_some_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n")
    assert read_columns(tmp_path / "x.csv") == {"a": [], "b": []}
    (tmp_path / "x.csv").write_text("a,b\n1,2\n3,4")
    with pytest.raises(CtlensError, match=r"x\.csv, line 3: the file ends within a row"):
        read_columns(tmp_path / "x.csv")
    with pytest.raises(CtlensError, match=r"x\.csv lacks the columns c, d"):
        typed({"a": ["1"]}, {"c": str, "a": whole_number, "d": str}, "x.csv")


def test_lines_keep_their_ends(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(MARK + b"a\r\nb\rc\n\nd")
    assert list(text_lines(tmp_path / "x")) == [(1, "a\r\n"), (2, "b\rc\n"), (3, "\n"), (4, "d")]


def test_a_nul_byte_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"a,b\n1,2\n3,\0\n")

    for read in (lambda path: list(read_csv(path)), read_columns):
        with pytest.raises(CtlensError, match="x.csv, row 2: a NUL byte"):
            read(tmp_path / "x.csv")
