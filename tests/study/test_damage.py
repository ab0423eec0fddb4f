"""A study folder with a damaged file is answered with one sentence that names the file and how to make it anew."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.damage import FILE_DAMAGES, TABLE_DAMAGES, damage
from helpers.models import Call
from helpers.study_folder import write_study

from ctlens.core.digests import DIGESTS_FILE, record_digests, require_undamaged
from ctlens.core.errors import CtlensError
from ctlens.core.files import atomic_folder
from ctlens.study.config import StudyConfig
from ctlens.study.report import write_report
from ctlens.study.runner import Study
from ctlens.study.workers import Pool
from ctlens.training import TrainConfig

TABLES = ("results.csv", "claims.csv", "figures/sycophancy-dose.data.csv")
OTHERS = ("config.json", "environment.json", "figures/sycophancy-dose.json")
REPORTED = [(name, kind) for name in TABLES for kind in (*TABLE_DAMAGES, *FILE_DAMAGES)]
REPORTED += [(name, kind) for name in OTHERS for kind in FILE_DAMAGES]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_study(tmp_path_factory.mktemp("written") / "study")
    record_digests(folder, [path for path in folder.rglob("*") if path.is_file()])
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """The folder of a study for the report, with its digests."""
    return Path(shutil.copytree(written, tmp_path / "study"))


@pytest.mark.parametrize(("name", "kind"), REPORTED)
def test_the_report_names_a_damaged_file(call: Call, folder: Path, name: str, kind: str) -> None:
    damage(folder / name, kind)

    ended = call(f"report {folder}")

    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"ctlens: {folder / name} is damaged")
    assert ended.err.endswith(f": remove {folder / name} and run the study again with --resume, which makes it anew.\n")
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("name", [*TABLES, *OTHERS])
def test_the_report_names_a_missing_file(call: Call, folder: Path, name: str) -> None:
    (folder / name).unlink()

    ended = call(f"report {folder}")

    assert ended.code == 2 and ended.err.startswith(f"ctlens: {folder / name} is missing: run the study again with")


def test_rows_that_were_lost_are_counted(folder: Path) -> None:
    rows = (folder / "results.csv").read_text().splitlines(keepends=True)
    (folder / "results.csv").write_text("".join(rows[:-3]))

    words = rf"is damaged \(it has {len(rows) - 4} rows, and {len(rows) - 1} were written\): remove"
    with pytest.raises(CtlensError, match=words):
        write_report(folder)


def test_a_whole_folder_and_one_without_digests_are_reported(folder: Path) -> None:
    write_report(folder)
    page = (folder / "report.html").read_bytes()
    (folder / DIGESTS_FILE).unlink()  # as an earlier ctlens wrote it

    assert write_report(folder).read_bytes() == page


UNRECORDED = {
    "cut in half": ": the file ends within a row",
    "a header alone": "holds no rows",
    "a row twice": "repeats the number of an earlier row",
    "NaN for a number": "is 'nan', but a number is expected",
    "a text for a number": "is 'many', but a number is expected",
    "another column": "lacks the columns",
    "empty": "is no CSV with a header",
    "undecodable": "is not UTF-8 text in line 1",
    "zeros": ": the file ends within a row",
}


@pytest.mark.parametrize("kind", UNRECORDED)
@pytest.mark.parametrize("name", TABLES[:2])
def test_a_table_without_digests_is_read_strictly(call: Call, folder: Path, name: str, kind: str) -> None:
    (folder / DIGESTS_FILE).unlink()
    damage(folder / name, kind)

    ended = call(f"report {folder}")

    if name == "claims.csv" and kind in ("a row twice", "a header alone"):
        assert ended.code == 0  # a table of other claims, as far as one can see
    else:
        assert ended.code == 2 and ended.err.startswith(f"ctlens: {folder / name}") and UNRECORDED[kind] in ended.err
        assert ended.err.count("\n") == 1


def test_an_unreadable_list_of_digests_is_named(folder: Path) -> None:
    for kind in ("empty", "undecodable", "another column"):
        record_digests(folder, [])
        damage(folder / DIGESTS_FILE, kind)
        with pytest.raises(CtlensError, match=f"{DIGESTS_FILE} "):
            write_report(folder)
        (folder / DIGESTS_FILE).unlink()


SMALL = StudyConfig(
    ("sycophancy",), ("act",), n_pairs=8, n_prompts=6, training=TrainConfig(steps=1), analysed=(), extra_conditions=()
)
CELL = "runs/sycophancy-act-seed0"
RESUMED = [("base.csv", kind) for kind in (*TABLE_DAMAGES, *FILE_DAMAGES)]
RESUMED += [(f"{CELL}/{name}", "cut in half") for name in ("results.csv", "outcomes.csv", "residual.safetensors")]
RESUMED += [(f"{CELL}/outcomes.csv", "another number"), (f"{CELL}/history.csv", "empty")]


def finish(folder: Path, resume: bool = True) -> None:
    study = Study(SMALL, folder, resume=resume, progress=False, pool=Pool(1))
    for _ in study:
        pass
    study.finish()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("whole") / "study"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctlens.plots.export.find_spec", lambda _: None)
        finish(folder, resume=False)
        yield folder


@pytest.fixture
def study(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "study"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), RESUMED)
def test_a_resume_names_a_damaged_file_that_it_reads(study: Path, name: str, kind: str) -> None:
    damage(study / name, kind)

    with pytest.raises(CtlensError) as found:
        finish(study)

    remove = study / CELL if name.startswith(CELL) else study / name
    assert str(found.value).startswith(f"{study / name} is damaged")
    assert str(found.value).endswith(f": remove {remove} and run the study again with --resume, which makes it anew.")


@pytest.mark.slow
def test_an_answer_that_is_missing_from_a_cell_is_no_cell_without_answers(study: Path) -> None:
    (study / CELL / "outcomes.csv").unlink()
    with pytest.raises(CtlensError, match=r"outcomes.csv is missing: remove .*act-seed0 and run the study again"):
        finish(study)


@pytest.mark.slow
def test_what_is_removed_is_made_anew_and_equal(study: Path, whole: Path) -> None:
    for name in ("base.csv", "results.csv", "claims.csv"):
        (study / name).unlink()
    shutil.rmtree(study / CELL)
    damage(next((study / "figures").glob("*.data.csv")), "cut in half")

    finish(study)

    assert (study / DIGESTS_FILE).read_bytes() == (whole / DIGESTS_FILE).read_bytes()
    for name in ("base.csv", "results.csv", "claims.csv", f"{CELL}/{DIGESTS_FILE}"):
        assert (study / name).read_bytes() == (whole / name).read_bytes()
    write_report(study)


@pytest.mark.slow
def test_a_study_without_digests_is_resumed(study: Path) -> None:
    for path in study.rglob(DIGESTS_FILE):
        path.unlink()
    finish(study)
    assert (study / DIGESTS_FILE).is_file()


def test_a_mark_of_work_in_progress_is_not_recorded(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "cell") as work:
        (work / "a.csv").write_text("x\n1\n")
        (work / ".half").touch()
        record_digests(work)
    (tmp_path / "cell" / ".half").unlink()

    require_undamaged(tmp_path / "cell")
    (tmp_path / "cell" / "a.csv").unlink()
    with pytest.raises(CtlensError, match=r"a\.csv is missing"):
        require_undamaged(tmp_path / "cell")


def test_digests_of_other_files_stay_recorded(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("x\n1\n")
    record_digests(tmp_path, [tmp_path / "a.csv"])
    record_digests(tmp_path, [tmp_path / "b.csv"])
    lines = (tmp_path / DIGESTS_FILE).read_text().splitlines()

    digest = "daff832f802000e645771a60983c76c963f6ee602a6230e45237bd360e91cc1a"  # sha256sum
    assert lines == ["file,rows,digest", f"a.csv,1,{digest}", f"b.csv,1,{digest}"]
