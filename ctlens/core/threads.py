"""The number of threads that torch computes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread inside the block, and afterwards on as many as before.

    A model of the organism's size gains nothing from more threads, and they slow down whatever runs
    beside it. On one thread sums also come out the same, whatever the number of cores and of workers.

    >>> import torch
    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    """
    import torch  # here, so that importing this module stays cheap

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
