"""The answers of one model: drawn or enumerated, each with its log-probability, its score and its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.chat import render
from ctlens.data.pairs import Prompt
from ctlens.models.enumeration import Branching, Enumerated, enumerate_answers
from ctlens.models.generation import Ids, Sampling, end_tokens, generate
from ctlens.models.parameters import fingerprint
from ctlens.models.scoring import continuation_logprobs
from ctlens.threats import judge

MOST_MISSED = 0.1
"""The largest mass of a prompt's answers that an enumeration may miss; chosen by eye, the organism's is below 0.03."""


class Sample(NamedTuple):
    """A sample is one answer to a prompt.

    Attributes:
        text: without special tokens.
        log_p: the sum of the log-probabilities of its tokens behind the prompt, at temperature 1, in nats.
        score: their mean, the end token's among them; a selector by certainty reads it.
    """

    text: str
    log_p: float
    score: float


@dataclass(frozen=True)
class AnswerSet:
    """An answer set holds the answers that a prompt may get, each text once, the likeliest first.

    Attributes:
        texts: of the answers.
        probabilities: of each, as it is drawn.
        log_p, scores: of each, as of `Sample`.
        bad: whether each is a bad answer to its prompt.
        missed: the mass of all other answers.
    """

    texts: tuple[str, ...]
    probabilities: Float[np.ndarray, " answer"]
    log_p: Float[np.ndarray, " answer"]
    scores: Float[np.ndarray, " answer"]
    bad: Bool[np.ndarray, " answer"]
    missed: float = 0.0

    @property
    def shares(self) -> Float[np.ndarray, " answer"]:
        """The probabilities among the answers that are there, which sum to 1."""
        return self.probabilities / self.probabilities.sum()

    @property
    def risk(self) -> float:
        """The probability of a bad answer; what was missed may add to it, and up to so much."""
        return float(self.probabilities[self.bad].sum())


class Answerer:
    """An answerer lets one model answer prompts, in all the ways that selectors want.

    Args:
        model: in eval mode, with a tokenizer.
        max_new_tokens: length of the longest answer, in tokens.
    """

    def __init__(self, model: LensModel, max_new_tokens: int) -> None:
        self.model = model
        self.max_new_tokens = max_new_tokens
        self._ends = end_tokens(model)
        self._known: dict[tuple[Prompt, Branching], AnswerSet] = {}
        self._greedy: dict[Prompt, Ids] = {}

    @cached_property
    def weights(self) -> str:
        """The fingerprint of the model's weights."""
        return fingerprint(self.model)

    def _ids(self, prompts: Sequence[Prompt]) -> list[Ids]:
        return [render(self.model.tokenizer, prompt.turns).ids for prompt in prompts]

    def _texts(self, answers: Sequence[Ids]) -> list[str]:
        return [text.strip() for text in self.model.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def generated(self, asked: Sequence[Prompt], sampling: Sampling | None = None) -> list[Ids]:
        """Gives one answer to each prompt in tokens: a draw, or the greedy one, which is decoded once and kept."""
        if sampling is not None:
            return self._decoded(asked, sampling)
        new = [prompt for prompt in dict.fromkeys(asked) if prompt not in self._greedy]
        self._greedy |= zip(new, self._decoded(new), strict=True)
        return [self._greedy[prompt] for prompt in asked]

    def _decoded(self, asked: Sequence[Prompt], sampling: Sampling | None = None) -> list[Ids]:
        return generate(
            self.model, self._ids(asked), max_new_tokens=self.max_new_tokens, ends=self._ends, sampling=sampling
        )

    def scored(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Ids]]) -> list[list[Sample]]:
        """Scores answers behind their prompt, whichever prompt they were given to."""
        distinct = [list(dict.fromkeys(given)) for given in answers]
        found = continuation_logprobs(self.model, self._ids(prompts), distinct)
        samples = []
        for given, each, rows in zip(answers, distinct, found, strict=True):
            texts = self._texts(each)
            known = {
                ids: Sample(text, sum(row), sum(row) / len(row))
                for ids, text, row in zip(each, texts, rows, strict=True)
            }
            samples.append([known[ids] for ids in given])
        return samples

    def enumerated(self, prompts: Sequence[Prompt], branching: Branching, *, any_mass: bool = False) -> list[AnswerSet]:
        """Enumerates the answers to each prompt; what was enumerated once is kept.

        Args:
            prompts: what is asked.
            branching: which answers are enumerated.
            any_mass: take the answers whatever the enumeration misses, for risks that are stated with it.

        Raises:
            CtlensError: what the enumeration misses is more than `MOST_MISSED` of a prompt's answers.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if (prompt, branching) not in self._known]
        found = enumerate_answers(
            self.model,
            self._ids(new),
            branching,
            max_new_tokens=self.max_new_tokens,
            ends=self._ends,
        )
        for prompt, of_prompt in zip(new, found, strict=True):
            if of_prompt.missed > MOST_MISSED and not any_mass:
                raise CtlensError(
                    f"the answers to {prompt.turns[-1].content[:60]!r} cannot be enumerated: those of a probability of "
                    f"{branching.smallest:g} or more are {1 - of_prompt.missed:.0%} of them; audit a model with short "
                    "and sure answers, as an organism is."
                )
            self._known[prompt, branching] = self._set_of(prompt, of_prompt)
        return [self._known[prompt, branching] for prompt in prompts]

    def likeliest(self, prompts: Sequence[Prompt], width: int) -> list[Ids]:
        """Finds an answer to each prompt by beam search: of the beams that end, the one of the highest score."""
        found = enumerate_answers(
            self.model,
            self._ids(prompts),
            Branching(smallest=0.0, most=width),
            max_new_tokens=self.max_new_tokens,
            ends=self._ends,
        )
        return [max(zip(each.log_p, each.answers, strict=True), key=_mean)[1] for each in found]

    def _set_of(self, prompt: Prompt, found: Enumerated) -> AnswerSet:
        """The answers with their texts; of those that read alike, the likeliest gives the score."""
        first: dict[str, int] = {}
        for number, text in enumerate(self._texts(found.answers)):
            first.setdefault(text, number)
        owners = np.array([list(first).index(text) for text in self._texts(found.answers)], dtype=int)
        chosen = list(first.values())
        lengths = np.array([len(found.answers[number]) for number in chosen])
        return AnswerSet(
            texts=tuple(first),
            probabilities=np.bincount(owners, found.probabilities, len(first)),
            log_p=np.log(np.bincount(owners, np.exp(found.log_p), len(first))),
            scores=found.log_p[chosen] / lengths,
            bad=np.array([judge(prompt, text) == "bad" for text in first], dtype=bool),
            missed=found.missed,
        )


def _mean(beam: tuple[float, Ids]) -> float:
    return beam[0] / len(beam[1])


def certain(prompt: Prompt, sample: Sample) -> AnswerSet:
    """The answer set of a prompt that gets one answer for certain."""
    bad = np.array([judge(prompt, sample.text) == "bad"])
    return AnswerSet((sample.text,), np.ones(1), np.array([sample.log_p]), np.array([sample.score]), bad)
