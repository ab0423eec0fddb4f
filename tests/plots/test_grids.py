"""Small multiples: each panel holds its own arrays under its own name, and all panels share one scale and legend."""

from __future__ import annotations

import re

import numpy as np
import plotly.graph_objects as go
import pytest

from ctlens import plots
from ctlens.core.errors import CtlensError
from ctlens.plots.theme import METHOD_STYLES, SPLIT_STYLES

NAN = float("nan")
THREATS = ["sycophancy", "jailbreak", "conditional"]
CHANGES = np.array([[-0.9, -0.5, 0.001], [0.04, -0.12, 0.7], [-0.3, -0.1, NAN]])
CLEAR = np.abs(CHANGES) > 0.2
CURVE = ([1, 2, 3], [0.2, 0.5, 0.9], [0.1, 0.4, 0.8], [0.4, 0.6, 1.0])


def strength(threats: int = 6, **settings: tuple[float, float]) -> go.Figure:
    curves = {f"threat {number}": {"train": CURVE, "heldout": CURVE} for number in range(threats)}
    return plots.attack_strength(curves, "Does a stronger attack work more often?", **settings)


def matrix(**panels: plots.IntervalGrid) -> go.Figure:
    clear = dict.fromkeys(panels, CLEAR)
    return plots.cross_threat(THREATS, THREATS, panels, clear, "Does training on one threat change the others?")


def panel(changes: np.ndarray = CHANGES) -> plots.IntervalGrid:
    return changes, changes - 0.05, changes + 0.08


def notes(figure: go.Figure) -> list[str]:
    return [note.text for note in figure.layout.annotations]


@pytest.mark.parametrize("threats", range(1, 9))
def test_every_threat_has_a_panel_under_its_name_and_the_legend_names_every_split_once(threats):
    figure = strength(threats)
    assert notes(figure) == [f"threat {number}" for number in range(threats)]
    assert len({trace.xaxis for trace in figure.data}) == threats
    assert [trace.name for trace in figure.data if trace.showlegend] == ["train", "heldout"]


def test_a_split_is_drawn_at_its_strengths_with_its_whiskers():
    _, trace = strength(1).data
    np.testing.assert_array_equal(np.round(trace.x), CURVE[0])
    np.testing.assert_array_equal(trace.y, CURVE[1])
    np.testing.assert_allclose(trace.error_y.arrayminus, [0.1, 0.1, 0.1])
    np.testing.assert_allclose(trace.error_y.array, [0.2, 0.1, 0.1])


def test_the_splits_of_a_strength_stand_side_by_side():
    train, heldout = strength(1).data
    assert (np.array(train.x) < np.array(heldout.x)).all()


def test_strength_axes_count_whole_strengths_and_share_one_scale_of_rates():
    figure = strength(6)
    assert {axis.tickvals for axis in figure.select_xaxes()} == {(1, 2, 3)}
    assert len({axis.range for axis in figure.select_yaxes()}) == 1
    assert [axis.title.text for axis in figure.select_yaxes()] == ["bad rate", None, None] * 2
    assert [axis.title.text for axis in figure.select_xaxes()] == [None] * 3 + ["attack strength"] * 3


def test_a_split_has_one_colour_and_one_dash_that_no_method_has():
    figure = strength(2)
    assert {(trace.line.color, trace.line.dash) for trace in figure.data if trace.name == "train"} == {
        (SPLIT_STYLES["train"].colour, SPLIT_STYLES["train"].dash)
    }
    assert not {look.colour for look in SPLIT_STYLES.values()} & {look.colour for look in METHOD_STYLES.values()}
    assert (
        len({look.colour for look in SPLIT_STYLES.values()}) == len({look.dash for look in SPLIT_STYLES.values()}) == 4
    )


def test_the_band_is_shaded_in_every_panel_and_named_once():
    figure = strength(5, band=(0.6, 0.95))
    shaded = [shape for shape in figure.layout.shapes if shape.type == "rect"]
    assert [(shape.y0, shape.y1) for shape in shaded] == [(0.6, 0.95)] * 5
    assert [shape.name for shape in figure.layout.shapes if shape.showlegend] == ["target: 60% to 95%"]
    assert not strength(5).layout.shapes


