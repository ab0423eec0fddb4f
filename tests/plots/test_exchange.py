"""Panels of what one model brings to another: one scale, the whole effect marked, bars side by side."""

from __future__ import annotations

import numpy as np
import pytest

from ctlens import plots
from ctlens.core.errors import CtlensError

CURVE = (np.array([0.2, 1.3]), np.array([0.1, 1.2]), np.array([0.4, 1.5]))
PANELS = {"there": {"act": CURVE, "bct": CURVE}, "back": {"act": CURVE, "bct": CURVE}}


def test_the_whole_effect_is_marked_in_every_panel_on_one_scale():
    for figure in (
        plots.exchange_curves([2, 5], PANELS, "?", y_title="share"),
        plots.graft_bars([["L0", "QK"]], PANELS, "?", y_title="share"),
    ):
        lines = sorted({(shape.yref.split()[0], shape.y0) for shape in figure.layout.shapes if shape.y0 == shape.y1})
        assert lines == [("y", 0), ("y", 1), ("y2", 0), ("y2", 1)]
        assert figure.layout.yaxis2.matches == "y" and figure.layout.yaxis.title.text == "share"


def test_shares_that_add_up_have_no_line_at_the_whole_effect():
    figure = plots.exchange_curves([2, 5], PANELS, "?", y_title="share", adds_up=True)
    assert {shape.y0 for shape in figure.layout.shapes} == {0}
    assert "adds up" in figure.layout.meta["caption"]


def test_curves_stand_at_their_layers():
    figure = plots.exchange_curves([2, 5], PANELS, "?", y_title="share")
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert all(list(line.x) == [2, 5] and list(line.y) == [0.2, 1.3] for line in lines)
    assert [line.showlegend for line in lines] == [True, True, False, False]


def test_bars_of_one_part_stand_side_by_side_with_their_intervals():
    figure = plots.graft_bars([["L0"], [], ["QK"]], PANELS, "?", y_title="share")
    first, second = figure.data[:2]
    np.testing.assert_allclose(np.add(first.x, first.width / 0.92), second.x)
    np.testing.assert_allclose((np.array(first.x) + np.array(second.x)) / 2, [0, 1])
    np.testing.assert_allclose(first.error_y.array, [0.2, 0.2])
    np.testing.assert_allclose(first.error_y.arrayminus, [0.1, 0.1])
    assert figure.layout.xaxis.ticktext == ("L0", "QK")
    assert [shape.x0 for shape in figure.layout.shapes if shape.x0 == shape.x1] == [0.5, 0.5]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.exchange_curves([2], PANELS, "?", y_title="share"),
        lambda: plots.exchange_curves([], PANELS, "?", y_title="share"),
        lambda: plots.exchange_curves([2, 5], {}, "?", y_title="share"),
        lambda: plots.graft_bars([["L0"]], PANELS, "?", y_title="share"),
        lambda: plots.graft_bars([[]], PANELS, "?", y_title="share"),
        lambda: plots.graft_bars([["L0", "QK"]], {}, "?", y_title="share"),
    ],
)
def test_what_does_not_fit_its_labels_is_refused(draw):
    with pytest.raises(CtlensError):
        draw()
