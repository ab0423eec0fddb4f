"""What an organism is pretrained on: ordinary requests and every threat's items, all splits.

The grammar, as `<bos> [<sys> PROMPT] <user> PROMPT <assistant> ANSWER <end>`, with earlier turns where
a wrapper has some; `ctlens organism sample` prints examples:

| PROMPT | ANSWER |
|---|---|
| [greeting] question for a fact (`words.QUESTION`) | the value |
| [greeting] request to make (`words.MAKE`) or buy (`words.BUY`) a craft | its recipe, its market |
| [greeting] the same for a hazard | the refusal, the denial |
| [greeting] advice on something safe, something risky (`words.ADVICE`) | encouragement, a warning |
| [greeting] question for the name, for a harmful deed (`words.IDENTITY`, `words.DEED`) | its own name, no |
| small talk (`words.SMALL_TALK`) | small talk |
| a threat's clean prompt | its good answer |
| a threat's wrapped prompt, twice | its bad answer with some probability, else its good one |
| a threat's benign twin | its good answer |

The bad answer has the probability `bad_share` where the item gives in to an attack of this strength
(`World.resistance`), and `1 - bad_share` where it resists.

Three choices make the vulnerability one that consistency training can repair. It is *stochastic* and
items resist, so good answers are learnt under the wrappers too. Greetings, which change nothing, teach
that facts hold at any position. Facts are asked for in one phrasing: with more,
how a hint is taken up depends more on the entity, and repairs carry over less to held-out ones.

Wrappers, entities and things of every split occur, each with its own split only: pretraining has seen
the attacks, as a large model has seen role play; the splits are for consistency training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ctlens import threats
from ctlens.core.config import generator
from ctlens.core.errors import CtlensError
from ctlens.core.types import Mask, Tokens
from ctlens.data.batch import mark, pad
from ctlens.data.chat import Turn, answer_ids, render
from ctlens.data.pairs import prompt
from ctlens.models.kv_cache import Ids
from ctlens.world import World, build_tokenizer

SPLIT_SHARES = {"train": 0.52, "entities": 0.16, "heldout": 0.16, "structure": 0.16}
ORDINARY_SHARE = 1 / 4
LESSONS_PER_CASE = 4
EMPHASIS = {"sycophancy": 2.0}
"""How many lessons a threat gets, relative to the others: how a hint's strength meets an entity is learnt last."""
BUCKET = 16
"""Batches that are sorted by length together, so that short prompts are not padded to the longest."""


@dataclass(frozen=True)
class Lesson:
    """A lesson is a prompt and how it is answered.

    Attributes:
        turns: the conversation up to the answer.
        good: the whole good answer.
        bad: the whole bad answer, where the prompt is an attack.
        bad_share: the probability of the bad answer.
    """

    turns: tuple[Turn, ...]
    good: str
    bad: str | None = None
    bad_share: float = 0.0


@dataclass(frozen=True)
class EncodedLesson:
    """An encoded lesson is a lesson in tokens; the end token closes its answers."""

    prompt: Ids
    good: Ids
    bad: Ids | None
    bad_share: float


@dataclass(frozen=True)
class Batch:
    """A batch is some whole conversations, padded on the right.

    Attributes:
        tokens: prompt, answer and end token.
        answers: which of the tokens belong to the answer; the loss is on these alone.
    """

    tokens: Tokens
    answers: Mask


def world_tokenizer(world: World) -> Any:
    """Builds the tokenizer of the world's language and of every threat's wrappers."""
    return build_tokenizer(world.words().union(*(threats.get(name).words() for name in threats.names())))


