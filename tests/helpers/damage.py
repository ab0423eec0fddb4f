"""Ways to damage a file of a study, each of which has to be seen."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path


def _first_number(content: bytes, new: bytes) -> bytes:
    """Replaces the last number of the second line that stands in a cell of its own."""
    header, row, rest = content.split(b"\n", 2)
    cells = row.split(b",")
    place = max(index for index, cell in enumerate(cells) if re.fullmatch(rb"-?\d+(\.\d+)?(e-?\d+)?", cell))
    cells[place] = new
    return b"\n".join([header, b",".join(cells), rest])


TABLE_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut in half": lambda content: content[: len(content) // 2],
    "without its last row": lambda content: content[: content.rstrip().rfind(b"\n") + 1],
    "a header alone": lambda content: content[: content.find(b"\n") + 1],
    "a row twice": lambda content: content + content.splitlines(keepends=True)[1],
    "rows in another order": lambda content: b"".join(
        (lines := content.splitlines(keepends=True))[:1] + lines[2:] + lines[1:2]
    ),
    "NaN for a number": lambda content: _first_number(content, b"nan"),
    "a text for a number": lambda content: _first_number(content, b"many"),
    "another number": lambda content: _first_number(content, b"0.123"),
    "another column": lambda content: b"column" + content[content.find(b",") :],
}
FILE_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "undecodable": lambda content: content[:20] + b"\xff\xfe" + content[20:],
    "zeros": lambda content: bytes(len(content)),
    "one bit": lambda content: content[:-2] + bytes([content[-2] ^ 1]) + content[-1:],
}


def damage(path: Path, kind: str) -> None:
    """Damages a file in one of these ways."""
    path.write_bytes({**TABLE_DAMAGES, **FILE_DAMAGES}[kind](path.read_bytes()))
