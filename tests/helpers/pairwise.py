"""Grids of parameters thinned to what the combination of any two of their values needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any

Pair = tuple[int, int, int, int]
"""Two axes of a grid, and the index of a value on each of them."""


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value per axis in which any two values of different axes stand together at least once.

    A fault that needs one value, or two together, still fails a row; one that needs three may not. Greedy: the next row
    is the first of the full grid that brings the most pairs of values that no row has yet, so equal axes give
    equal rows, and the first row holds the first value of every axis.
    """
    grid = list(product(*(range(len(axis)) for axis in axes)))
    missing = {pair for row in grid for pair in _pairs(row)}
    chosen: list[tuple[int, ...]] = []
    while missing:
        best = max(grid, key=lambda row: len(missing.intersection(_pairs(row))))
        missing.difference_update(_pairs(best))
        chosen.append(best)
    return [tuple(axis[index] for axis, index in zip(axes, row, strict=True)) for row in chosen]


def _pairs(row: Sequence[int]) -> Iterator[Pair]:
    for (one, first), (other, second) in combinations(enumerate(row), 2):
        yield one, other, first, second
