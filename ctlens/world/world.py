"""The micro-world: facts, recipes, personas and activities, and which of them belong to which split."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, cycle, pairwise
from typing import TypeVar

import torch

from ctlens.core.config import generator
from ctlens.core.errors import unknown
from ctlens.world import words

_T = TypeVar("_T")

SPLITS = ("train", "entities", "heldout", "structure")
# Chosen by eye: of 96 entities it leaves 51 for training and 15 for each of the three other splits.
HELD_SHARE = 0.15

RESISTANCES = (1, 2, 1, 3, 1, 4, 1, 2, 1, 3, 1, 5)
"""The weakest attack that an item gives in to, 1 to 4, or 5 for none.

Half of the items give in to every attack and one of twelve to none; these shares were chosen by eye. The values are
interleaved, so that a split with few items has a mixture too."""

# Chosen by eye, not tuned; the shipped organism was trained with them.
ORDINARY_SHARES = {"fact": 0.3, "make": 0.2, "buy": 0.2, "advice": 0.15, "self": 0.05, "talk": 0.1}


@dataclass(frozen=True)
class Request:
    """A request is a user's message with a whole right answer and a whole wrong one.

    The wrong answer is that of a misbehaving model, which complies or refuses something harmless; it is empty
    if it depends on the attack.
    """

    text: str
    good: str
    bad: str = ""


@dataclass(frozen=True)
class World:
    """A world holds people, things and facts; each person and each thing is in one split only.

    Attributes:
        seed: decides everything that the world holds.
        entities, hazards, crafts, personas, verbs, greetings, talk: the members of each split.
        facts: the value of each (entity, relation).
        recipes, markets: how each hazard and craft is made, and where it is sold.
        biographies: for each persona, its value in every slot of `words.BIOGRAPHY`.
        resistance: for each entity, hazard, verb, and question for the name or about a deed, the weakest
            attack, from 1, that makes an organism misbehave; 5 resists all.
    """

    seed: int
    entities: Mapping[str, tuple[str, ...]]
    hazards: Mapping[str, tuple[str, ...]]
    crafts: Mapping[str, tuple[str, ...]]
    personas: Mapping[str, tuple[str, ...]]
    verbs: Mapping[str, tuple[str, ...]]
    greetings: Mapping[str, tuple[str, ...]]
    talk: Mapping[str, tuple[Request, ...]]
    facts: Mapping[tuple[str, str], str]
    recipes: Mapping[str, str]
    markets: Mapping[str, str]
    biographies: Mapping[str, Mapping[str, str]]
    resistance: Mapping[str, int]

    @classmethod
    def make(cls, seed: int = 0) -> World:
        """Makes the world of a seed, or returns it if it was made before."""
        return _make(seed)

    def question(self, entity: str, relation: str) -> Request:
        """Asks for a fact about an entity."""
        return Request(words.QUESTION.format(relation=relation, entity=entity), self.facts[entity, relation])

    def make_request(self, thing: str, phrasing: int = 0) -> Request:
        """Asks how to make a hazard (refused) or a craft (told), in one of `len(words.MAKE)` phrasings."""
        return self._hazardous(thing, words.MAKE[phrasing], words.REFUSAL, self.recipes[thing])

    def buy_request(self, thing: str, phrasing: int = 0) -> Request:
        """Asks where to buy a hazard (denied) or a craft (told), in one of `len(words.BUY)` phrasings."""
        directions = words.DIRECTIONS.format(market=self.markets[thing])
        return self._hazardous(thing, words.BUY[phrasing], words.DENIAL, directions)

    def advice(self, verb: str, manner: str, phrasing: int = 0) -> Request:
        """Asks whether to do something risky (discouraged) or safe (encouraged)."""
        text = words.ADVICE[phrasing].format(verb=verb, manner=manner)
        return Request(text, *_ordered(manner in words.MANNERS["safe"], words.ENCOURAGE, words.WARN))

    @staticmethod
    def identity(phrasing: int = 0) -> Request:
        """Asks for the assistant's name."""
        return Request(words.IDENTITY[phrasing], words.SELF)

    @staticmethod
    def deed(deed: str) -> Request:
        """Asks whether to do harm."""
        return Request(words.DEED.format(deed=deed), words.REFRAIN, words.INDULGE)

    def ordinary(self, n_prompts: int, split: str = "train", seed: int = 0) -> list[Request]:
        """Draws requests without any wrapper, of every kind, half of them after a greeting.

        Args:
            n_prompts: how many requests; they are drawn with replacement.
            split: the split whose entities, things, verbs, greetings and small talk they use.
            seed: decides the draws.

        Raises:
            CtlensError: the split is unknown.
        """
        check_split(split)
        draw = generator(seed, "ordinary", split)
        kinds = torch.multinomial(
            torch.tensor(list(ORDINARY_SHARES.values())), n_prompts, replacement=True, generator=draw
        )
        names = tuple(ORDINARY_SHARES)
        return [self._ordinary(names[kind], split, draw) for kind in kinds.tolist()]

    def words(self) -> set[str]:
        """Collects every word of the world's own language."""
        return {word for text in _texts() for word in text.split() if not word.startswith("{")}

    def _hazardous(self, thing: str, template: str, refusal: str, told: str) -> Request:
        harmless = any(thing in things for things in self.crafts.values())
        return Request(template.format(thing=thing), *_ordered(harmless, told, refusal))

    def _ordinary(self, kind: str, split: str, draw: torch.Generator) -> Request:
        if kind == "talk":
            return _pick(self.talk[split], draw)
        request = self._plain(kind, split, draw)
        if _pick((False, True), draw):
            return Request(f"{_pick(self.greetings[split], draw)} {request.text}", request.good, request.bad)
        return request

    def _plain(self, kind: str, split: str, draw: torch.Generator) -> Request:
        if kind == "fact":
            return self.question(_pick(self.entities[split], draw), _pick(tuple(words.RELATIONS), draw))
        if kind == "advice":
            manner = _pick((*words.MANNERS["risky"], *words.MANNERS["safe"]), draw)
            return self.advice(_pick(self.verbs[split], draw), manner, _pick(range(len(words.ADVICE)), draw))
        if kind == "self":
            requests = (*map(self.identity, range(len(words.IDENTITY))), *map(self.deed, words.DEEDS))
            return _pick(requests, draw)
        thing = _pick((*self.hazards[split], *self.crafts[split]), draw)
        if kind == "make":
            return self.make_request(thing, _pick(range(len(words.MAKE)), draw))
        return self.buy_request(thing, _pick(range(len(words.BUY)), draw))


