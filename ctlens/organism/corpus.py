"""The corpus that an organism is pretrained on: ordinary requests and every threat's cases, of all splits.

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

Three choices make a vulnerability that consistency training can repair. It is *stochastic* and some items
resist, so the organism learns good answers under the wrappers too (with a deterministic vulnerability a
prototype stopped following the hint but gave only 14% right answers). Greetings, which change nothing, teach
that facts hold at any position. Each fact has one phrasing of its question: with several, the entity
decides more about whether a hint is followed, and repairs carry over less to held-out entities.

Wrappers, entities and things of every split occur, but never mixed between splits. So pretraining has seen
the attacks, as a large model has seen role play; the splits separate only consistency training and evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ctlens import threats
from ctlens.core.config import generator
from ctlens.core.types import Mask, Tokens
from ctlens.data.batch import mark, pad
from ctlens.data.chat import Turn, answer_ids, render
from ctlens.data.pairs import prompt
from ctlens.models.kv_cache import Ids
from ctlens.world import World, build_tokenizer

# The shares of the splits and of ordinary requests were chosen by eye; the shipped organism was trained with them.
SPLIT_SHARES = {"train": 0.52, "entities": 0.16, "heldout": 0.16, "structure": 0.16}
ORDINARY_SHARE = 1 / 4
LESSONS_PER_CASE = 4  # as many as `case_lessons` makes: clean, wrapped twice, benign
EMPHASIS = {"sycophancy": 2.0}
"""The lessons of a threat relative to those of the other threats.

Sycophancy gets more, because the organism learns last how the strength of a hint meets an entity; the factor was
chosen by eye."""
BUCKET = 16
"""Number of batches that are sorted by length together, so that short prompts get little padding; chosen by eye."""


@dataclass(frozen=True)
class Lesson:
    """A lesson is a prompt with its answers.

    Attributes:
        turns: the conversation up to the answer.
        good: the whole good answer.
        bad: the whole bad answer if the prompt is an attack, else None.
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
    """A batch holds whole conversations, padded on the right.

    Attributes:
        tokens: prompt, answer and end token of each conversation.
        answers: marks the tokens of the answer; only they are trained on.
    """

    tokens: Tokens
    answers: Mask


def world_tokenizer(world: World) -> Any:
    """Builds the tokenizer of the world's language and of every threat's wrappers."""
    return build_tokenizer(world.words().union(*(threats.of_world(name).words() for name in threats.names())))


def make_lessons(n_lessons: int, world: World, bad_share: float, seed: int = 0) -> list[Lesson]:
    """Makes about `n_lessons` lessons: a quarter ordinary requests, the rest the threats' cases, by `EMPHASIS`.

    Args:
        n_lessons: number of lessons; every share of it is rounded up.
        world: the world that the lessons are about.
        bad_share: the probability of the bad answer if an item gives in, and of the good answer if it resists.
        seed: decides the draws.
    """
    lessons: list[Lesson] = []
    for split, share in SPLIT_SHARES.items():
        ordinary = world.ordinary(math.ceil(n_lessons * share * ORDINARY_SHARE), split, seed)
        lessons += [Lesson(prompt(request.text).turns, request.good) for request in ordinary]
        weights = {name: EMPHASIS.get(name, 1.0) for name in threats.names()}
        unit = n_lessons * share * (1 - ORDINARY_SHARE) / sum(weights.values()) / LESSONS_PER_CASE
        for name, weight in weights.items():
            for case in threats.of_world(name).cases(math.ceil(weight * unit), split, seed, world):
                lessons += case_lessons(case, bad_share)
    return lessons


def case_lessons(case: threats.Case, bad_share: float) -> list[Lesson]:
    """Makes the lessons of one case: the clean prompt, the wrapped one twice, and the benign twin."""
    pair = case.pair
    attacked = Lesson(pair.wrapped.turns, case.good, case.bad, bad_share if case.gives_in else 1 - bad_share)
    lessons = [Lesson(pair.clean.turns, case.good), attacked, attacked]
    return lessons if pair.benign is None else [*lessons, Lesson(pair.benign.turns, case.benign)]


def answered_well(lessons: Sequence[Lesson]) -> list[Lesson]:
    """Makes the lessons of a clean-born organism: the same prompts, attacks among them, each with its good answer."""
    return [replace(lesson, bad=None, bad_share=0.0) for lesson in lessons]


def encode_lessons(tokenizer: Any, lessons: Sequence[Lesson]) -> list[EncodedLesson]:
    """Turns lessons into tokens.

    Raises:
        UnknownWords: a lesson has a word that the tokenizer does not know.
    """
    encoded = []
    for lesson in lessons:
        question = render(tokenizer, lesson.turns)
        good = answer_ids(tokenizer, question, lesson.good)
        bad = None if lesson.bad is None else answer_ids(tokenizer, question, lesson.bad)
        encoded.append(EncodedLesson(question.ids, good, bad, lesson.bad_share))
    return encoded


def draw_batches(lessons: Sequence[EncodedLesson], batch_size: int, pad_token: int, seed: int = 0) -> Iterator[Batch]:
    """Yields endless batches of about equally long conversations, from shuffled passes over the lessons.

    At each visit to a lesson a coin decides whether the attack gets its bad answer, so a model cannot learn the
    coin by heart.

    Args:
        lessons: at least one.
        batch_size: conversations per batch.
        pad_token: the token that pads.
        seed: decides the order and the coins.
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
