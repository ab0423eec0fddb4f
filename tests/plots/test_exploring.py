"""The figures of one pair: what is in a cell, what is outlined, and arrays that do not fit their labels."""

from __future__ import annotations

import numpy as np
import pytest

from ctlens import plots
from ctlens.core.errors import CtlensError
from ctlens.plots.exploring import TOKENS_PER_ROW


def test_tokens_fill_rows_and_the_chosen_one_is_outlined():
    words = [f"w{number}" for number in range(TOKENS_PER_ROW + 2)]
    figure = plots.token_grid({"wrapped": plots.TokenRow(words, ["wrapper", *["content"] * 13], 13)}, "What?")

    cells, *legend = figure.data
    assert [row.count("") for row in cells.text] == [0, TOKENS_PER_ROW - 2] and cells.text[1][1] == "w13"
    assert cells.z[0][:2] == [0.0, 1.0] and cells.z[1][2] is None
    assert [trace.name for trace in legend] == ["wrapper", "content"]
    (outline,) = figure.layout.shapes
    assert (outline.x0, outline.x1, outline.y0, outline.y1) == (0.5, 1.5, 0.5, 1.5)


def test_a_token_with_markup_stands_as_it_is_written():
    figure = plots.token_grid({"clean": plots.TokenRow(["<b>&", "<assistant>"], ["user", "user"])}, "What?")

    assert figure.data[0].text[0][:2] == ["&lt;b&gt;&amp;", "&lt;assista…"] and not figure.layout.shapes


def test_heads_and_layers_share_a_scale_from_zero():
    grids = {"base": np.array([[0.1, 0.2], [0.3, 0.8]]), "act": np.zeros((2, 2))}
    heads = plots.head_grids(grids, "Which?", unit="mass", chosen=(1, 0))
    kinds = ["wrapper", "content"]
    layers = plots.layer_tokens(grids, ["0 a", "1 a"], "Where?", unit="distance", kinds=kinds, chosen=1)

    for figure in (heads, layers):
        assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0.0, 0.8)
        assert [trace.z[1][1] for trace in figure.data[:2]] == [0.8, 0.0]
        assert [shape.yref for shape in figure.layout.shapes] == ["y", "y2"]
    assert {shape.y1 - shape.y0 for shape in heads.layout.shapes} == {1}
    assert {shape.y1 - shape.y0 for shape in layers.layout.shapes} == {2}
    assert [trace.name for trace in layers.data[2:]] == kinds
    assert plots.head_grids({"base": np.zeros((2, 2))}, "Which?", unit="mass").layout.coloraxis.cmax == 1.0


def test_an_answer_stands_beside_its_number_and_at_zero_without_one():
    rows = [
        plots.AnswerRow("base", "clean", 2.5, "good: blue"),
        plots.AnswerRow("act", "clean", float("nan"), "x" * 40),
    ]
    figure = plots.answer_margins(rows, "Which?", subtitle="pair 0")

    first, second = figure.data
    assert (first.x, first.text, first.mode) == ((2.5,), ("  good: blue",), "markers+text")
    assert (
        (second.x, second.mode) == ((0.0,), "text")
        and second.text[0].endswith("x…")
        and "x" * 40 in second.hovertemplate
    )
    assert figure.layout.yaxis.ticktext == ("base, clean", "ACT, clean")


def test_a_patch_lies_between_its_two_runs():
    figure = plots.patched_margins({"base": (-2.0, 0.5, 3.0)}, ("wrapped", "clean"), "What?", subtitle="pair 0")

    assert [(trace.name, trace.x) for trace in figure.data[1:]] == [
        ("wrapped", (-2.0,)),
        ("patched", (0.5,)),
        ("clean", (3.0,)),
    ]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.token_grid({}, "?"), "prompts is empty"),
        (lambda: plots.head_grids({"a": np.zeros((2, 2)), "b": np.zeros((2, 3))}, "?", unit=""), "grid 'b' has shape"),
        (lambda: plots.layer_tokens({"a": np.zeros((2, 2))}, ["x"], "?", unit=""), "map 'a' has shape"),
        (
            lambda: plots.lens_lines(
                {"a": plots.LensLine([1.0], ["x"])}, plots.LensLine([1.0, 2.0], ["x"] * 2), "?", subtitle=""
            ),
            "line 'the clean prompt'",
        ),
        (lambda: plots.answer_margins([], "?", subtitle=""), "rows is empty"),
        (lambda: plots.patched_margins({}, ("a", "b"), "?", subtitle=""), "rows is empty"),
    ],
)
def test_what_does_not_fit_its_labels_is_refused(draw, message):
    with pytest.raises(CtlensError, match=message):
        draw()
