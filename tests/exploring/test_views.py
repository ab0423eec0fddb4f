"""Every view is drawn by the call that it shows, and the page holds what is on the screen."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.exploring import PAIRS, explored

import ctlens as ct
from ctlens.core.errors import CtlensError
from ctlens.exploring import VIEWS
from ctlens.exploring.panel import choose_by_click
from ctlens.plots.exploring import TOKENS_PER_ROW
from ctlens.plots.kinds import without_kind

CHOSEN = {
    "pair": 1,
    "models": ["act", "base"],
    "layer": 2,
    "head": 3,
    "position": 9,
    "site": "resid_mid",
    "direction": "noising",
    "text": "i would bet on red . {request}",
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("options", [{}, CHOSEN], ids=["as it opens", "chosen"])
def test_the_code_of_a_view_makes_its_figure(view, options):
    found = explored()
    names = {"ct": ct, "models": found.models, "pairs": PAIRS}
    found.select(**options)

    begin, call, *rest = found.code(view).splitlines()
    exec(begin, names)

    assert eval(call, names).to_json() == found.figure(view).to_json()
    assert (".select(" in begin) == bool(options)
    for line in rest:
        assert line.endswith("  # over all pairs") and eval(line, names)


def test_the_guides_example_runs(tmp_path, monkeypatch):
    guide = (Path(__file__).parents[2] / "docs/guide.md").read_text()
    (example,) = re.findall(r"```python\n(explored = .*?)```", guide, flags=re.DOTALL)
    models = explored().models
    monkeypatch.chdir(tmp_path)

    exec(example, {"ct": ct, "base": models["base"], "run": models["act"], "pairs": [*PAIRS, PAIRS[0]]})

    assert (tmp_path / "pair-3.html").is_file()


def test_a_figure_asks_one_question_and_says_whose_it_is():
    found = explored().select(pair=2)
    figures = {view: found.figure(view) for view in VIEWS}

    for view, figure in figures.items():
        title, *_ = figure.layout.title.text.split("<br>")
        assert title.endswith("?"), view
    assert all("pair 2" in figures[view].layout.title.text for view in VIEWS if view != "attention")
    with pytest.raises(CtlensError, match="unknown view 'head'; did you mean 'heads'"):
        found.figure("head")


def test_the_tokens_stand_in_their_cells_with_their_kinds():
    found = explored()
    clean, wrapped, *legend = found.figure("tokens").data

    words = [text for row in wrapped.text for text in row if text]
    assert len(words) == len(found.tokens["wrapped"]) and words[2:8] == ["i", "would", "bet", "on", "yellow", "."]
    kinds = [trace.name for trace in legend]
    drawn = [kinds[int(number)] for row in wrapped.z for number in row if number is not None]
    assert tuple(drawn) == found.kinds["wrapped"]
    assert kinds == ["template", "content", "assistant header", "wrapper"]
    assert clean.text[0][-1] == "" or len(found.tokens["clean"]) >= TOKENS_PER_ROW


def test_a_long_prompt_shows_the_attention_around_the_chosen_token():
    pair = ct.Pair(PAIRS[0].clean, PAIRS[0].wrapped)
    found = ct.explore(ct.load_organism(), [pair]).select(text="i would bet on red . " * 9 + "{request}")
    length = len(found.tokens["wrapped"])

    last = found.figure("attention").layout.yaxis2.ticktext
    early = found.select(position=5).figure("attention").layout

    assert length > 50 and last[-1].startswith(f"{length - 1} ")
    assert without_kind(early.yaxis.ticktext[0]) == "0 &lt;bos&gt;"


def test_a_click_chooses_what_was_clicked():
    found = explored()
    choose_by_click(found, "heads", 1, 2.0, 3.0)
    assert (found.selection.layer, found.selection.head) == (3, 2)
    choose_by_click(found, "tokens", 1, 1, 1)
    assert found.selection.position == TOKENS_PER_ROW + 1
    choose_by_click(found, "tokens", 0, 3, 0)  # of the clean prompt: its twin
    assert found.twins[found.selection.position] == 3
    choose_by_click(found, "gap", 0, 0, 1)
    assert (found.selection.layer, found.selection.position) == (1, list(found.twins)[0])
    choose_by_click(found, "lens", 0, 2, 0.5)
    assert found.selection.layer == 2
    before = found.selection
    choose_by_click(found, "answers", 0, 2, 0)
    assert found.selection == before
    with pytest.raises(CtlensError, match="no twin in the wrapped one"):
        choose_by_click(found, "tokens", 0, 0, 0)


def test_the_page_holds_every_view_its_code_and_why_one_is_missing(tmp_path):
    found = explored().select(layer=1, head=2, position=3)
    path = found.save(tmp_path / "page.html")

    text = path.read_text()
    views = json.loads(text.split('id="views">')[1].split("</script>")[0])
    assert set(views) == set(VIEWS)
    assert {view for view, shown in views.items() if shown["figure"] is None} == {"patch"}
    assert "no twin in the clean prompt" in views["patch"]["message"]
    assert all(shown["code"] == found.code(view) for view, shown in views.items())
    assert views["heads"]["figure"] == json.loads(found.figure("heads").to_json() or "")
    assert PAIRS[0].wrapped.turns[0].content in text and "layer 1, head 2, token 3" in text
    with pytest.raises(CtlensError, match="page.html is no folder"):
        found.save(tmp_path / "page.html" / "nowhere.html")
    with pytest.raises(CtlensError, match="saved as a page, and .*page.png is none by its name"):
        found.save(tmp_path / "page.png")
