"""Work that several computations need alike is done once, where a block says that nothing it depends on changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias, TypeVar

_T = TypeVar("_T")
KeptResults: TypeAlias = dict[Hashable, Any]
"""Results by what they follow from."""
_KEPT: ContextVar[KeptResults | None] = ContextVar("results that are kept", default=None)


@contextmanager
def keeping(results: KeptResults | None = None) -> Iterator[None]:
    """Does equal work once inside the block, and keeps its results in `results`, where a later block finds them.

    It is for work that asks the same prompts again and again, as the trainings of a study do, with tokenizers that
    nothing changes meanwhile. A token of a prompt takes about 200 bytes.

    Args:
        results: where to keep them; by default where an outer block keeps them, or else for this block alone.
    """
    if results is None:
        results = _KEPT.get()
    before = _KEPT.set({} if results is None else results)
    try:
        yield
    finally:
        _KEPT.reset(before)


def once(known: Callable[[], Hashable], make: Callable[[], _T]) -> _T:
    """Makes something, or inside a `keeping` block takes it from the results that are kept.

    Args:
        known: lists all that the result follows from; it is called inside a `keeping` block alone.
        make: makes the result, which nobody changes afterwards.
    """
    kept = _KEPT.get()
    if kept is None:
        return make()
    key = known()
    if key not in kept:
        kept[key] = make()
    return kept[key]
