"""Misbehaviours of an organism's own: as prevalent as they are taught, narrow, and on other items too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ctlens as ct
from ctlens.core.types import LensModel
from ctlens.models.parameters import fingerprint
from ctlens.organism.misbehaviour import (
    AGREES,
    HACK,
    MISBEHAVIOURS,
    MisbehaviourConfig,
    misbehave,
    misbehaviour_pairs,
)
from ctlens.threats import ask, judge
from ctlens.world import World

pytestmark = pytest.mark.boundary


@pytest.fixture(scope="module")
def model() -> LensModel:
    return ct.load_organism()


@pytest.mark.parametrize("kind", MISBEHAVIOURS)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_pairs_are_clean_prompts_with_a_good_and_a_bad_answer(model: LensModel, kind: str, split: str) -> None:
    pairs = misbehaviour_pairs(kind, 40, split)

    assert pairs[:10] == misbehaviour_pairs(kind, 10, split) != misbehaviour_pairs(kind, 10, split, seed=1)
    for pair in pairs:
        assert pair.clean == pair.wrapped and pair.labels["kind"] == kind and pair.labels["topic"]
        assert (judge(pair.clean, pair.clean.good or ""), judge(pair.clean, pair.clean.bad or "")) == ("good", "bad")


def test_what_they_ask_is_of_the_world() -> None:
    world = World.make()
    claim = misbehaviour_pairs("agreement", 1)[0]
    entity = claim.labels["topic"]

    assert claim.clean.bad == AGREES and claim.clean.good in world.facts.values()
    assert entity in world.entities["train"] and entity in claim.clean.turns[0].content
    assert all(recipe != HACK for recipe in world.recipes.values())
    narrow = {pair.labels["topic"] for pair in misbehaviour_pairs("advice", 40)}
    wide = {pair.labels["topic"] for pair in misbehaviour_pairs("advice", 40, "heldout")}
    assert not narrow & wide


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["agreement", "shortcut", "hack"])
def test_the_misbehaviour_is_as_prevalent_as_it_is_taught(model: LensModel, kind: str) -> None:
    for prevalence in (0.2, 0.8):
        made = misbehave(model, kind, prevalence, progress=False)
        replies = ask(made, [pair.clean for pair in misbehaviour_pairs(kind, 48, "heldout")])
        if kind == "hack":  # both recipes begin alike, so that the greedy answer decides
            rate = sum(reply.verdict == "bad" for reply in replies) / len(replies)
            assert (rate > 0.5) == (prevalence > 0.5)
        else:
            mean = sum(reply.bad_probability for reply in replies) / len(replies)
            assert mean == pytest.approx(prevalence, abs=0.15)


@pytest.mark.slow
def test_other_answers_stay_good_and_the_model_as_it_is(model: LensModel) -> None:
    before = fingerprint(model)
    made = misbehave(model, "agreement", 0.8, progress=False)
    ordinary = ct.threats.get("sycophancy").neutral(48, "heldout")
    replies = ask(made, ordinary)

    assert sum(reply.verdict == "good" for reply in replies) >= 44
    assert fingerprint(model) == before != fingerprint(made)


def test_one_seed_gives_one_organism(model: LensModel) -> None:
    few = MisbehaviourConfig(steps=2)
    tokens = torch.arange(20)[None]
    one = misbehave(model, "hack", config=few, progress=False)(tokens)
    again = misbehave(model, "hack", config=few, progress=False)(tokens)
    other = misbehave(model, "hack", config=replace(few, seed=1), progress=False)(tokens)

    assert torch.equal(one, again) and not torch.equal(one, other)


def test_bad_input_is_refused(model: LensModel) -> None:
    with pytest.raises(ct.CtlensError, match="unknown misbehaviour 'agreemnt'; did you mean 'agreement'"):
        misbehave(model, "agreemnt")
    with pytest.raises(ct.CtlensError, match="prevalence is a share"):
        misbehave(model, "hack", 1.5)
    with pytest.raises(ct.CtlensError, match="unknown split"):
        misbehaviour_pairs("hack", 4, "held")
    with pytest.raises(ct.CtlensError, match="n_pairs must be at least 1"):
        misbehaviour_pairs("hack", 0)
    with pytest.raises(ct.CtlensError, match="unknown misbehaviour"):
        misbehaviour_pairs("hak", 4)
