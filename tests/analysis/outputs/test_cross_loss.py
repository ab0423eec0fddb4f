"""Trained with one loss, measured by every loss: the numbers are those of training, and nothing depends on batching."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import byte_level_tokenizer, hf_model
from helpers.tiers import unit_first

from ctlens import losses as registry
from ctlens.analysis import CrossLoss, cross_loss
from ctlens.analysis.outputs import cross_loss as crossloss
from ctlens.analysis.outputs.cross_loss import CROSS_LOSS_COLUMNS
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import ACT, BCT, MEASURED, MLPCT, AttCT
from ctlens.models.hooks import run_capturing
from ctlens.models.loading import build, load_model
from ctlens.models.parameters import copy_model
from ctlens.models.weights import ModelConfig
from ctlens.training import TrainConfig, Trainer

QUESTIONS = ("Which term best describes the disease?", "Is it right?", "When a creature experiences feeling, what?")
PAIRS = [Pair(prompt(q), prompt("I don't think it's right. " * (i + 1) + q)) for i, q in enumerate(QUESTIONS)]
INSIDE = [ACT(), MLPCT(), AttCT()]


@pytest.fixture(scope="module", params=unit_first(["bridge", "hooked"]))
def model(request, tokenizer) -> LensModel:
    if request.param == "bridge":
        return load_model(hf_model("llama"), tokenizer=tokenizer)
    return build(ModelConfig(d_vocab=400, n_layers=2, n_heads=4, d_model=32, d_mlp=48, n_ctx=128), tokenizer, seed=0)


def moved(model: LensModel, seed: int = 0) -> LensModel:
    other = copy_model(model)
    draw = torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=draw)
    return other


def measure(model: LensModel, models: dict, pairs=PAIRS, losses=None, **options) -> CrossLoss:
    return cross_loss(model, models, pairs, losses, max_new_tokens=4, progress=False, **options)


@pytest.fixture(scope="module")
def result(model) -> CrossLoss:
    return measure(model, {"act": moved(model), "mlpct": moved(model, 1)})


def means(result: CrossLoss):
    table = result.to_dataframe()
    return table[table["hook_name"] == ""].set_index(["model", "loss"])


def test_the_values_are_those_of_the_training_on_the_same_batch(model) -> None:
    config = TrainConfig(steps=9, batch_size=len(PAIRS), lr=3e-3, warmup=0, max_new_tokens=4)
    trainer = Trainer(model, PAIRS, [registry.get(name) for name in MEASURED], config)
    next(trainer)
    trained = copy_model(trainer.model)

    step = next(trainer)  # its losses are those of the model before its update
    table = measure(model, {1: trained}).to_dataframe().query("model == '1'").set_index(["loss", "hook_name"])

    for loss in trainer.losses:
        for hook_name, value in step.by_hook[loss.name].items():
            assert table.loc[(loss.name, hook_name), "value"] == pytest.approx(value, rel=1e-6, abs=1e-6)
        own = table.loc[(loss.name, ""), "value"]
        assert own == pytest.approx(step.losses[loss.name] / loss.weight, rel=1e-6, abs=1e-6)
    assert step.losses["act"] > 0


@pytest.mark.parametrize("clean", ["reference", "own"])
def test_act_matches_plain_indexing_of_one_pair(model, clean) -> None:
    after = moved(model)
    result = measure(model, {"act": after}, losses=ACT(), clean=clean)

    for index, pair in enumerate(PAIRS):
        here = ids(model, pair.clean.turns[0].content)
        there = ids(model, pair.wrapped.turns[0].content)
        kept = next(n for n in range(len(here)) if here[-n - 1] != there[-n - 1])  # the longest common end
        gap = resid(after, there)[:, -kept:] - resid(after if clean == "own" else model, here)[:, -kept:]
        np.testing.assert_allclose(result.by_hook[1, :, index], gap.square().sum(-1).mean(-1).numpy(), rtol=1e-3)


def ids(model: LensModel, text: str) -> list[int]:
    return [0, *model.tokenizer(text, add_special_tokens=False).input_ids]


def resid(model: LensModel, tokens: list[int]) -> torch.Tensor:
    """`resid_post` as `[layer, pos, d]`, one prompt, TransformerLens's own cache."""
    cache = model.run_with_cache(torch.tensor([tokens]))[1]
    return torch.stack([cache[f"blocks.{layer}.hook_resid_post"][0].detach() for layer in range(2)])


