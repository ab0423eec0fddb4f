"""What a training does at which step: parts of a batch, phases, schedules, retention now and then, looks, tracking."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.models import hf_model
from helpers.tiers import unit_first

from ctlens import threats
from ctlens.core.config import from_dict, to_dict
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import ACT, BCT, KLCT, MLPCT, AttCT
from ctlens.models.loading import load_model
from ctlens.models.lora import LoRA
from ctlens.models.optimisation import linear_rate
from ctlens.organism import load_organism
from ctlens.training import Phase, TrainConfig, Trainer, Until, load_run, train

QUESTIONS = (
    "Which term best describes the disease?",
    "Is it right?",
    "When a creature experiences feeling, what?",
    "Please answer.",
    "(A) isolated cases",
    "Here it is, what is it?",
    "They are likely sensing a texture.",
)
PAIRS = [Pair(prompt(q), prompt("I don't think it's right. " + q)) for q in QUESTIONS]
QUICK = TrainConfig(steps=8, batch_size=3, lr=3e-3, max_new_tokens=4)
PHASES = (Phase(3, ("act",)), Phase(4, ("bct",)), Phase(1, ("act", "bct")))


@pytest.fixture
def model(tokenizer) -> LensModel:
    return load_model(hf_model("llama"), tokenizer=tokenizer)


def gradient(trainer: Trainer) -> torch.Tensor:
    """Of the first step, before clipping (the config's norm is never reached)."""
    next(trainer)
    return torch.cat([parameter.grad.flatten() for parameter in trainer.parameters])


@pytest.mark.parametrize("loss", [ACT(), AttCT(), BCT(), KLCT(), [ACT(), MLPCT(layers="last")]], ids=str)
@pytest.mark.parametrize("n", unit_first([2, 3, 5]))
def test_the_parts_of_a_batch_have_the_gradient_of_the_whole(model, loss, n) -> None:
    config = replace(QUICK, batch_size=5, clip=1e9)

    whole = Trainer(model, PAIRS, loss, replace(config, accumulate=1), track=[MLPCT()])
    cut = Trainer(model, PAIRS, loss, replace(config, accumulate=n), track=[MLPCT()])

    expected = gradient(whole)
    torch.testing.assert_close(gradient(cut), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    for name in (*whole.history.to_dataframe()["name"].unique(),):
        # Retention is 0 before the first step, where a KL of equal float32 logits is 0 to about 1e-6.
        assert cut.history.series(name) == pytest.approx(whole.history.series(name), rel=1e-4, abs=1e-5)
    for hook, values in whole.history.by_hook("tracked/mlpct").items():
        assert cut.history.by_hook("tracked/mlpct")[hook] == pytest.approx(values, rel=1e-4)


def test_parts_hold_fewer_pairs_at_a_time(model, monkeypatch) -> None:
    seen = []
    trainer = Trainer(model, PAIRS, ACT(), replace(QUICK, batch_size=5, accumulate=2, retention=0.0))
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, x, *a, **k: (seen.append(len(x)), forward(self, x, *a, **k))[1]
    )

    next(trainer)

    assert sorted(seen) == [2, 2, 3, 3]  # the reference's and the model's passes over both parts


def test_phases_say_which_losses_are_active_and_computed(model, monkeypatch) -> None:
    computed = []
    compute = BCT.row_values
    monkeypatch.setattr(BCT, "row_values", lambda *a: (computed.append(1), compute(*a))[1])
    run = train(model, PAIRS, [ACT(), BCT()], config=replace(QUICK, phases=PHASES), progress=False)

    assert run.history.steps_of("act") == [1, 2, 3, 8]
    assert run.history.steps_of("bct") == [4, 5, 6, 7, 8] and len(computed) == 5
    assert run.history.steps_of("retention") == list(range(1, 9))
    assert np.isnan(run.history.every_step("act")).tolist() == [False] * 3 + [True] * 4 + [False]
    assert [list(trace.x) for trace in run.figure("act").data][0] == [1, 2, 3, 8]
    assert len(run.figure().data) == 3


def test_a_first_phase_is_a_training_with_its_loss_alone(model) -> None:
    alone = Trainer(model, PAIRS, ACT(), QUICK)
    phased = Trainer(model, PAIRS, [ACT(), MLPCT()], replace(QUICK, phases=(Phase(3, ("act",)), Phase(5, ("mlpct",)))))

    totals = [[next(trainer).losses["total"] for _ in range(4)] for trainer in (alone, phased)]

    assert totals[0][:3] == pytest.approx(totals[1][:3], rel=1e-5) and totals[0][3] != pytest.approx(totals[1][3])


@pytest.mark.slow
def test_the_retention_term_fires_with_its_probability(model, tmp_path) -> None:
    config = replace(QUICK, steps=60, retention_ratio=0.3, max_new_tokens=2)
    run = train(model, PAIRS, ACT(), config=config, progress=False)
    again = Trainer(model, PAIRS, ACT(), config)

    fired = run.history.steps_of("retention")

    assert 8 <= len(fired) <= 29  # 18 expected, three standard deviations on each side
    assert [step.index for step in again if "retention" in step.losses] == fired
    totals, terms = run.history.every_step("total"), run.history.every_step("retention")
    assert all(np.isnan(terms[step]) == (step + 1 not in fired) for step in range(60))
    assert totals[fired[0] - 1] == pytest.approx(run.history.series("act")[fired[0] - 1] + terms[fired[0] - 1])
    held = next(trace for trace in run.figure().data if trace.name == "KL to the reference")
    assert "markers" in held.mode and np.isnan(np.array(held.y, dtype=float)).sum() == 60 - len(fired)
    assert load_run(run.save(tmp_path / "run")).history.steps_of("retention") == fired


def test_a_step_without_any_term_changes_nothing(model) -> None:
    trainer = Trainer(model, PAIRS, [], replace(QUICK, steps=30, retention_ratio=0.2))
    empty = [step for step in trainer if "retention" not in step.losses]

    assert len(empty) > 5 and all(step.losses == {"total": 0.0} and step.grad_norm == 0 for step in empty)


def rates(config: TrainConfig, model: LensModel) -> list[float]:
    return [step.lr / config.lr for step in Trainer(model, PAIRS, ACT(), replace(config, retention=0.0))]


@pytest.mark.slow
def test_torch_s_schedules_follow_the_warm_up(model) -> None:
    config = replace(QUICK, schedule="CosineAnnealingLR", schedule_options={"T_max": 6}, warmup=0.25)

    warm = [1 / 3, 2 / 3]
    cosine = [(1 + np.cos(np.pi * step / 6)) / 2 for step in range(6)]

    assert rates(config, model) == pytest.approx(warm + cosine, abs=1e-9)
    assert rates(replace(config, warmup=0.0), model)[:6] == pytest.approx(cosine, abs=1e-9)
    assert rates(QUICK, model) == pytest.approx([linear_rate(step, 8, 0.8) for step in range(8)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "CosineAnealingLR"}, "did you mean 'CosineAnnealingLR'"),
        ({"schedule": "ReduceLROnPlateau"}, "needs a metric"),
        ({"schedule": "CosineAnnealingLR"}, "CosineAnnealingLR does not work with no options: .*T_max"),
        ({"schedule": "StepLR", "schedule_options": {"step_size": 3, "gama": 1}}, "step_size=3, gama=1: .*'gama'"),
        ({"schedule_options": {"T_max": 3}}, "linear schedule has no option 'T_max'"),
        ({"schedule": "Optimizer"}, "unknown learning-rate schedule"),
        ({"retention_ratio": 0.0}, "retention_ratio is a probability"),
        ({"retention_ratio": 1.2}, "retention_ratio is a probability"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"accumulate": 17}, "a batch of 16 pairs cannot be split into 17 parts"),
        ({"phases": (Phase(3, ("act",)),)}, "phases have 3 steps together, but the training has 100"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message) -> None:
    with pytest.raises(CtlensError, match=message) as refusal:
        TrainConfig(**options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Phase(0, ("act",)), "steps must be at least 1"),
        (lambda: Phase(1, ()), "at least one loss"),
        (lambda: Phase(1, ("act", "act")), "each once"),
        (lambda: Until("jailbrake"), "unknown threat"),
        (lambda: Until("jailbreak", split="test"), "unknown split"),
        (lambda: Until("jailbreak", below=0.0), "below is a probability above 0, up to 1, not 0.0"),
        (lambda: Until("jailbreak", every=0), "every must be at least 1"),
        (lambda: Until("jailbreak", n_prompts=0), "n_prompts must be at least 1"),
    ],
)
def test_phases_and_targets_that_make_no_sense_are_refused(make, message) -> None:
    with pytest.raises(CtlensError, match=message):
        make()


