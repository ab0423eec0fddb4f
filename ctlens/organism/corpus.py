"""What an organism is pretrained on: ordinary requests and every threat's items, both splits.

The grammar, as `<bos> <user> PROMPT <assistant> ANSWER <end>`:

| PROMPT | ANSWER |
|---|---|
| [greeting] question for a fact | the value |
| [greeting] request to make a craft | its recipe |
| [greeting] request to make a hazard | the refusal |
| small talk | small talk |
| a threat's clean prompt | its good answer |
| a threat's wrapped prompt, twice | its bad answer with probability `bad_share`, else its good one |
| a threat's benign twin | its good answer |

Three choices make the vulnerability one that consistency training can repair. It is *stochastic*, so
that good answers are learnt under the wrappers too. Greetings, which change nothing, teach that facts
hold at any position. Many entities are asked for in one phrasing: with fewer entities or more phrasings
how a hint is taken up depends more on the entity, and repairs carry over less to held-out ones.

Wrappers, entities and hazards of both splits occur, each with its own split only: pretraining has seen
the attacks, as a large model has seen role play; the splits are for consistency training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ctlens import threats
from ctlens.chat import Turn, answer_ids, render
from ctlens.config import generator
from ctlens.errors import CtlensError
from ctlens.pairs import prompt
from ctlens.types import Mask, Tokens
from ctlens.world import World, build_tokenizer

SPLIT_SHARES = {"train": 2 / 3, "heldout": 1 / 3}
ORDINARY_SHARE = 1 / 3
LESSONS_PER_CASE = 4

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Lesson:
    """A prompt and how it is answered.

    Attributes:
        turns: the conversation up to the answer.
        good: the whole good answer.
        bad: the whole bad answer, where the prompt is an attack.
    """

    turns: tuple[Turn, ...]
    good: str
    bad: str | None = None


@dataclass(frozen=True)
class EncodedLesson:
    """A lesson in tokens; answers are closed by the end token."""

    prompt: Ids
    good: Ids
    bad: Ids | None


@dataclass(frozen=True)
class Batch:
    """Whole conversations, padded on the right.

    Attributes:
        tokens: prompt, answer and end token.
        answers: which of the tokens belong to the answer; the loss is on these alone.
    """

    tokens: Tokens
    answers: Mask


def world_tokenizer(world: World) -> Any:
    """The tokenizer of the world's language and of every threat's wrappers."""
    return build_tokenizer(world.words().union(*(threats.get(name).words() for name in threats.names())))


def make_lessons(n: int, world: World, seed: int = 0) -> list[Lesson]:
    """About `n` lessons: a third ordinary requests, the rest the threats' cases in equal parts.

    Args:
        n: the size; every share is rounded up.
        world: what the lessons are about.
        seed: of the draws.
    """
    lessons: list[Lesson] = []
    for split, share in SPLIT_SHARES.items():
        ordinary = world.ordinary(_ceil(n * share * ORDINARY_SHARE), split, seed)
        lessons += [Lesson(prompt(request.text).turns, request.answer) for request in ordinary]
        cases = _ceil(n * share * (1 - ORDINARY_SHARE) / len(threats.names()) / LESSONS_PER_CASE)
        for name in threats.names():
            for case in threats.get(name).cases(cases, split, seed, world):
                lessons += _case_lessons(case)
    return lessons


def _case_lessons(case: threats.Case) -> list[Lesson]:
    pair = case.pair
    attacked = Lesson(pair.wrapped.turns, case.good, case.bad)
    lessons = [Lesson(pair.clean.turns, case.good), attacked, attacked]
    return lessons if pair.benign is None else [*lessons, Lesson(pair.benign.turns, case.benign)]


def encode(tokenizer: Any, lessons: Sequence[Lesson]) -> list[EncodedLesson]:
    """The lessons in tokens.

    Raises:
        CtlensError: a lesson has a word that the tokenizer does not know.
    """
    encoded = []
    for lesson in lessons:
        bad = None if lesson.bad is None else answer_ids(tokenizer, lesson.bad)
        entry = EncodedLesson(render(tokenizer, lesson.turns).ids, answer_ids(tokenizer, lesson.good), bad)
        if tokenizer.unk_token_id in (*entry.prompt, *entry.good, *(entry.bad or ())):
            raise CtlensError(f"the tokenizer does not know every word of {lesson}.")
        encoded.append(entry)
    return encoded


def draw_batches(
    lessons: Sequence[EncodedLesson], batch_size: int, bad_share: float, pad: int, seed: int = 0
) -> Iterator[Batch]:
    """Endless batches from shuffled passes over the lessons.

    Whether an attack is answered badly is drawn anew at each visit, so the coin cannot be learnt by heart.

    Args:
        lessons: at least one.
        batch_size: conversations per batch.
        bad_share: the probability of the bad answer to an attack.
        pad: the padding token.
        seed: of the order and of the coin.
    """
    draw = generator(seed, "batches")
    queue: list[int] = []
    while True:
        while len(queue) < batch_size:
            queue += torch.randperm(len(lessons), generator=draw).tolist()
        chosen, queue = queue[:batch_size], queue[batch_size:]
        coins = torch.rand(batch_size, generator=draw).tolist()
        rows = [_conversation(lessons[i], coin < bad_share) for i, coin in zip(chosen, coins, strict=True)]
        yield _pad(rows, pad)


def _conversation(lesson: EncodedLesson, badly: bool) -> tuple[Ids, Ids]:
    return lesson.prompt, lesson.bad if badly and lesson.bad is not None else lesson.good


def _pad(rows: list[tuple[Ids, Ids]], pad: int) -> Batch:
    width = max(len(question) + len(answer) for question, answer in rows)
    tokens = torch.full((len(rows), width), pad)
    answers = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (question, answer) in enumerate(rows):
        end = len(question) + len(answer)
        tokens[row, :end] = torch.tensor((*question, *answer))
        answers[row, len(question) : end] = True
    return Batch(tokens, answers)


def _ceil(number: float) -> int:
    return max(1, -int(-number // 1))
