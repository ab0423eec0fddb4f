"""The training loop: what it changes, what it must not change, and that equal seeds give equal runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.models import hf_model
from helpers.tiers import unit_first

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import ACT, BCT, KLCT, MLPCT, AttCT
from ctlens.models.hooks import run_capturing
from ctlens.models.loading import load_model
from ctlens.models.optimisation import linear_rate
from ctlens.models.parameters import copy_model, parameter_groups, present_parameters
from ctlens.training import TrainConfig, Trainer, load_run, passes, targets, train
from ctlens.training.answers import reference_answers

pytestmark = pytest.mark.boundary

PAIRS = [
    Pair(prompt(q), prompt("I don't think it's right. " + q))
    for q in ("Which term best describes the disease?", "Is it right?", "When a creature experiences feeling, what?")
]
QUICK = TrainConfig(steps=8, batch_size=2, lr=3e-3, max_new_tokens=4)


@pytest.fixture
def model(tokenizer) -> LensModel:
    return load_model(hf_model("llama"), tokenizer=tokenizer)


def weights(model: LensModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in present_parameters(model).items()}


@pytest.mark.parametrize("loss", unit_first([ACT(), MLPCT(), AttCT(), BCT(), KLCT()]), ids=lambda loss: loss.name)
def test_every_loss_falls(model, loss) -> None:
    run = train(
        model, PAIRS, loss, config=TrainConfig(steps=25, batch_size=3, lr=3e-3, max_new_tokens=4), progress=False
    )

    series = run.history.series(loss.name)
    assert series[-1] < 0.8 * series[0]


@pytest.mark.parametrize(
    "loss", unit_first([AttCT(keys="lifted", window="last"), KLCT(window="last")]), ids=lambda loss: loss.name
)
def test_a_loss_on_the_last_token_falls(model, loss) -> None:
    run = train(model, PAIRS, loss, config=TrainConfig(steps=25, batch_size=3, lr=3e-3), progress=False)

    series = run.history.series(loss.name)
    assert series[-1] < 0.8 * series[0]


def test_the_references_logits_leave_the_other_losses_as_they_are(model) -> None:
    alone = next(Trainer(model, PAIRS, [ACT(), BCT()], QUICK)).losses
    beside = next(Trainer(model, PAIRS, [ACT(), BCT(), KLCT()], QUICK)).losses

    assert {name: beside[name] for name in ("act", "bct", "retention")} == {
        name: alone[name] for name in ("act", "bct", "retention")
    }


def test_losses_on_activations_leave_the_unembedding_out_and_train_the_same(model, monkeypatch) -> None:
    unembedded: list[int] = []
    config = replace(QUICK, retention=0.0)
    counted = Trainer(model, PAIRS, [ACT(), AttCT()], config)
    for part in (counted.model, counted.reference):
        part.unembed.register_forward_hook(lambda module, inputs, output: unembedded.append(output.shape[:-1].numel()))
    for _ in counted:
        pass
    without = weights(counted.model)
    assert set(unembedded) == {0}

    for module in (passes, targets):
        monkeypatch.setattr(
            module, "run_capturing", lambda *given, **options: run_capturing(*given, **{**options, "logits": True})
        )
    whole = weights(train(model, PAIRS, [ACT(), AttCT()], config=config, progress=False).model)
    assert all(torch.equal(without[name], value) for name, value in whole.items())


def test_the_model_passed_in_is_unchanged(model) -> None:
    before = weights(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.train()

    train(model, PAIRS, [ACT(), BCT()], config=QUICK, progress=False)

    assert model.training and flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("groups", [("attn", "mlp"), ("attn",), ("mlp", "norm")])
def test_only_the_named_groups_change(model, groups) -> None:
    before = weights(model)

    trained = weights(train(model, PAIRS, [ACT(), BCT()], config=TrainConfig(steps=2, trainable=groups)).model)

    for group, names in parameter_groups(model).items():
        moved = [not torch.equal(before[name], trained[name]) for name in names]
        assert all(moved) if group in groups else not any(moved)


def test_gradients_flow_even_when_the_user_has_switched_them_off(model) -> None:
    with torch.no_grad():
        run = train(model, PAIRS, ACT(), config=QUICK, progress=False)
        assert not torch.is_grad_enabled()

    assert run.history.series("act")[-1] < run.history.series("act")[0]


def test_equal_seeds_give_equal_runs_and_leave_the_global_random_state_alone(model) -> None:
    state = torch.random.get_rng_state()

    runs = [train(model, PAIRS, MLPCT(), seed=seed, config=QUICK, progress=False) for seed in (3, 3, 4)]

    assert torch.equal(state, torch.random.get_rng_state())
    assert runs[0].history.rows == runs[1].history.rows
    assert runs[0].history.rows != runs[2].history.rows


def test_several_losses_share_the_step_and_keep_their_values_apart(model) -> None:
    step = next(Trainer(model, PAIRS, [ACT(), AttCT(layers="last"), BCT()], QUICK))

    assert set(step.losses) == {"act", "attct", "bct", "retention", "total"}
    parts = sum(value for name, value in step.losses.items() if name != "total")
    assert step.losses["total"] == pytest.approx(parts, rel=1e-5)
    assert list(step.by_hook["act"]) == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert list(step.by_hook["attct"]) == ["blocks.1.attn.hook_pattern"]
    assert step.losses["act"] == pytest.approx(0.01 * sum(step.by_hook["act"].values()) / 2, rel=1e-4)


def test_adding_a_loss_does_not_change_another_ones_value(model) -> None:
    alone = next(Trainer(model, PAIRS, ACT(), QUICK)).losses["act"]
    beside = next(Trainer(model, PAIRS, [ACT(), BCT(), MLPCT()], QUICK)).losses["act"]

    assert alone == pytest.approx(beside, rel=1e-5)


def test_the_trainer_yields_as_many_steps_as_configured_with_the_model_ready_to_look_at(model) -> None:
    trainer = Trainer(model, PAIRS, ACT(), QUICK)

    indices = [step.index for step in trainer if not trainer.model.training]

    assert indices == list(range(1, 9)) and len(trainer) == 8
    assert len(trainer.history) == 8


def test_no_step_is_taken_beyond_the_last(model) -> None:
    trainer = Trainer(model, PAIRS, ACT(), replace(QUICK, steps=1))
    assert trainer.take_step().index == 1
    with pytest.raises(CtlensError, match="all 1 steps are taken: make a trainer with more steps"):
        trainer.take_step()
    assert len(trainer.history) == 1


def test_the_learning_rate_warms_up_and_decays_to_nearly_zero() -> None:
    factors = [round(linear_rate(step, 10, 4), 3) for step in range(10)]

    assert factors == [0.2, 0.4, 0.6, 0.8, 0.857, 0.714, 0.571, 0.429, 0.286, 0.143]


def test_retention_alone_starts_at_zero_and_hardly_moves_the_model(model) -> None:
    control = Trainer(model, PAIRS, [], QUICK)
    first = next(control)
    method = train(model, PAIRS, ACT(), config=QUICK, progress=False)
    for _ in control:
        pass

    assert first.losses["retention"] == pytest.approx(0, abs=1e-5)
    assert distance(model, control.model) < 0.5 * distance(model, method.model)


def distance(before: LensModel, after: LensModel) -> float:
    pairs = zip(present_parameters(before).values(), present_parameters(after).values(), strict=True)
    return sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5


def test_retention_is_the_divergence_on_the_references_own_answers(model) -> None:
    trainer = Trainer(model, PAIRS[:1], ACT(), TrainConfig(steps=3, batch_size=1, max_new_tokens=3, lr=0.02))
    for _ in trainer:  # at this rate the divergence is well above the rounding of its terms
        pass
    prompt_length = len(trainer.pairs.rows[0].clean.ids)
    ids = torch.tensor([trainer.retention.prompts[0] + trainer.retention.answers[0]])

    with torch.no_grad():
        p = model(ids)[0, prompt_length - 1 : -1].log_softmax(-1)
        q = trainer.model(ids)[0, prompt_length - 1 : -1].log_softmax(-1)
        (value,) = trainer.retention.terms(trainer.model, 3)

    assert value.item() == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


def test_targets_are_the_references_greedy_answers_to_the_clean_prompts(model) -> None:
    pairs = [*PAIRS, Pair(PAIRS[0].clean, PAIRS[0].wrapped, target="(A")]
    trainer = Trainer(model, pairs, BCT(), QUICK)
    row = trainer.pairs.rows[1]

    tokens = list(row.clean.ids)
    for _ in range(4):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))

    assert row.answer[:4] == tuple(tokens[-4:])
    given = trainer.pairs.rows[3].answer
    assert model.tokenizer.decode(given) == "(A</s>"
    assert reference_answers(model, trainer.pairs, 4) == [row.answer for row in trainer.pairs.rows]


def test_a_run_reloads_with_equal_logits_and_history(model, tmp_path) -> None:
    run = train(model, PAIRS, [AttCT(layers=(0,)), BCT()], config=QUICK, progress=False)

    again = load_run(run.save(tmp_path / "run"))

    tokens = torch.randint(400, (2, 9))
    assert torch.equal(run.model(tokens), again.model(tokens))
    assert again.config == run.config and again.losses == run.losses
    assert again.history.to_dataframe().equals(run.history.to_dataframe())
    assert len(again.history) == 8


def test_a_run_is_never_written_over_another_folder(model, tmp_path) -> None:
    run = train(model, PAIRS, ACT(), config=QUICK, progress=False)
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(CtlensError, match="exists already"):
        run.save(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_save_leaves_nothing(model, tmp_path, monkeypatch) -> None:
    run = train(model, PAIRS, ACT(), config=QUICK, progress=False)
    monkeypatch.setattr("ctlens.training.run.save_model", lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        run.save(tmp_path / "run")

    assert list(tmp_path.iterdir()) == []


def test_a_run_draws_its_losses(model) -> None:
    run = train(model, PAIRS, ACT(), config=QUICK, progress=False)

    overall = [list(trace.y) for trace in run.figure().data]
    by_layer = [list(trace.y) for trace in run.figure("act").data if trace.y is not None]

    assert run.history.series("act") in overall
    assert all(series in by_layer for series in run.history.by_hook("act").values())
    with pytest.raises(CtlensError, match="loss of this run"):
        run.figure("bct")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": -1.0}, "lr must be a positive"),
        ({"retention": -1.0}, "retention"),
        ({"warmup": 2.0}, "warmup is a share, 0 to 1, not 2.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message) -> None:
    with pytest.raises(CtlensError, match=message):
        TrainConfig(**options)


def test_bad_requests_are_refused(model) -> None:
    for losses, config, message in (
        ([ACT(), ACT(site="resid_pre")], QUICK, "given twice"),
        ([], TrainConfig(retention=0), "nothing to train"),
        (ACT(), TrainConfig(trainable=("heads",)), "parameter group"),
        (ACT(), TrainConfig(trainable=()), "no parameter is trainable"),
    ):
        with pytest.raises(CtlensError, match=message):
            Trainer(model, PAIRS, losses, config)
    with pytest.raises(CtlensError, match="no pairs"):
        Trainer(model, [], ACT(), QUICK)
    with pytest.raises(CtlensError, match="context"):
        Trainer(model, [Pair(prompt("a b " * 200), prompt("a b " * 200))], ACT(), QUICK)


def test_a_loss_that_is_no_number_stops_the_training(model) -> None:
    broken = copy_model(model)
    next(broken.parameters()).data.fill_(float("nan"))
    trainer = Trainer(broken, PAIRS, ACT(), TrainConfig(steps=1, retention=0))

    with pytest.raises(CtlensError, match="at step 1 the model computes nan"):
        next(trainer)

    assert not trainer.model.training
