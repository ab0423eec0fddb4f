"""The kit for intervals: whiskers, bands, and the grey behind them, drawn here and nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

from ctlens.core.errors import CtlensError
from ctlens.plots import intervals
from ctlens.plots.intervals import Intervals

X = np.arange(3)
NUMBERS = Intervals(np.array([0.5, np.nan, 0.7]), np.array([0.4, np.nan, 0.5]), np.array([0.6, np.nan, 1.0]))


def test_whiskers_reach_from_the_lower_to_the_upper_ends_and_slim_ones_as_far() -> None:
    full = intervals.whiskers(NUMBERS)
    slim = intervals.whiskers(NUMBERS, slim=True)

    np.testing.assert_allclose(full["array"], [0.1, np.nan, 0.3])
    np.testing.assert_allclose(full["arrayminus"], [0.1, np.nan, 0.2])
    np.testing.assert_array_equal(full["array"], slim["array"])
    assert slim["width"] < full["width"] and slim["thickness"] < full["thickness"]


def test_a_band_leaves_out_unknown_ends_and_belongs_to_the_group_of_its_curve() -> None:
    figure = go.Figure()

    intervals.draw_band(figure, X, NUMBERS.low, NUMBERS.high, colour="red", group="act")

    (band,) = figure.data
    assert band.x == (0, 2, 2, 0) and band.y == (0.6, 1.0, 0.5, 0.4)
    assert (band.legendgroup, band.showlegend, band.name) == ("act", False, None)


def test_every_null_is_one_grey_under_the_name_of_its_chance() -> None:
    figure = go.Figure()

    intervals.draw_null(figure, X, ([0, 0, 0], [1, 1, 1]), "random directions", listed=True)

    (band,) = figure.data
    assert (band.fillcolor, band.name, band.showlegend) == (intervals.NULL_COLOUR, "random directions", True)


@pytest.mark.parametrize(
    "check",
    [
        lambda: intervals.checked_intervals("it", NUMBERS[:2], 3),
        lambda: intervals.checked_intervals("it", NUMBERS, 2),
        lambda: intervals.checked_with_x("it", ([0, 1], *NUMBERS)),
        lambda: intervals.draw_null(go.Figure(), X, ([0], [1]), "null", listed=True),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(check) -> None:
    with pytest.raises(CtlensError):
        check()


def test_no_other_file_draws_intervals_of_its_own() -> None:
    kit = Path(intervals.__file__)
    drawing = ('"arrayminus":', 'fill="toself"', "add_hrect")

    found = {path.name for path in kit.parent.glob("*.py") if any(words in path.read_text() for words in drawing)}

    assert found == {kit.name}
