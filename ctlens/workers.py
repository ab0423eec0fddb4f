"""Work spread over processes, with the results in the order of the tasks."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from joblib import Parallel, cpu_count, delayed, parallel_config
from joblib.externals.loky.backend import resource_tracker
from tqdm.auto import tqdm

from ctlens.errors import CtlensError

T = TypeVar("T")


def available(workers: int | None) -> int:
    """The number of workers asked for; by default one per core that this process may use.

    Raises:
        CtlensError: it is below 1.
    """
    if workers is None:
        return cpu_count()
    if workers < 1:
        raise CtlensError(f"workers must be at least 1, not {workers}.")
    return workers


def in_order(function: Callable[..., T], tasks: Sequence[tuple[Any, ...]], workers: int) -> Generator[T, None, None]:
    """Calls `function` with every task and yields the results in the order of the tasks, each as soon as it is there.

    With one worker the calls run in this process, when the next result is asked for. More workers
    are processes beside it that compute ahead, on one thread each; whoever stops asking, by an
    exception or an interrupt, ends them at once.

    Args:
        function: can be imported by its name.
        tasks: its arguments, a tuple a call.
        workers: how many calls run at a time, from 1.

    Raises:
        CtlensError: a worker was killed.
        BaseException: whatever a call raised.
    """
    if not tasks:
        return
    with parallel_config(backend="loky", inner_max_num_threads=1, initializer=_prepare_worker):
        pool = Parallel(min(workers, len(tasks)), return_as="generator", batch_size=1)  # type: ignore[arg-type]
    try:
        with _interrupts_later():
            results = cast(Generator[T, None, None], pool(delayed(function)(*task) for task in tasks))
        with _closing_silently(results):
            for result in results:  # noqa: UP028 (an early end of a `yield from` would be joblib's, with its warning)
                yield result
    except BrokenProcessPool:
        raise CtlensError("a worker process was killed, most likely for want of memory: use fewer workers.") from None


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
    """As `closing`, but without joblib's warning of work that is given up, as it is here on purpose."""
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
