"""A damaged or missing file of a folder is known by its digest, and so is a damaged table of digests."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctlens.core.digests import DIGESTS_FILE, record_digests, require_undamaged
from ctlens.core.errors import CtlensError


def folder_of(path: Path) -> Path:
    (path / "a.csv").write_text("x\n1\n")
    (path / "b.json").write_text("{}")
    record_digests(path)
    return path


def test_files_as_they_were_written_pass_and_others_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    require_undamaged(folder)

    (folder / "a.csv").write_text("x\n1\n2\n")
    with pytest.raises(CtlensError, match=r"a\.csv is damaged \(it has 2 rows, and 1 were written\)"):
        require_undamaged(folder)
    require_undamaged(folder, "b.json")
    (folder / "b.json").unlink()
    with pytest.raises(CtlensError, match=r"b\.json is missing: run the study again with --resume"):
        require_undamaged(folder, "b.json")


def test_a_file_that_is_no_longer_there_when_others_are_recorded_is_no_longer_asked_for(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "b.json").unlink()

    record_digests(folder, [folder / "a.csv"])

    require_undamaged(folder)


def test_damaged_digests_say_what_to_do(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / DIGESTS_FILE).write_bytes(b"file,ro")

    with pytest.raises(CtlensError, match=r"digests\.csv is damaged: remove it and run the study again with --resume"):
        require_undamaged(folder)