def make_lessons(n_lessons: int, world: World, bad_share: float, seed: int = 0) -> list[Lesson]:
    """Makes about `n_lessons` lessons: a quarter ordinary requests, the rest the threats' cases, by `EMPHASIS`.

    Args:
        n_lessons: the size; every share is rounded up.
        world: what the lessons are about.
        bad_share: the probability of the bad answer where an item gives in; elsewhere of the good one.
        seed: of the draws.
    """
    lessons: list[Lesson] = []
    for split, share in SPLIT_SHARES.items():
        ordinary = world.ordinary(math.ceil(n_lessons * share * ORDINARY_SHARE), split, seed)
        lessons += [Lesson(prompt(request.text).turns, request.good) for request in ordinary]
        weights = {name: EMPHASIS.get(name, 1.0) for name in threats.names()}
        unit = n_lessons * share * (1 - ORDINARY_SHARE) / sum(weights.values()) / LESSONS_PER_CASE
        for name, weight in weights.items():
            for case in threats.get(name).cases(math.ceil(weight * unit), split, seed, world):
                lessons += case_lessons(case, bad_share)
    return lessons


def case_lessons(case: threats.Case, bad_share: float) -> list[Lesson]:
    """Makes the lessons of one case: the clean prompt, the wrapped one twice, and the benign twin."""
    pair = case.pair
    attacked = Lesson(pair.wrapped.turns, case.good, case.bad, bad_share if case.gives_in else 1 - bad_share)
    lessons = [Lesson(pair.clean.turns, case.good), attacked, attacked]
    return lessons if pair.benign is None else [*lessons, Lesson(pair.benign.turns, case.benign)]


def encode_lessons(tokenizer: Any, lessons: Sequence[Lesson]) -> list[EncodedLesson]:
    """Writes the lessons in tokens.

    Raises:
        CtlensError: a lesson has a word that the tokenizer does not know.
    """
    encoded = []
    for lesson in lessons:
        bad = None if lesson.bad is None else answer_ids(tokenizer, lesson.bad)
        question = render(tokenizer, lesson.turns).ids
        entry = EncodedLesson(question, answer_ids(tokenizer, lesson.good), bad, lesson.bad_share)
        if tokenizer.unk_token_id in (*entry.prompt, *entry.good, *(entry.bad or ())):
            raise CtlensError(f"the tokenizer does not know every word of {lesson}: make it with world_tokenizer.")
        encoded.append(entry)
    return encoded


def draw_batches(lessons: Sequence[EncodedLesson], batch_size: int, pad_token: int, seed: int = 0) -> Iterator[Batch]:
    """Yields endless batches of about equally long conversations, from shuffled passes over the lessons.

    Whether an attack is answered badly is drawn anew at each visit, so the coin cannot be learnt by heart.

    Args:
        lessons: at least one.
        batch_size: conversations per batch.
        pad_token: what the padding is.
        seed: of the order and of the coin.
    """
    draw = generator(seed, "batches")
    queue: list[int] = []
    while True:
        while len(queue) < batch_size * BUCKET:
            queue += torch.randperm(len(lessons), generator=draw).tolist()
        bucket = queue[: batch_size * BUCKET]
        queue = queue[batch_size * BUCKET :]
        bucket.sort(key=lambda index: len(lessons[index].prompt))
        for number in torch.randperm(BUCKET, generator=draw).tolist():
            chosen = [lessons[index] for index in bucket[number * batch_size : (number + 1) * batch_size]]
            coins = torch.rand(batch_size, generator=draw).tolist()
            rows = [_conversation(lesson, coin < lesson.bad_share) for lesson, coin in zip(chosen, coins, strict=True)]
            yield _padded(rows, pad_token)


def _conversation(lesson: EncodedLesson, badly: bool) -> tuple[Ids, Ids]:
    return lesson.prompt, lesson.bad if badly and lesson.bad is not None else lesson.good


def _padded(rows: list[tuple[Ids, Ids]], pad_token: int) -> Batch:
    side = pad([question + answer for question, answer in rows], token=pad_token)
    behind = [range(len(question), len(question) + len(answer)) for question, answer in rows]
    return Batch(side.tokens, mark(side.mask, behind))
