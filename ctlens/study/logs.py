"""What a worker says of its work: a line when it began, where, and a line when it ended or failed.

A study's logs lie in its folder, a file per cell and analysis. They tell which one a lost machine had, for that one
began and never ended, and they are still there when the command that led the study is started again.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

LOGS_FOLDER = "logs"


@contextmanager
def logged(study: Path, name: str) -> Iterator[None]:
    """Writes down when the work in the block began and how it ended.

    Args:
        study: the folder of the study.
        name: of the work, and of its file.
    """
    path = study / LOGS_FOLDER / f"{name}.log"
    path.parent.mkdir(exist_ok=True)
    _say(path, f"began on {platform.node()}, process {os.getpid()}")
    began = time.monotonic()
    try:
        yield
    except BaseException as error:
        _say(path, f"failed after {time.monotonic() - began:.0f} s: {type(error).__name__}: {error}")
        raise
    _say(path, f"ended after {time.monotonic() - began:.0f} s")


def _say(path: Path, text: str) -> None:
    """Appends a line: a file has one writer at a time, so that nobody waits for a lock that a lost machine holds."""
    moment = datetime.now(UTC).isoformat(timespec="seconds")
    with path.open("a", encoding="utf-8") as log:
        log.write(f"{moment} {' '.join(text.split())}\n")
