"""Panels over one amount: each quantity in its own, on the band of chance, with what has a meaning marked."""

from __future__ import annotations

from typing import Any

import pytest

from ctlens import plots
from ctlens.core.errors import CtlensError
from ctlens.plots import CurvePanel

CURVE = ([0.0, 0.5, 0.9], [0.0, 0.4, 0.8], [0.0, 0.6, 1.0])
BAND = ([0.0, 0.1, 0.2], [0.1, 0.3, 0.4])
WORDS: dict[str, Any] = {"title": "?", "x_title": "heads", "caption": "read it so"}


def test_every_panel_has_its_curves_its_band_and_its_marks():
    shown = {
        "there": CurvePanel({"ranked": CURVE}, "share", ("random orders", BAND), levels=(0, 1)),
        "back": CurvePanel({"ranked": CURVE, "other": CURVE}, "rate", ("random orders", BAND)),
    }
    figure: Any = plots.curve_panels([0, 1, 4], shown, marked=(1,), subtitle="16 pairs", **WORDS)

    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert [(line.name, line.xaxis, list(line.x), list(line.y)) for line in lines] == [
        ("ranked", "x", [0, 1, 4], CURVE[0]),
        ("ranked", "x2", [0, 1, 4], CURVE[0]),
        ("other", "x2", [0, 1, 4], CURVE[0]),
    ]
    bands = [trace for trace in figure.data if trace.name == "random orders"]
    assert [list(band.y) for band in bands] == [[*BAND[1], *BAND[0][::-1]]] * 2
    assert [trace.showlegend for trace in (*lines, *bands)] == [True, False, True, True, False]
    level = {(shape.yref, shape.y0) for shape in figure.layout.shapes if shape.y0 == shape.y1}
    amount = {(shape.xref, shape.x0) for shape in figure.layout.shapes if shape.x0 == shape.x1}
    assert level == {("y", 0), ("y", 1)} and amount == {("x", 1), ("x2", 1)}
    assert [axis.title.text for axis in figure.select_yaxes()] == ["share", "rate"]
    assert figure.layout.meta["caption"] == "read it so"


@pytest.mark.parametrize(
    ("x", "shown"),
    [
        ([0, 1], {"there": CurvePanel({"ranked": CURVE}, "share")}),
        ([0, 1, 4], {"there": CurvePanel({"ranked": CURVE}, "share", ("random", ([0.0], [1.0])))}),
        ([0, 1, 4], {"there": CurvePanel({}, "share")}),
        ([0, 1, 4], {}),
        ([], {"there": CurvePanel({"ranked": CURVE}, "share")}),
    ],
)
def test_what_does_not_fit_is_refused(x, shown):
    with pytest.raises(CtlensError):
        plots.curve_panels(x, shown, **WORDS)
