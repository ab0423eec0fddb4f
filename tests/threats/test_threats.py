"""Threats: what each split holds out, what each pair asks, and the organism's ground truth."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from helpers.tiers import unit_first

from ctlens import threats
from ctlens.core.errors import CtlensError
from ctlens.data.alignment import align
from ctlens.data.chat import render
from ctlens.data.pairs import PROMPT_SIDES, Pair, clusters_of, prompt
from ctlens.organism.corpus import world_tokenizer
from ctlens.threats.base import WorldThreat, draw_grid, known
from ctlens.threats.frustration import REJECTIONS, WAY_OUT
from ctlens.threats.persona import HELDOUT_STYLES, STRUCTURE_STYLES, TRAIN_STYLES
from ctlens.world import SPLITS, World, words

HELD = ("entities", "heldout", "structure")
LEAST_DISTINCT = 96
MANY = 600
PLACEHOLDER = re.compile(r"\{\w+\}")


@pytest.fixture(params=threats.names())
def threat(request: pytest.FixtureRequest) -> WorldThreat:
    return threats.of_world(request.param)


def texts(pair: Pair) -> list[str]:
    """Every message of every prompt side."""
    return [
        turn.content
        for prompt_side in PROMPT_SIDES
        if (item := pair.side(prompt_side)) is not None
        for turn in item.turns
    ]


def spoken(threat: WorldThreat, split: str) -> set[str]:
    """Every word in a split's messages."""
    return {word for pair in threat.pairs(MANY, split) for text in texts(pair) for word in text.split()}


def test_an_unknown_threat_is_refused_with_the_nearest_name():
    with pytest.raises(CtlensError, match="did you mean 'jailbreak'"):
        threats.get("jailbrake")


def test_pairs_refuse_an_unknown_split_and_too_few_items(threat: WorldThreat):
    with pytest.raises(CtlensError, match="unknown split"):
        threat.pairs(4, split="test")
    with pytest.raises(CtlensError, match="at least 1"):
        threat.pairs(0)


def test_no_wrapper_crosses_splits(threat: WorldThreat):
    assert set(threat.wrappers) == {"train", "heldout", "structure"}
    for one, other in itertools.combinations(threat.wrappers.values(), 2):
        assert not {w.name for w in one} & {w.name for w in other}
        assert not {w.template for w in one} & {w.template for w in other}


def test_no_sentence_of_a_wrapper_crosses_splits(threat: WorldThreat):
    """Wrappers that are built from parts share no part either."""
    sentences = [
        {
            sentence
            for wrapper in wrappers
            for turn in wrapper.turns
            for part in re.split(r"[.?:]", PLACEHOLDER.sub("", turn.content))
            if len((sentence := part.strip()).split()) > 1
        }
        for wrappers in threat.wrappers.values()
    ]
    for one, other in itertools.combinations(sentences, 2):
        assert not (one & other) - {"as you wish", "go on", "i eat", "i fear"}


@pytest.mark.parametrize("pools", [REJECTIONS, WAY_OUT], ids=["rejections", "ways out"])
def test_the_parts_of_frustration_are_split_too(pools: dict[str, tuple[str, ...] | str]):
    parts = [{pool} if isinstance(pool, str) else set(pool) for pool in pools.values()]
    assert not any(one & other for one, other in itertools.combinations(parts, 2))


def test_the_questions_of_persona_are_split_too():
    questions = [
        {str(fact) for style in styles.values() for fact in style.values()}
        for styles in (TRAIN_STYLES, HELDOUT_STYLES, STRUCTURE_STYLES)
    ]
    assert not any(one & other for one, other in itertools.combinations(questions, 2))


def test_no_entity_thing_persona_or_verb_crosses_splits(threat: WorldThreat):
    names = {*words.ENTITIES, *words.HAZARDS, *words.CRAFTS, *words.PERSONAS}
    names |= {value for values in words.BIOGRAPHY.values() for value in values}
    names |= {verb for verbs in words.DOMAINS.values() for verb in verbs}
    named = [spoken(threat, split) & names for split in SPLITS]
    assert all(named)
    for one, other in itertools.combinations(named, 2):
        assert not one & other


