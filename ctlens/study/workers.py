"""Work spread over processes, with the results in the order of the tasks."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from typing import Any, TypeVar, cast

from joblib import Parallel, cpu_count, delayed, parallel_config
from joblib.externals.loky.backend import resource_tracker
from tqdm.auto import tqdm

from ctlens.core.errors import CtlensError, unknown

TaskResult = TypeVar("TaskResult")
LOKY = "loky"
DASK = "dask"
RAY = "ray"
BACKENDS = {LOKY: "joblib", DASK: "distributed", RAY: "ray"}
"""The package that each backend needs."""
_KILLED = ("KilledWorker", "WorkerCrashedError")
"""The errors of Dask and Ray when workers die, by name: no class can be imported where its package is missing."""
_RETRIES = 3
"""How often a task is begun anew whose worker died; Dask's own number."""
_WAITING = 2
"""Tasks per worker that Ray holds beside those that run, so that none waits for the driver; joblib's own number."""


@dataclass(frozen=True)
class Pool:
    """A pool of workers: where the work of a study runs.

    Attributes:
        count: how many calls run at a time; None for one per core that this process may use, or for all
            that a cluster has.
        backend: of joblib: `"loky"`, processes of this machine; `"dask"` or `"ray"`, a cluster whose
            workers see the same files.
        scheduler: the address of the cluster's scheduler, for Dask; Ray finds its own, by `RAY_ADDRESS`, or starts one
            on this machine.
        gpus: how many GPUs of a cluster each call has for itself; Dask's workers are started with `--resources GPU=1`.

    Raises:
        CtlensError: `count` is below 1, the backend is unknown or not installed, or Dask lacks its scheduler.
    """

    count: int | None = None
    backend: str = LOKY
    scheduler: str = ""
    gpus: int = 0

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise CtlensError(f"workers must be at least 1, not {self.count}.")
        if self.backend not in BACKENDS:
            raise unknown("backend", self.backend, BACKENDS)
        package = BACKENDS[self.backend]
        if find_spec(package) is None:
            raise CtlensError(f"the backend {self.backend} needs {package}: install ctlens with its extra 'cluster'.")
        if self.backend == DASK and not self.scheduler:
            raise CtlensError("the backend dask needs the address of its scheduler: give --scheduler tcp://HOST:PORT.")
        if self.scheduler and self.backend != DASK:
            raise CtlensError(
                f"the backend {self.backend} takes no scheduler, but {self.scheduler!r} was given: "
                "give --backend dask, or leave out --scheduler."
            )
        if self.gpus and self.backend == LOKY:
            raise CtlensError("the backend loky gives no GPUs to calls: give --backend dask or ray.")

    @property
    def workers(self) -> int:
        """The number of calls that run at a time; of a cluster whose size is not given, the cores of this machine."""
        return cpu_count() if self.count is None else self.count

    def options(self) -> dict[str, Any]:
        """The options of joblib's backend."""
        if self.backend == LOKY:
            return {"inner_max_num_threads": 1, "initializer": _prepare_worker}
        needed = {"resources": {"GPU": self.gpus}} if self.gpus else {}
        return {"scheduler_host": self.scheduler, **needed}

    def parallel(self, tasks: int) -> Parallel:
        """Builds joblib's runner of so many tasks, on this machine or on Dask's cluster."""
        if self.backend == LOKY:
            # A worker that has grown by 300 MB, as with the answers of a large model, is ended and another one started.
            warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)
            jobs = min(self.workers, tasks)
        else:
            jobs = -1 if self.count is None else self.count
        with parallel_config(backend=self.backend, **self.options()):
            return Parallel(jobs, return_as="generator", batch_size=1)  # type: ignore[arg-type]


def run_in_order(
    function: Callable[..., TaskResult], tasks: Sequence[tuple[Any, ...]], pool: Pool
) -> Generator[TaskResult, None, None]:
    """Calls `function` with every task and yields the results in the order of the tasks, each as soon as it is there.

    With one worker the calls run in this process, when the next result is asked for. More workers
    are processes that compute ahead, on one thread each; an exception or interrupt in the caller ends
    them at once. A cluster gives a task whose worker is lost to another worker.

    Args:
        function: can be imported by its name.
        tasks: its arguments, a tuple per call.
        pool: where they run.

    Raises:
        CtlensError: a worker was killed.
        BaseException: whatever a call raised.
    """
    if not tasks:
        return
    try:
        with _interrupts_later():
            if pool.backend == RAY:
                results = _on_ray(function, tasks, pool)
            else:
                calls = (delayed(function)(*task) for task in tasks)
                results = cast(Generator[TaskResult, None, None], pool.parallel(len(tasks))(calls))
        with _closing_silently(results):
            for result in results:  # noqa: UP028 (an early end of a `yield from` would be joblib's, with its warning)
                yield result
    except BrokenProcessPool:
        raise CtlensError("a worker process was killed, most likely for want of memory: use fewer workers.") from None
    except Exception as error:
        if type(error).__name__ not in _KILLED:
            raise
        raise CtlensError("a cluster gave up on a task whose workers were killed: give them more memory.") from None


def _on_ray(
    function: Callable[..., TaskResult], tasks: Sequence[tuple[Any, ...]], pool: Pool
) -> Generator[TaskResult, None, None]:
    """Yields the results of Ray's tasks in order; few wait at a time, so that many tasks cost the driver no memory."""
    ray = import_module("ray")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR")
    cores = int(ray.cluster_resources().get("CPU", 1)) if pool.count is None else pool.count
    remote = ray.remote(num_cpus=1, num_gpus=pool.gpus, max_retries=_RETRIES)(function)
    waiting: deque[Any] = deque()
    todo = iter(tasks)
    try:
        while True:
            waiting.extend(remote.remote(*task) for task in islice(todo, (1 + _WAITING) * cores - len(waiting)))
            if not waiting:
                return
            yield ray.get(waiting.popleft())
    except ray.exceptions.RayTaskError as error:  # the call's own error, without the text of its worker around it
        raise error.cause from None
    finally:
        for task in waiting:
            ray.cancel(task, force=True)


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Delays interrupts of this thread to the end of the block; processes started inside inherit the delay.

    A terminal interrupts all processes of a command at once: the one that leads should answer, not its workers.
    """
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # else it starts inside the block, and lets the interrupts through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _closing_silently(results: Generator[Any, None, None]) -> Iterator[None]:
    """Closes as `closing` does, without joblib's warning that work is given up: here that is on purpose."""
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.close()


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A lock of tqdm's own would be one between processes, reported as leaked when the worker is ended.
    tqdm.set_lock(threading.RLock())
