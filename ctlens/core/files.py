"""Writes files so that a result on disk is always whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ctlens.core.errors import CtlensError


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; it is renamed to `path` on success and removed on failure.

    Raises:
        CtlensError: as `require_plain`.
    """
    path = Path(path)
    require_plain(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    os.chmod(name, 0o644)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; it is renamed to `path` on success and removed on failure.

    Raises:
        CtlensError: `path` exists already and is not an empty folder.
    """
    path = Path(path)
    require_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    os.chmod(work, 0o755)
    try:
        yield work
        if path.exists():
            path.rmdir()
        os.replace(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def usable_folder(path: str | Path) -> Path:
    """Returns the path of a folder that exists or can be made.

    Raises:
        CtlensError: the path, or a part of it, is a file.
    """
    path = Path(path)
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise CtlensError(f"{part} is no folder: name one that is there or can be made.")
    return path


def require_plain(path: str | Path) -> None:
    """Raises a `CtlensError` unless `path` is a plain file, which may be replaced, or absent and can be made.

    A device, a pipe or a socket, or a link to one, must not be replaced: others write to it.
    """
    path = Path(path)
    if path.is_dir():
        raise CtlensError(f"{path} is a folder: name a file.")
    if path.exists() and not path.is_file():
        raise CtlensError(f"{path} is a device, a pipe or a socket: name a plain file, or a new one.")
    usable_folder(path.parent)


def require_free(path: str | Path) -> None:
    """Raises a `CtlensError` unless `path` is an empty folder, or absent and can be made."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CtlensError(f"{path} exists already: name a new folder, or remove it first.")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise CtlensError(f"{path} cannot be made in {nearest}: name a folder that can be written to.")


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` in one step (temporary name, then rename)."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Writes `data` as indented JSON to `path` in one step."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def sweep(paths: Iterable[Path]) -> None:
    """Removes the temporary files beside these paths that interrupted processes left."""
    for path in paths:
        for left in path.parent.glob(f".{path.name}.*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def sweep_folder(folder: Path) -> None:
    """Removes the temporary files anywhere in a folder of ours that interrupted processes left."""
    for left in sorted(folder.rglob(".*"), reverse=True):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def digest_of(data: Any) -> str:
    """Hashes JSON-ready data to a name of 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def digest(path: str | Path) -> str:
    """Hashes the content of a file to a name of 16 hexadecimal digits.

    Raises:
        CtlensError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise CtlensError(f"{path} does not exist or is no file: check the path.")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