def test_a_strength_that_was_not_measured_leaves_a_gap():
    missing = tuple(np.where([False, True, False], NAN, array) for array in CURVE[1:])
    figure = plots.attack_strength({"sycophancy": {"train": (CURVE[0], *missing)}}, "?")
    assert np.isnan(figure.data[0].y[1]) and not figure.data[0].connectgaps


def test_a_matrix_is_read_by_row_trained_and_column_evaluated():
    figure = matrix(act=panel())
    np.testing.assert_array_equal(figure.data[0].z, CHANGES)
    assert list(figure.layout.xaxis.ticktext) == list(figure.layout.yaxis.ticktext) == THREATS
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # the first row on top


def test_a_change_is_written_in_points_bold_where_it_is_clear_with_its_interval_on_hover():
    (drawn,) = matrix(act=panel()).data
    written = [[re.sub(r"<(?!/?b>)[^>]*>", "", text) for text in row] for row in drawn.text]
    assert written == [["<b>−90</b>", "<b>−50</b>", "0"], ["+4", "−12", "<b>+70</b>"], ["<b>−30</b>", "−10", ""]]
    name, value, low, high = drawn.customdata[0][1]
    assert (name, value) == ("trained on sycophancy, evaluated on jailbreak", -0.5)
    assert (low, high) == pytest.approx((-0.55, -0.42))


def test_own_threat_cells_are_outlined_by_name_not_by_position():
    figure = plots.cross_threat(THREATS[:2], THREATS[::-1], {"act": panel(CHANGES[:2])}, {"act": CLEAR[:2]}, "?")
    corners = [(shape.y0 + 0.5, shape.x0 + 0.5) for shape in figure.layout.shapes]
    assert corners == [(0, 2), (1, 1)]


def test_no_change_has_the_middle_colour_and_extremes_are_cut_at_a_factor_of_16():
    value = np.array([[1.0, 0.5, 100.0, 0.0, NAN]])
    figure = plots.cross_loss_matrix(["x"], ["act", "a", "b", "c", "x"], (value, 0.9 * value, 1.1 * value), "?")
    assert figure.data[0].z[0][:4] == [0.0, -1.0, 4.0, -4.0]
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-4.0, 4.0)
    texts = figure.data[0].text[0]
    assert "0.50" in texts[1] and "0.45–0.55" in texts[1] and texts[4] == ""
    assert figure.layout.coloraxis.colorbar.tickvals == (-4, -2, 0, 2, 4)
    assert [shape.x0 + 0.5 for shape in figure.layout.shapes] == [4]


STEPS = [0, 10, 20]
COURSES = {
    "act": {"act": (STEPS, [1, 0.5, 0.1], [1, 0.4, 0.05], [1, 0.6, 0.2]), "bct": (STEPS[:2], [1, 2], [1, 1.5], [1, 3])},
    "bct": {"bct": (STEPS[:2], [1, 0.25], [1, 0.0], [1, 0.5])},
}


def test_a_course_is_drawn_in_the_panel_of_the_measured_loss_in_the_colour_of_the_trained_loss():
    figure = plots.cross_loss_steps(COURSES, "?")
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert notes(figure) == ["measured by ACT", "measured by BCT"]
    act, bct = METHOD_STYLES["act"].colour, METHOD_STYLES["bct"].colour
    assert [(line.name, line.xaxis, line.line.color) for line in lines] == [
        ("ACT", "x", act),
        ("BCT", "x", bct),
        ("BCT", "x2", bct),
    ]
    assert [(list(line.x), list(line.y)) for line in lines[:2]] == [(STEPS, [1, 0.5, 0.1]), (STEPS[:2], [1, 2])]
    assert [line.name for line in lines if line.showlegend] == ["ACT", "BCT"]
    np.testing.assert_array_equal(figure.data[0].y, [1, 0.6, 0.2, 0.05, 0.4, 1])