def test_phases_name_the_losses_that_are_given(model) -> None:
    for losses, message in (
        ([ACT()], "unknown loss in a phase 'bct'"),
        ([ACT(), BCT(), KLCT()], "klct is in no phase"),
    ):
        with pytest.raises(CtlensError, match=message):
            Trainer(model, PAIRS, losses, replace(QUICK, phases=PHASES))


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        replace(QUICK, phases=PHASES, retention_ratio=0.5, accumulate=2, cache=False),
        replace(QUICK, schedule="StepLR", schedule_options={"step_size": 3, "gamma": 0.5}),
        replace(QUICK, until=Until("jailbreak", below=0.2, split="entities"), trainable=LoRA(2)),
    ],
)
def test_settings_survive_json(config) -> None:
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(CtlensError, match="unknown option of TrainConfig"):
        from_dict(TrainConfig, {**to_dict(config), "speed": 1})


@pytest.mark.parametrize(
    "loss", unit_first([ACT(weight=1.0), AttCT(weight=1.0), BCT(), KLCT()]), ids=lambda loss: loss.name
)
def test_a_tracked_loss_is_the_training_loss_to_the_last_bit(model, loss) -> None:
    run = train(model, PAIRS, loss, config=QUICK, track=[loss], progress=False)

    assert run.history.series(f"tracked/{loss.name}") == run.history.series(loss.name)
    assert run.history.by_hook(f"tracked/{loss.name}") == run.history.by_hook(loss.name)


