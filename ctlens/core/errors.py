"""The exceptions that mean "the input is wrong", the place of a mistake, and the sentence for an unknown name."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class CtlensError(ValueError):
    """CtlensError is a mistake in the input; its one sentence says what is wrong and what to do.

    The command line prints the sentence to stderr and exits with code 2. A program that uses the library can
    catch it apart from programming errors.
    """


class UnknownWords(CtlensError):
    """UnknownWords is a text with words that a tokenizer does not know, so that a model would not see them."""


@contextmanager
def located(where: str) -> Iterator[None]:
    """Puts the place of unknown words in front of the sentence about them.

    >>> with located("pair 3"):
    ...     raise UnknownWords("the tokenizer does not know 'qua'.")
    Traceback (most recent call last):
    ctlens.core.errors.UnknownWords: pair 3: the tokenizer does not know 'qua'.
    """
    try:
        yield
    except UnknownWords as error:
        raise UnknownWords(f"{where}: {error}") from None


_AGAIN = "repeat the command; train, compare and doses go on with --resume."
_ADVICE = {
    ("ENOSPC", "EDQUOT"): f"make room there and {_AGAIN}",
    ("EFBIG",): f"raise the limit on the size of files (ulimit -f) and {_AGAIN}",
    ("EACCES", "EPERM", "EROFS"): "name a folder that can be written to.",
    ("ENAMETOOLONG",): "name a shorter path.",
    ("ENOENT", "ENOTDIR"): f"its folder was removed or is none; see to it and {_AGAIN}",
    ("EEXIST", "ENOTEMPTY", "EISDIR"): f"something else is there; name another path or move it away, and {_AGAIN}",
}
"""What to do about an error of the operating system, by the names of its numbers; not every system has all of them."""


class UnwritableError(CtlensError):
    """UnwritableError says that the system refused to write a file or folder: the disk is full, read-only or gone.

    Whatever was there before is intact.

    Args:
        path: what could not be written.
        number: the system's number of the error (`errno`).
        reason: the system's words for it; by default those of the number.
    """

    def __init__(self, path: str | Path, number: int, reason: str = "") -> None:
        super().__init__(path, number, reason)  # all of them, so that the error can come out of a worker process
        self.path = Path(path)
        self.number = number
        self.reason = reason or os.strerror(number)

    def __str__(self) -> str:
        name = errno.errorcode.get(self.number, "")
        advice = next((text for names, text in _ADVICE.items() if name in names), f"see to the disk and {_AGAIN}")
        return f"{self.path} cannot be written ({self.reason}): {advice}"


class NotFinite(CtlensError):
    """NotFinite is a model that computes NaN or infinity, from which no number may be taken."""


def unknown(kind: str, name: object, known: Iterable[str]) -> CtlensError:
    """Makes the error for a name that no registry has; it suggests the nearest known names.

    >>> str(unknown("loss", "atct", ["act", "attct", "bct"]))
    "unknown loss 'atct'; did you mean 'attct' or 'act'? Known: act, attct, bct."
    """
    names = [str(entry) for entry in known]
    # The cut-off 0.5 and the 12 names shown were chosen by eye, so that the sentence stays short.
    by_lower = {entry.lower(): entry for entry in names}  # "ACT" is near to "act"
    near = [by_lower[entry] for entry in difflib.get_close_matches(str(name).lower(), by_lower, n=2, cutoff=0.5)]
    hint = f"; did you mean {' or '.join(repr(entry) for entry in near)}?" if near else "."
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return CtlensError(f"unknown {kind} {str(name)!r}{hint} Known: {shown}.")
