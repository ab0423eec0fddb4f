"""Work on a cluster of two processes on the loopback address: one of Dask, one of Ray."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from ctlens.core.errors import CtlensError
from ctlens.study import cells
from ctlens.study.config import Cell, StudyConfig
from ctlens.study.logs import LOGS_FOLDER, logged
from ctlens.study.runner import Study
from ctlens.study.workers import BACKENDS, Pool, run_in_order
from ctlens.training import TrainConfig

TINY = StudyConfig(
    ("sycophancy",), ("bct",), n_pairs=4, n_prompts=3, training=TrainConfig(steps=1), analysed=(), extra_conditions=()
)
MB = 2**20


@pytest.fixture(scope="module", params=["dask", "ray"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Pool]:
    if find_spec(BACKENDS[request.param]) is None:
        pytest.skip("the extra 'cluster' is not installed")
    if request.param == "dask":
        from distributed import LocalCluster

        options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "host": "127.0.0.1"}
        with LocalCluster(processes=True, **options) as dask:
            yield Pool(backend="dask", scheduler=dask.scheduler_address)
    else:
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield Pool(backend="ray")
        ray.shutdown()


def noted(folder: Path, number: int, dies: bool) -> int:
    """Notes that it was begun; the first time it kills the worker that it runs on, where it is to."""
    begun = len(list(folder.glob(f"{number}-*")))
    (folder / f"{number}-{begun}").touch()
    if dies and not begun:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def large(number: int) -> bytes:
    """A result that takes a megabyte of whoever keeps it."""
    return bytes([number % 256]) * MB


def of_so_many(workers: int) -> int:
    return Pool(workers).workers


@pytest.mark.processes
def test_results_come_in_the_order_of_the_tasks(cluster: Pool, tmp_path: Path) -> None:
    tasks = [(tmp_path, number, False) for number in range(6)]

    assert list(run_in_order(noted, tasks, cluster)) == [0, 1, 4, 9, 16, 25]


@pytest.mark.processes
def test_a_killed_worker_costs_its_task_alone(cluster: Pool, tmp_path: Path) -> None:
    tasks = [(tmp_path, number, number == 2) for number in range(6)]

    found = list(run_in_order(noted, tasks, cluster))

    begun = sorted(path.name for path in tmp_path.iterdir())
    assert found == [0, 1, 4, 9, 16, 25]
    assert "2-1" in begun and len(begun) <= 8  # the lost one again, and at most one more that was on its worker


@pytest.mark.processes
def test_an_error_of_a_task_is_raised_as_it_is(cluster: Pool) -> None:
    with pytest.raises(CtlensError, match=r"^workers must be at least 1, not 0\.$"):
        list(run_in_order(of_so_many, [(1,), (0,)], cluster))


@pytest.mark.processes
def test_results_of_many_tasks_do_not_pile_up_where_they_are_read(cluster: Pool) -> None:
    before = psutil.Process().memory_info().rss
    most = 0
    for number, found in enumerate(run_in_order(large, [(number,) for number in range(500)], cluster)):
        assert found[0] == number % 256
        most = max(most, psutil.Process().memory_info().rss - before)

    assert number == 499 and most < 200 * MB


@pytest.mark.processes
def test_a_study_on_a_cluster_is_that_on_this_machine_to_the_byte(cluster: Pool, tmp_path: Path) -> None:
    folders = {"here": tmp_path / "here", "there": tmp_path / "there"}
    for pool, folder in zip((Pool(1), cluster), folders.values(), strict=True):
        found = [cell.name for cell, _ in Study(TINY, folder, progress=False, pool=pool)]
        assert found == ["sycophancy-retention-seed0", "sycophancy-bct-seed0"]

    files = {path.relative_to(folders["here"]) for path in (folders["here"] / "runs").rglob("*") if path.is_file()}
    assert Path("runs/sycophancy-bct-seed0/results.csv") in files
    for name in sorted(files):
        assert (folders["here"] / name).read_bytes() == (folders["there"] / name).read_bytes(), name
    logs = {path.stem: path.read_text() for path in (folders["there"] / LOGS_FOLDER).iterdir()}
    assert set(logs) == {"base", "sycophancy-retention-seed0", "sycophancy-bct-seed0"}
    assert all(re.search(r"began on \S+, process \d+\n.* ended after \d+ s\n$", log) for log in logs.values())


def test_a_log_tells_when_work_was_begun_and_how_it_ended(tmp_path: Path) -> None:
    with logged(tmp_path, "cell"):
        pass
    with pytest.raises(CtlensError), logged(tmp_path, "cell"):
        raise CtlensError("no\nroom")

    lines = (tmp_path / LOGS_FOLDER / "cell.log").read_text().splitlines()
    moment = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"
    wanted = ["began on .*", "ended after 0 s", "began on .*", "failed after 0 s: CtlensError: no room"]
    assert len(lines) == 4
    assert all(re.fullmatch(f"{moment} {text}", line) for text, line in zip(wanted, lines, strict=True))


def test_a_cell_that_fails_says_so_in_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: object) -> None:
        raise CtlensError("the disk is full.")

    monkeypatch.setattr(cells, "CellTraining", fails)
    with pytest.raises(CtlensError):
        cells.run_cell(TINY, tmp_path, Cell("sycophancy", "bct", 0))

    assert (
        (tmp_path / LOGS_FOLDER / "sycophancy-bct-seed0.log").read_text().endswith("CtlensError: the disk is full.\n")
    )


def test_each_call_has_a_gpu_of_its_own_where_it_asks_for_one() -> None:
    pool = Pool(2, backend="dask", scheduler="tcp://127.0.0.1:1", gpus=1)

    assert pool.options() == {"scheduler_host": "tcp://127.0.0.1:1", "resources": {"GPU": 1}}
    assert Pool(2, backend="dask", scheduler="tcp://127.0.0.1:1").options() == {"scheduler_host": "tcp://127.0.0.1:1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "dask"}, "dask needs the address of its scheduler: give --scheduler tcp://HOST:PORT"),
        ({"scheduler": "tcp://127.0.0.1:8786"}, "loky takes no scheduler, but 'tcp://127.0.0.1:8786' was given"),
        ({"gpus": 1}, "loky gives no GPUs to calls: give --backend dask or ray"),
    ],
)
def test_a_backend_and_what_it_takes_go_together(options: dict, message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        Pool(**options)


def test_a_backend_that_is_not_installed_or_not_known_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctlens.study.workers.find_spec", lambda name: None)
    with pytest.raises(CtlensError, match="needs ray: install ctlens with its extra"):
        Pool(backend="ray")
    with pytest.raises(CtlensError, match="unknown backend 'spark'"):
        Pool(backend="spark")
