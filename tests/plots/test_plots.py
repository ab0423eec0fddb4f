"""Figures hold the arrays that they were given, in the same colours everywhere, and refuse what does not fit."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from ctlens import plots
from ctlens.core.errors import CtlensError
from ctlens.plots.theme import METHOD_STYLES

PROMPT_SIDES = ["wrapped", "clean", "benign"]
RATES = np.array([[0.8, 0.1, 0.0], [0.2, 0.1, 0.1]])
STEPS = [0, 10, 50]
LINE = (np.array([0.9, 0.5, 0.1]), np.array([0.8, 0.4, 0.0]), np.array([1.0, 0.6, 0.3]))


def behaviour(methods: list[str] | None = None) -> go.Figure:
    methods = ["base", "act"] if methods is None else methods
    return plots.behaviour(methods, PROMPT_SIDES, RATES, RATES - 0.1, RATES + 0.2, metric="bad rate", title="Does it?")


def named(figure: go.Figure, name: str) -> go.Scatter:
    return next(trace for trace in figure.data if trace.name == name)


def test_behaviour_draws_each_rate_with_its_whiskers():
    trace = named(behaviour(), "ACT")
    np.testing.assert_array_equal(trace.y, RATES[1])
    np.testing.assert_allclose(trace.error_y.arrayminus, 0.1)
    np.testing.assert_allclose(trace.error_y.array, 0.2)


def test_behaviour_keeps_the_methods_of_a_prompt_side_apart_and_near_its_label():
    figure = behaviour()
    positions = np.array([trace.x for trace in figure.data])
    assert (np.diff(positions, axis=0) > 0).all()
    assert (np.round(positions) == np.arange(3)).all()
    assert list(figure.layout.xaxis.ticktext) == PROMPT_SIDES


def test_a_curve_carries_its_values_and_its_band():
    figure = plots.dose_curves(STEPS, {"bct": LINE}, "How much training?")
    band, line = figure.data
    np.testing.assert_array_equal(line.x, STEPS)
    np.testing.assert_array_equal(line.y, LINE[0])
    np.testing.assert_array_equal(band.y, [*LINE[2], *LINE[1][::-1]])
    np.testing.assert_array_equal(band.x, [*STEPS, *STEPS[::-1]])


def test_doses_on_a_log_axis_are_the_ticks():
    figure = plots.dose_curves([16, 32, 128], {"bct": LINE}, "?", x_title="training pairs", log_x=True)
    axis = figure.layout.xaxis
    assert (axis.type, axis.title.text) == ("log", "training pairs")
    assert list(axis.tickvals) == [16, 32, 128] and list(axis.ticktext) == ["16", "32", "128"]
    np.testing.assert_array_equal(named(figure, "BCT").x, [16, 32, 128])


def test_the_caption_of_a_dose_response_says_only_what_applies():
    def caption(doses: list[int], **settings: bool) -> str:
        return plots.dose_curves(doses, {"bct": LINE}, "?", **settings).layout.meta["caption"]

    assert "before training" in caption(STEPS) and "logarithmic" not in caption(STEPS)
    pairs = caption([16, 32, 128], log_x=True)
    assert "before training" not in pairs and "logarithmic" in pairs


def test_a_dose_that_was_not_measured_leaves_a_gap_in_the_line_and_none_in_the_band():
    line = tuple(np.where([False, True, False], np.nan, array) for array in LINE)
    band, drawn = plots.dose_curves(STEPS, {"bct": line}, "?").data
    assert band.x == (0, 50, 50, 0) and np.isfinite(band.y).all()
    np.testing.assert_array_equal(drawn.y, line[0])


def test_stages_are_told_apart_in_order_from_dark_to_light():
    stages = ["before", "bad advice", "inoculated", "inoculated + ACT"]
    rates = np.full((4, 3), 0.5)
    figure = plots.behaviour(stages, PROMPT_SIDES, rates, rates, rates, metric="misalignment", title="?", stages=True)
    assert [trace.name for trace in figure.data] == stages
    colours = [trace.marker.color for trace in figure.data]
    light = [sum(int(colour[at : at + 2], 16) for at in (1, 3, 5)) for colour in colours]
    assert light == sorted(light) and len(set(light)) == 4
    assert len({trace.marker.symbol for trace in figure.data}) == 4
    assert not {look.colour for look in METHOD_STYLES.values()} & set(colours)
    beside = plots.behaviour(
        [*stages[:3], "act"], PROMPT_SIDES, rates, rates, rates, metric="m", title="?", stages=True
    )
    assert beside.data[-1].marker.color == METHOD_STYLES["act"].colour and beside.data[-1].name == "ACT"


def test_layer_curves_count_layers_from_zero_and_write_their_reference_lines():
    lines = {"as before": 0.0, "as clean": 1.0}
    figure = plots.layer_curves({"act": LINE}, "Where?", y_title="gap closed", reference_lines=lines)
    np.testing.assert_array_equal(named(figure, "ACT").x, [0, 1, 2])
    assert [shape.y0 for shape in figure.layout.shapes] == [0, 1]
    assert [note.text for note in figure.layout.annotations] == list(lines)


def test_a_method_has_one_colour_in_every_figure():
    figures = [
        behaviour(),
        plots.dose_curves(STEPS, {"act": LINE}, "?"),
        plots.layer_curves({"act": LINE}, "?", y_title="gap"),
    ]
    assert {named(figure, "ACT").marker.color for figure in figures} == {METHOD_STYLES["act"].colour}
    assert named(plots.history(STEPS, {"act": LINE[0]}, "?"), "ACT").line.color == METHOD_STYLES["act"].colour


def test_methods_differ_in_colour_and_in_marker():
    assert len({look.colour for look in METHOD_STYLES.values()}) == len(METHOD_STYLES)
    assert len({look.symbol for look in METHOD_STYLES.values()}) == len(METHOD_STYLES)


def test_controls_and_unknown_methods_are_drawn_in_grey_always_the_same():
    for name in ("base", "retention", "my_loss"):
        red = int(plots.style(name).colour[1:3], 16)
        green = int(plots.style(name).colour[3:5], 16)
        blue = int(plots.style(name).colour[5:7], 16)
        assert max(red, green, blue) - min(red, green, blue) <= 20
    assert plots.style("my_loss") == plots.style("my_loss")


def test_attention_heads_centres_the_difference_and_shares_the_scale_of_the_two_maps():
    before, after = np.array([[0.5, 0.1], [0.2, 0.9]]), np.array([[0.1, 0.2], [0.2, 0.3]])
    figure = plots.attention_heads(before, after, "Which heads?")
    np.testing.assert_allclose(figure.data[2].z, after - before)
    assert figure.data[0].coloraxis == figure.data[1].coloraxis == "coloraxis"
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 0.9)
    assert figure.layout.coloraxis2.cmax == pytest.approx(0.6)
    assert figure.layout.coloraxis2.cmin == -figure.layout.coloraxis2.cmax
    assert figure.data[0].text[1][0] == "L1H0"


def test_heads_that_did_not_change_still_get_a_centred_scale():
    figure = plots.attention_heads(np.zeros((2, 3)), np.zeros((2, 3)), "Which heads?")
    assert figure.layout.coloraxis2.cmin == -figure.layout.coloraxis2.cmax < 0


def test_a_change_of_rounding_does_not_fill_the_scale_of_the_changes():
    figure = plots.attention_heads(np.full((2, 3), 0.5), np.full((2, 3), 0.5 + 1e-6), "Which heads?")
    assert figure.layout.coloraxis2.cmax == pytest.approx(0.01, rel=1e-4)  # two percent of 0.5


def test_losses_that_are_rounding_do_not_fill_their_axis():
    noise = plots.history(STEPS, {"act": [1e-7, -1e-7, 2e-7]}, "?").layout.yaxis
    assert noise.type != "log" and noise.autorangeoptions.include == (0, 1e-3)


def test_heads_are_named_for_their_effect_or_their_attention_and_models_do_not_overlap():
    attention = np.array([0.1, 0.2, 0.3, 0.9, 0.8, 0.7])
    effect = np.array([5.0, 4.0, -3.0, 0.0, 0.1, 0.2])
    points = {name: (attention, effect, np.zeros(6)) for name in ("base", "attct")}
    figure = plots.knockout_heads(points, [f"H{head}" for head in range(6)], "?", y_title="change")
    texts = [trace for trace in figure.data if trace.text]
    assert [list(trace.text) for trace in texts] == [["H0", "H1", "H2", "H3", "H4", ""]] * 2
    assert [trace.textposition for trace in texts] == ["top center", "bottom center"]


def test_history_is_logarithmic_only_when_every_loss_is_positive():
    assert plots.history(STEPS, {"act": [1, 0.1, 0.01]}, "?").layout.yaxis.type == "log"
    assert plots.history(STEPS, {"act": [1, 0.1, 0.0]}, "?").layout.yaxis.type != "log"


def test_progress_reaches_to_the_end_from_the_start_and_keeps_gaps_and_looks():
    empty = plots.progress({}, {"bad": ([], [])}, 50, "?")
    losses = {"act": [4.0, 2.0, 1.0], "retention": [np.nan, 0.5, 0.25]}
    figure = plots.progress(losses, {"bad": ([0, 2], [0.75, 0.5])}, 50, "?")

    for shown in (empty, figure):
        assert shown.layout.xaxis.range == shown.layout.xaxis2.range == (0, 50)
    assert figure.layout.yaxis.type == "log" and figure.layout.yaxis2.type != "log"
    np.testing.assert_array_equal(named(figure, "ACT").x, [1, 2, 3])
    np.testing.assert_array_equal(named(figure, "retention only").y, losses["retention"])
    assert (named(figure, "bad").x, named(figure, "bad").y, named(figure, "bad").xaxis) == ((0, 2), (0.75, 0.5), "x2")
    assert "xaxis2" not in plots.progress(losses, {}, 50, "?").to_plotly_json()["layout"]


def test_hook_history_keeps_every_hook_and_lists_the_ends_of_a_deep_model():
    figure = plots.hook_history(STEPS, {f"blocks.{layer}.hook_resid_post": LINE[0] for layer in range(12)}, "?")
    assert len(figure.data) == len({trace.line.color for trace in figure.data}) == 12
    assert [trace.name for trace in figure.data if trace.showlegend] == [
        "blocks.0.hook_resid_post",
        "blocks.11.hook_resid_post",
    ]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: behaviour(["act"]),
        lambda: plots.behaviour(
            [], PROMPT_SIDES, np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 3)), metric="m", title="?"
        ),
        lambda: plots.dose_curves([0, 1], {"act": LINE}, "?"),
        lambda: plots.dose_curves(STEPS, {}, "?"),
        lambda: plots.dose_curves(STEPS, {"act": LINE}, "?", log_x=True),
        lambda: plots.dose_curves([], {"act": LINE}, "?", log_x=True),
        lambda: plots.layer_curves({"act": LINE, "bct": tuple(array[:2] for array in LINE)}, "?", y_title="gap"),
        lambda: plots.layer_curves({}, "?", y_title="gap"),
        lambda: plots.attention_heads(np.zeros((2, 2)), np.zeros((2, 3)), "?"),
        lambda: plots.attention_heads(np.zeros(4), np.zeros(4), "?"),
        lambda: plots.history([], {"act": []}, "?"),
        lambda: plots.progress({"act": [1.0], "bct": [1.0, 2.0]}, {}, 9, "?"),
        lambda: plots.progress({}, {"bad": ([0, 10], [0.5])}, 9, "?"),
        lambda: plots.hook_history(STEPS, {"blocks.0.hook_z": [1.0]}, "?"),
    ],
)
def test_shapes_that_do_not_fit_and_empty_input_are_refused(draw):
    with pytest.raises(CtlensError):
        draw()


def test_the_title_wraps_and_names_the_question_for_the_report():
    question = "Does the model still give the answer that the user hinted at, after it was trained on clean targets?"
    figure = plots.finish(go.Figure(), question, "64 prompts")
    assert figure.layout.title.text.count("<br>") == 2
    assert figure.layout.meta["title"] == question


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_drawing_changes_no_global_setting():
    before = pio.templates.default, pio.renderers.default
    behaviour()
    assert (pio.templates.default, pio.renderers.default) == before
