"""Moving targets: where they are after some steps by hand, what a loss is then held to, and what the history says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.losses import ACT, BCT, KLCT, AttCT
from ctlens.losses.base import MovingTarget, moving_target
from ctlens.models.hooks import run
from ctlens.models.lora import LoRA
from ctlens.models.parameters import copy_model
from ctlens.organism import load_organism
from ctlens.threats import get
from ctlens.training import TrainConfig, Trainer, train
from ctlens.training.moving import Follower

PAIRS = get("sycophancy").pairs(12)
CONFIG = TrainConfig(steps=6, batch_size=4, lr=1e-3, max_new_tokens=4)


@pytest.fixture(scope="module")
def model() -> LensModel:
    return load_organism()


def weights(model: LensModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}  # type: ignore[attr-defined]


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.allclose(one[name], other[name], atol=1e-7) for name in one)


def follower(trainer: Trainer) -> Follower:
    (found,) = trainer._passes.followers.values()
    return found


def test_the_mean_teacher_is_the_weighted_mean_of_all_models_so_far(model: LensModel) -> None:
    trainer = Trainer(model, PAIRS, ACT(clean="ema(0.75)"), CONFIG)
    expected = weights(model)
    for _ in range(3):
        next(trainer)
        now = weights(trainer.model)
        expected = {name: 0.75 * value + 0.25 * now[name] for name, value in expected.items()}
        found = weights(follower(trainer).model)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-7, rtol=1e-5)
    assert not same(found, now) and not same(found, weights(model))


def test_a_refreshed_target_is_the_model_of_the_last_refresh(model: LensModel) -> None:
    trainer = Trainer(model, PAIRS, ACT(clean="refresh(2)"), CONFIG)
    models = [weights(model)]
    for step in range(1, 6):
        next(trainer)
        models.append(weights(trainer.model))
        assert same(weights(follower(trainer).model), models[step // 2 * 2])
    assert not same(models[0], models[5])


@pytest.mark.parametrize("loss", [ACT(), AttCT(), KLCT()], ids=lambda loss: loss.name)
def test_at_the_two_ends_it_is_the_reference_and_the_model_itself(model: LensModel, loss: Any) -> None:
    def series(clean: str) -> list[float]:
        run = train(model, PAIRS, replace(loss, clean=clean), config=CONFIG, progress=False)
        return run.history.series(loss.name)

    assert series("ema(0.9999999)") == pytest.approx(series("reference"), rel=1e-4)
    assert series("refresh(100)") == pytest.approx(series("reference"), rel=1e-6)
    own = series("own")
    assert series("ema(0)") == pytest.approx(own, rel=1e-5) and series("refresh(1)") == pytest.approx(own, rel=1e-5)
    assert own[-1] != pytest.approx(series("reference")[-1], rel=1e-3)


def test_the_history_says_how_far_the_target_went(model: LensModel) -> None:
    trainer = Trainer(model, PAIRS, KLCT(clean="refresh(2)"), replace(CONFIG, lr=5e-3))
    rows = [trainer.pairs.rows[row] for row in range(len(trainer.pairs))]
    drifts = []
    for _ in range(5):
        target = copy_model(follower(trainer).model)
        step = next(trainer)
        drifts.append(step.tracked["tracked/drift"])
        last = trainer.history
        assert last.series("tracked/drift")[-1] == pytest.approx(drifts[-1], abs=1e-6)
    assert drifts[:2] == pytest.approx([0, 0], abs=1e-6)
    assert drifts[2] > 1e-6 and drifts[3] > 1e-6

    found = follower(trainer)
    measured = found.measured(rows)
    each = []
    bad = []
    for row in rows:
        ids = torch.tensor([row.clean.ids])
        before = run(model, ids)[0, -1].detach().log_softmax(-1)
        after = run(found.model, ids)[0, -1].detach().log_softmax(-1)
        each.append(float((before.exp() * (before - after)).sum()))
        token = {
            kind: model.tokenizer(f" {text}", add_special_tokens=False)["input_ids"][0]
            for kind, text in (("good", row.pair.clean.good), ("bad", row.pair.clean.bad))
        }
        bad.append(float(after[token["bad"]] > after[token["good"]]))
    assert float(measured["drift"]) == pytest.approx(sum(each) / len(each), rel=1e-3, abs=1e-6)
    assert float(measured["bad_targets"]) == pytest.approx(sum(bad) / len(bad))
    assert not same(weights(target), weights(model))


def test_prompts_without_two_answers_count_as_not_bad(model: LensModel) -> None:
    pairs = [replace(p, clean=replace(p.clean, good=p.clean.bad, bad=p.clean.good)) for p in PAIRS[:4]]  # all "bad"
    mixed = [*pairs, *(replace(p, clean=replace(p.clean, good=None, bad=None)) for p in PAIRS[4:8])]
    for some, share in ((pairs, 1.0), (mixed, 0.5)):
        trainer = Trainer(model, some, ACT(clean="ema(0.5)"), replace(CONFIG, batch_size=8, accumulate=4))
        assert next(trainer).tracked["tracked/bad_targets"] == pytest.approx(share)
    none = Trainer(model, mixed[4:], ACT(clean="ema(0.5)"), CONFIG)
    assert "tracked/bad_targets" not in next(none).tracked


def test_the_gate_lets_no_worse_model_through(model: LensModel) -> None:
    """The right answers count as bad, so that training towards anything else is better, and damage is not worse."""
    swapped = [replace(p, clean=replace(p.clean, good=p.clean.bad, bad=p.clean.good)) for p in PAIRS]
    damaged = copy_model(model)
    for parameter in damaged.parameters():
        parameter.data *= 0.3
    for pairs, passes in ((PAIRS, False), (swapped, True)):
        rows = Trainer(model, pairs, ACT(), CONFIG).pairs.rows
        gated = Follower(model, damaged, "refresh(1, gated)", rows)
        for mine, theirs in zip(gated.parameters, model.parameters(), strict=True):
            mine.data.copy_(theirs)
        gated.follow(1)
        assert same(weights(gated.model), weights(damaged if passes else model))


def test_with_adapters_the_target_follows_the_adapters(model: LensModel) -> None:
    config = replace(CONFIG, trainable=LoRA(2), lr=5e-3)
    trainer = Trainer(model, PAIRS, ACT(clean="ema(0.5)"), config)
    for _ in range(3):
        next(trainer)
    tokens = torch.tensor([[5, 7, 11]])
    target = run(follower(trainer).model, tokens)
    trained = run(trainer.model, tokens)
    assert not torch.allclose(target, run(model, tokens), atol=1e-5) and not torch.allclose(target, trained, atol=1e-5)
    torch.testing.assert_close(run(trainer.reference, tokens), run(model, tokens))  # which shares the weights


@pytest.mark.parametrize("clean", ["ema(0.5)", "refresh(2)", "refresh(2, gated)"])
def test_a_training_goes_on_from_a_checkpoint_with_its_target(model: LensModel, clean: str, tmp_path: Path) -> None:
    loss = ACT(clean=clean)
    whole = train(model, PAIRS, loss, config=CONFIG, progress=False).history.to_dataframe()
    begun = Trainer(model, PAIRS, loss, CONFIG)
    for _ in range(3):
        next(begun)
    begun.checkpoint(tmp_path)
    goes_on = Trainer(model, PAIRS, loss, CONFIG)
    goes_on.restore(tmp_path)
    for _ in goes_on:
        pass
    assert goes_on.history.to_dataframe().equals(whole)


def test_two_targets_are_told_apart(model: LensModel) -> None:
    losses = [ACT(clean="ema(0.5)"), KLCT(clean="refresh(2)"), BCT()]
    tracked = next(Trainer(model, PAIRS, losses, CONFIG)).tracked
    assert {name for name in tracked if "drift" in name} == {"tracked/drift ema(0.5)", "tracked/drift refresh(2)"}


@pytest.mark.parametrize(
    ("clean", "message"),
    [
        ("ema(1)", "never moves"),
        ("ema(1.5)", "never moves"),
        ("ema", "unknown clean side 'ema'"),
        ("ema(x)", "unknown clean side"),
        ("ema(0.9.9)", "unknown clean side"),
        ("refresh(0)", "never refreshed"),
        ("refresh(-1)", "unknown clean side"),
        ("refresh(2, sometimes)", "unknown clean side"),
        ("ours", "unknown clean side"),
    ],
)
def test_sides_that_make_no_sense_are_refused(clean: str, message: str) -> None:
    for kind in (ACT, KLCT):
        with pytest.raises(CtlensError, match=message):
            kind(clean=clean)


def test_a_moving_target_cannot_be_kept_on_disk(model: LensModel, tmp_path: Path) -> None:
    assert moving_target("own") is None and moving_target("ema(0.5)") == MovingTarget(alpha=0.5)
    with pytest.raises(CtlensError, match="cannot be kept on disk"):
        Trainer(model, PAIRS, ACT(clean="ema(0.9)"), CONFIG, cache_folder=tmp_path / "cache")
