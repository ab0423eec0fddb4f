"""Numbers with their intervals, one a row."""

from __future__ import annotations

import numpy as np
import pytest

from ctlens.plots import points

NUMBERS = {
    "act": (np.array([0.5, 0.7]), np.array([0.4, 0.5]), np.array([0.6, 0.8])),
    "mine": (np.array([0.1]), np.array([0.0]), np.array([0.3])),
}
ROWS = {"act": ["sycophancy", "jailbreak"], "mine": ["sycophancy"]}


def test_every_row_has_its_number_and_its_interval() -> None:
    figure = points(ROWS, NUMBERS, "How much?", x_title="share")

    act, mine = figure.data
    assert (act.x, act.y) == ((0.5, 0.7), (0, 1)) and (mine.x, mine.y) == ((0.1,), (2,))
    assert act.error_x.array == pytest.approx((0.1, 0.1)) and act.error_x.arrayminus == pytest.approx((0.1, 0.2))
    assert figure.layout.yaxis.ticktext == ("sycophancy", "jailbreak", "sycophancy")
    assert figure.layout.yaxis.autorange == "reversed"


def test_names_that_repeat_keep_their_rows() -> None:
    figure = points(ROWS, NUMBERS, "How much?", x_title="share")

    assert figure.layout.yaxis.tickvals == (0, 1, 2)


def test_marks_are_drawn_where_they_mean_something() -> None:
    figure = points(ROWS, NUMBERS, "How much?", x_title="share", marks={"as before": 0.0})

    assert [line.x0 for line in figure.layout.shapes] == [0.0]
    assert [note.text for note in figure.layout.annotations] == ["as before"]