def test_a_model_is_at_no_distance_from_itself_on_the_same_prompt(model) -> None:
    same = [Pair(prompt(q), prompt(q)) for q in QUESTIONS]

    for other, clean in ((model, "reference"), (moved(model), "own")):
        found = measure(model, {"x": other}, same, INSIDE, clean=clean)
        np.testing.assert_allclose(found.by_hook, 0, atol=1e-5)
    assert measure(model, {"x": moved(model)}, same, INSIDE).values[1].min() > 1e-5


def test_the_clean_side_changes_the_distances_but_not_bct(model, result) -> None:
    own = measure(model, {"act": moved(model), "mlpct": moved(model, 1)}, clean="own")

    np.testing.assert_array_equal(own.by_hook[0], result.by_hook[0])  # the reference is its own reference
    for loss in result.losses:
        here = means(own).loc[("act", loss), "value"]
        there = means(result).loc[("act", loss), "value"]
        assert (here == there) == (loss == "bct")


@pytest.mark.parametrize(("clean", "passes"), [("reference", 1 + 3), ("own", 3 + 3)])
def test_all_losses_share_one_pass_a_side_and_model(model, monkeypatch, clean, passes) -> None:
    seen = []

    def counted(*arguments, **options):
        seen.append(arguments)
        return run_capturing(*arguments, **options)

    monkeypatch.setattr(crossloss, "run_capturing", counted)
    measure(model, {"x": model, "y": model}, clean=clean)

    assert len(seen) == passes


def test_the_reference_is_at_one_and_others_relative_to_it(result) -> None:
    table = means(result)

    assert (table.loc["base", ["relative", "relative_low", "relative_high"]] == 1).all(axis=None)
    np.testing.assert_allclose(
        table.loc["act", "relative"], table.loc["act", "value"] / table.loc["base", "value"], rtol=1e-12
    )
    assert (table["ci_low"] <= table["value"]).all() and (table["value"] <= table["ci_high"]).all()
    assert (table["relative_low"] <= table["relative"]).all() and (table["relative"] <= table["relative_high"]).all()


def test_a_value_relative_to_nothing_is_not_a_number() -> None:
    zero = CrossLoss(np.zeros((2, 1, 3)), np.ones((1, 3), bool), ("base", "x"), ("act",), ("h",), "own")

    assert zero.to_dataframe()[["relative", "relative_low", "relative_high"]].isna().all(axis=None)
    assert zero.figure().data[0].text[0][0] == ""


def test_the_table_has_a_row_per_model_loss_and_hook_name(result) -> None:
    table = result.to_dataframe()

    assert tuple(table.columns) == CROSS_LOSS_COLUMNS
    assert len(table) == 3 * (3 * (1 + 2) + 2 * 2)  # three losses at two layers and their mean, two at the logits
    assert not table.duplicated(["model", "loss", "hook_name"]).any()
    assert list(table["model"].unique()) == ["base", "act", "mlpct"]
    assert result.values.shape == (3, len(MEASURED), 3)
    layer = table.query("model == 'act' and loss == 'mlpct' and hook_name == 'blocks.1.mlp.hook_post'")
    point = [*zip(result.hook_losses, result.hook_names, strict=True)].index(("mlpct", "blocks.1.mlp.hook_post"))
    assert layer["value"].item() == pytest.approx(result.by_hook[1, point].mean())


