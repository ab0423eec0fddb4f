"""Numbers of several models, group by group."""

from __future__ import annotations

from typing import Any

import numpy as np

from ctlens import plots
from ctlens.plots.theme import METHOD_STYLES

FEW = ["here", "there"]
MANY = ["here", "there", "elsewhere", "nowhere"]


def traces(figure: plots.Figure) -> list[dict[str, Any]]:
    return figure.to_dict()["data"]


def drawn(groups: list[str], *names: str, panels: int = 4) -> plots.Figure:
    numbers = np.arange(3.0 * len(groups)).reshape(3, -1)
    return plots.agreement({f"panel {n}": (groups, dict.fromkeys(names, numbers)) for n in range(panels)}, "Do they?")


def test_the_legend_names_each_model_once_however_many_rows_of_panels() -> None:
    shown = [trace["name"] for trace in traces(drawn(FEW, "one", "other")) if trace["showlegend"]]

    assert shown == ["one", "other"]


def test_methods_look_like_methods_and_others_go_from_dark_to_light() -> None:
    methods = traces(drawn(FEW, "act", "bct", panels=1))
    others = [trace["marker"] for trace in traces(drawn(FEW, "one", "other", panels=1))]

    assert [trace["marker"]["color"] for trace in methods] == [METHOD_STYLES[name].colour for name in ("act", "bct")]
    assert len({marker["color"] for marker in others}) == len({marker["symbol"] for marker in others}) == 2


def test_the_names_of_many_groups_are_slanted_and_have_room() -> None:
    few = drawn(FEW, "one").to_dict()["layout"]
    many = drawn(MANY, "one").to_dict()["layout"]

    assert "tickangle" not in few["xaxis"] and many["xaxis"]["tickangle"] < 0
    assert many["margin"]["b"] > few["margin"]["b"] and many["height"] > few["height"]
