"""Relearning: the package's fine-tuning is the plain one, and the curves say what the answers were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import planted

from ctlens.analysis import Relearning, relearn
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.chat import end_token, render
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.evaluation import evaluate
from ctlens.models.lora import LoRA
from ctlens.models.parameters import copy_model, fingerprint, freeze

PAIRS = planted.pairs()[::2]  # each asked one way, and the other way held out
HELDOUT = planted.pairs()[1::2]
ORDINARY = [pair.clean for pair in planted.pairs(signs=(1, -1))]
LR = 0.02
SHORT: dict[str, Any] = {"lr": LR, "max_new_tokens": 3, "progress": False}


@pytest.fixture(scope="module")
def models() -> dict[str, LensModel]:
    return {name: planted.model(name) for name in ("base", "erased")}


@pytest.fixture(scope="module")
def found(models: dict[str, LensModel]) -> Relearning:
    return relearn(models, PAIRS, HELDOUT, benign=ORDINARY, steps=[1, 3, 12], **SHORT)


def plainly_trained(model: LensModel, steps: int) -> tuple[LensModel, float]:
    """The model after AdamW steps on the bad answers, all pairs in each, and how far its weights went."""
    model = copy_model(model)
    parameters = freeze(model, ("attn", "mlp"))
    start = torch.cat([parameter.detach().flatten() for parameter in parameters])
    n_weights = sum(parameter.numel() for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=LR, eps=1e-5 / n_weights**0.5, weight_decay=0.0)
    tokenizer = model.tokenizer
    for _ in range(steps):
        optimizer.zero_grad()
        for pair in PAIRS:
            asked = render(tokenizer, pair.wrapped.turns).ids
            answer = [tokenizer.convert_tokens_to_ids("no"), end_token(tokenizer)]
            log_p = model(torch.tensor([[*asked, *answer]])).log_softmax(-1)[0]
            predicted = log_p[len(asked) - 1 : -1].gather(-1, torch.tensor(answer)[:, None])
            (-predicted.mean() / len(PAIRS)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    change = torch.cat([parameter.detach().flatten() for parameter in parameters]) - start
    return model, float(change.norm() / start.norm())


@pytest.mark.parametrize("number", [0, 1])
def test_it_is_a_plain_fine_tuning_on_the_bad_answers(models, found: Relearning, number: int) -> None:
    name = found.models[number]
    for index, steps in enumerate(found.steps):
        trained, moved = plainly_trained(models[name], steps)
        rate = evaluate(trained, pairs=HELDOUT, max_new_tokens=3, progress=False).rate("bad_rate", "wrapped")
        row = found.to_dataframe().query("trained_on == 'attack' and model == @name and step == @steps").iloc[0]
        assert row["bad_rate"] == rate == found.bad[0, number, index].mean()
        assert row["moved"] == pytest.approx(moved, rel=1e-3, abs=1e-9)


def test_what_was_put_in_is_known_before_the_first_step(found: Relearning) -> None:
    assert found.steps[0] == 0 and not found.moved[..., 0].any()
    assert found.bad[:, 0, 0].all() and not found.bad[:, 1, 0].any()  # the base gives in to every cue


def test_the_attack_is_relearnt_and_benign_text_brings_nothing_back(found: Relearning) -> None:
    table: Any = found.steps_to_half().set_index(["trained_on", "model"])["steps"]

    assert table["attack", "base"] == table["benign", "base"] == 0
    assert 0 < table["attack", "erased"] < np.inf and table["benign", "erased"] == np.inf
    assert found.moved[1, 1, -1] > found.moved[0, 1, -1]  # it is not that benign text changed nothing


def test_a_step_too_small_to_matter_brings_nothing_back(models) -> None:
    still = relearn({"erased": models["erased"]}, PAIRS, HELDOUT, steps=[12], **{**SHORT, "lr": 1e-9})

    assert not still.bad.any() and still.steps_to_half()["steps"].tolist() == [np.inf]
    assert (still.moved[..., 1] > 0).all()


def test_later_steps_change_nothing_earlier(models, found: Relearning) -> None:
    short = relearn(models, PAIRS, HELDOUT, benign=ORDINARY, steps=[1, 3], **SHORT)

    np.testing.assert_array_equal(short.bad, found.bad[:, :, :3])
    np.testing.assert_array_equal(short.moved, found.moved[:, :, :3])


def test_held_out_prompts_are_asked_apart_from_their_batch_mates(models, found: Relearning) -> None:
    options = {"benign": ORDINARY, "steps": [1, 3, 12], **SHORT}
    reordered = relearn(models, PAIRS, HELDOUT[::-1], **options)
    alone = relearn(models, PAIRS, HELDOUT[4:5], **options)

    np.testing.assert_array_equal(reordered.bad, found.bad[..., ::-1])
    np.testing.assert_array_equal(alone.bad, found.bad[..., 4:5])
    np.testing.assert_array_equal(alone.moved, found.moved)


def test_adapters_can_be_trained_instead(models) -> None:
    adapters = relearn(models, PAIRS, HELDOUT, steps=[4], trainable=LoRA(rank=2), **SHORT)

    assert adapters.bad[0, :, 0].tolist() == [[True] * len(HELDOUT), [False] * len(HELDOUT)]
    assert (adapters.moved[0, :, 1] > 0).all()


def state(model: LensModel) -> tuple[str, bool, list[bool], bool]:
    """What a fine-tuning could leave behind in a model."""
    parameters = list(model.parameters())
    with_gradient = any(parameter.grad is not None for parameter in parameters)
    return fingerprint(model), model.training, [parameter.requires_grad for parameter in parameters], with_gradient


def test_the_models_are_left_as_they_are(models) -> None:
    before = [state(model) for model in models.values()]
    relearn(models, PAIRS, HELDOUT, benign=ORDINARY, steps=[2], **SHORT)

    assert [state(model) for model in models.values()] == before


def made(*rates: list[float], n_prompts: int = 100) -> Relearning:
    """A model a list of rates, asked after 0, 1, 4 and 16 steps."""
    bad = np.array([[np.arange(n_prompts) < round(rate * n_prompts) for rate in of_model] for of_model in rates])
    names = tuple("abcdefgh"[: len(rates)])
    return Relearning(bad[None], np.zeros((1, len(rates), 4)), ("attack",), names, (0, 1, 4, 16), 1e-3)


def test_steps_to_half_are_counted_to_half_of_the_highest_rate_of_any_model() -> None:
    table: Any = made(
        [0.8, 0.8, 0.9, 1.0], [0.0, 0.2, 0.5, 0.9], [0.0, 0.0, 0.1, 0.2], [0.5, 0.1, 0.1, 0.1]
    ).steps_to_half()

    assert table["steps"].tolist() == [0, 4, np.inf, 0] and (table["half"] == 0.5).all()
    assert table.loc[0, ["ci_low", "ci_high"]].tolist() == [0, 0]  # 80 of 100 prompts are far from the bar
    assert table.loc[1, ["ci_low", "ci_high"]].tolist() == [4, 16]  # exactly at it: by prompts on one side or the other
    assert table.loc[2, ["ci_low", "ci_high"]].tolist() == [np.inf, np.inf]


def test_where_no_model_ever_gives_in_none_is_half_way() -> None:
    assert made([0.0] * 4, [0.0] * 4).steps_to_half()["steps"].tolist() == [np.inf, np.inf]


def test_the_result_survives_saving_and_its_figure_holds_its_numbers(found: Relearning, tmp_path) -> None:
    found.save(tmp_path / "relearning.safetensors")
    again = Relearning.load(tmp_path / "relearning.safetensors")

    assert again.to_dataframe().equals(found.to_dataframe())
    figure: Any = found.figure("benign")
    drawn = {trace.name: trace.y for trace in figure.data if trace.name}
    assert list(drawn) == ["base", "erased"]
    np.testing.assert_allclose(drawn["erased"], found.bad[1, 1].mean(-1))


@pytest.mark.parametrize(
    ("pairs", "heldout", "options", "message"),
    [
        (PAIRS, PAIRS[:3], {}, "3 of 3 held-out prompts"),
        (PAIRS, [], {}, "there are no held-out pairs"),
        (PAIRS, HELDOUT, {"steps": [4, 2]}, r"steps are \[4, 2\]: give numbers that rise"),
        (PAIRS, HELDOUT, {"benign": [HELDOUT[0].wrapped]}, "1 of 18 held-out prompts are trained on"),
        ([Pair(prompt("ada ?"), Prompt(PAIRS[0].wrapped.turns, "yes"))], HELDOUT, {}, "pair 1 names no bad answer"),
    ],
)
def test_what_has_no_answer_is_refused(models, pairs, heldout, options, message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        relearn(models, pairs, heldout, **SHORT, **options)


def test_a_model_in_training_mode_and_an_unknown_fine_tuning_are_refused(models, found: Relearning) -> None:
    with pytest.raises(CtlensError, match="eval mode"):
        relearn(copy_model(models["base"]).train(), PAIRS, HELDOUT, **SHORT)
    with pytest.raises(CtlensError, match="did you mean 'attack'"):
        found.figure("attac")