def test_courses_share_one_logarithmic_scale_with_a_line_at_no_change():
    figure = plots.cross_loss_steps(COURSES, "?")
    assert {axis.type for axis in figure.select_yaxes()} == {"log"}
    first, *others = [axis.matches for axis in figure.select_yaxes()]
    assert first is None and set(others) == {"y"}
    assert [(shape.y0, shape.y1, shape.xref) for shape in figure.layout.shapes] == [
        (1, 1, "x domain"),
        (1, 1, "x2 domain"),
    ]
    band = next(trace for trace in figure.data if trace.xaxis == "x2" and trace.fill)
    assert list(band.y) == [1, 1]  # a logarithmic axis cannot show an end at 0


def test_ranks_are_drawn_by_layer_and_a_missing_matrix_leaves_a_gap():
    figure = plots.update_ranks({"q": {"act": [3, 2], "mine": [1, 1]}, "k": {"act": [NAN, 4]}}, "?", y_title="rank")
    assert notes(figure) == ["q", "k"]
    assert [trace.name for trace in figure.data if trace.showlegend] == ["ACT", "mine"]
    assert [list(trace.y) for trace in figure.data[:2]] == [[3, 2], [1, 1]] and np.isnan(figure.data[2].y[0])
    assert list(figure.data[2].x) == [0, 1]
    assert [axis.title.text for axis in figure.select_yaxes()] == ["rank", None]


def test_costs_are_drawn_over_every_size_with_their_limit():
    curves = {"layers": {"all": ([2, 4], [3.0, 4.0]), "mine": ([2, 4], [1.5, 1.5])}, "length": {"all": ([64], [2.0])}}
    figure = plots.costs(curves, "?", y_title="ratio", limit=1.5)
    assert [(trace.name, trace.x, trace.y) for trace in figure.data] == [
        ("all", (2, 4), (3.0, 4.0)),
        ("mine", (2, 4), (1.5, 1.5)),
        ("all", (64,), (2.0,)),
    ]
    assert [shape.y0 for shape in figure.layout.shapes] == [1.5, 1.5]
    assert figure.layout.annotations[0].text == "layers" and figure.layout.yaxis.title.text == "ratio"
    assert len({trace.line.color for trace in figure.data}) == 2


@pytest.mark.parametrize(("changes", "span"), [(CHANGES, 0.9), (CHANGES / 10, 0.2)])
def test_all_methods_share_one_scale_around_no_change_and_are_named_for_readers(changes, span):
    figure = matrix(**dict.fromkeys(METHOD_STYLES, panel(changes)))
    assert notes(figure) == [look.label for look in METHOD_STYLES.values()]
    assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-span, span)


def test_only_the_lowest_panel_of_a_column_names_its_columns():
    shown = [axis.showticklabels for axis in matrix(**dict.fromkeys(list(METHOD_STYLES)[:5], panel())).select_xaxes()]
    assert shown == [False, False, True, True, True]


def drawn_for(figure: go.Figure) -> list[tuple[str | None, str | None]]:
    """What each trace is drawn for, with the panel it stands in."""
    return [(trace.meta["method"], trace.xaxis) for trace in figure.data]


def test_a_line_and_its_band_say_which_method_they_are_drawn_for_whatever_it_is_called_in_the_legend():
    line = ([0.5, 0.5], [0.4, 0.4], [0.6, 0.6])
    curves = plots.layer_curves({"act": line, "mine": line}, "?", y_title="y")
    assert [method for method, _ in drawn_for(curves)] == ["act", "act", "mine", "mine"]
    assert drawn_for(plots.history([1, 2], {"attct": [1, 2], "base": [1, 1]}, "?")) == [("attct", None), ("base", None)]
    panels = {"act": {"act": line, "bct": line}}
    random = {"act": ([0, 0], [1, 1])}
    shifts = plots.similarity_curves([0, 1], panels, random, "?", y_title="y")
    ceiling = "ceiling: same method, other seed"
    assert [method for method, _ in drawn_for(shifts)] == ["random directions", ceiling, ceiling, "bct", "bct"]


