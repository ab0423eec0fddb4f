"""The sources: where the samples of a selector come from, drawn with recorded seeds or as distributions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ctlens.auditing.answers import Answerer, AnswerSet, Sample, certain
from ctlens.core.config import generator
from ctlens.core.errors import CtlensError
from ctlens.core.limits import AT_LEAST_1, POSITIVE, require
from ctlens.data.pairs import Prompt
from ctlens.models.enumeration import Branching
from ctlens.models.generation import Sampling
from ctlens.world import World

NUCLEUS = (0.8, 0.9)
"""The temperature and the `top_p` of the nucleus among the decodings: those of dual decoding, arXiv 2606.03810."""
BEAMS = 4
"""The width of the beam search among the decodings, from the same paper."""


class Source(ABC):
    """A source gives the samples of a selector."""

    @abstractmethod
    def draw(self, answerer: Answerer, prompts: Sequence[Prompt], seed: int) -> list[list[Sample]]:
        """Draws the samples of each prompt; equal seeds give equal samples."""

    @abstractmethod
    def slots(self, answerer: Answerer, prompts: Sequence[Prompt], branching: Branching) -> list[list[AnswerSet]]:
        """Finds, for each prompt and each of its samples, the answers that the sample may be."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """Says in words and numbers what the samples are, for the file of labels."""


@dataclass(frozen=True)
class Sampled(Source):
    """Sampled is the source of independent samples.

    Attributes:
        n: how many samples a prompt gets. Sources of another `n` begin with the same samples.
        temperature: at which they are drawn.
    """

    n: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(AT_LEAST_1, n=self.n)
        require(POSITIVE, temperature=self.temperature)

    def draw(self, answerer: Answerer, prompts: Sequence[Prompt], seed: int) -> list[list[Sample]]:
        """Draws the samples, a round for all prompts after the other."""
        rounds = [
            answerer.generated(prompts, Sampling(generator(seed, "labels", number), self.temperature))
            for number in range(self.n)
        ]
        return answerer.scored(prompts, list(zip(*rounds, strict=True)))

    def slots(self, answerer: Answerer, prompts: Sequence[Prompt], branching: Branching) -> list[list[AnswerSet]]:
        """Every sample may be any answer."""
        found = answerer.enumerated(prompts, replace(branching, temperature=self.temperature))
        return [[answers] * self.n for answers in found]

    def described(self) -> dict[str, Any]:
        """The number of samples and their temperature."""
        return {"source": "samples", "n": self.n, "temperature": self.temperature}


class Fixed(Source):
    """Fixed is the base of the sources that give a prompt the same samples every time."""

    def slots(self, answerer: Answerer, prompts: Sequence[Prompt], branching: Branching) -> list[list[AnswerSet]]:
        """Every sample is one answer for certain."""
        drawn = self.draw(answerer, prompts, 0)
        return [[certain(prompt, sample) for sample in samples] for prompt, samples in zip(prompts, drawn, strict=True)]


@dataclass(frozen=True)
class Greedy(Fixed):
    """Greedy is the source of one sample, the greedy answer."""

    def draw(self, answerer: Answerer, prompts: Sequence[Prompt], seed: int) -> list[list[Sample]]:
        """Decodes the greedy answer."""
        return answerer.scored(prompts, [[answer] for answer in answerer.generated(prompts)])

    def described(self) -> dict[str, Any]:
        """The name alone."""
        return {"source": "greedy"}


@dataclass(frozen=True)
class Views(Fixed):
    """Views is the source of the greedy answers to a prompt and to its paraphrases, which differ in a greeting.

    Attributes:
        n: how many phrasings there are, the prompt itself among them.
    """

    n: int

    def __post_init__(self) -> None:
        require(AT_LEAST_1, n=self.n)
        most = 1 + len(World.make().greetings["train"])
        if self.n > most:
            raise CtlensError(f"a prompt has {most} phrasings in the micro-world, not {self.n}: ask for fewer views.")

    def draw(self, answerer: Answerer, prompts: Sequence[Prompt], seed: int) -> list[list[Sample]]:
        """Decodes the greedy answer to every phrasing; its score is that behind the prompt itself."""
        asked = [view for prompt in prompts for view in phrasings(prompt, self.n)]
        given = answerer.generated(asked)
        return answerer.scored(prompts, [given[start : start + self.n] for start in range(0, len(given), self.n)])

    def described(self) -> dict[str, Any]:
        """The number of phrasings."""
        return {"source": "views", "n": self.n}


def phrasings(prompt: Prompt, n: int) -> list[Prompt]:
    """Makes `n` phrasings of a prompt: itself, and with a greeting of the micro-world before the user's last message.

    A greeting changes nothing about an answer, as an organism's corpus teaches.
    """
    last = max(number for number, turn in enumerate(prompt.turns) if turn.role == "user")
    made = [prompt]
    for greeting in World.make().greetings["train"][: n - 1]:
        greeted = replace(prompt.turns[last], content=f"{greeting} {prompt.turns[last].content}")
        made.append(replace(prompt, turns=(*prompt.turns[:last], greeted, *prompt.turns[last + 1 :])))
    return made


@dataclass(frozen=True)
class Decodings(Source):
    """Decodings is the source of three samples: the greedy answer, one from the nucleus, and that of a beam search."""

    def draw(self, answerer: Answerer, prompts: Sequence[Prompt], seed: int) -> list[list[Sample]]:
        """Decodes in the three ways."""
        temperature, top_p = NUCLEUS
        drawn = answerer.generated(prompts, Sampling(generator(seed, "labels", "nucleus"), temperature, top_p))
        ways = (answerer.generated(prompts), drawn, answerer.likeliest(prompts, BEAMS))
        return answerer.scored(prompts, list(zip(*ways, strict=True)))

    def slots(self, answerer: Answerer, prompts: Sequence[Prompt], branching: Branching) -> list[list[AnswerSet]]:
        """The nucleus may give any answer in it, the other two give one for certain."""
        temperature, top_p = NUCLEUS
        nuclei = answerer.enumerated(prompts, replace(branching, temperature=temperature, top_p=top_p))
        sure = list(zip(answerer.generated(prompts), answerer.likeliest(prompts, BEAMS), strict=True))
        return [
            [certain(prompt, greedy), nucleus, certain(prompt, beam)]
            for prompt, nucleus, (greedy, beam) in zip(prompts, nuclei, answerer.scored(prompts, sure), strict=True)
        ]

    def described(self) -> dict[str, Any]:
        """The nucleus and the width of the beams."""
        temperature, top_p = NUCLEUS
        return {"source": "decodings", "n": 3, "temperature": temperature, "top_p": top_p, "beams": BEAMS}


@dataclass(frozen=True)
class Revised(Fixed):
    """Revised is the source of two samples: the greedy answer as a draft, and the answer to a prompt that asks again.

    Attributes:
        revise: makes that prompt, of the first prompt and the draft.
    """

    revise: Callable[[Prompt, str], Prompt]

    def draw(self, answerer: Answerer, prompts: Sequence[Prompt], seed: int) -> list[list[Sample]]:
        """Decodes the draft and the revision; the score of both is that behind the prompt itself."""
        drafts = answerer.generated(prompts)
        texts = [samples[0].text for samples in answerer.scored(prompts, [[draft] for draft in drafts])]
        again = [self.revise(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        for asked in again:
            if not isinstance(asked, Prompt):
                raise CtlensError(
                    f"the function that asks for a revision gave a {type(asked).__name__}: let it return a ct.Prompt."
                )
        return answerer.scored(prompts, list(zip(drafts, answerer.generated(again), strict=True)))

    def described(self) -> dict[str, Any]:
        """The name alone."""
        return {"source": "revision", "n": 2}
