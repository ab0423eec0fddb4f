"""The docstrings as pages need them: the package writes doctests bare, and what is alike on one line."""

from __future__ import annotations

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"(?m)^( *)>>> .*(?:\n *\S.*)*")
_TO_EDITORS = "A name imported as itself"
"""How the paragraph of an `__init__` begins that is for whoever edits it."""
_ALIKE = re.compile(r"(?m)^(    )((?:\w+, )+\w+)(: .*(?:\n {8,}\S.*)*)")


def readable(text: str) -> str:
    """Fences doctests, and gives each argument or attribute of a line `one, other: what both are` its own."""
    told = "\n\n".join(part for part in text.split("\n\n") if not part.startswith(_TO_EDITORS))
    fenced = _DOCTEST.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", told)
    return _ALIKE.sub(lambda found: "\n".join(f"{found[1]}{name}{found[3]}" for name in found[2].split(", ")), fenced)


class Readable(griffe.Extension):
    """Makes every docstring readable when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replaces the docstring's text."""
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)
