"""Work spread over processes, with the results in the order of the tasks."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
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
_KILLED = "KilledWorker"
"""The name of the error that Dask raises when workers die; the class cannot be imported where Dask is missing."""


@dataclass(frozen=True)
class Pool:
    """A pool of workers: where the work of a study runs.

    Attributes:
        count: how many calls run at a time; None for one per core that this process may use, or for all
            that a cluster has.
        backend: of joblib: `"loky"`, processes of this machine; `"dask"` or `"ray"`, a cluster whose
            workers see the same files.
        scheduler: the address of the cluster's scheduler, for Dask; Ray finds its own.

    Raises:
        CtlensError: `count` is below 1, the backend is unknown or not installed, or Dask lacks its scheduler.
    """

    count: int | None = None
    backend: str = LOKY
    scheduler: str = ""

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

    @property
    def workers(self) -> int:
        """The number of calls that run at a time; of a cluster whose size is not given, the cores of this machine."""
        return cpu_count() if self.count is None else self.count

    def parallel(self, tasks: int) -> Parallel:
        """Builds joblib's runner of so many tasks."""
        if self.backend == LOKY:
            # A worker that has grown by 300 MB, as with the answers of a large model, is ended and another one started.
            warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)
            options: dict[str, Any] = {"inner_max_num_threads": 1, "initializer": _prepare_worker}
            jobs = min(self.workers, tasks)
        else:
            options = {"scheduler_host": self.scheduler} if self.backend == DASK else {}
            jobs = -1 if self.count is None else self.count
        if self.backend == RAY:
            import_module("ray.util.joblib").register_ray()
        with parallel_config(backend=self.backend, **options):
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
    parallel = pool.parallel(len(tasks))
    try:
        with _interrupts_later():
            results = cast(Generator[TaskResult, None, None], parallel(delayed(function)(*task) for task in tasks))
        with _closing_silently(results):
            for result in results:  # noqa: UP028 (an early end of a `yield from` would be joblib's, with its warning)
                yield result
    except BrokenProcessPool:
        raise CtlensError("a worker process was killed, most likely for want of memory: use fewer workers.") from None
    except Exception as error:
        if type(error).__name__ != _KILLED:
            raise
        raise CtlensError("a cluster gave up on a task whose workers were killed: give them more memory.") from None


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
