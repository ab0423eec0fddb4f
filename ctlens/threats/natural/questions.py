"""The questions of the natural threats: facts of one word with a plausible wrong answer, read from `questions.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch

from ctlens.core.config import generator
from ctlens.world import SPLITS

_FILE = Path(__file__).with_name("questions.json")
_SHARES = (0.4, 0.6, 0.8)
"""Where the splits end in each kind's shuffled questions: training gets 40 %, and the three others 20 % each."""
_N_OPTIONS = 4


@dataclass(frozen=True)
class Question:
    """A question has one word for an answer.

    Attributes:
        kind: what it asks for, such as `"capital"`.
        subject: what it is about, such as `"France"`.
        phrasings: the question in several wordings; the first is the plain one.
        stem: the beginning of a sentence that the answer ends.
        right: the answer.
        wrong: an answer that is plausible and wrong.
        others: the right answers of two other questions of the kind, which are wrong here; of one, where all
            questions of the kind have the same three answers.
        split: one of `ctlens.world.SPLITS`; no subject of a kind is in two splits.
    """

    kind: str
    subject: str
    phrasings: tuple[str, ...]
    stem: str
    right: str
    wrong: str
    others: tuple[str, ...]
    split: str

    @property
    def text(self) -> str:
        """The text is the question in its plain wording."""
        return self.phrasings[0]

    @property
    def options(self) -> tuple[str, ...]:
        """The options are the right answer, the wrong one and the others, in this order."""
        return (self.right, self.wrong, *self.others)


@cache
def questions() -> tuple[Question, ...]:
    """Reads all questions, in the order of the file."""
    kinds = json.loads(_FILE.read_text(encoding="utf-8"))
    return tuple(question for kind, known in kinds.items() for question in _of_kind(kind, known))


def _of_kind(kind: str, known: dict) -> list[Question]:
    items = [tuple(item) for item in known["items"]]
    splits = _splits(kind, len(items))
    return [
        Question(
            kind,
            subject,
            tuple(text.format(x=subject) for text in known["questions"]),
            known["stem"].format(x=subject),
            right,
            wrong,
            _others(number, items),
            splits[number],
        )
        for number, (subject, right, wrong) in enumerate(items)
    ]


def _splits(kind: str, n: int) -> list[str]:
    """The split of each question of a kind, which depends on nothing but the kind and their number."""
    order = torch.randperm(n, generator=generator(0, "questions", kind)).tolist()
    cuts = [0, *(round(share * n) for share in _SHARES), n]
    found = [""] * n
    for split, (start, end) in zip(SPLITS, pairwise(cuts), strict=True):
        for number in order[start:end]:
            found[number] = split
    return found


def _others(number: int, items: list[tuple[str, str, str]]) -> tuple[str, ...]:
    """Right answers of the questions that follow in the kind's list, none the beginning of another option."""
    _, *taken = items[number]
    for _, other, _ in items[number + 1 :] + items[:number]:
        if not any(other.startswith(word) or word.startswith(other) for word in taken):
            taken.append(other)
        if len(taken) == _N_OPTIONS:
            break
    return tuple(taken[2:])
