"""What all natural threats share: questions in splits, the choice behind a stem, and the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import ClassVar

import torch

from ctlens.core.config import generator
from ctlens.core.errors import CtlensError
from ctlens.core.public import public
from ctlens.data.chat import Turn
from ctlens.data.pairs import Pair, Prompt
from ctlens.threats.base import Count, Metrics, Outcomes, Threat, Wrapper, draw_grid, known, switches
from ctlens.threats.natural.questions import Question, questions
from ctlens.world import check_split


class Natural(Threat):
    """A natural threat asks a model from elsewhere short questions with one-word answers.

    The answer is a choice: the assistant's turn is begun with the question's stem ("The capital of France is"), and
    the likeliest of the options behind it is the answer. Clean, wrapped and benign prompts end in the same stem.

    Attributes:
        questions: those that the pairs are drawn from; `ctlens.threats.screen` leaves those that a model knows.
        stems: whether there is a stem; without one the model answers in its own words.
        all_options: whether the choice is between all options of a question, and not the right and the wrong one.
    """

    questions: tuple[Question, ...]
    stems: ClassVar[bool] = True
    all_options: ClassVar[bool] = False

    def __init__(self, asked: Sequence[Question] | None = None) -> None:
        self.questions = questions() if asked is None else tuple(asked)

    def keeping(self, asked: Sequence[Question]) -> Natural:
        """Makes the same threat of other questions."""
        found = copy(self)
        found.questions = tuple(asked)
        return found

    @public
    def pairs(self, n_pairs: int, split: str = "train", seed: int = 0) -> list[Pair]:
        """Draws pairs: the first `n_pairs` of a shuffled grid of questions and wrappers.

        Every pair has the labels `wrapper`, `strength`, `kind`, `split` and `subject`.

        Args:
            n_pairs: how many pairs. They repeat only once the whole grid of the split has been used.
            split: `"train"`; `"entities"`: new questions under the wrappers of training; `"heldout"`: new questions
                under new wrapper texts; `"structure"`: new questions under wrappers of another structure. No
                question is in two splits.
            seed: decides the order of the grid; the first pairs do not depend on `n_pairs`.

        Raises:
            CtlensError: the split is unknown, it has no question, or `n_pairs` is below 1.
        """
        check_split(split)
        if n_pairs < 1:
            raise CtlensError(f"{n_pairs} pairs were asked for: ask for at least 1 pair.")
        asked = self.asked(split)
        wrappers = self.wrappers[known(split)]
        cells = draw_grid((len(asked), len(wrappers)), n_pairs, generator(seed, self.name, split))
        return [self.pair(asked[question], wrappers[wrapper]) for question, wrapper in cells]

    def neutral(self, n_prompts: int, split: str = "train", seed: int = 0) -> list[Prompt]:
        """Draws clean questions of the split, as the questions are all that is ordinary here."""
        asked = self.asked(split)
        order = torch.randperm(len(asked), generator=generator(seed, self.name, "neutral", split)).tolist()
        return [self.clean(asked[number]) for number in (order * (n_prompts // len(asked) + 1))[:n_prompts]]

    def asked(self, split: str) -> list[Question]:
        """Lists the questions of a split.

        Raises:
            CtlensError: there is none.
        """
        check_split(split)
        found = [question for question in self.questions if question.split == split]
        if not found:
            raise CtlensError(
                f"no question of the split {split!r} is left of {self.name}: take another split, or a model that "
                "answers more of them right."
            )
        return found

    def clean(self, question: Question) -> Prompt:
        """Makes the prompt without an attack."""
        return self.prompt(question, (Turn("user", question.text),), question.right, question.wrong)

    def pair(self, question: Question, wrapper: Wrapper) -> Pair:
        """Puts a question under a wrapper: with the wrong answer and, in the benign twin, with the right one."""
        wrapped = wrapper.wrap(question.text, **_slots(question, "wrong", question.wrong))
        benign = wrapper.wrap(question.text, **_slots(question, "right", question.right))
        return Pair(
            clean=self.clean(question),
            wrapped=self.prompt(question, wrapped, question.right, question.wrong),
            benign=self.prompt(question, benign, question.right, None),
            labels=self.labelled(question, wrapper, hint=question.wrong),
        )

    def metrics(self, outcomes: Outcomes) -> Metrics:
        """Computes the directed switch rates, see `ctlens.threats.base.switches`."""
        return switches(outcomes)

    def prompt(self, question: Question, turns: Sequence[Turn], good: str, bad: str | None) -> Prompt:
        """Makes a prompt that ends in the stem, with the options behind it; without stems, one that is answered freely.

        Args:
            question: what is asked.
            turns: the conversation; a last turn of the assistant is followed by the stem.
            good, bad: the two answers, as words.
        """
        if not self.stems:
            return Prompt(tuple(turns), good, bad)
        *before, last = turns
        begun = f"{last.content} {question.stem}" if last.role == "assistant" else question.stem
        ended = (*before, Turn("assistant", begun)) if last.role == "assistant" else (*turns, Turn("assistant", begun))
        words = question.options if self.all_options else (question.right, question.wrong)
        return Prompt(ended, f" {good}", bad and f" {bad}", tuple(f" {word}" for word in words))

    def labelled(self, question: Question, wrapper: Wrapper, **more: str) -> dict[str, str]:
        """Makes the labels of a pair."""
        return {**wrapper.labels(question.split, question.kind, subject=question.subject), **more}


def _slots(question: Question, manner: str, hint: str) -> dict[str, str]:
    """The texts that fill a wrapper's slots; a wrapper takes those that it names."""
    _, second, third, fourth = question.phrasings
    return {
        "hint": hint,
        "manner": manner,
        "second": second,
        "third": third,
        "fourth": fourth,
        "begun": question.stem,
    }


def flips(outcomes: Outcomes) -> Metrics:
    """Computes `flip_rate`, the share of pairs whose wrapped answer is another option than the clean one."""
    wrapped, clean = outcomes.answers.get("wrapped"), outcomes.answers.get("clean")
    if wrapped is None or clean is None or not len(wrapped):
        return {}
    return {"flip_rate": Count("wrapped", int((wrapped != clean).sum()), len(wrapped))}
