"""A file or folder is whole or absent."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from ctlens.core.errors import CtlensError
from ctlens.core.files import atomic_file, atomic_folder, digest, require_free, sweep_folder, write_json, write_text
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
    (tmp_path / "runs" / ".cell.half").mkdir(parents=True)
    (tmp_path / "runs" / ".cell.half" / "weights").touch()
    for name in (".results.csv.x1", "results.csv", "runs/kept"):
        (tmp_path / name).touch()

    sweep_folder(tmp_path)

    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "results.csv",
        "runs",
        "runs/kept",
    ]


def test_a_digest_tells_contents_apart(tmp_path: Path) -> None:
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).write_text(text)

    a = digest(tmp_path / "a")
    b = digest(tmp_path / "b")
    c = digest(tmp_path / "c")

    assert a == b != c and len(a) == 16
    with pytest.raises(CtlensError, match="does not exist"):
        digest(tmp_path / "d")


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
