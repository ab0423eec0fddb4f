"""Which tests, and which parameters of a test, run where."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def loosely_typed(test: Callable[..., None]) -> Callable[..., None]:
    """A test that gives what the hints forbid: it runs where no hint is checked, which on TransformerLens 4.x is so."""
    checked = os.environ.get("CTLENS_TYPECHECK") == "1"
    return pytest.mark.boundary(pytest.mark.skipif(checked, reason="the type check refuses it first")(test))


def unit_first(values: Iterable[Any], count: int = 1) -> list[Any]:
    """Parameters of which the first `count` are in the unit tier and the others are slow."""
    return [
        value if index < count else pytest.param(value, marks=pytest.mark.slow) for index, value in enumerate(values)
    ]


def unit_first_rows(rows: Iterable[tuple[Any, ...]], count: int = 1) -> list[Any]:
    """The same for rows of several parameters each."""
    return [row if index < count else pytest.param(*row, marks=pytest.mark.slow) for index, row in enumerate(rows)]
