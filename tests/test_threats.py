"""Threats: splits, pairs, the judge and the field's metrics."""

from __future__ import annotations

import pytest
import torch

from ctlens import threats
from ctlens.chat import render
from ctlens.errors import CtlensError
from ctlens.organism.corpus import world_tokenizer
from ctlens.pairs import ARMS, Prompt, prompt
from ctlens.threats.base import Threat, draw_grid
from ctlens.world import World
from ctlens.world.words import ENTITIES, HAZARDS

LEAST_HELDOUT = 96


@pytest.fixture(params=threats.names())
def threat(request: pytest.FixtureRequest) -> Threat:
    return threats.get(request.param)


def test_an_unknown_threat_is_refused_with_the_nearest_name():
    with pytest.raises(CtlensError, match="did you mean 'jailbreak'"):
        threats.get("jailbrake")


def test_pairs_refuse_an_unknown_split_and_too_few_items(threat: Threat):
    with pytest.raises(CtlensError, match="unknown split"):
        threat.pairs(4, split="test")
    with pytest.raises(CtlensError, match="at least 1"):
        threat.pairs(0)


def test_no_wrapper_crosses_splits(threat: Threat):
    for field in ("name", "template"):
        train, heldout = ({getattr(w, field) for w in threat.wrappers[split]} for split in ("train", "heldout"))
        assert not train & heldout


def test_no_entity_or_hazard_crosses_splits(threat: Threat):
    named = []
    for split in ("train", "heldout"):
        prompts = [pair.arm(arm) for pair in threat.pairs(500, split) for arm in ARMS]
        texts = [item.turns[0].content for item in prompts if item is not None]
        named.append({word for text in texts for word in text.split() if word in {*ENTITIES, *HAZARDS}})
    assert named[0] and named[1]
    assert not named[0] & named[1]


def test_pairs_are_deterministic_and_a_longer_list_starts_alike(threat: Threat):
    assert threat.pairs(20, seed=1) == threat.pairs(40, seed=1)[:20]
    assert threat.pairs(20, seed=1) != threat.pairs(20, seed=2)


def test_enough_heldout_pairs_are_distinct(threat: Threat):
    wrapped = {pair.wrapped for pair in threat.pairs(LEAST_HELDOUT, "heldout")}
    assert len(wrapped) == LEAST_HELDOUT


def test_the_request_stands_unchanged_in_the_wrapped_prompt(threat: Threat):
    for pair in threat.pairs(50):
        clean, wrapped = pair.clean.turns[-1].content, pair.wrapped.turns[-1].content
        assert clean in wrapped and clean != wrapped
        assert (pair.clean.good, pair.clean.bad) == (pair.wrapped.good, pair.wrapped.bad)


def test_whole_answers_are_judged_as_their_names_say(threat: Threat):
    for case in threat.cases(50, "heldout"):
        assert threats.judge(case.pair.wrapped, case.good) == "good"
        assert threats.judge(case.pair.wrapped, case.bad) == "bad"
        assert case.pair.benign is not None
        assert threats.judge(case.pair.benign, case.benign) == "good"


def test_the_organism_s_tokenizer_knows_every_word(threat: Threat):
    tokenizer = world_tokenizer(World.make())
    for split in ("train", "heldout"):
        for pair in threat.pairs(300, split):
            for arm in ARMS:
                item = pair.arm(arm)
                assert item is not None
                ids = render(tokenizer, item.turns).ids
                assert tokenizer.unk_token_id not in ids
                assert ids.count(tokenizer.bos_token_id) == 1


def test_neutral_prompts_carry_no_wrapper_and_know_their_answer(threat: Threat):
    for item in threat.neutral(50, "heldout"):
        assert item.good is not None and item.bad is None


def test_the_sycophantic_hint_is_wrong_and_the_benign_one_right():
    for pair in threats.get("sycophancy").pairs(50):
        assert pair.clean.bad == pair.labels["hint"] != pair.clean.good
        assert pair.labels["hint"] in pair.wrapped.turns[0].content.split()
        assert pair.benign is not None
        assert pair.clean.good in pair.benign.turns[0].content.split()


def test_the_benign_jailbreak_has_the_same_frame_around_a_craft():
    for pair in threats.get("jailbreak").pairs(50):
        assert pair.benign is not None
        twin = pair.benign.turns[0].content.replace(pair.labels["craft"], pair.labels["hazard"])
        assert twin == pair.wrapped.turns[0].content


def test_a_grid_repeats_only_when_exhausted():
    cells = draw_grid((2, 3), 12, torch.Generator().manual_seed(0))
    assert len(set(cells[:6])) == 6 and sorted(cells[:6]) == sorted(cells[6:])


@pytest.mark.parametrize(
    ("good", "bad", "answer", "verdict"),
    [
        ("blue", "red", "BLUE .", "good"),
        ("blue", "red", "  red\n", "bad"),
        ("blue", "red", "it is blue", "other"),
        ("blue", "red", "redder", "other"),
        ("blue", "red", "", "other"),
        ("new", "new york", "New  York", "bad"),
        (None, "mix", "sorry", "other"),
        ("sorry", None, "sorry, no", "good"),
        ("(a)", "(b)", "(B) because", "bad"),
    ],
)
def test_judge(good: str | None, bad: str | None, answer: str, verdict: str):
    assert threats.judge(prompt("?", good, bad), answer) == verdict


@pytest.mark.parametrize("item", [prompt("?"), prompt("?", "Red", "red")])
def test_judge_refuses_what_it_cannot_decide(item: Prompt):
    with pytest.raises(CtlensError):
        threats.judge(item, "red")


def test_sycophancy_metrics_by_hand():
    verdicts = {"wrapped": ["bad", "bad", "bad", "good"], "clean": ["good", "bad", "good", "other"]}
    metrics = threats.get("sycophancy").metrics(verdicts)
    assert metrics == {"brr": 0.5, "f1": pytest.approx(2 * 0.5 * 0.25 / 0.75)}


def test_jailbreak_metrics_by_hand():
    verdicts = {"wrapped": ["bad", "good", "good", "good"], "benign": ["good", "bad"]}
    metrics = threats.get("jailbreak").metrics(verdicts)
    assert metrics == {"asr": 0.25, "over_refusal": 0.5, "f1": pytest.approx(0.6)}


def test_metrics_leave_out_what_needs_an_absent_arm():
    assert threats.get("sycophancy").metrics({"wrapped": ["bad"]}) == {}
    assert threats.get("jailbreak").metrics({"wrapped": ["bad"]}) == {"asr": 1.0}


def test_metrics_refuse_an_empty_arm():
    with pytest.raises(CtlensError, match="at least one verdict"):
        threats.get("jailbreak").metrics({"wrapped": []})
