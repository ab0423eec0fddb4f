"""What the fuzzing tests share: one fixed profile, how a command ended, and what lies in a folder."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ctlens import cli
from ctlens.core.errors import CtlensError
from helpers.models import Ended

# Equal on every machine and in every run: a failure in CI is found again by the same command.
FUZZ = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Began(BaseException):
    """A command has accepted all that it was given, and its long work would begin now."""


def began(*_: Any, **__: Any) -> Any:
    """Stands in the place of long work."""
    raise Began


def ended(*arguments: str) -> Ended:
    """Runs a command in this process; code 0 stands for one that came as far as its long work."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    code: Any = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["ctlens", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        except Began:
            code = 0
        except BaseException:
            traceback.print_exc()
            code = 1
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return Ended(code, *texts)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file in a folder, and the folders in it."""
    found = sorted(folder.rglob("*"))
    return {str(path): (path.stat().st_size * path.is_file(), path.stat().st_mtime_ns) for path in found}


def refused_in_a_sentence(call: Any, *arguments: Any) -> bool:
    """Calls a function; True if it refused in one sentence, False if it gave something; all else fails the test."""
    try:
        call(*arguments)
    except CtlensError as error:
        sentence = str(error)
        assert sentence.strip() and len(sentence) < 2000
        return True
    return False


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file's bytes with some of them changed, left out, doubled, put in or cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        width = draw(st.integers(1, 24))
        piece = draw(st.sampled_from(PIECES))
        change = draw(st.sampled_from(("replace", "leave out", "double", "put in", "cut off")))
        if change == "replace":
            content[at : at + len(piece)] = piece
        elif change == "leave out":
            del content[at : at + width]
        elif change == "double":
            content[at:at] = content[at : at + width]
        elif change == "put in":
            content[at:at] = piece
        else:
            del content[at:]
    return bytes(content)


PIECES = (
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r",
    b"\n",
    b"\n\n",
    b'"',
    b"\\",
    b"\\ud83d",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"null",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"[" * 2000,
    b'{"a":' * 2000,
    b'"clean": 1, ',
    b"\xf0\x9f\x98",
    b"\xe2\x80\xa8",
    b"true",
    b"-0",
    b"'",
    b"\t",
)
"""Bytes that readers trip over: half characters, marks, brackets, numbers without end."""
