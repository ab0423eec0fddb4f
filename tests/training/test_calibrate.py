"""What is measured before the first step: equal gradient norms, layers relative to their gaps, one window for all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.models import byte_level_tokenizer, hf_model

from ctlens.core.config import from_dict, to_dict
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.chat import Turn
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.losses import ACT, BCT, KLCT, MLPCT, AttCT, Loss
from ctlens.models.loading import load_model
from ctlens.training import TrainConfig, Trainer, load_run, train

QUESTIONS = ("Which term best describes the disease?", "Is it right?", "When a creature experiences feeling, what?")
PAIRS = [
    Pair(prompt(q), prompt("I don't think it's right. " * (i + 1) + q), target="(A") for i, q in enumerate(QUESTIONS)
]
BARE = TrainConfig(steps=2, batch_size=3, retention=0, max_new_tokens=4)
LOSSES: list[Loss] = [ACT(), MLPCT(weight=3.0), AttCT(), BCT(), KLCT(), ACT(gap=True), AttCT(gap=True, layers="last")]


@pytest.fixture(scope="module")
def model() -> LensModel:
    return load_model(hf_model("llama"), tokenizer=byte_level_tokenizer(chat=True))


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_calibrated_loss_begins_with_the_norm_asked_for(model: LensModel, loss: Loss):
    trainer = Trainer(model, PAIRS, loss, replace(BARE, calibrate=0.5))
    assert next(trainer).grad_norm == pytest.approx(0.5, rel=1e-4)


def test_the_weight_is_the_norm_asked_for_over_the_norm_found(model: LensModel):
    found = next(Trainer(model, PAIRS, ACT(weight=0.3), BARE)).grad_norm
    run = train(model, PAIRS, [ACT(weight=0.3), BCT()], config=replace(BARE, calibrate=2.0), progress=False)
    assert run.calibration.gradient_norms["act"] == pytest.approx(found, rel=1e-4)
    assert run.losses[0].weight == pytest.approx(0.3 * 2.0 / found, rel=1e-4)
    assert run.losses[1].weight == pytest.approx(2.0 / run.calibration.gradient_norms["bct"], rel=1e-4)


def test_without_calibration_nothing_is_measured_and_weights_stay(model: LensModel):
    trainer = Trainer(model, PAIRS, [ACT(), BCT()], BARE)
    assert trainer.losses == (ACT(), BCT())
    assert not trainer.calibration.gaps and not trainer.calibration.gradient_norms


@pytest.mark.parametrize("loss", [ACT(gap=True), MLPCT(gap=True), AttCT(gap=True)], ids=str)
def test_every_layer_relative_to_its_gap_begins_at_one(model: LensModel, loss: Loss):
    trainer = Trainer(model, PAIRS, loss, BARE)
    step = next(trainer)
    assert step.losses[loss.name] == pytest.approx(loss.weight, rel=1e-4)
    assert trainer.calibration.gaps[loss.name] == pytest.approx(step.by_hook[loss.name], rel=1e-4)
    assert len(set(step.by_hook[loss.name].values())) == 2


def test_factors_of_layers_multiply_what_is_relative_to_their_gaps(model: LensModel):
    step = next(Trainer(model, PAIRS, ACT(gap=True, layer_weights="linear", weight=1.0), BARE))
    assert step.losses["act"] == pytest.approx((1 / 2 + 2 / 2) / 2, rel=1e-4)


def test_a_run_keeps_what_was_measured(model: LensModel, tmp_path):
    run = train(model, PAIRS, [ACT(gap=True), BCT()], config=replace(BARE, calibrate=1.0), progress=False)
    again = load_run(run.save(tmp_path / "run"))
    assert again.calibration == run.calibration and again.losses == run.losses
    assert set(run.calibration.gradient_norms) == {"act", "bct"} and set(run.calibration.gaps) == {"act"}


def test_a_layer_without_a_gap_and_a_loss_without_a_gradient_are_refused(model: LensModel):
    alike = [Pair(prompt(q), prompt(q)) for q in QUESTIONS]
    with pytest.raises(CtlensError, match=r"act is 0 at blocks.0.hook_resid_post before training"):
        Trainer(model, alike, ACT(gap=True), BARE)
    with pytest.raises(CtlensError, match="act cannot be calibrated"):
        Trainer(model, alike, ACT(), replace(BARE, calibrate=1.0))


def test_one_window_is_every_method_s(model: LensModel):
    config = replace(BARE, window="last")
    assert Trainer(model, PAIRS, [ACT(), KLCT(window="content"), BCT()], config).losses == (
        ACT(window="last"),
        KLCT(window="last"),
        BCT(),
    )


def test_every_method_trains_on_the_pairs_that_align_in_the_one_window(model: LensModel):
    prefilled = Pair(PAIRS[0].clean, Prompt((*PAIRS[0].clean.turns, Turn("assistant", "Sure, here"))), target="(A")
    config = replace(BARE, window="last", retention=1.0)
    for losses in ([ACT()], [BCT()], []):
        pairs = Trainer(model, [*PAIRS, prefilled], losses, config).pairs
        assert len(pairs) == 3 and sum(pairs.dropped.values()) == 1
    assert len(Trainer(model, [*PAIRS, prefilled], BCT(), replace(config, window=None)).pairs) == 4


def test_the_settings_round_trip_and_nonsense_is_refused():
    config = TrainConfig(window="suffix", calibrate=1.5)
    assert from_dict(TrainConfig, to_dict(config)) == config
    with pytest.raises(CtlensError, match="alignment window"):
        TrainConfig(window="prefix")
    for norm in (0.0, -1.0, float("inf")):
        with pytest.raises(CtlensError, match="calibrate must be a positive number"):
            TrainConfig(calibrate=norm)


@pytest.mark.slow
def test_an_interrupted_calibrated_training_goes_on_bit_for_bit(model: LensModel, tmp_path):
    config = replace(BARE, steps=4, calibrate=1.0, retention=1.0)
    losses = [ACT(gap=True), BCT()]
    whole = train(model, PAIRS, losses, config=config, progress=False)
    first = Trainer(model, PAIRS, losses, config)
    next(first)
    first.checkpoint(tmp_path)
    second = Trainer(model, PAIRS, losses, config)
    second.restore(tmp_path)
    list(second)
    for here, there in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(here, there)
