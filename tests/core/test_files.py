"""A file or folder is whole or absent."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.disk import HOLDER, Killed, contents, full, killed

from ctlens.core.errors import CtlensError, UnwritableError
from ctlens.core.files import (
    alone,
    atomic_file,
    atomic_folder,
    digest,
    require_free,
    sweep_folder,
    write_json,
    write_text,
    writing,
)
from ctlens.core.reading import read_json


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_replaced_on_success_and_nothing_else_stays(tmp_path: Path):
    (tmp_path / "x.txt").write_text("old")
    with atomic_file(tmp_path / "x.txt") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "x.txt").read_text() == "old"
    assert (tmp_path / "x.txt").read_text() == "new"
    assert names(tmp_path) == ["x.txt"]


def test_a_failed_file_leaves_the_old_one_and_nothing_else(tmp_path: Path):
    (tmp_path / "x.txt").write_text("old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "x.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "x.txt").read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_a_file_makes_its_folders_and_can_be_read_by_others(tmp_path: Path):
    write_text(tmp_path / "a" / "b" / "x.txt", "é")
    assert (tmp_path / "a" / "b" / "x.txt").read_bytes() == "é".encode()
    assert (tmp_path / "a" / "b" / "x.txt").stat().st_mode & 0o777 == 0o644


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path):
    with atomic_folder(tmp_path / "run") as work:
        (work / "x").write_text("1")
        assert not (tmp_path / "run").exists()
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["x"]


def test_a_failed_folder_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "run") as work:
        (work / "x").write_text("1")
        raise RuntimeError
    assert names(tmp_path) == []


def test_an_empty_folder_is_filled_and_stays_empty_on_failure(tmp_path: Path):
    (tmp_path / "run").mkdir()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "run"):
        raise RuntimeError
    assert names(tmp_path / "run") == []
    with atomic_folder(tmp_path / "run") as work:
        (work / "x").write_text("1")
    assert names(tmp_path / "run") == ["x"]


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_a_taken_path_is_refused_and_kept(tmp_path: Path, taken: str):
    path = tmp_path / "run"
    write_text(path if taken == "file" else path / "x", "mine")
    with pytest.raises(CtlensError, match="run exists already"), atomic_folder(path):
        pytest.fail("the body must not run")
    assert names(tmp_path) == ["run"]
    assert (path if taken == "file" else path / "x").read_text() == "mine"


def test_free_is_absent_or_an_empty_folder(tmp_path: Path):
    require_free(tmp_path / "absent")
    require_free(tmp_path)
    with pytest.raises(CtlensError, match="exists already"):
        require_free(tmp_path.parent)


def test_json_comes_back_as_it_was(tmp_path: Path):
    data = {"é": [1, 0.1, None, True], "nested": {"a": "漢"}}
    write_json(tmp_path / "x.json", data)
    assert read_json(tmp_path / "x.json") == data
    assert "漢" in (tmp_path / "x.json").read_text(encoding="utf-8")


def test_json_that_cannot_be_written_leaves_nothing(tmp_path: Path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert names(tmp_path) == []


@pytest.mark.parametrize("make", [lambda path: path.write_text("mine"), lambda path: path.mkdir(mode=0o555)])
def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path: Path, make, monkeypatch):
    make(tmp_path / "place")
    writable = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "place" not in str(path) and writable(path, mode))

    with pytest.raises(CtlensError, match="cannot be made in"):
        require_free(tmp_path / "place" / "deep" / "run")


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "runs" / ".cell.abcdefgh.tmp").mkdir(parents=True)
    (tmp_path / "runs" / ".cell.abcdefgh.tmp" / "weights").touch()
    (tmp_path / ".git").mkdir()
    for name in (".results.csv.x1y2z3_4.tmp", "results.csv", "runs/kept", ".git/config"):
        (tmp_path / name).touch()

    sweep_folder(tmp_path)

    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        ".git",
        ".git/config",
        "results.csv",
        "runs",
        "runs/kept",
    ]


def test_the_lock_of_a_link_sweeps_beside_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "disk" / ".run.abcdefgh.tmp").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")

    with alone(tmp_path / "link"):
        assert not list((tmp_path / "disk").glob("*.tmp"))


def test_a_digest_tells_contents_apart(tmp_path: Path) -> None:
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).write_text(text)

    a = digest(tmp_path / "a")
    b = digest(tmp_path / "b")
    c = digest(tmp_path / "c")

    assert a == b != c and len(a) == 16
    with pytest.raises(CtlensError, match="does not exist"):
        digest(tmp_path / "d")


def write_run(path: Path) -> None:
    """A folder of two files, as every run, study cell and export is written."""
    with atomic_folder(path) as work:
        write_text(work / "config.json", "{}")
        write_text(work / "model" / "weights", "1")


@pytest.mark.parametrize("at", range(1, 10))
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path: Path, at: int) -> None:
    write_text(tmp_path / "there.txt", "old")
    with full(tmp_path, 0) as disk:
        write_run(tmp_path / "a" / "all")
    assert disk.seen == 9  # the folder above, the folder, its mark; then three of each file

    with full(tmp_path, at), pytest.raises(UnwritableError) as found:
        write_run(tmp_path / "b" / "run")

    path = tmp_path / "b" / "run" / ("", "config.json", "model/weights")[(at - 1) // 3]
    assert str(found.value).startswith(f"{path} cannot be written (No space left on device): make room there and ")
    assert "--resume" in str(found.value) and "\n" not in str(found.value)
    assert names(tmp_path) == ["a", "there.txt"] and contents(tmp_path)["there.txt"] == b"old"
    write_run(tmp_path / "b" / "run")
    assert contents(tmp_path / "b" / "run") == contents(tmp_path / "a" / "all")


def test_a_process_killed_at_any_write_leaves_a_whole_folder_or_none(tmp_path: Path) -> None:
    with killed(tmp_path, 0) as disk:
        write_run(tmp_path / "all")
    whole = contents(tmp_path / "all")

    for at in range(1, disk.seen + 1):
        folder = tmp_path / str(at)
        folder.mkdir()
        with killed(tmp_path, at), pytest.raises(Killed):
            write_run(folder / "run")
        assert contents(folder / "run") in ({}, whole)
        sweep_folder(folder)
        if not (folder / "run").exists():
            write_run(folder / "run")
        assert contents(folder) == {f"run/{name}": content for name, content in whole.items()}


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EROFS, "Read-only file system"), "(Read-only file system): name a folder that can be written"),
        (OSError(errno.EIO, "Input/output error"), "(Input/output error): see to the disk"),
        (OSError("Unable to save"), "(Unable to save): see to the disk"),
        # safetensors and tokenizers raise exceptions of their own, with the system's number in the text
        (Exception("I/O error: File too large (os error 27)"), "(File too large): raise the limit"),
    ],
)
def test_every_error_of_the_system_is_a_sentence_that_survives_another_process(error, sentence: str) -> None:
    with pytest.raises(UnwritableError) as found, writing("runs/x"):
        raise error

    assert f"runs/x cannot be written {sentence}" in str(found.value)
    assert str(copy.copy(found.value)) == str(found.value)  # made again of its parts, as behind a process
    with pytest.raises(ZeroDivisionError), writing("runs/x"):
        raise ZeroDivisionError


def test_a_name_that_is_too_long_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    with pytest.raises(UnwritableError, match="name a shorter path"):
        require_free(path)
    for use in (atomic_folder, atomic_file, alone):
        with pytest.raises(UnwritableError, match="xxx cannot be written .*: name a shorter path"), use(path):
            pytest.fail("nothing was refused")
    assert names(tmp_path) == []


def test_only_plain_files_are_replaced_and_a_link_stays_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "folder").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "folder")
    for name in ("pipe", "null", "folder"):
        with pytest.raises(CtlensError, match=f"{name} is (a device, a pipe or a socket|a folder): name a plain file"):
            write_text(tmp_path / name, "x")
    with pytest.raises(CtlensError, match="/dev/full is a device"):
        write_text("/dev/full", "x")

    write_text(tmp_path / "link", "through")
    write_run(tmp_path / "linked")

    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "through"
    assert (tmp_path / "linked").is_symlink() and (tmp_path / "folder" / "config.json").is_file()
    assert Path("/dev/full").is_char_device()


def test_a_folder_that_is_removed_while_it_is_written_is_not_taken_for_whole(tmp_path: Path) -> None:
    refused = pytest.raises(UnwritableError, match="run cannot be written .*: its folder was removed")
    with refused, atomic_folder(tmp_path / "run") as work:
        write_text(work / "config.json", "{}")
        shutil.rmtree(work)
        write_text(work / "late", "1")
    assert names(tmp_path) == []


def test_a_folder_that_somebody_fills_meanwhile_stays_theirs(tmp_path: Path) -> None:
    refused = pytest.raises(UnwritableError, match="run cannot be written .*: something else is there")
    with refused, atomic_folder(tmp_path / "run") as work:
        write_text(work / "config.json", "{}")
        write_text(tmp_path / "run" / "theirs", "1")
    assert contents(tmp_path) == {"run/theirs": b"1"}


@pytest.mark.processes
def test_one_process_at_a_time_writes_a_folder_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(CtlensError, match="run is being written by another process"), alone(path):
            pytest.fail("two processes hold one folder")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()

    with alone(path), alone(path.parent / "." / "run"):  # of one process, by any spelling
        assert names(path.parent) == [".run.lock"]
    assert names(path.parent) == []


def socket_at(path: Path) -> Path:
    socket.socket(socket.AF_UNIX).bind(str(path))
    return path


def fifo_at(path: Path) -> Path:
    os.mkfifo(path)
    return path


def link_at(path: Path) -> Path:
    path.symlink_to("/dev/full")
    return path


@pytest.mark.parametrize("make", [socket_at, fifo_at, link_at, lambda path: Path("/dev/full")])
def test_what_is_no_plain_file_is_never_replaced(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "x")
    before = path.stat().st_mode

    with pytest.raises(CtlensError, match=f"{path} is a device, a pipe or a socket"), atomic_file(path):
        pytest.fail("the body must not run")

    assert path.stat().st_mode == before and not path.is_file()
    assert all(name == "x" for name in names(tmp_path))


def test_a_folder_or_a_path_below_a_file_takes_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "file" / "x", "file is no folder")):
        with pytest.raises(CtlensError, match=words):
            write_text(path, "x")