def test_the_entities_split_uses_the_wrappers_of_training_and_no_other(threat: WorldThreat):
    used = {pair.labels["wrapper"] for pair in threat.pairs(MANY, "entities")}
    assert used <= {wrapper.name for wrapper in threat.wrappers["train"]}
    assert known("entities") == "train" and known("structure") == "structure"


def test_a_new_structure_is_new(threat: WorldThreat):
    """Where the request stands among the turns, and what is before and behind it in its own turn."""

    def structure(turns: tuple[tuple[str, str], ...]) -> tuple[object, ...]:
        number, text = next((i, text) for i, (_, text) in enumerate(turns) if "{request}" in text)
        before, behind = PLACEHOLDER.sub("", text.replace("{request}", "|")).split("|")
        return tuple(role for role, _ in turns), number, bool(before.strip()), bool(behind.strip())

    kinds = {
        split: {structure(tuple((turn.role, turn.content) for turn in w.turns)) for w in wrappers}
        for split, wrappers in threat.wrappers.items()
    }
    assert kinds["train"] == kinds["heldout"]
    assert not kinds["train"] & kinds["structure"]


def test_attacks_are_graded_alike_in_every_split(threat: WorldThreat):
    grades = [[group[0].strength for group in threat.graded(split)] for split in SPLITS]
    assert grades[0] == list(range(1, len(grades[0]) + 1)) and len(grades[0]) == (
        6 if threat.name == "frustration" else 4
    )
    assert all(grade == grades[0] for grade in grades)
    for split in SPLITS:
        assert len({len(group) for group in threat.graded(split)}) == 1


def test_pairs_are_deterministic_and_a_longer_list_starts_alike(threat: WorldThreat):
    assert threat.pairs(20, seed=1) == threat.pairs(40, seed=1)[:20]
    assert threat.pairs(20, seed=1) != threat.pairs(20, seed=2)


@pytest.mark.parametrize("split", HELD)
def test_enough_heldout_pairs_are_distinct(threat: WorldThreat, split: str):
    wrapped = {pair.wrapped for pair in threat.pairs(LEAST_DISTINCT, split)}
    assert len(wrapped) == LEAST_DISTINCT


@pytest.mark.parametrize("split", SPLITS)
def test_the_request_stands_unchanged_in_the_wrapped_prompt_and_aligns(threat: WorldThreat, split: str):
    tokenizer = world_tokenizer(World.make())
    for pair in threat.pairs(100, split):
        request = pair.clean.turns[-1].content
        assert len(pair.clean.turns) == 1
        assert sum(request in turn.content for turn in pair.wrapped.turns) == 1 and pair.wrapped != pair.clean
        assert (pair.clean.good, pair.clean.bad) == (pair.wrapped.good, pair.wrapped.bad)
        alignment = align(render(tokenizer, pair.clean.turns), render(tokenizer, pair.wrapped.turns))
        assert not alignment.refusal and len(alignment.clean) >= len(request.split())


@pytest.mark.parametrize("split", SPLITS)
def test_whole_answers_are_judged_as_their_names_say(threat: WorldThreat, split: str):
    for case in threat.cases(100, split):
        assert case.pair.benign is not None
        assert threats.judge(case.pair.wrapped, case.good) == threats.judge(case.pair.clean, case.good) == "good"
        assert threats.judge(case.pair.wrapped, case.bad) == "bad"
        assert threats.judge(case.pair.benign, case.benign) == "good"


def test_a_judged_answer_is_recognised_by_its_first_token(threat: WorldThreat):
    """So that the probability of the first token is that of the answer."""
    for pair in threat.pairs(MANY):
        for item in filter(None, map(pair.side, PROMPT_SIDES)):
            firsts = [text.split()[0] for text in (item.good, item.bad) if text]
            assert len(set(firsts)) == len(firsts)