def test_batch_size_and_order_of_pairs_do_not_matter(model, result) -> None:
    models = {"act": moved(model), "mlpct": moved(model, 1)}

    small = measure(model, models, batch_size=1)
    turned = measure(model, models, PAIRS[::-1])

    np.testing.assert_allclose(small.by_hook, result.by_hook, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(turned.by_hook[..., ::-1], result.by_hook, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_pair_that_does_not_align_is_dropped_for_that_loss_alone(model, batch_size) -> None:
    odd = Pair(prompt("Is it right?"), prompt("Is it right? The best answer is: ("))  # another last token
    losses = [ACT(window="suffix"), MLPCT(window="content"), BCT()]

    found = measure(model, {"x": moved(model)}, [odd, *PAIRS], losses, batch_size=batch_size)
    without = measure(model, {"x": moved(model)}, PAIRS, losses)

    assert found.dropped == {"act": 1, "mlpct": 0, "bct": 0}
    assert np.isnan(found.values[:, 0, 0]).all() and np.isfinite(found.values[:, 1:]).all()
    assert means(found).loc["x", "n_pairs"].to_dict() == {"act": 3, "mlpct": 4, "bct": 4}
    assert means(found).loc[("x", "act"), "value"] == pytest.approx(means(without).loc[("x", "act"), "value"], rel=1e-3)
    with pytest.raises(CtlensError, match="none of the 1 pairs aligns for act"):
        measure(model, {"x": model}, [odd], losses)


def test_results_survive_saving(result, tmp_path) -> None:
    result.save(tmp_path / "cross.safetensors")
    again = CrossLoss.load(tmp_path / "cross.safetensors")

    assert again.to_dataframe().equals(result.to_dataframe())
    assert (again.models, again.losses, again.clean, again.dropped) == (
        result.models,
        result.losses,
        result.clean,
        result.dropped,
    )


def test_the_figure_holds_the_numbers_of_the_table(result) -> None:
    table = means(result)
    figure = result.figure()

    (matrix,) = figure.data
    expected = table["relative"].to_numpy().reshape(3, len(MEASURED))[1:]
    np.testing.assert_allclose([[cell[1] for cell in row] for row in matrix.customdata], expected)
    span = figure.layout.coloraxis.cmax
    np.testing.assert_allclose(np.asarray(matrix.z, dtype=float), np.clip(np.log2(expected), -span, span))
    assert figure.layout.coloraxis.cmin == -span
    assert list(figure.layout.yaxis.ticktext) == ["ACT", "MLPCT"]
    assert list(figure.layout.xaxis.ticktext) == ["ACT", "MLPCT", "AttCT", "BCT", "KLCT"]
    outlined = [(shape.y0 + 0.5, shape.x0 + 0.5) for shape in figure.layout.shapes]
    assert outlined == [(0, 0), (1, 1)]
    assert "reference's clean prompts" in figure.layout.meta["subtitle"]


@pytest.fixture(scope="module")
def courses(model) -> CrossLoss:
    models = {("act", 20): moved(model), ("bct", 5): moved(model, 1), ("act", 10): moved(model, 2)}
    return measure(model, models)


@pytest.mark.slow
def test_over_steps_every_model_is_measured_as_it_is_alone(model, courses) -> None:
    table = courses.to_dataframe()

    for key, seed in ((("act", 20), 0), (("bct", 5), 1), (("act", 10), 2)):
        alone = measure(model, {"x": moved(model, seed)}).to_dataframe().query("model == 'x'")
        here = table[(table["model"] == key[0]) & (table["step"] == key[1])]
        rest = list(CROSS_LOSS_COLUMNS[2:])
        assert here[rest].reset_index(drop=True).equals(alone[rest].reset_index(drop=True))
    assert len(table) == 4 * (3 * (1 + 2) + 2 * 2) and table["step"].tolist()[0] == 0
    assert not table.duplicated(["model", "step", "loss", "hook_name"]).any()
    assert means(measure(model, {"x": model}))["step"].isna().all()


def test_the_matrix_shows_each_label_at_its_last_step(courses) -> None:
    table = courses.to_dataframe().query("hook_name == ''").set_index(["model", "step"])["relative"]

    (matrix,) = courses.figure().data

    assert list(courses.figure().layout.yaxis.ticktext) == ["ACT", "BCT"]
    shown = [[cell[1] for cell in row] for row in matrix.customdata]
    np.testing.assert_allclose(shown, [table["act", 20], table["bct", 5]])


def test_the_courses_begin_at_one_and_hold_the_numbers_of_the_table(courses) -> None:
    table = courses.to_dataframe().query("hook_name == ''").set_index(["loss", "model", "step"])

    figure = courses.figure(over="steps")

    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert [note.text for note in figure.layout.annotations] == [
        f"measured by {name}" for name in ("ACT", "MLPCT", "AttCT", "BCT", "KLCT")
    ]
    for number, loss in enumerate(courses.losses):
        act, bct = lines[2 * number : 2 * number + 2]
        assert (act.name, list(act.x), bct.name, list(bct.x)) == ("ACT", [0, 10, 20], "BCT", [0, 5])
        np.testing.assert_allclose(act.y, [1, *(table.loc[(loss, "act", step), "relative"] for step in (10, 20))])
        ends = [table.loc[(loss, "act", step), end] for end in ("relative_high", "relative_low") for step in (10, 20)]
        band = figure.data[4 * number]
        np.testing.assert_allclose(band.y, [1, *ends[:2], *ends[:1:-1], 1])


def test_a_model_given_at_step_0_is_drawn_as_measured(model) -> None:
    found = measure(model, {("act", 0): moved(model), ("act", 3): moved(model, 1)}, losses=ACT())

    (line,) = (trace for trace in found.figure(over="steps").data if trace.mode == "lines+markers")

    assert list(line.x) == [0, 3] and line.y[0] == means(found)["relative"].iloc[1] != 1


def test_steps_survive_saving(courses, tmp_path) -> None:
    courses.save(tmp_path / "cross.safetensors")
    again = CrossLoss.load(tmp_path / "cross.safetensors")

    assert (again.models, again.steps) == (("base", "act", "bct", "act"), (0, 20, 5, 10))
    assert again.to_dataframe().equals(courses.to_dataframe())


def test_a_figure_of_what_is_not_there_is_refused(result) -> None:
    with pytest.raises(CtlensError, match="the models have no steps"):
        result.figure(over="steps")
    with pytest.raises(CtlensError, match="unknown axis 'layers'"):
        result.figure(over="layers")


def test_what_cannot_be_measured_is_refused(model) -> None:
    training = copy_model(model).train()
    other = build(ModelConfig(d_vocab=400, n_layers=1, n_heads=2, d_model=16, d_mlp=16), byte_level_tokenizer())

    for models, losses, pairs, clean, message in (
        ({}, None, PAIRS, "reference", "there are no models"),
        ({"x": training}, None, PAIRS, "reference", "eval mode"),
        ({"x": other}, None, PAIRS, "reference", "n_layers is 2 before and 1 after"),
        ({"base": model}, None, PAIRS, "reference", "a label is given twice"),
        ({("base", 3): model}, None, PAIRS, "reference", "a label is given twice"),
        ({1: model, "1": model}, None, PAIRS, "reference", "a label is given twice"),
        ({("x", -1): model}, None, PAIRS, "reference", "'x', -1. labels no model"),
        ({("x", 1): model, "y": model}, None, PAIRS, "reference", "'y' labels no model"),
        ({"x": model}, [ACT(), ACT(layers="last")], PAIRS, "reference", "a loss is given twice"),
        ({"x": model}, [], PAIRS, "reference", "nothing to measure by"),
        ({"x": model}, None, [], "reference", "there are no pairs"),
        ({"x": model}, None, PAIRS, "ours", "clean side"),
    ):
        with pytest.raises(CtlensError, match=message):
            measure(model, models, pairs, losses, clean=clean)
    with pytest.raises(CtlensError, match="eval mode"):
        measure(training, {"x": model})
