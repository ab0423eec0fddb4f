"""Patching grids: what stands where, and tokens that repeat."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest

from ctlens import plots
from ctlens.core.errors import CtlensError
from ctlens.plots.data import table_rows
from ctlens.plots.kinds import kind_colour, without_kind

CHANGES = np.array([[0.0, -2.0, np.nan], [0.5, 0.25, 1.0]])


def positions(changes, rows, tokens, kinds=()):
    return plots.patched_positions({"": plots.PatchedTokens(changes, tokens, kinds)}, rows, "?", unit="logits")


def heads(changes, layers, **options):
    return plots.patched_heads({"": changes}, layers, "?", unit="logits", **options)


def test_repeated_tokens_keep_their_columns_and_unknown_ones_are_counted_from_the_end():
    figure = positions(CHANGES, ["L0", "L1"], [" no", "", " no"])
    (trace,) = figure.data
    np.testing.assert_array_equal(np.array(trace.z, float), CHANGES)
    assert figure.layout.xaxis.tickvals == (0, 1, 2) and figure.layout.xaxis.ticktext == ("no", "-2", "no")
    assert figure.layout.yaxis.ticktext == ("L0", "L1") and figure.layout.yaxis.autorange == "reversed"
    assert trace.text[1][0] == "L1, no (-3)" and trace.hoverongaps is False


def test_colours_are_centred_on_no_change():
    for figure in (
        positions(CHANGES, ["L0", "L1"], ["a", "b", "c"]),
        heads(CHANGES, [0, 1]),
    ):
        assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-2.0, 2.0)
    still = heads(np.zeros((1, 2)), [3])
    assert (still.layout.coloraxis.cmin, still.layout.coloraxis.cmax) == (-1.0, 1.0)


def test_an_effect_and_its_null_have_one_scale_and_each_its_own_columns():
    """A null drawn on a scale of its own looks as strong as the effect."""
    effect = plots.PatchedTokens(CHANGES, ["a", "b", "c"], ["wrapper", "", "content"])
    null = plots.PatchedTokens(CHANGES[:, :2] / 100, ["x", "y"], ["content", "content"])
    figure = plots.patched_positions({"attack": effect, "twin": null}, ["L0", "L1"], "?", unit="logits")
    first, second, *legend = figure.data
    assert first.coloraxis == second.coloraxis == "coloraxis"
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-2.0, 2.0)
    np.testing.assert_array_equal(np.array(second.z, float), null.changes)
    assert [note.text for note in figure.layout.annotations] == ["attack", "twin"]
    assert [without_kind(tick) for tick in figure.layout.xaxis2.ticktext] == ["x", "y"]
    assert [trace.name for trace in legend] == ["wrapper", "content"]
    ticks = figure.layout.xaxis.ticktext
    assert [kind_colour(kind) in tick for kind, tick in zip(("wrapper", "", "content"), ticks, strict=True)] == [
        True,
        False,
        True,
    ]
    assert legend[1].marker.color == kind_colour("content")


def test_grids_of_heads_have_one_scale_too():
    figure = plots.patched_heads({"attack": CHANGES, "twin": CHANGES / 100}, [0, 1], "?", unit="logits")
    assert figure.layout.coloraxis.cmax == 2.0 and len(figure.data) == 2
    with pytest.raises(CtlensError, match="grid 'b' has shape"):
        plots.patched_heads({"a": CHANGES, "b": CHANGES[:1]}, [0, 1], "?", unit="logits")


def test_heads_are_named_by_the_layers_that_were_patched():
    figure = heads(CHANGES, [3, 7])
    assert figure.data[0].text[1][2] == "L7H2" and figure.layout.yaxis.ticktext == ("3", "7")


def test_the_mlps_stand_behind_the_heads():
    figure = heads(CHANGES, [3, 7], mlps=True)
    assert list(figure.data[0].text[1]) == ["L7H0", "L7H1", "L7 MLP"] and figure.layout.xaxis.ticktext == (
        "0",
        "1",
        "MLP",
    )


def test_many_rows_are_named_in_steps():
    rows = [f"L{layer}H{head}" for layer in range(12) for head in range(8)]
    figure = positions(np.ones((96, 1)), rows, ["a"])
    assert figure.layout.yaxis.ticktext[:2] == ("L0H0", "L0H2")


def test_first_order_changes_are_drawn_over_exact_ones_beside_the_line_where_both_are_equal():
    figure = plots.first_order([0.0, 2.0, -1.0], [0.5, 1.0, -3.0], "?", unit="logits")
    line, points = figure.data
    assert line.x == line.y == (-3.0, 2.0)
    assert points.x == (0.0, 2.0, -1.0) and points.y == (0.5, 1.0, -3.0)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: positions(CHANGES, ["L0"], ["a", "b", "c"]),
        lambda: positions(CHANGES, ["L0", "L1"], ["a"]),
        lambda: heads(CHANGES, [0]),
        lambda: plots.first_order([1.0, 2.0], [1.0], "?", unit="logits"),
        lambda: plots.first_order([], [], "?", unit="logits"),
        lambda: heads(CHANGES[:, :0], [0, 1]),
    ],
)
def test_grids_that_do_not_fit_their_labels_are_refused(draw):
    with pytest.raises(CtlensError):
        draw()


@pytest.mark.parametrize("token", ["<b>", "<br>", "<a href='x'>", "</s>", "&lt;", "<sub>&amp;"])
def test_a_token_that_looks_like_html_is_drawn_letter_by_letter(token: str) -> None:
    """Plotly reads tags and entities in every text, so the file must hold a text that it reads back as the token."""
    entry = {token: plots.PatchedTokens([[1.0, 2.0]], [token, "a"], [token, token])}
    grid = plots.patched_positions(entry | {"b": entry[token]}, ["L0"], f"{token}?", unit="logits", subtitle=token)
    entry = plots.LabelledMap([[1.0]], [token], [token])
    maps = plots.labelled_maps({token: entry}, "?", subtitle="")
    drawn = [json.loads(str(figure.to_json())) for figure in (grid, maps)]

    texts = [
        without_kind(drawn[0]["layout"]["xaxis"]["ticktext"][0]),
        drawn[0]["layout"]["annotations"][0]["text"],
        *(drawn[1]["layout"][axis]["ticktext"][0] for axis in ("xaxis", "yaxis")),
        *(drawn[1]["layout"][axis]["labelalias"]["0"] for axis in ("xaxis", "yaxis")),
        drawn[1]["layout"]["annotations"][0]["text"],
    ]
    for text in texts:
        assert "<" not in text and html.unescape(text) == token
    assert html.unescape(drawn[0]["data"][0]["text"][0][0]) == f"L0, {token} (-2)"
    assert "<" not in drawn[0]["data"][0]["text"][0][0]
    title, subtitle = drawn[0]["layout"]["title"]["text"].split("<br>")
    assert html.unescape(title) == f"{token}?" and "<" not in title
    assert html.unescape(re.sub("<span[^>]*>|</span>", "", subtitle)) == token
    assert next(table_rows(grid))["x"] == token  # the table of the numbers holds the token itself
