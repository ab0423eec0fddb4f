"""Two numbers of many things."""

from __future__ import annotations

from typing import Any

import pytest

from ctlens.core.errors import CtlensError
from ctlens.plots import scattered

TITLES: Any = {"x_title": "first", "y_title": "second", "caption": "A point is a thing."}


def test_every_thing_has_its_two_numbers_and_the_corner_is_drawn() -> None:
    figure: Any = scattered({"one": ([0.1, 0.2], [1, 2]), "other": ([3], [4])}, "Where?", **TITLES, corner=(0.5, 0.2))

    one, other = figure.data
    assert (one.x, one.y, other.x, other.y) == ((0.1, 0.2), (1, 2), (3,), (4,))
    assert one.marker.color != other.marker.color
    upright, level = figure.layout.shapes
    assert (upright.x0, upright.x1, level.y0, level.y1) == (0.5, 0.5, 0.2, 0.2)


@pytest.mark.parametrize("points_of", [{}, {"one": ([1.0, 2.0], [1.0])}, {"one": ([], [])}])
def test_what_cannot_be_drawn_is_refused(points_of: Any) -> None:
    with pytest.raises(CtlensError):
        scattered(points_of, "Where?", **TITLES)