def test_everything_in_a_panel_of_one_model_is_drawn_for_it():
    line = ([0.5, 0.5], [0.4, 0.4], [0.6, 0.6])
    ends = ([0.0, 0.0], [0.1, 0.1])
    against = plots.against_random(
        {"base": ({"direction": line}, ends), "act": ({"direction": line}, ends)}, [0, 1], "?", x_title="x", y_title="y"
    )
    assert set(drawn_for(against)) == {("base", "x"), ("act", "x2")}
    measured = dict.fromkeys(("readable", "used", "reelicited"), plots.Measurement(*line, *ends))
    looks = {"base": ["masked", "erased"], "bct": ["masked", "masked"]}
    shown = plots.evidence(dict.fromkeys(looks, measured), looks, [0, 1], "?")
    rows = {(method, axis) for method, axis in drawn_for(shown) if method in looks}
    assert rows == {("base", f"x{n or ''}") for n in (0, 2, 3)} | {("bct", f"x{n}") for n in (4, 5, 6)}
    grids = plots.component_grids({"base": CHANGES[:2], "act": CHANGES[:2]}, THREATS, "?", unit="u")
    assert drawn_for(grids) == [("base", "x"), ("act", "x2")]
    assert drawn_for(matrix(base=panel(), act=panel())) == [("base", "x"), ("act", "x2")]
    assert [axis.matches for axis in against.select_yaxes()] == [None, "y"]  # an axis that matches itself is refused
    assert [axis.matches for axis in shown.select_yaxes()] == [None, None, None, "y", "y2", "y3"]


def test_many_methods_have_slanted_names_under_their_similarity():
    def angles(count: int) -> set[float | None]:
        cells = (np.full((count, count), 0.5),) * 3
        names = [f"method {number}" for number in range(count)]
        figure = plots.similarity_matrix(names, {"last": (cells, cells, np.zeros((count, count)))}, "?")
        return {axis.tickangle for axis in figure.select_xaxes()}

    assert (angles(4), angles(12)) == ({0}, {-40})


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.attack_strength({}, "?"),
        lambda: plots.attack_strength({"sycophancy": {}}, "?"),
        lambda: plots.attack_strength({"sycophancy": {"train": ([], [], [], [])}}, "?"),
        lambda: plots.attack_strength({"sycophancy": {"train": ([1, 2], *CURVE[1:])}}, "?"),
        lambda: plots.cross_threat(THREATS, THREATS, {}, {}, "?"),
        lambda: plots.cross_threat([], THREATS, {"act": panel()}, {"act": CLEAR}, "?"),
        lambda: plots.cross_threat(THREATS, [], {"act": panel(CHANGES[:, :0])}, {"act": CLEAR[:, :0]}, "?"),
        lambda: plots.cross_threat(THREATS, THREATS, {"act": panel()}, {"act": CLEAR[:2]}, "?"),
        lambda: plots.cross_loss_matrix(["act"], ["act"], panel(), "?"),
        lambda: plots.cross_loss_matrix([], ["act"], panel(CHANGES[:0, :1]), "?"),
        lambda: plots.cross_loss_steps({}, "?"),
        lambda: plots.cross_loss_steps({"act": {}}, "?"),
        lambda: plots.cross_loss_steps({"act": {"act": ([], [], [], [])}}, "?"),
        lambda: plots.cross_loss_steps({"act": {"act": (STEPS, [1], [1], [1])}}, "?"),
        lambda: plots.costs({}, "?", y_title="ratio", limit=1),
        lambda: plots.costs({"layers": {}}, "?", y_title="ratio", limit=1),
        lambda: plots.costs({"layers": {"all": ([1, 2], [1])}}, "?", y_title="ratio", limit=1),
        lambda: plots.update_ranks({}, "?", y_title="rank"),
        lambda: plots.update_ranks({"q": {}}, "?", y_title="rank"),
        lambda: plots.update_ranks({"q": {"act": [1, 2], "bct": [1]}}, "?", y_title="rank"),
        lambda: matrix(act=panel(CHANGES[:2])),
        lambda: matrix(act=panel(CHANGES[:, :2])),
        lambda: matrix(act=(CHANGES, CHANGES[:1], CHANGES)),
    ],
)
def test_panels_that_do_not_fit_and_empty_input_are_refused(draw):
    with pytest.raises(CtlensError):
        draw()
