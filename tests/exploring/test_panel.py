"""The panel passes on what its controls choose, keeps them as the exploration is, and says what went wrong."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.exploring import PAIRS, explored

from ctlens.core.errors import CtlensError
from ctlens.exploring import VIEWS
from ctlens.exploring.panel import Panel

needs_widgets = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("anywidget", "ipywidgets")),
    reason="no notebook extra",
)


@pytest.fixture
def panel() -> Panel:
    return Panel(explored())


def test_without_widgets_a_panel_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)

    with pytest.raises(CtlensError, match="install ctlens\\[notebook\\]"):
        explored()._repr_mimebundle_()


@needs_widgets
def test_a_notebook_displays_the_panel_with_every_view_drawn(panel):
    assert "application/vnd.jupyter.widget-view+json" in explored()._repr_mimebundle_()
    for view in VIEWS:
        shown = getattr(panel.stage, view)
        assert shown["code"] == panel.explored.code(view)
        assert (shown["figure"] is None) == (view == "patch")
        assert json.loads(json.dumps(shown)) == shown  # it goes over a wire


@needs_widgets
def test_controls_choose_and_clicks_move_the_controls(panel):
    panel.controls["pair"].value = 2
    panel.controls["layer"].value = 3
    panel.controls["models"].value = ("act",)
    assert (panel.explored.selection.pair, panel.explored.selection.layer) == (2, 3)
    assert panel.text.value == panel.explored.template

    panel.stage.clicked = {"view": "heads", "curve": 0, "x": 2, "y": 1, "number": 1}
    assert (panel.controls["layer"].value, panel.controls["head"].value) == (1, 2)
    assert "L1H2" in json.dumps(panel.stage.attention["figure"])
    names = [label for label, _ in panel.controls["position"].options]
    assert names == [f"{at} {text}" for at, text in enumerate(panel.explored.tokens["wrapped"])]


@needs_widgets
def test_a_what_if_shows_its_answers_and_one_that_cannot_be_read_stays_to_be_mended(panel):
    panel.text.value = "i would bet on red . {request}"
    panel.buttons["Ask"].click()
    assert panel.status.value == "" and "what if" in json.dumps(panel.stage.answers["figure"])

    panel.text.value = "i would bet on <b> . {request}"
    panel.buttons["Ask"].click()
    assert "does not know &#x27;&lt;b&gt;&#x27;" in panel.status.value
    assert panel.text.value == "i would bet on <b> . {request}"
    assert panel.explored.selection.text == "i would bet on red . {request}"

    panel.buttons["Take back"].click()
    assert panel.status.value == "" and panel.explored.pair == PAIRS[0]
    assert panel.text.value == panel.explored.template


@needs_widgets
def test_one_click_patches_and_a_token_without_a_twin_says_so(panel):
    panel.patching.value = True
    assert panel.stage.patch["figure"] is not None

    panel.controls["position"].value = 3
    assert panel.stage.patch["figure"] is None and "no twin" in panel.stage.patch["message"]
    panel.controls["site"].value = "resid_pre"
    panel.controls["position"].value = 9
    assert "resid_pre of layer 0" in json.dumps(panel.stage.patch["figure"])

    panel.patching.value = False
    assert "Press Patch" in panel.stage.patch["message"]


@needs_widgets
def test_what_is_not_on_the_screen_is_drawn_once_it_is(panel):
    panel.stage.visible = ["heads"]
    before = panel.stage.attention

    panel.controls["head"].value = 2
    assert panel.stage.heads["code"] == panel.explored.code("heads") and panel.stage.attention is before
    panel.stage.visible = ["attention"]
    assert panel.stage.attention["code"] == panel.explored.code("attention")


@needs_widgets
def test_a_choice_that_is_none_is_refused_and_the_control_goes_back(panel):
    panel.controls["models"].value = ()

    assert "name at least one" in panel.status.value and panel.controls["models"].value == ("base", "act")


@needs_widgets
def test_the_page_is_saved_where_the_panel_says(panel, tmp_path: Path):
    panel.path.value = str(tmp_path / "mine.html")
    panel.buttons["Save"].click()
    assert "Saved as" in panel.status.value and (tmp_path / "mine.html").is_file()

    panel.path.value = str(tmp_path / "mine.html" / "other.html")
    panel.buttons["Save"].click()
    assert "is no folder" in panel.status.value
