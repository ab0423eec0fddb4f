"""The exceptions that mean "the input is wrong", the place of a mistake, and the sentence for an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


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


def unknown(kind: str, name: object, known: Iterable[str]) -> CtlensError:
    """Makes the error for a name that no registry has; it suggests the nearest known names.

    >>> str(unknown("loss", "atct", ["act", "attct", "bct"]))
    "unknown loss 'atct'; did you mean 'attct' or 'act'? Known: act, attct, bct."
    """
    names = [str(entry) for entry in known]
    # The cut-off 0.5 and the 12 names shown were chosen by eye, so that the sentence stays short.
    near = difflib.get_close_matches(str(name), names, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(entry) for entry in near)}?" if near else "."
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return CtlensError(f"unknown {kind} {str(name)!r}{hint} Known: {shown}.")
