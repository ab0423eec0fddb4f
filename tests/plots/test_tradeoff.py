"""Methods as points: what each gains along x, what it costs along y."""

from __future__ import annotations

import numpy as np
import pytest

from ctlens.core.errors import CtlensError
from ctlens.plots import TradeoffPanel, style, tradeoff

GAINED = (np.array([0.7, 0.2]), np.array([0.5, 0.1]), np.array([0.8, 0.4]))
COST = (np.array([0.01, 2.0]), np.array([0.0, 2.0]), np.array([0.03, 2.0]))
PANEL = TradeoffPanel(("act", "opct"), GAINED, COST, "lost")


def test_a_point_stands_at_its_gain_and_its_cost_with_whiskers_both_ways() -> None:
    figure = tradeoff({"sycophancy": PANEL, "jailbreak": PANEL}, "How much?", x_title="fall", caption="Read it.")

    act, opct, again, _ = figure.data
    assert (act.x, act.y, opct.x, opct.y) == ((0.7,), (0.01,), (0.2,), (2.0,))
    assert act.error_x.arrayminus == pytest.approx((0.2,)) and act.error_y.array == pytest.approx((0.02,))
    assert act.marker.color == style("act").colour and act.meta["method"] == "act"
    assert (act.showlegend, again.showlegend) == (True, False)
    assert (figure.layout.xaxis2.title.text, figure.layout.yaxis2.title.text) == ("fall", "lost")


def test_a_panel_without_points_and_numbers_that_are_none_too_many_are_refused() -> None:
    empty = TradeoffPanel((), GAINED, COST, "lost")
    one = TradeoffPanel(("act",), GAINED, COST, "lost")
    for panels in ({}, {"sycophancy": empty}, {"sycophancy": one}):
        with pytest.raises(CtlensError):
            tradeoff(panels, "How much?", x_title="fall", caption="Read it.")
