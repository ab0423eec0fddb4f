"""Edits hold in every pass of a training and in none afterwards, and their twins are as large."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import hf_model
from torch import Tensor

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import ACT, BCT, KLCT, Loss
from ctlens.models.hooks import run, run_capturing
from ctlens.models.loading import load_model
from ctlens.models.parameters import present_weights
from ctlens.training import TrainConfig, Trainer, TrainingEdits, train

NAME = "blocks.0.hook_resid_post"
LATER = "blocks.1.hook_resid_post"
QUESTIONS = ("Which term best describes the disease?", "Is it right?", "When a creature experiences feeling, what?")
PAIRS = [Pair(prompt(q), prompt(f"I don't think it's right. {q}"), target="(A) isolated cases") for q in QUESTIONS]
CONFIG = TrainConfig(steps=3, batch_size=3, lr=1e-3, max_new_tokens=4)
TOKENS = torch.tensor([[5, 7, 11, 13]])


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> LensModel:
    return load_model(hf_model("llama"), tokenizer=tokenizer)


def direction(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, 32, generator=torch.Generator().manual_seed(seed))


def seen(edits: TrainingEdits, model: LensModel) -> Tensor:
    with edits.on(model):
        return run_capturing(model, TOKENS, [NAME], grad=False)[1][NAME]


def test_what_is_projected_out_is_gone_and_nothing_else(model: LensModel) -> None:
    plain = run_capturing(model, TOKENS, [NAME], grad=False)[1][NAME]
    two = direction(0, 2)
    found = seen(TrainingEdits({NAME: two}), model)
    assert (found @ two.T).abs().max() < 1e-4
    basis = torch.linalg.qr(two.T).Q
    torch.testing.assert_close(found, plain - (plain @ basis) @ basis.T, atol=1e-5, rtol=1e-4)
    along = torch.stack([two[0], 3 * two[0]])  # of one line, however often it is given
    torch.testing.assert_close(seen(TrainingEdits({NAME: along}), model), seen(TrainingEdits({NAME: two[0]}), model))


def test_what_is_added_is_added_at_every_token(model: LensModel) -> None:
    plain = run_capturing(model, TOKENS, [NAME], grad=False)[1][NAME]
    vector = direction(1)
    torch.testing.assert_close(seen(TrainingEdits(add={NAME: vector}), model), plain + vector)


@pytest.mark.parametrize("memory", ["all", "layers", "blocks"])
def test_the_losses_and_retention_see_the_edited_stream(model: LensModel, memory: str) -> None:
    """With all of the stream taken out behind the last block, the wrapped prompt's state there is 0 for good."""
    everything = TrainingEdits({LATER: torch.eye(32)})
    config = replace(CONFIG, memory=memory, retention=1.0)
    done = train(model, PAIRS, ACT(layers="last"), config=config, edits=everything, progress=False)
    values = done.history.by_hook("act")[LATER]
    assert max(values) - min(values) < 1e-4 and values[0] > 0.01  # the clean side is the reference's, without edits
    for name, value in present_weights(done.model).items():
        torch.testing.assert_close(value, present_weights(model)[name])  # no gradient comes through


@pytest.mark.parametrize("loss", [BCT(), KLCT(window="content"), ACT()], ids=lambda loss: loss.name)
def test_the_first_value_is_that_of_the_model_with_the_vector_added(model: LensModel, loss: Loss) -> None:
    vector = TrainingEdits(add={NAME: 0.5 * direction(2)})
    edited = next(Trainer(model, PAIRS, loss, CONFIG, edits=vector)).losses[loss.name]
    plain = next(Trainer(model, PAIRS, loss, CONFIG)).losses[loss.name]
    assert abs(edited - plain) > 1e-3 * abs(plain)


def test_the_trained_model_has_no_edits(model: LensModel) -> None:
    trainer = Trainer(model, PAIRS, BCT(), CONFIG, edits=TrainingEdits(add={NAME: direction(2)}))
    before = run(trainer.model, TOKENS)
    torch.testing.assert_close(before, run(model, TOKENS))
    for _ in trainer:
        plain = run_capturing(trainer.model, TOKENS, [NAME], grad=False)[1][NAME]
        with TrainingEdits(add={NAME: torch.ones(32)}).on(trainer.model):
            moved = run_capturing(trainer.model, TOKENS, [NAME], grad=False)[1][NAME]
        torch.testing.assert_close(moved, plain + 1)  # one edit, and not the training's too


def test_a_twin_is_as_large_and_decided_by_its_seed() -> None:
    edits = TrainingEdits({NAME: direction(0, 3)}, {LATER: direction(1)})
    one = edits.random_twin(0)
    again = edits.random_twin(0)
    other = edits.random_twin(1)
    assert one.project_out[NAME].shape == (3, 32)
    assert one.lengths[LATER] == pytest.approx(edits.lengths[LATER])
    assert torch.equal(one.add[LATER], again.add[LATER]) and not torch.equal(one.add[LATER], other.add[LATER])
    assert torch.nn.functional.cosine_similarity(one.add[LATER], edits.add[LATER], dim=0).abs() < 0.7


def test_a_checkpoint_goes_on_under_the_same_edits_alone(model: LensModel, tmp_path: Path) -> None:
    edits = TrainingEdits(add={NAME: direction(2)})
    whole = train(model, PAIRS, BCT(), config=CONFIG, edits=edits, progress=False)
    begun = Trainer(model, PAIRS, BCT(), CONFIG, edits=edits)
    next(begun)
    begun.checkpoint(tmp_path)
    goes_on = Trainer(model, PAIRS, BCT(), CONFIG, edits=edits)
    goes_on.restore(tmp_path)
    for _ in goes_on:
        pass
    assert goes_on.history.to_dataframe().equals(whole.history.to_dataframe())
    for other in (None, edits.random_twin()):
        with pytest.raises(CtlensError, match="other edits of the stream"):
            Trainer(model, PAIRS, BCT(), CONFIG, edits=other).restore(tmp_path)
    plain = Trainer(model, PAIRS, BCT(), CONFIG)
    next(plain)
    plain.checkpoint(tmp_path / "plain")
    with pytest.raises(CtlensError, match="other edits of the stream"):
        Trainer(model, PAIRS, BCT(), CONFIG, edits=edits).restore(tmp_path / "plain")


@pytest.mark.parametrize(
    ("project_out", "add", "message"),
    [
        ({}, {}, "nothing to edit"),
        ({NAME: torch.ones(32)}, {NAME: torch.ones(32)}, "named twice"),
        ({NAME: torch.zeros(32)}, {}, "no vectors with a length"),
        ({NAME: torch.stack([torch.ones(32), torch.zeros(32)])}, {}, "no vectors with a length"),
        ({}, {NAME: torch.full((32,), torch.nan)}, "no vectors with a length"),
        ({}, {NAME: torch.ones(2, 32)}, "no vectors with a length"),
    ],
)
def test_edits_that_make_no_sense_are_refused(project_out: Any, add: Any, message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        TrainingEdits(project_out, add)


def test_edits_of_another_model_are_refused(model: LensModel) -> None:
    with pytest.raises(CtlensError, match="has 8 numbers, and the activations there 32"):
        train(model, PAIRS, ACT(), config=CONFIG, edits=TrainingEdits(add={NAME: torch.ones(8)}), progress=False)
    with pytest.raises(CtlensError, match="blocks.9"):
        elsewhere = TrainingEdits(add={"blocks.9.hook_resid_post": torch.ones(32)})
        train(model, PAIRS, ACT(), config=CONFIG, edits=elsewhere, progress=False)