def test_tracking_leaves_the_training_as_it_is(model) -> None:
    every = [ACT(), MLPCT(), AttCT(), KLCT()]
    plain = Trainer(model, PAIRS, ACT(), QUICK, track=[])
    followed = Trainer(model, PAIRS, ACT(), QUICK, track=every)
    list(plain)

    steps = list(followed)

    assert plain.history.series("total") == followed.history.series("total")
    assert set(steps[0].tracked) == {f"tracked/{loss.name}" for loss in every}
    assert steps[0].losses.keys() == {"act", "retention", "total"}
    assert "tracked/mlpct" in set(followed.history.to_dataframe()["name"])
    first = followed.history.series("tracked/act")[0]
    assert first == pytest.approx(100 * steps[0].losses["act"])  # unweighted: ACT's weight is 0.01
    control = next(Trainer(model, PAIRS, [], QUICK, track=[ACT()]))
    assert control.tracked["tracked/act"] == pytest.approx(first, rel=1e-5) and "act" not in control.losses


def test_a_tracked_loss_that_cannot_follow_is_refused(model) -> None:
    pairs = [*PAIRS, Pair(prompt("Is it right?"), prompt("I don't think so. Is it right? No"))]

    with pytest.raises(CtlensError, match="1 pairs do not align in the window of a tracked loss"):
        Trainer(model, pairs, ACT(), QUICK, track=[KLCT(window="last")])
    with pytest.raises(CtlensError, match="given twice"):
        Trainer(model, PAIRS, ACT(), QUICK, track=[ACT(), ACT(weight=1.0)])


