"""Trajectories: along a line what is linear in the weights is linear, and over steps each model is what it is alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers import planted
from helpers.models import byte_level_tokenizer, chat_model, hf_model
from helpers.tiers import loosely_typed
from helpers.transplants import PAIRS, moved

import ctlens as ct
from ctlens.analysis import Trajectory, WeightLine, interpolation, residual_shift, trajectory
from ctlens.core.clusters import Clusters, clustered_mean, clustered_rate, paired_difference
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import encode
from ctlens.data.pairs import prompt
from ctlens.models.loading import save_model
from ctlens.models.lora import add_adapters, save_adapters
from ctlens.models.parameters import copy_model, fingerprint

TRUE = planted.pairs()
AMOUNTS = (-1.0, 0.0, 0.5, 1.0, 2.0)


def track(checkpoints: Any, measure: Any = "logit_diff", pairs: Any = TRUE, **options: Any) -> Trajectory:
    return trajectory(checkpoints, pairs, measure, **{"max_new_tokens": 1, "progress": False} | options)


@pytest.fixture(scope="module")
def line() -> WeightLine:
    """From the planted model to one whose read-out no longer reads the planted direction."""
    return WeightLine(planted.model(), planted.model("masked"), at=AMOUNTS)


@pytest.fixture(scope="module")
def found(line: WeightLine) -> Trajectory:
    return track(line)


def test_a_quantity_that_is_linear_in_the_weights_is_linear_along_the_line(found: Trajectory):
    values = found.per_pair["logit_diff"]

    np.testing.assert_allclose(values, values[1] + np.outer(AMOUNTS, values[3] - values[1]), atol=1e-4)
    for column, pair in enumerate(TRUE):
        cue = planted.written(pair)
        read = planted.margin(pair, cue)
        unread = planted.margin(pair, cue, read=False)
        assert values[0, column] == pytest.approx(2 * read - unread, abs=1e-3)  # half a training reversed is whole
        assert values[4, column] == pytest.approx(2 * unread - read, abs=1e-3)  # and amplified, as much again


def test_its_interval_is_over_pairs_and_its_change_compares_each_pair_with_itself(found: Trajectory):
    values = found.per_pair["logit_diff"]
    table = found.to_dataframe()
    mean, low, high = clustered_mean(values.T, found.clusters())
    change, change_low, change_high = clustered_mean((values - values[1]).T, found.clusters())

    assert table["amount"].tolist() == list(AMOUNTS) and set(table["n_pairs"]) == {len(TRUE)}
    expected = {"value": mean, "ci_low": low, "ci_high": high, "change": change}
    for name, numbers in (expected | {"change_low": change_low, "change_high": change_high}).items():
        np.testing.assert_allclose(table[name], numbers)
    assert table["change"].iloc[1] == 0 and bool((table["ci_high"] > table["ci_low"]).all())


def test_the_line_is_the_one_of_interpolation_and_leaves_its_models_as_they_are(line: WeightLine):
    before = [fingerprint(model) for model in (line.base, line.trained)]
    both = track(line, {"rate": "bad_rate", "clean": "logit_diff_clean"})
    there = interpolation(
        line.base,
        line.trained,
        TRUE,
        at=AMOUNTS,
        max_new_tokens=1,
        progress=False,
        layers="last",
        task=ct.analysis.wrapper_present(TRUE, line.base.tokenizer, negatives=planted.neutral()),
    )

    np.testing.assert_array_equal(both.per_pair["rate"], there.values[:, 3])
    np.testing.assert_allclose(both.per_pair["clean"], there.values[:, 1], atol=1e-4)
    assert [fingerprint(model) for model in (line.base, line.trained)] == before
    rates = [clustered_rate(row == 1, both.clusters()) for row in there.values[:, 3]]
    np.testing.assert_allclose(both.value[0], [rate[0] for rate in rates])
    np.testing.assert_allclose(both.high[0], [rate[3] for rate in rates])
    table = both.to_dataframe().query("measure == 'rate'")
    lost = ((there.values[1, 3] == 1) & (there.values[3, 3] == 0)).astype(float)
    low, high = paired_difference(np.zeros(len(TRUE)), lost, both.clusters() or Clusters.alone(len(TRUE)))
    assert table[["change_low", "change_high"]].iloc[3].tolist() == [low, high] and lost.all()
    start = table[table["amount"] == 0]  # against itself, by construction
    assert start[["change", "change_low", "change_high"]].to_numpy().tolist() == [[0, 0, 0]]


def test_checkpoints_are_read_by_the_step_in_their_names(tmp_path: Path, line: WeightLine):
    half = next(WeightLine(line.base, line.trained, at=(0.5,)).models())
    for name, model in (("checkpoint-12", line.trained), ("checkpoint-3", half), ("logs", line.base)):
        save_model(model, tmp_path / name)
    inside = track(tmp_path, base=line.base)
    listed = track([tmp_path / "checkpoint-12", tmp_path / "checkpoint-3"], base=line.base)
    by_step = track({12: line.trained, 0: line.base, 3: str(tmp_path / "checkpoint-3")})

    along = track(WeightLine(line.base, line.trained, at=(0.0, 0.5, 1.0)))
    for one in (inside, listed, by_step):
        assert (one.x, one.over) == ((0.0, 3.0, 12.0), "step")
        np.testing.assert_allclose(one.per_pair["logit_diff"], along.per_pair["logit_diff"], atol=1e-4)
    assert track(tmp_path).x == (3.0, 12.0)


@pytest.mark.slow
def test_a_run_and_its_adapters_are_read_by_the_steps_of_their_history(tmp_path: Path):
    base = ct.load_organism()
    pairs = ct.threats.get("sycophancy").pairs(8)
    run = ct.train(base, pairs, "act", config=ct.TrainConfig(steps=2, trainable=ct.LoRA(2)), progress=False)

    whole = run.save(tmp_path / "whole")
    alone = run.save(tmp_path / "adapters", adapters_only=True)
    for folders in ([whole], whole, [alone], alone):
        one = track(folders, pairs=pairs, base=base)
        assert one.x == (0.0, 2.0)
        expected = track({0: base, 2: run.model}, pairs=pairs)
        np.testing.assert_allclose(one.per_pair["logit_diff"], expected.per_pair["logit_diff"], atol=1e-4)
    with pytest.raises(CtlensError, match="holds adapters alone: give the model that they belong to with base="):
        track(alone, pairs=pairs)
    # as a run keeps models on its way
    save_adapters(run.model, whole / "steps" / "1" / "adapters")
    kept = track(whole, pairs=pairs, base=base)
    assert kept.x == (0.0, 1.0, 2.0)
    np.testing.assert_allclose(kept.per_pair["logit_diff"][1], kept.per_pair["logit_diff"][2], atol=1e-4)


def test_adapters_of_peft_are_put_onto_the_base(tmp_path: Path):
    pytest.importorskip("peft", reason="peft is of the extra dev, and not needed at run time")
    hf_model("llama").save_pretrained(tmp_path / "base")
    byte_level_tokenizer().save_pretrained(tmp_path / "base")
    base = ct.load_model(tmp_path / "base")
    adapted = copy_model(base)
    for update in add_adapters(adapted, ct.LoRA(2)):
        update.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    ct.export_peft(adapted, tmp_path / "adapter-4")
    one = track([tmp_path / "adapter-4"], pairs=PAIRS, base=base)
    expected = track({0: base, 4: adapted}, pairs=PAIRS)

    assert one.x == (0.0, 4.0)
    np.testing.assert_allclose(one.per_pair["logit_diff"], expected.per_pair["logit_diff"], atol=1e-4)
    assert (np.abs(np.diff(one.per_pair["logit_diff"], axis=0)) > 1e-3).all()


def test_named_measures_are_those_of_their_analyses():
    base = chat_model("made here")
    trained = moved(base)
    twin = prompt("no. Is it?", "the", "a")
    pairs = [replace(PAIRS[0], benign=twin), *PAIRS[1:]]
    named = ("gap_closed", "kl_clean", "over_refusal")
    one = track({0: base, 5: trained}, {name: name for name in named}, pairs, base=base)

    shift = residual_shift(base, trained, pairs, progress=False)
    np.testing.assert_allclose(one.per_pair["gap_closed"], [np.zeros(3), shift.gap_closed[0].mean(-1)], atol=1e-5)
    np.testing.assert_allclose(one.per_pair["kl_clean"][0], 0, atol=1e-6)
    tokens = torch.tensor([encode(PAIRS[1:2], base.tokenizer, n_ctx=256).rows[0].clean.ids])
    with torch.no_grad():
        here = base(tokens)[0, -1].double().log_softmax(-1)
        there = trained(tokens)[0, -1].double().log_softmax(-1)
    assert one.per_pair["kl_clean"][1, 1] == pytest.approx(float((here.exp() * (here - there)).sum()), rel=1e-4)
    np.testing.assert_array_equal(np.isnan(one.per_pair["over_refusal"]), [[False, True, True]] * 2)
    assert one.to_dataframe().query("measure == 'over_refusal'")["n_pairs"].tolist() == [1, 1]


def norm(model: LensModel) -> float:
    return float(sum(weight.detach().square().sum() for weight in model.parameters()))


def test_a_function_gives_a_number_an_interval_or_a_number_per_pair(line: WeightLine):
    measures = {
        "norm": norm,
        "interval": lambda model: (1, 0.5, 2.0),
        "pairs": lambda model: np.arange(len(TRUE)),
    }
    one = track(line, measures)

    assert track(line, norm).measures == ("norm",)
    assert one.value[0].tolist() == [norm(model) for model in line.models()]
    assert np.isnan(one.low[0]).all() and one.rates == () and set(one.per_pair) == {"pairs"}
    assert np.stack([one.value[1], one.low[1], one.high[1]]).T.tolist() == [[1, 0.5, 2]] * 5
    assert one.value[2].tolist() == [(len(TRUE) - 1) / 2] * 5
    table = one.to_dataframe().set_index("measure")
    assert table.loc["norm", "n_pairs"].tolist() == [0] * 5 and table.loc["pairs", "change"].tolist() == [0] * 5
    np.testing.assert_allclose(table.loc["norm", "change"], one.value[0] - one.value[0, 1])


def test_the_result_survives_saving_and_its_figures_hold_its_numbers(found: Trajectory, line: WeightLine, tmp_path):
    found.save(tmp_path / "one.safetensors")
    again = Trajectory.load(tmp_path / "one.safetensors")
    assert again.to_dataframe().equals(found.to_dataframe())
    numbers = track(line, norm)
    numbers.save(tmp_path / "number.safetensors")
    assert Trajectory.load(tmp_path / "number.safetensors").to_dataframe().equals(numbers.to_dataframe())

    drawn: Any = found.figure()
    np.testing.assert_allclose(next(trace.y for trace in drawn.data if trace.name == "model"), found.value[0])
    beside: Any = found.compare({"again": again}, label="here")
    assert {trace.name for trace in beside.data if trace.name} == {"here", "again"}
    with pytest.raises(CtlensError, match="'other' does not compare with 'here': measure the same at the same amounts"):
        found.compare({"other": numbers}, label="here")
    with pytest.raises(CtlensError, match="unknown measure 'norm'"):
        found.curve("norm")


def test_what_does_not_fit_is_refused(tmp_path: Path, line: WeightLine):
    base = line.base
    for checkpoints, words in (
        ([], "there are no checkpoints"),
        (tmp_path, "holds no checkpoints: folders whose names end in a step"),
        (tmp_path / "none", "none is no folder"),
        ([tmp_path], "does not end in a step" if not tmp_path.name[-1].isdigit() else "."),
        ([tmp_path / "a-1", tmp_path / "b-1"], "two checkpoints are of step 1"),
        ({0: base, 1: copy_model(base).train()}, "eval mode"),
        ({0: base, 1: chat_model("made here")}, "do not compare"),
    ):
        with pytest.raises(CtlensError, match=words):
            track(checkpoints)
    for measure, words in (
        ("none", "unknown measure 'none'"),
        ({}, "name at least one measure"),
        ("over_refusal", "no pair has over_refusal"),
        (lambda model: None, "the measure '<lambda>' gave None, which is no number"),
        (lambda model: (5.0, 1.0, 2.0), "gave 5, outside of its interval from 1 to 2"),
        (lambda model: "red", "the measure '<lambda>' gave a str, which is no number"),
        (lambda model: (None, 0.0, 1.0), r"gave \(None, 0.0, 1.0\), of which not all are numbers"),
        (lambda model: (1.0, 2.0), "gave 2 numbers: give value, lower end and upper end"),
        (lambda model: np.zeros(3), r"gave shape \(3,\).*one number for each of the 36 pairs"),
    ):
        with pytest.raises(CtlensError, match=words):
            track({0: base}, measure)
    with pytest.raises(CtlensError, match="gap_closed compares with the model before training: give it with base="):
        track({0: base}, "gap_closed")
    with pytest.raises(CtlensError, match="a line has its own base"):
        track(line, base=base)
    with pytest.raises(CtlensError, match="give at least one number, and numbers that rise"):
        WeightLine(base, base, at=(1.0, 0.0))


@loosely_typed
def test_checkpoints_go_by_their_step(line: WeightLine) -> None:
    assert track(cast(Any, {np.int64(3): line.base})).x == (3,)
    with pytest.raises(CtlensError, match="go by their step, a whole number, not by 'last'"):
        track(cast(Any, {"last": line.base}))
