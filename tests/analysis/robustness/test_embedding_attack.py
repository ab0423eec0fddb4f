"""The attack in embedding space, on a planted model whose margin in it is known: a cue of the size of a truth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import planted
from helpers.models import chat_model

from ctlens.analysis import EmbeddingAttack, embedding_attack
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.evaluation import evaluate
from ctlens.models.parameters import copy_model, fingerprint
from ctlens.organism import load_organism
from ctlens.threats import get

# Words that say nothing, which a move along the cue's axis makes a cue.
PAIRS = [replace(pair, wrapped=Prompt(pair.wrapped.turns, "yes", "no")) for pair in planted.neutral()]
RADIUS = 0.18  # the cue that fits the ball is sqrt(24) * .18 = .88 large: it outweighs truths up to .85 of 1
SHORT: dict[str, Any] = {"max_new_tokens": 3, "progress": False}


@pytest.fixture(scope="module")
def models() -> dict[str, LensModel]:
    return {name: planted.model(name) for name in ("base", "erased")}


@pytest.fixture(scope="module")
def found(models: dict[str, LensModel]) -> EmbeddingAttack:
    return embedding_attack(models, PAIRS, radii=[0.1, RADIUS, 0.3], **SHORT)


def test_the_planted_model_falls_exactly_where_the_largest_cue_outweighs_the_truth(found: EmbeddingAttack) -> None:
    truths = np.array([planted.TRUTHS[pair.labels["entity"]] for pair in PAIRS])

    for index, radius in enumerate(found.radii):
        np.testing.assert_array_equal(found.bad[0, index], planted.SIZE**0.5 * radius > truths)
    assert 0 < found.bad[0, 2].mean() < 1  # some, but not all of them


def test_a_model_that_writes_no_cue_withstands_it_and_a_random_move_is_none(found: EmbeddingAttack) -> None:
    assert not found.bad[1, :3].any()
    assert not found.random_bad[:, :3].any()
    assert found.random_bad.shape == (2, 4, 5, len(PAIRS))


def test_a_larger_radius_takes_nothing_back(found: EmbeddingAttack) -> None:
    assert (np.diff(found.p_bad, axis=1) >= 0).all()
    assert (found.bad[:, 1:] >= found.bad[:, :-1]).all()


def test_margin_over_sensitivity_tells_which_prompts_fall_where_the_model_is_linear(found: EmbeddingAttack) -> None:
    table = found.prediction().set_index(["model", "radius"])

    assert table.loc[("base", RADIUS), "auc"] == table.loc[("base", RADIUS), "ci_low"] == 1.0
    fallen = (found.bad[0, 2] & ~found.bad[0, 0]).sum()
    assert table.loc[("base", RADIUS), ["n_fallen", "n_pairs"]].tolist() == [fallen, (~found.bad[0, 0]).sum()]
    assert np.isnan(table.loc[("erased", RADIUS), "auc"])  # none falls


def test_a_model_s_numbers_are_found_by_its_name(found: EmbeddingAttack) -> None:
    np.testing.assert_array_equal(found.bad_at("erased"), found.bad[1])
    np.testing.assert_allclose(found.firmness("base") * found.sensitivity[0], found.margin[0])
    for numbers in (found.firmness, found.bad_at):
        with pytest.raises(CtlensError, match="unknown model 'bas'.*base"):
            numbers("bas")


def test_margin_and_sensitivity_are_those_of_the_answer_s_log_odds() -> None:
    pairs = get("jailbreak").pairs(6, split="heldout")
    radius = 1e-3
    found = embedding_attack(load_organism(), pairs, radii=[radius], iterations=4, draws=1, **SHORT)

    odds = np.log1p(-found.p_bad[0]) - np.log(found.p_bad[0])
    np.testing.assert_allclose(found.margin[0], odds[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose((odds[0] - odds[1]) / radius, found.sensitivity[0], rtol=0.05)
    halves = [embedding_attack(load_organism(), part, radii=[radius], **SHORT) for part in (pairs[:2], pairs[2:])]
    np.testing.assert_allclose(np.concatenate([of.margin for of in halves], 1), found.margin, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.concatenate([of.sensitivity for of in halves], 1), found.sensitivity, rtol=1e-3)


@pytest.mark.parametrize("threat", ["jailbreak", "prefill"])
def test_without_a_move_it_is_the_greedy_bad_rate(threat: str) -> None:
    base = load_organism()
    pairs = get(threat).pairs(12, split="heldout")
    found = embedding_attack(base, pairs, radii=[], draws=2, progress=False)

    answers = evaluate(base, pairs=pairs, progress=False).outcomes.query("prompt_side == 'wrapped'")
    np.testing.assert_array_equal(found.bad[0, 0], answers["verdict"] == "bad")
    np.testing.assert_array_equal(found.random_bad[0, 0], found.bad[0, 0][None].repeat(2, 0))


@pytest.mark.boundary
@pytest.mark.parametrize("kind", ["made here", "gpt2"])
def test_pairs_in_another_order_and_alone_give_equal_answers(kind: str) -> None:
    model = chat_model(kind)
    questions = ("Is it right?", "Which term best describes the disease?", "What is it?")
    pairs = [
        Pair(prompt(question), prompt("I don't think it's right. " * number + question, "outbreak", "isolated cases"))
        for number, question in enumerate(questions, start=1)
    ]
    options: dict[str, Any] = {"radii": [0.2, 0.5], "iterations": 3, "draws": 2, "progress": False}
    together = embedding_attack(model, pairs, **options)
    apart = embedding_attack(model, pairs[::-1], batch_size=1, **options)

    np.testing.assert_allclose(apart.p_bad[..., ::-1], together.p_bad, rtol=1e-2)
    np.testing.assert_array_equal(apart.random_bad[..., ::-1], together.random_bad)
    assert (together.p_bad[0, 2] > 1.5 * together.p_bad[0, 0]).all()  # the gradient leads somewhere on any model


def test_the_models_are_left_as_they_are_and_the_result_survives_saving(models, found, tmp_path) -> None:
    assert [fingerprint(model) for model in models.values()] == [fingerprint(planted.model(name)) for name in models]
    assert all(parameter.grad is None for model in models.values() for parameter in model.parameters())
    found.save(tmp_path / "attack.safetensors")
    assert EmbeddingAttack.load(tmp_path / "attack.safetensors").to_dataframe().equals(found.to_dataframe())
    figure: Any = found.figure()
    drawn = [trace for trace in figure.data if trace.name == "the attack"]
    np.testing.assert_allclose(drawn[0].y, found.bad[0].mean(-1))


def test_what_cannot_be_attacked_is_refused(models) -> None:
    turns = PAIRS[0].wrapped.turns
    for pairs, options, message in (
        (PAIRS, {"radii": [0.2, 0.1]}, r"radii are \[0.2, 0.1\]: give numbers above 0 that rise"),
        (PAIRS, {"radii": [0.0]}, "give numbers above 0 that rise"),
        (PAIRS, {"iterations": 0}, "iterations must be at least 1"),
        ([Pair(PAIRS[0].clean, PAIRS[0].clean)], {}, "pair 1 has no token that the attack added"),
        ([Pair(PAIRS[0].clean, Prompt(turns, "yes"))], {}, "pair 1 names no bad answer"),
    ):
        with pytest.raises(CtlensError, match=message):
            embedding_attack(models, pairs, **options, **SHORT)
    with pytest.raises(CtlensError, match="eval mode"):
        embedding_attack(copy_model(models["base"]).train(), PAIRS, **SHORT)