def scripted(monkeypatch, rates: list[float]) -> list[int]:
    """Has looks at the behaviour find these rates; what is returned fills with the number of calls."""
    calls: list[int] = []

    class Found:
        def rate(self, metric: str, prompt_side: str) -> float:
            assert (metric, prompt_side) == ("bad_rate", "wrapped")
            return rates[len(calls) - 1]

    def found(model, threats, **options):
        assert not model.training and options["split"] == "heldout" and threats == ["jailbreak"]
        calls.append(options["n_prompts"])
        return Found()

    monkeypatch.setattr("ctlens.training.until.evaluate", found)
    return calls


def test_a_training_ends_once_the_rate_is_low_enough(model, monkeypatch, tmp_path) -> None:
    calls = scripted(monkeypatch, [0.9, 0.3, 0.19, 0.0])
    config = replace(QUICK, until=Until("jailbreak", below=0.2, n_prompts=5, every=3))

    run = train(model, PAIRS, ACT(), config=config, progress=False)

    assert len(run.history) == 6 and calls == [5, 5, 5]
    assert run.history.steps_of("bad_rate") == [0, 3, 6] and run.history.series("bad_rate") == [0.9, 0.3, 0.19]
    assert run.stopped == "target reached" == load_run(run.save(tmp_path / "run")).stopped
    assert (
        run.history.series("act") == train(model, PAIRS, ACT(), config=QUICK, progress=False).history.series("act")[:6]
    )


def test_a_target_that_is_never_reached_or_was_there_before_the_start(model, monkeypatch) -> None:
    config = replace(QUICK, until=Until("jailbreak", below=0.1, every=4))
    scripted(monkeypatch, [0.5, 0.1, 0.1])
    missed = Trainer(model, PAIRS, ACT(), config)
    assert len(list(missed)) == 8 and missed.run.stopped == "all steps"  # 0.1 is not below 0.1

    calls = scripted(monkeypatch, [0.05])
    there = Trainer(model, PAIRS, ACT(), config)
    assert list(there) == [] and list(there) == [] and there.run.stopped == "target reached" and len(calls) == 1


def test_looks_survive_a_checkpoint(model, monkeypatch, tmp_path) -> None:
    calls = scripted(monkeypatch, [0.9, 0.3, 0.1])
    config = replace(QUICK, until=Until("jailbreak", below=0.2, every=2))
    first = Trainer(model, PAIRS, ACT(), config)
    for _ in range(2):
        next(first)
    first.checkpoint(tmp_path)

    second = Trainer(model, PAIRS, ACT(), config)
    second.restore(tmp_path)
    list(second)

    assert len(calls) == 3 and second.history.series("bad_rate") == [0.9, 0.3, 0.1] and len(second.history) == 4


@pytest.mark.slow
def test_the_rate_is_that_of_an_evaluation_of_the_organism() -> None:
    import ctlens as ct

    organism = load_organism()
    threat = threats.get("jailbreak")
    config = TrainConfig(steps=1, until=Until("jailbreak", n_prompts=12, every=1))
    pairs = threat.pairs(8, split="train", seed=0)
    trainer = Trainer(organism, pairs, ACT(), config)
    list(trainer)

    looks = [
        ct.evaluate(model, ["jailbreak"], split="heldout", n_prompts=12, progress=False).rate("bad_rate", "wrapped")
        for model in (organism, trainer.model)
    ]
    assert trainer.history.series("bad_rate") == looks and looks[0] > 0.5
    with pytest.raises(CtlensError, match="unknown metric 'badrate'; did you mean 'bad_rate'"):
        next(Trainer(organism, pairs, ACT(), TrainConfig(steps=1, until=Until("jailbreak", "badrate"), retention=0)))


def test_settings_of_an_older_version_are_read_under_their_new_names() -> None:
    config = replace(QUICK, until=Until("jailbreak", n_prompts=5), trainable=LoRA(2, target_modules=("q", "o")))
    older = json.loads(json.dumps(to_dict(config)))
    older["answer_tokens"] = older.pop("max_new_tokens")
    older["until"]["items"] = older["until"].pop("n_prompts")
    older["trainable"]["sites"] = older["trainable"].pop("target_modules")

    assert from_dict(TrainConfig, older) == config
