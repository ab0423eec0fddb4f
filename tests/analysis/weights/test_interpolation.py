"""Interpolation: the ends are the two models to the last digit; between and beyond, a model put together by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import planted
from helpers.models import CHAT_MODELS, chat_model
from helpers.patching import CLOSE, logit_diff
from helpers.transplants import PAIRS, moved

from ctlens.analysis import Interpolation, Task, interpolation, probe, wrapper_present
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import encode
from ctlens.data.pairs import prompt
from ctlens.models.lora import LoRA, add_adapters, has_adapters, merge_adapters
from ctlens.models.parameters import GROUPS, copy_model, fingerprint, present_parameters
from ctlens.threats import ask

READ = Task(
    "the side",
    ("wrapped",) * 3 + ("clean",) * 3,
    {"pair": ("0", "1", "2") * 2},
    parts=((tuple(PAIRS), "wrapped"), (tuple(PAIRS), "clean")),
)
AMOUNTS = (-0.5, 0.0, 0.25, 1.0, 1.5)
TRUE = planted.pairs()


@pytest.fixture(scope="module", params=CHAT_MODELS)
def models(request: pytest.FixtureRequest) -> tuple[LensModel, LensModel]:
    """A base and a trained model, apart in all their weights."""
    base = chat_model(request.param)
    return base, moved(base, GROUPS)


def line(models: tuple[LensModel, LensModel], pairs: Any = PAIRS, **options: Any) -> Interpolation:
    given = {"task": READ, "at": AMOUNTS, "max_new_tokens": 2, "progress": False}
    return interpolation(*models, pairs, **given | options)


def same_numbers(one: Interpolation, other: Interpolation, rows: Any, others: Any) -> None:
    for name in ("values", "readable", "readable_low", "readable_high", "shuffled"):
        np.testing.assert_array_equal(getattr(one, name)[rows], getattr(other, name)[others])


@pytest.mark.boundary
def test_the_ends_are_the_two_models_to_the_last_digit(models: tuple[LensModel, LensModel]):
    base, trained = models
    found = line(models)
    for end, model in ((1, base), (3, trained)):
        same_numbers(found, line((model, model), at=[0.0]), end, 0)  # no mixing there
        verdicts = [reply.verdict for reply in ask(model, [pair.wrapped for pair in PAIRS], max_new_tokens=2)]
        np.testing.assert_array_equal(found.values[end, 3], [verdict == "bad" for verdict in verdicts])
        ids = encode(PAIRS[1:2], base.tokenizer, n_ctx=256).rows[0]
        for measure, side in enumerate(("wrapped", "clean")):
            expected = logit_diff(model, getattr(ids, side).ids, [])
            assert found.values[end, measure, 1] == pytest.approx(expected, abs=1e-5)
    assert np.abs(found.values[1, :2] - found.values[3, :2]).min() > 1e-3


@pytest.mark.boundary
def test_every_model_on_the_line_is_one_put_together_by_hand(models: tuple[LensModel, LensModel]):
    base, trained = models
    found = line(models)
    theirs = present_parameters(trained)
    for row, amount in enumerate(AMOUNTS):
        made = copy_model(base)
        for name, value in present_parameters(made).items():
            value.data = ((1 - amount) * value.data.double() + amount * theirs[name].data.double()).float()
        same = line((made, made), at=[0.0])
        np.testing.assert_allclose(found.values[row, :2], same.values[0, :2], **CLOSE)
        read = probe({"made": made}, READ, positions=["last"], progress=False)
        np.testing.assert_allclose(found.readable[row], read.score[0, 0, 0])
    assert found.layers == (0, 1) and found.chance == 0.5


def test_the_models_are_left_as_they_are_and_exchanged_they_exchange_the_ends(models: tuple[LensModel, LensModel]):
    before = [fingerprint(model) for model in models]
    there = line(models, at=[0.0, 1.0])
    back = line(models[::-1], at=[0.0, 1.0])

    same_numbers(there, back, [0, 1], [1, 0])
    assert [fingerprint(model) for model in models] == before and not any(model.training for model in models)


def test_adapters_count_as_the_weights_that_they_add_up_to(models: tuple[LensModel, LensModel]):
    base = models[0]
    adapted = copy_model(base)
    for update in add_adapters(adapted, LoRA(2, target_modules=("q", "mlp_out"))):
        update.data.normal_(generator=torch.Generator().manual_seed(2))
    merged = copy_model(adapted)
    merge_adapters(merged)
    before = fingerprint(adapted)

    for there, plain in (((base, adapted), (base, merged)), ((adapted, base), (merged, base))):
        same_numbers(line(there), line(plain), slice(None), slice(None))
    assert has_adapters(adapted) and fingerprint(adapted) == before
    assert np.abs(np.diff(line((base, adapted)).values[:, 0], axis=0)).min() > 1e-4


def test_pairs_in_another_order_and_alone_give_equal_answers(models: tuple[LensModel, LensModel]):
    together = line(models)
    turned = line(models, PAIRS[::-1], batch_size=2)
    alone = line(models, PAIRS[1:2])

    np.testing.assert_allclose(turned.values[..., ::-1], together.values, **CLOSE)
    np.testing.assert_allclose(alone.values[..., 0], together.values[..., 1], **CLOSE)
    np.testing.assert_allclose(turned.readable, together.readable)


@pytest.mark.parametrize("variant", ["erased", "masked"])
def test_a_planted_direction_is_written_or_read_in_proportion(variant: str):
    base = planted.model()
    task = wrapper_present(TRUE, base.tokenizer, negatives=planted.neutral())
    at = (-0.5, 0.0, 0.51, 1.0, 1.5)  # at 0.5 some would tie
    found = interpolation(base, planted.model(variant), TRUE, at=at, task=task, max_new_tokens=1, progress=False)

    for row, amount in enumerate(at):
        left = 1 - amount  # of what writes the direction, or of what reads it
        for column, pair in enumerate(TRUE):
            cue = planted.written(pair)
            written = planted.margin(pair, left * cue)
            read = (1 - left) * planted.margin(pair, cue, read=False) + left * planted.margin(pair, cue)
            expected = written if variant == "erased" else read
            assert found.values[row, 0, column] == pytest.approx(expected, abs=1e-3)
            assert found.values[row, 1, column] == pytest.approx(planted.margin(pair, 0), abs=1e-3)
            assert found.values[row, 3, column] == (expected < 0)
    bad = found.to_dataframe().query("quantity == 'bad_rate'")["value"].tolist()
    assert bad == [1, 1, bad[2], 0, 0] and 0 < bad[2] < 1
    behind = found.readability().query("layer == 2").set_index("amount")
    assert (behind.loc[[-0.5, 0.0, 0.51, 1.5], "score"] == 1).all()  # a part of the direction is as easily read
    assert behind.loc[1.0, "score"] == pytest.approx(1 if variant == "masked" else 0.5, abs=0.15)
    assert (behind["n_prompts"] == 2 * len(TRUE)).all()


def test_benign_twins_are_asked_where_there_are(models: tuple[LensModel, LensModel]):
    base = models[0]
    twin = prompt("no. Is it?", "the", "a")
    good_alone = prompt("no. Is it?", "the")
    pairs = [replace(PAIRS[0], benign=twin), replace(PAIRS[1], benign=good_alone), PAIRS[2]]
    found = line(models, pairs, at=[0.0, 1.0])
    table = found.to_dataframe().query("prompt_side == 'benign'").groupby("quantity")["n_pairs"].unique()

    assert {name: count.tolist() for name, count in table.items()} == {"logit_diff": [1], "over_refusal": [2]}
    np.testing.assert_array_equal(np.isnan(found.values[0, [2, 4]]), [[False, True, True], [False, False, True]])
    (reply,) = ask(base, [twin], max_new_tokens=2)
    assert found.values[0, 4, 0] == (reply.verdict != "good")
    without = line(models, at=[0.0, 1.0])
    assert set(without.to_dataframe()["prompt_side"]) == {"wrapped", "clean"}
    with pytest.raises(CtlensError, match="no pair has over_refusal on the benign side"):
        without.curve("over_refusal", "benign")


def test_the_result_survives_saving_and_its_figure_holds_its_numbers(models: tuple[LensModel, LensModel], tmp_path):
    found = line(models)
    found.save(tmp_path / "line.safetensors")
    again = Interpolation.load(tmp_path / "line.safetensors")

    assert again.to_dataframe().equals(found.to_dataframe()) and again.readability().equals(found.readability())
    figure: Any = found.figure(layer=0)
    drawn = {trace.name: trace for trace in figure.data if trace.name}
    assert set(drawn) == {"wrapped", "clean", "bad, wrapped", "probe"}
    table = found.to_dataframe().query("quantity == 'logit_diff' and prompt_side == 'clean'")
    np.testing.assert_allclose(drawn["clean"].y, table["value"])
    np.testing.assert_allclose(drawn["clean"].x, AMOUNTS)
    np.testing.assert_allclose(drawn["probe"].y, found.readable[:, 0])


def test_what_does_not_fit_is_refused(models: tuple[LensModel, LensModel]):
    base, trained = models
    for at in ([], [0.0, 0.0], [1.0, 0.0], [0.0, float("nan")]):
        with pytest.raises(CtlensError, match="at is .*: give at least one number, and numbers that rise"):
            line(models, at=at)
    with pytest.raises(CtlensError, match="eval mode"):
        line((base, copy_model(trained).train()))
    with pytest.raises(CtlensError, match="the weights do not fit the model"):
        line((chat_model("made here"), chat_model("gpt2")))
    with pytest.raises(CtlensError, match="unknown layer that was read"):
        line(models, at=[0.0]).figure(layer=7)
    with pytest.raises(CtlensError, match="unknown measure 'bad_rate of clean'"):
        line(models, at=[0.0]).curve("bad_rate", "clean")
