"""The digests of the files in a folder, written beside them, by which a damaged file is known before it is read.

`digests.csv` has a row per file: its name in the folder, the rows of a CSV (its lines, where quoted cells hold
line ends) and the SHA-256 of its bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

from ctlens.core.errors import CtlensError
from ctlens.core.files import write_text
from ctlens.core.reading import read_columns, typed

DIGESTS_FILE = "digests.csv"
_COLUMNS = ("file", "rows", "digest")
_Row = tuple[str, str]


def record_digests(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Writes down the digests of files in a folder; those of other files that are still there stay as recorded.

    Args:
        folder: the folder.
        files: in it or below; by default all that lie in it, but for the marks of work in progress (`.name`).
    """
    if files is None:
        lying = (path for path in folder.iterdir() if path.is_file())
        files = [path for path in lying if path.name != DIGESTS_FILE and not path.name.startswith(".")]
    others = {name: row for name, row in _recorded(folder).items() if (folder / name).is_file()}
    known = {**others, **{path.relative_to(folder).as_posix(): _row(path) for path in files}}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerows([_COLUMNS, *((name, *row) for name, row in sorted(known.items()))])
    write_text(folder / DIGESTS_FILE, text.getvalue())


def require_undamaged(folder: Path, *names: str, remove: Path | None = None) -> None:
    """Raises unless every recorded file of a folder is there and as it was written.

    A folder of an earlier ctlens has no digests; nothing is known of its files, and they are read as they are.

    Args:
        folder: of the digests.
        names: the files to look at; all that are recorded if none is named.
        remove: what a user removes to have it made anew; the damaged file itself if None.

    Raises:
        CtlensError: a file is missing or damaged; the sentence names it and says how to make it anew.
    """
    for name, (rows, digest) in _recorded(folder).items():
        if names and name not in names:
            continue
        path = folder / name
        found = _row(path) if path.is_file() else ("", "")
        if found == (rows, digest):
            continue
        counted = f" (it has {found[0]} rows, and {rows} were written)" if found[0] != rows and path.is_file() else ""
        state = f"is damaged{counted}" if path.is_file() else "is missing"
        first = f"remove {remove or path} and " if path.is_file() or remove else ""
        raise CtlensError(f"{path} {state}: {first}run the study again with --resume, which makes it anew.")


def _recorded(folder: Path) -> dict[str, _Row]:
    """The rows and the digest of each file that is recorded, by name."""
    path = folder / DIGESTS_FILE
    if not path.is_file():
        return {}
    try:
        names, *rest = typed(read_columns(path), dict.fromkeys(_COLUMNS, str), path).values()
    except CtlensError:
        raise CtlensError(f"{path} is damaged: remove it and run the study again with --resume.") from None
    return dict(zip(names, zip(*rest, strict=True), strict=True))


def _row(path: Path) -> _Row:
    content = path.read_bytes()
    rows = str(max(content.count(b"\n") - 1, 0)) if path.suffix == ".csv" else ""
    return rows, hashlib.sha256(content).hexdigest()
