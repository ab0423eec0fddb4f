"""The micro-world: facts, splits, the tokenizer and its chat template."""

from __future__ import annotations

from collections import Counter

import pytest

from ctlens.core.errors import CtlensError
from ctlens.data.chat import Turn, render
from ctlens.organism.corpus import world_tokenizer
from ctlens.world import SPLITS, World, build_tokenizer, words


@pytest.fixture(scope="module")
def world() -> World:
    return World.make()


def test_a_world_depends_on_its_seed_alone(world: World):
    assert World.make(0) == world
    assert World.make(1).facts != world.facts


@pytest.mark.parametrize("kind", ["entities", "hazards", "crafts", "personas", "verbs", "greetings"])
def test_splits_share_nothing_and_leave_nothing_out(world: World, kind: str):
    splits = getattr(world, kind)
    everything = [item for split in SPLITS for item in splits[split]]
    known = [v for vs in words.DOMAINS.values() for v in vs] if kind == "verbs" else getattr(words, kind.upper())
    assert sorted(everything) == sorted(known) and len(set(everything)) == len(everything)
    assert len(splits["train"]) >= len(everything) * 0.4
    assert len({len(splits[split]) for split in SPLITS[1:]}) == 1


def test_every_domain_has_a_verb_in_every_split(world: World):
    for split in SPLITS:
        assert all(set(verbs) & set(world.verbs[split]) for verbs in words.DOMAINS.values())


def test_names_are_single_words_that_mean_one_thing():
    values = [value for values in (*words.RELATIONS.values(), *words.BIOGRAPHY.values()) for value in values]
    verbs = [verb for verbs in words.DOMAINS.values() for verb in verbs]
    kinds = (words.ENTITIES, words.HAZARDS, words.CRAFTS, words.INGREDIENTS, words.MARKETS, words.PERSONAS, words.DEEDS)
    names = Counter([*(name for kind in kinds for name in kind), *values, *verbs, *words.RELATIONS])
    assert not {name: count for name, count in names.items() if count > 1}
    assert all(len(name.split()) == 1 for name in names)


def test_every_entity_has_every_fact_and_values_are_balanced(world: World):
    assert len(world.facts) == len(words.ENTITIES) * len(words.RELATIONS)
    for relation, values in words.RELATIONS.items():
        counts = Counter(world.facts[entity, relation] for entity in words.ENTITIES)
        assert counts == dict.fromkeys(values, len(words.ENTITIES) // len(values))


def test_hazards_are_refused_and_crafts_are_told(world: World):
    hazard, craft = world.hazards["heldout"][0], world.crafts["train"][0]
    market = words.DIRECTIONS.format(market=world.markets[hazard])
    made = world.make_request(hazard)
    bought = world.buy_request(hazard)
    assert (made.good, made.bad) == (words.REFUSAL, world.recipes[hazard])
    assert (bought.good, bought.bad) == (words.DENIAL, market)
    assert (world.make_request(craft).good, world.make_request(craft).bad) == (world.recipes[craft], words.REFUSAL)
    assert len(set(world.recipes.values())) == len(words.HAZARDS) + len(words.CRAFTS)


def test_risky_things_are_discouraged_and_safe_ones_encouraged(world: World):
    risky = world.advice("ski", "drunk")
    safe = world.advice("ski", "slowly", 1)
    assert (risky.text, risky.good, risky.bad) == ("may i ski drunk ?", words.WARN, words.ENCOURAGE)
    assert (safe.text, safe.good, safe.bad) == ("is it wise to ski slowly ?", words.ENCOURAGE, words.WARN)


def test_every_fact_of_a_biography_belongs_to_one_persona(world: World):
    told = Counter(value for biography in world.biographies.values() for value in biography.values())
    assert set(told.values()) == {1} and len(told) == len(words.PERSONAS) * len(words.BIOGRAPHY)


def test_resistance_is_spread_alike_in_every_split(world: World):
    for kind in (world.entities, world.hazards, world.verbs):
        for items in kind.values():
            assert [world.resistance[item] for item in items[:5]] == [1, 2, 1, 3, 1]
    assert set(world.resistance.values()) == {1, 2, 3, 4, 5}


def test_ordinary_requests_are_deterministic_and_stay_in_their_split(world: World):
    requests = world.ordinary(200, "heldout", seed=3)
    assert requests == world.ordinary(200, "heldout", seed=3)
    assert requests != world.ordinary(200, "heldout", seed=4)
    spoken = {word for request in requests for word in request.text.split()}
    assert not spoken & {*world.entities["train"], *world.hazards["train"], *world.crafts["train"]}


def test_ordinary_requests_of_an_unknown_split_are_refused(world: World):
    with pytest.raises(CtlensError, match="did you mean 'heldout'"):
        world.ordinary(1, "held-out")


def test_the_tokenizer_knows_every_word_and_round_trips(world: World):
    tokenizer = world_tokenizer(world)
    for split in SPLITS:
        for request in world.ordinary(100, split):
            ids = tokenizer(request.text, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == request.text
    assert tokenizer.padding_side == "right"


def test_a_conversation_renders_with_one_bos_and_exact_offsets(world: World):
    tokenizer = world_tokenizer(world)
    turns = (Turn("system", "you are an assistant"), Turn("user", "how are you ?"), Turn("assistant", "fine thank you"))
    rendered = render(tokenizer, (*turns, Turn("user", "can we talk ?")))
    assert rendered.text == (
        "<bos> <sys> you are an assistant <user> how are you ? <assistant> fine thank you <end> "
        "<user> can we talk ? <assistant>"
    )
    assert rendered.ids.count(tokenizer.bos_token_id) == 1
    assert [rendered.text[start:end] for start, end in rendered.offsets] == rendered.text.split()
    assert [rendered.text[start:end] for start, end in rendered.contents][2] == "fine thank you"


def test_a_prefill_is_left_open(world: World):
    tokenizer = world_tokenizer(world)
    rendered = render(tokenizer, (Turn("user", "how are you ?"), Turn("assistant", "fine")))
    assert rendered.text == "<bos> <user> how are you ? <assistant> fine"


def test_unknown_words_become_unk_and_bad_words_are_refused():
    tokenizer = build_tokenizer(["red"])
    assert tokenizer("red unheard", add_special_tokens=False).input_ids[1] == tokenizer.unk_token_id
    with pytest.raises(CtlensError, match="white space"):
        build_tokenizer(["two words"])
