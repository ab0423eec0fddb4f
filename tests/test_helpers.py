"""The helpers of the tests that a test may be wrong by: grids that leave combinations out."""

from __future__ import annotations

from itertools import combinations

import pytest
from helpers.pairwise import pairwise


@pytest.mark.parametrize(
    ("sizes", "most"), [((2, 2), 4), ((3, 2, 2), 6), ((4, 2, 3), 12), ((3, 9, 2), 28), ((3, 2, 3, 2), 12), ((1, 2), 2)]
)
def test_any_two_values_of_a_pairwise_grid_stand_together_in_a_row(sizes: tuple[int, ...], most: int) -> None:
    axes = [[f"{axis}{value}" for value in range(size)] for axis, size in enumerate(sizes)]

    rows = pairwise(*axes)

    for one, other in combinations(range(len(axes)), 2):
        together = {(row[one], row[other]) for row in rows}
        assert together == {(first, second) for first in axes[one] for second in axes[other]}
    assert len(rows) == len(set(rows)) <= most
    assert rows[0] == tuple(axis[0] for axis in axes)
