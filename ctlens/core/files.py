"""Writes files so that a result on disk is always whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ctlens.core.errors import CtlensError, UnwritableError

_NUMBER = re.compile(r"\(os error (\d+)\)")
"""The number of a system's error in the text of an exception of a library in Rust (safetensors, tokenizers)."""
_TEMPORARY = ".tmp"
_UNFINISHED = ".unfinished"
"""The file that is in a temporary folder from its first moment to its last."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Makes one sentence of whatever the system refuses while `path` is written inside the block.

    Raises:
        UnwritableError: the disk is full, read-only or gone, or a limit is reached.
    """
    try:
        yield
    except OSError as error:
        raise UnwritableError(path, error.errno or 0, error.strerror or str(error)) from error
    except Exception as error:
        if isinstance(error, CtlensError) or not (found := _NUMBER.search(str(error))):
            raise
        raise UnwritableError(path, int(found[1])) from error


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; it is renamed to `path` on success and removed on failure.

    Raises:
        CtlensError: `path` is no file, or cannot be written (`UnwritableError`).
    """
    path = usable_file(path)
    with writing(path), _folder_of(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY)
        os.close(handle)
        temporary = Path(name)
        try:
            os.chmod(temporary, 0o644)
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; it is renamed to `path` on success and removed on failure.

    Raises:
        CtlensError: `path` exists already and is not an empty folder, or cannot be written (`UnwritableError`).
    """
    path = _followed(path)
    require_free(path)
    with writing(path), _folder_of(path):
        work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY))
        try:
            os.chmod(work, 0o755)
            (work / _UNFINISHED).touch()
            yield work
            (work / _UNFINISHED).unlink()  # absent if the folder was removed meanwhile: then files are missing too
            if path.exists():
                path.rmdir()
            os.replace(work, path)
        except UnwritableError as error:
            if not error.path.is_relative_to(work):
                raise
            raise UnwritableError(path / error.path.relative_to(work), error.number, error.reason) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _folder_of(path: Path) -> Iterator[None]:
    """Makes the folders above `path`; those that the block leaves empty are removed again."""
    made = [folder for folder in path.parents if not os.path.exists(folder)]
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """Keeps other processes from writing to the folder `path` for the length of the block.

    The system frees the lock if this process is killed. Blocks of one process may be nested. Temporary folders that
    killed processes left beside `path` are removed.

    Raises:
        CtlensError: another process writes to `path`, or its lock cannot be written (`UnwritableError`).
    """
    target = Path(os.path.realpath(path))
    file = target.with_name(f".{target.name}.lock")
    lock = FileLock(file, timeout=0, is_singleton=True, thread_local=False)
    outermost = not lock.is_locked
    with _folder_of(file):
        with writing(path):
            try:
                lock.acquire()
            except Timeout:
                raise CtlensError(
                    f"{path} is being written by another process: wait for its end, or name another folder."
                ) from None
        try:
            if outermost:
                sweep([target])
            yield
        finally:
            try:
                if outermost:  # while the lock is still held, so that nobody can hold a file that is gone
                    with suppress(OSError):
                        file.unlink()
            finally:
                lock.release()


def _followed(path: str | Path) -> Path:
    """The path itself; of a link, the path that it leads to, so that the link stays."""
    path = Path(path)
    return path.resolve() if os.path.islink(path) else path


def usable_folder(path: str | Path) -> Path:
    """Returns the path of a folder that exists or can be made.

    Raises:
        CtlensError: the path, or a part of it, is a file.
    """
    path = Path(path)
    with writing(path):
        for part in (path, *path.parents):
            if part.exists() and not part.is_dir():
                raise CtlensError(f"{part} is no folder: name one that is there or can be made.")
    return path


def usable_file(path: str | Path) -> Path:
    """Returns the path of a plain file that exists or can be made; of a link, the path that it leads to.

    Raises:
        CtlensError: the path is a folder, a device, a pipe or a socket, or a part of it is a file.
    """
    path = Path(path)
    with writing(path):
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "a device, a pipe or a socket"
            raise CtlensError(f"{path} is {kind}: name a plain file, or a new one.")
    usable_folder(path.parent)
    return _followed(path)


def new_file(path: str | Path, *endings: str) -> Path:
    """Returns the path of a file that does not exist yet and can be made.

    Args:
        path: of the file.
        endings: that its name may have; any where none is named.

    Raises:
        CtlensError: it exists, has another ending, or cannot be made.
    """
    found = usable_file(path)
    if found.exists():
        raise CtlensError(f"{path} exists already: name a new file, or remove it first.")
    if endings and found.suffix not in endings:
        raise CtlensError(f"{path} would hold something else than its name says: name it {endings[0]}.")
    return found


def require_free(path: str | Path) -> None:
    """Raises a `CtlensError` unless `path` is an empty folder, or absent and can be made."""
    path = Path(path)
    with writing(path):
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
        with writing(path.parent):
            for left in path.parent.glob(f".{escape(path.name)}.????????{_TEMPORARY}"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def sweep_folder(folder: Path) -> None:
    """Removes the temporary files anywhere in a folder that interrupted processes left; other hidden files stay."""
    with writing(folder):
        for left in sorted(folder.rglob(f".*.????????{_TEMPORARY}"), reverse=True):
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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
