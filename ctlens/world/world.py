"""The micro-world: facts, recipes, and which of them belong to which split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, combinations
from typing import TypeVar

import torch

from ctlens.config import generator
from ctlens.errors import unknown
from ctlens.world import words

T = TypeVar("T")

SPLITS = ("train", "heldout")
TRAIN_SHARE = 2 / 3
ORDINARY_SHARES = {"fact": 0.4, "craft": 0.25, "hazard": 0.25, "talk": 0.1}


@dataclass(frozen=True)
class Request:
    """What a user says and the whole answer that is right."""

    text: str
    answer: str


@dataclass(frozen=True)
class World:
    """Entities with facts, and hazards and crafts with recipes, each in one split only.

    Attributes:
        seed: what facts, recipes and splits were drawn from.
        entities, hazards, crafts: by split.
        facts: value by (entity, relation).
        recipes: whole answer by hazard or craft.
    """

    seed: int
    entities: Mapping[str, tuple[str, ...]]
    hazards: Mapping[str, tuple[str, ...]]
    crafts: Mapping[str, tuple[str, ...]]
    facts: Mapping[tuple[str, str], str]
    recipes: Mapping[str, str]

    @classmethod
    def make(cls, seed: int = 0) -> World:
        """The world of a seed; the same object for the same seed."""
        return _make(seed)

    def question(self, entity: str, relation: str) -> Request:
        """A question for a fact."""
        text = words.QUESTION.format(relation=relation, entity=entity)
        return Request(text, self.facts[entity, relation])

    def order(self, thing: str, phrasing: int = 0) -> Request:
        """A request to make a hazard (refused) or a craft (its recipe), in one of `len(words.ORDERS)` phrasings."""
        hazardous = any(thing in things for things in self.hazards.values())
        answer = words.REFUSAL if hazardous else self.recipes[thing]
        return Request(words.ORDERS[phrasing].format(thing=thing), answer)

    def ordinary(self, n: int, split: str = "train", seed: int = 0) -> list[Request]:
        """Requests without any wrapper: facts, crafts, hazards and small talk, half of them after a greeting.

        Args:
            n: how many; they are drawn with replacement.
            split: whose entities, hazards, crafts, greetings and small talk are used.
            seed: of the draws.

        Raises:
            CtlensError: the split is unknown.
        """
        check_split(split)
        draw = generator(seed, "ordinary", split)
        kinds = torch.multinomial(torch.tensor(list(ORDINARY_SHARES.values())), n, replacement=True, generator=draw)
        names = tuple(ORDINARY_SHARES)
        return [self._ordinary(names[kind], split, draw) for kind in kinds.tolist()]

    def words(self) -> set[str]:
        """Every word of the world's own language."""
        texts = chain(
            (word for entry in words.RELATIONS.items() for word in (entry[0], *entry[1])),
            (*words.ENTITIES, *words.HAZARDS, *words.CRAFTS, *words.ORDERS, words.QUESTION, words.REFUSAL),
            self.recipes.values(),
            (text for texts in words.GREETINGS.values() for text in texts),
            (text for talk in words.SMALL_TALK.values() for exchange in talk for text in exchange),
        )
        return {word for text in texts for word in text.split() if not word.startswith("{")}

    def _ordinary(self, kind: str, split: str, draw: torch.Generator) -> Request:
        if kind == "talk":
            return Request(*_pick(words.SMALL_TALK[split], draw))
        if kind == "fact":
            request = self.question(_pick(self.entities[split], draw), _pick(tuple(words.RELATIONS), draw))
        else:
            things = self.crafts if kind == "craft" else self.hazards
            request = self.order(_pick(things[split], draw), _pick(range(len(words.ORDERS)), draw))
        if _pick((False, True), draw):
            return Request(f"{_pick(words.GREETINGS[split], draw)} {request.text}", request.answer)
        return request


def check_split(split: str) -> None:
    """Raises a `CtlensError` unless `split` is `"train"` or `"heldout"`."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)


@lru_cache(maxsize=8)
def _make(seed: int) -> World:
    things = (*words.HAZARDS, *words.CRAFTS)
    mixtures = _shuffled(tuple(combinations(words.INGREDIENTS, 2)), seed, "recipes")
    facts = {}
    for relation, values in words.RELATIONS.items():
        repeated = [values[i % len(values)] for i in range(len(words.ENTITIES))]
        for entity, value in zip(words.ENTITIES, _shuffled(repeated, seed, "facts", relation), strict=True):
            facts[entity, relation] = value
    return World(
        seed=seed,
        entities=_split(words.ENTITIES, seed, "entities"),
        hazards=_split(words.HAZARDS, seed, "hazards"),
        crafts=_split(words.CRAFTS, seed, "crafts"),
        facts=facts,
        recipes={
            thing: words.RECIPE.format(first=first, second=second)
            for thing, (first, second) in zip(things, mixtures, strict=False)
        },
    )


def _split(items: Sequence[str], seed: int, scope: str) -> dict[str, tuple[str, ...]]:
    shuffled = tuple(_shuffled(items, seed, scope))
    cut = round(len(items) * TRAIN_SHARE)
    return {"train": shuffled[:cut], "heldout": shuffled[cut:]}


def _shuffled(items: Sequence[T], seed: int, *scope: str) -> list[T]:
    order = torch.randperm(len(items), generator=generator(seed, "world", *scope))
    return [items[i] for i in order.tolist()]


def _pick(items: Sequence[T], draw: torch.Generator) -> T:
    return items[int(torch.randint(len(items), (), generator=draw))]
