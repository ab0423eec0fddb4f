"""A disk that is full from some write on, and a process that is killed at some write, both inside one process."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MAKING = ("open", "os.mkdir")
CHANGING = (*MAKING, "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


class Killed(BaseException):
    """Killed stands for SIGKILL: nothing catches it, and what a `finally` tries to write afterwards is not written."""


class _Disk:
    """_Disk sees whatever Python writes (an audit hook, which cannot be removed) and fails where it is told to."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.events: tuple[str, ...] = ()
        self.at = 0
        self.seen = 0
        self.error: BaseException = Killed()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or event not in self.events or not self._is_ours(event, arguments):
            return
        self.seen += 1
        if self.at and self.seen >= self.at:
            raise self.error

    def _is_ours(self, event: str, arguments: tuple[Any, ...]) -> bool:
        path, *rest = arguments
        if event == "open" and not (isinstance(path, str) and rest[1] & WRITES):
            return False
        # A name relative to an open folder comes from the removal of a tree.
        relative = event != "open" and not os.path.isabs(path) and isinstance(rest[-1], int) and rest[-1] != -1
        return relative or Path(os.path.abspath(path)).is_relative_to(str(self.folder))


_DISK = _Disk()
sys.addaudithook(_DISK)


@contextmanager
def _failing(folder: Path, at: int, error: BaseException, events: tuple[str, ...]) -> Iterator[_Disk]:
    _DISK.at = at
    _DISK.seen = 0
    _DISK.error = error
    _DISK.events = events
    _DISK.folder = folder
    try:
        yield _DISK
    finally:
        _DISK.folder = None


def full(folder: Path, at: int) -> Any:
    """A block in which nothing can be made in a folder from the `at`-th time on; 0 only counts (`.seen`)."""
    return _failing(folder, at, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), MAKING)


def killed(folder: Path, at: int) -> Any:
    """A block in which nothing can be changed in a folder from the `at`-th time on, as if the process had ended."""
    return _failing(folder, at, Killed(), CHANGING)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


HOLDER = """
import sys, time
from ctlens.core.files import alone
with alone(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
"""A program that holds the folder of its argument, as one that writes to it does, and says when."""
