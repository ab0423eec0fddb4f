"""Which parameters of a test are in the unit tier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def unit_first(values: Iterable[Any], count: int = 1) -> list[Any]:
    """Parameters of which the first `count` are in the unit tier and the others are slow."""
    return [
        value if index < count else pytest.param(value, marks=pytest.mark.slow) for index, value in enumerate(values)
    ]


def unit_first_rows(rows: Iterable[tuple[Any, ...]], count: int = 1) -> list[Any]:
    """The same for rows of several parameters each."""
    return [row if index < count else pytest.param(*row, marks=pytest.mark.slow) for index, row in enumerate(rows)]
