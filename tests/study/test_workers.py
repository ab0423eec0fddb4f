"""Work in other processes: results in order, errors as they are, and a clean end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ctlens.core.errors import CtlensError
from ctlens.core.stats import wilson
from ctlens.study.workers import Pool, run_in_order

INTERRUPTED = """
import time
from contextlib import closing
from ctlens.study.workers import Pool, run_in_order
with closing(run_in_order(time.sleep, [(0.01,), (60,), (60,)], Pool(2))) as results:
    for _ in results:
        print("one", flush=True)
"""


@pytest.mark.processes
@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    tasks = [(["sh", "-c", f"sleep {wait}; echo {wait}"],) for wait in ("0.5", "0.2", "0")]

    assert list(run_in_order(subprocess.check_output, tasks, Pool(workers))) == [b"0.5\n", b"0.2\n", b"0\n"]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.processes)])
def test_an_error_of_a_task_is_raised_as_it_is(workers: int) -> None:
    with pytest.raises(CtlensError, match="at least one answer"):
        list(run_in_order(wilson, [(1, 2), (0, 0), (1, 2)], Pool(workers)))


@pytest.mark.processes
def test_a_killed_worker_is_a_sentence() -> None:
    with pytest.raises(CtlensError, match="use fewer workers"):
        list(run_in_order(os.abort, [(), ()], Pool(2)))


@pytest.mark.parametrize("tasks", [[], [(7, 2)]])
def test_few_tasks_need_no_processes(tasks: list) -> None:
    assert list(run_in_order(divmod, tasks, Pool(8))) == [(3, 1)] * len(tasks)


@pytest.mark.processes
def test_whoever_stops_asking_does_not_wait(recwarn: pytest.WarningsRecorder) -> None:
    results = run_in_order(time.sleep, [(0.01,), (60,), (60,)], Pool(2))
    next(results)
    start = time.monotonic()

    results.close()

    assert time.monotonic() - start < 20 and not recwarn.list


@pytest.mark.processes
def test_an_interrupt_of_the_whole_terminal_ends_the_work_as_an_interrupt() -> None:
    command = [sys.executable, "-c", INTERRUPTED]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout and process.stdout.readline() == "one\n"

    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)

    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in said


def test_by_default_there_is_a_worker_a_core() -> None:
    assert 1 <= Pool().workers <= (os.cpu_count() or 1)
    assert Pool(3).workers == 3
    with pytest.raises(CtlensError, match="workers must be at least 1, not 0"):
        Pool(0)