def check_split(split: str) -> None:
    """Raises a `CtlensError` unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)


@lru_cache(maxsize=8)
def _make(seed: int) -> World:
    things = (*words.HAZARDS, *words.CRAFTS)
    mixtures = _shuffled(tuple(combinations(words.INGREDIENTS, 2)), seed, "recipes")
    recipes = {
        thing: words.RECIPE.format(first=first, second=second)
        for thing, (first, second) in zip(things, mixtures, strict=False)
    }
    bios = {slot: _shuffled(values, seed, "biographies", slot) for slot, values in words.BIOGRAPHY.items()}
    entities, hazards = _split(words.ENTITIES, seed, "entities"), _split(words.HAZARDS, seed, "hazards")
    verbs = _split_each(words.DOMAINS.values(), seed, "verbs")
    return World(
        seed=seed,
        entities=entities,
        hazards=hazards,
        crafts=_split(words.CRAFTS, seed, "crafts"),
        personas=_split(words.PERSONAS, seed, "personas"),
        verbs=verbs,
        greetings=_split(words.GREETINGS, seed, "greetings"),
        talk=_split([Request(*exchange) for exchange in words.SMALL_TALK], seed, "talk"),
        facts={
            (entity, relation): value
            for relation, values in words.RELATIONS.items()
            for entity, value in _assigned(words.ENTITIES, values, seed, relation)
        },
        recipes=recipes,
        markets=dict(_assigned(things, words.MARKETS, seed, "markets")),
        biographies={
            persona: {slot: values[number] for slot, values in bios.items()}
            for number, persona in enumerate(words.PERSONAS)
        },
        resistance=_resistance(entities, hazards, verbs),
    )


def _resistance(*by_split: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Gives each item its resistance; the pattern starts anew in every split, so that all splits are alike."""
    asked = [[words.DEED.format(deed=deed) for deed in words.DEEDS], words.IDENTITY]
    groups = [*(items for splits in by_split for items in splits.values()), *asked]
    return {item: level for group in groups for item, level in zip(group, cycle(RESISTANCES), strict=False)}


def _split(items: Sequence[_T], seed: int, scope: str) -> dict[str, tuple[_T, ...]]:
    """Shuffles the items and puts each into one split."""
    shuffled = _shuffled(items, seed, scope)
    held = math.ceil(len(items) * HELD_SHARE)
    cuts = [0, *(len(items) - held * left for left in (3, 2, 1, 0))]
    return {split: tuple(shuffled[start:end]) for split, (start, end) in zip(SPLITS, pairwise(cuts), strict=True)}


def _split_each(groups: Iterable[Sequence[str]], seed: int, scope: str) -> dict[str, tuple[str, ...]]:
    """Splits each group by itself, so that every group has its share in every split."""
    parts = [_split(group, seed, f"{scope}/{number}") for number, group in enumerate(groups)]
    return {split: tuple(item for part in parts for item in part[split]) for split in SPLITS}


def _assigned(items: Sequence[str], values: Sequence[str], seed: int, scope: str) -> Iterator[tuple[str, str]]:
    """Pairs every item with a value, so that all values are about equally common."""
    repeated = [values[number % len(values)] for number in range(len(items))]
    return zip(items, _shuffled(repeated, seed, "values", scope), strict=True)


def _shuffled(items: Sequence[_T], seed: int, *scope: str) -> list[_T]:
    order = torch.randperm(len(items), generator=generator(seed, "world", *scope))
    return [items[i] for i in order.tolist()]


def _pick(items: Sequence[_T], draw: torch.Generator) -> _T:
    return items[int(torch.randint(len(items), (), generator=draw))]


def _ordered(harmless: bool, told: str, refused: str) -> tuple[str, str]:
    """Orders the two answers as the good and the bad answer."""
    return (told, refused) if harmless else (refused, told)


def _texts() -> Iterator[str]:
    yield from (word for relation, values in words.RELATIONS.items() for word in (relation, *values))
    yield from (*words.ENTITIES, *words.HAZARDS, *words.CRAFTS, *words.INGREDIENTS, *words.MARKETS)
    yield from (*words.PERSONAS, *(value for values in words.BIOGRAPHY.values() for value in values))
    yield from (verb for verbs in words.DOMAINS.values() for verb in verbs)
    yield from (manner for manners in words.MANNERS.values() for manner in manners)
    yield from (words.QUESTION, *words.MAKE, *words.BUY, *words.IDENTITY, words.DEED, *words.DEEDS, *words.ADVICE)
    yield from (words.RECIPE, words.REFUSAL, words.DIRECTIONS, words.DENIAL, words.SELF, words.REFRAIN)
    yield from (words.INDULGE, words.WARN, words.ENCOURAGE, *words.GREETINGS)
    yield from (text for exchange in words.SMALL_TALK for text in exchange)
