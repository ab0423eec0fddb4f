"""Work on a Dask cluster of two processes on the loopback address."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctlens.core.errors import CtlensError
from ctlens.study.workers import Pool, run_in_order

distributed = pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "host": "127.0.0.1"}
    with distributed.LocalCluster(processes=True, **options) as cluster:
        yield cluster.scheduler_address


def noted(folder: Path, number: int, dies: bool) -> int:
    """Notes that it was begun; the first time it kills the worker that it runs on, where it is to."""
    begun = len(list(folder.glob(f"{number}-*")))
    (folder / f"{number}-{begun}").touch()
    if dies and not begun:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


@pytest.mark.processes
def test_results_come_in_the_order_of_the_tasks(scheduler: str, tmp_path: Path) -> None:
    tasks = [(tmp_path, number, False) for number in range(6)]

    assert list(run_in_order(noted, tasks, Pool(backend="dask", scheduler=scheduler))) == [0, 1, 4, 9, 16, 25]


@pytest.mark.processes
def test_a_killed_worker_costs_its_task_alone(scheduler: str, tmp_path: Path) -> None:
    tasks = [(tmp_path, number, number == 2) for number in range(6)]

    found = list(run_in_order(noted, tasks, Pool(backend="dask", scheduler=scheduler)))

    begun = sorted(path.name for path in tmp_path.iterdir())
    assert found == [0, 1, 4, 9, 16, 25]
    assert "2-1" in begun and len(begun) <= 8  # the lost one again, and at most one more that was on its worker


@pytest.mark.processes
def test_an_error_of_a_task_is_raised_as_it_is(scheduler: str) -> None:
    with pytest.raises(CtlensError, match="workers must be at least 1"):
        list(run_in_order(Pool, [(1,), (0,)], Pool(backend="dask", scheduler=scheduler)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "dask"}, "dask needs the address of its scheduler: give --scheduler tcp://HOST:PORT"),
        ({"scheduler": "tcp://127.0.0.1:8786"}, "loky takes no scheduler, but 'tcp://127.0.0.1:8786' was given"),
    ],
)
def test_a_backend_and_its_scheduler_go_together(options: dict, message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        Pool(**options)


def test_a_backend_that_is_not_installed_or_not_known_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctlens.study.workers.find_spec", lambda name: None)
    with pytest.raises(CtlensError, match="needs ray: install ctlens with its extra"):
        Pool(backend="ray")
    with pytest.raises(CtlensError, match="unknown backend 'spark'"):
        Pool(backend="spark")
