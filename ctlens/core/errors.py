"""The exceptions that mean "the input is wrong", and the sentence for an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CtlensError(ValueError):
    """CtlensError is a mistake in the input; its one sentence says what is wrong and what to do.

    The command line prints the sentence to stderr and exits with code 2. A program that uses the library can
    catch it apart from programming errors.
    """


class NotFinite(CtlensError):
    """NotFinite is a model that computes NaN or infinity, from which no number may be taken.

    Attributes:
        value: `"nan"` or `"infinity"`.
    """

    def __init__(self, sentence: str, value: str = "nan") -> None:
        super().__init__(sentence)
        self.value = value


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