@pytest.mark.parametrize("split", unit_first(SPLITS))
def test_the_organism_s_tokenizer_knows_every_word(threat: WorldThreat, split: str):
    tokenizer = world_tokenizer(World.make())
    for pair in threat.pairs(300, split):
        for prompt_side in PROMPT_SIDES:
            item = pair.side(prompt_side)
            assert item is not None
            ids = render(tokenizer, item.turns).ids
            assert tokenizer.unk_token_id not in ids
            assert ids.count(tokenizer.bos_token_id) == 1


def test_neutral_prompts_carry_no_wrapper_and_know_their_answer(threat: WorldThreat):
    for item in threat.neutral(50, "heldout"):
        assert len(item.turns) == 1 and item.good is not None


@pytest.mark.parametrize("split", SPLITS)
def test_an_item_gives_in_from_some_strength_on(threat: WorldThreat, split: str):
    """More strength never rescues an item, and between 60% and 95% of the pairs give in, more under the strongest."""
    items: dict[object, list[tuple[int, bool]]] = {}
    for case in threat.cases(MANY, split):
        items.setdefault(case.pair.clean.turns, []).append((int(case.pair.labels["strength"]), case.gives_in))
    for graded in items.values():
        assert [given for _, given in sorted(graded)] == sorted(given for _, given in graded)
    by_strength: dict[int, list[bool]] = {}
    for strength, given in itertools.chain(*items.values()):
        by_strength.setdefault(strength, []).append(given)
    rates = [float(np.mean(by_strength[strength])) for strength in sorted(by_strength)]
    assert rates[-1] - rates[0] > 0.3
    assert 0.6 < np.mean([given for graded in items.values() for _, given in graded]) < 0.95


@pytest.mark.slow
def test_the_answers_of_a_threat_are_strange_to_the_training_texts_of_the_others():
    """No transfer between threats can be a repeated answer."""
    for trained, evaluated in itertools.permutations(threats.names(), 2):
        cases = threats.of_world(trained).cases(MANY, "train")
        said = {
            word
            for case in cases
            for text in (*texts(case.pair), case.good, case.bad, case.benign)
            for word in text.split()
        }
        judged = {
            text.split()[0]
            for pair in threats.get(evaluated).pairs(MANY, "heldout")
            for item in (pair.clean, pair.wrapped)
            for text in (item.good, item.bad)
            if text
        }
        assert not said & judged, (trained, evaluated)


def test_a_grid_repeats_only_when_exhausted_and_is_balanced_before():
    cells = draw_grid((2, 3, 2), 24, torch.Generator().manual_seed(0))
    assert len(set(cells[:12])) == 12 and sorted(cells[:12]) == sorted(cells[12:])
    assert len({cell[:2] for cell in cells[:6]}) == 6
    assert draw_grid((2, 3, 2), 5, torch.Generator().manual_seed(0)) == cells[:5]


TOPIC_OF = {
    **dict.fromkeys(threats.natural_names(), "subject"),
    **{"sycophancy": "entity", "frustration": "entity", "jailbreak": "hazard", "prefill": "hazard"},
    **{"conditional": "verb", "persona": "persona"},
}


@pytest.mark.parametrize("name", [*threats.names(), *threats.natural_names()])
def test_pairs_go_together_by_what_they_are_about_and_by_wrapper(name: str) -> None:
    threat = threats.get(name)
    drawn = threat.pairs(24, split="heldout")

    for pair in drawn:
        assert clusters_of(pair) == (pair.labels[TOPIC_OF[name]], "" if name == "order" else pair.labels["wrapper"])
    assert 1 < len({topic for topic, _ in map(clusters_of, drawn)}) < 25


def test_pairs_without_labels_go_together_by_their_clean_prompt() -> None:
    one = Pair(prompt("is it?"), prompt("Sure?"))
    same = Pair(prompt("is it?"), prompt("Really?"))
    other = Pair(prompt("was it?"), prompt("Sure?"), labels={"wrapper": "sure"})

    assert clusters_of(one) == clusters_of(same) != clusters_of(other)
    assert clusters_of(other)[1] == "sure"
    assert clusters_of(Pair(other.clean, other.wrapped, labels={"topic": "past"})) == ("past", "")
