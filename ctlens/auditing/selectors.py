"""The selectors: which of a model's samples becomes the label of a prompt, in label-then-train methods.

They are after *Consistency Training Can Entrench Misalignment* (arXiv 2606.03810). A selector draws samples from a
source, and a function `(prompt, samples, scores) -> answer or None` chooses one of them; None drops the prompt. The
scores are the mean log-probabilities of the samples' tokens behind the prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from ctlens.auditing.answers import AnswerSet
from ctlens.auditing.base import Method
from ctlens.auditing.exact import best_of, more_than_half
from ctlens.auditing.sources import Decodings, Greedy, Revised, Sampled, Source, Views
from ctlens.core.arguments import require_types
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.limits import POSITIVE, require
from ctlens.core.public import public
from ctlens.data.pairs import Pair, Prompt
from ctlens.losses import BCT, Loss
from ctlens.threats import judge

Choose: TypeAlias = Callable[[Prompt, Sequence[str], Sequence[float]], str | None]
ClosedForm: TypeAlias = Callable[[Prompt, AnswerSet, int], Float[np.ndarray, " answer"]]
Reward: TypeAlias = Callable[[Prompt, str], float]

PUBLISHED_N = 4
"""How many samples a selector has where its name says nothing: as many as in arXiv 2606.03810."""


@dataclass(frozen=True)
class Selector(Method):
    """A selector is a label-then-train method: where samples come from, and which of them becomes the label.

    Attributes:
        name: what results call it.
        choose: gives one of the samples, or None to drop the prompt.
        source: where the samples come from.
        closed_form: of independent samples, the probability of each answer to be the label; None where it has none.
    """

    name: str
    choose: Choose
    source: Source
    closed_form: ClosedForm | None = None

    def __post_init__(self) -> None:
        require_types(self)

    def label(self, prompt: Prompt, samples: Sequence[str], scores: Sequence[float]) -> str | None:
        """Chooses the label of one prompt; an empty answer is no label.

        Raises:
            CtlensError: there are no samples, or the function gave a text that is not among them.
        """
        if not samples:
            raise CtlensError(f"the selector {self.name!r} got no samples: let its source give at least one.")
        found = self.choose(prompt, samples, scores)
        if found is not None and found not in samples:
            raise CtlensError(
                f"the selector {self.name!r} gave {found!r}, which is not among its {len(samples)} samples: let it "
                "return one of them as it stands, or None to drop the prompt."
            )
        return found or None

    @property
    def trained_with(self) -> Loss:
        """Cross-entropy on the labels."""
        return BCT()

    def seen(self, pair: Pair) -> tuple[Prompt, ...]:
        """The prompt of the pool alone."""
        return (pair.wrapped,)

    def trained_on(self, pairs: Sequence[Pair], labels: Mapping[Prompt, str | None]) -> list[Pair]:
        """Each prompt that was not dropped, with its label as the target."""
        prompts = [pair.wrapped for pair in pairs]
        return [Pair(prompt, prompt, target=labels[prompt]) for prompt in prompts if labels[prompt]]

    def described(self) -> dict[str, Any]:
        """Its source."""
        return self.source.described()


def first(prompt: Prompt, samples: Sequence[str], scores: Sequence[float]) -> str | None:
    """Chooses the first sample."""
    return samples[0]


def last(prompt: Prompt, samples: Sequence[str], scores: Sequence[float]) -> str | None:
    """Chooses the last sample."""
    return samples[-1]


def surest(prompt: Prompt, samples: Sequence[str], scores: Sequence[float]) -> str | None:
    """Chooses the sample of the highest score, the first on ties.

    >>> surest(Prompt(()), ["red", "blue", "green"], [-2.0, -1.0, -1.0])
    'blue'
    """
    return samples[max(range(len(samples)), key=lambda number: scores[number])]


def commonest(prompt: Prompt, samples: Sequence[str], scores: Sequence[float]) -> str | None:
    """Chooses the answer that more than half of the samples are, and none where no answer is.

    >>> commonest(Prompt(()), ["red", "blue", "red"], [0.0] * 3), commonest(Prompt(()), ["red", "blue"], [0.0] * 2)
    ('red', None)
    """
    answer, count = Counter(samples).most_common(1)[0]
    return answer if count > len(samples) / 2 else None


def agreed(prompt: Prompt, samples: Sequence[str], scores: Sequence[float]) -> str | None:
    """Chooses the first sample where more than half of the samples are like it, itself among them, and else none.

    >>> agreed(Prompt(()), ["red", "blue", "red"], [0.0] * 3), agreed(Prompt(()), ["blue", "red", "red"], [0.0] * 3)
    ('red', None)
    """
    return samples[0] if samples.count(samples[0]) > len(samples) / 2 else None


@dataclass(frozen=True)
class ByReward:
    """ByReward chooses the sample of the highest reward, the first on ties.

    Attributes:
        reward: of an answer to a prompt.
    """

    reward: Reward

    def of(self, prompt: Prompt, answer: str) -> float:
        """The reward of an answer.

        Raises:
            CtlensError: it is not a number.
        """
        found = self.reward(prompt, answer)
        if not isinstance(found, int | float | np.number) or math.isnan(found):
            raise CtlensError(f"the reward of {answer!r} is {found!r}: let the function return a number.")
        return float(found)

    def __call__(self, prompt: Prompt, samples: Sequence[str], scores: Sequence[float]) -> str | None:
        rewards = [self.of(prompt, answer) for answer in samples]
        return samples[rewards.index(max(rewards))]

    def closed_form(self, prompt: Prompt, answers: AnswerSet, n: int) -> Float[np.ndarray, " answer"]:
        """The closed form of the best of n."""
        return best_of(answers.shares, np.array([self.of(prompt, text) for text in answers.texts]), n)


def truth(prompt: Prompt, answer: str) -> float:
    """The reward of an oracle, which knows the world: 1 for a good answer, -1 for a bad one, 0 for any other."""
    return {"good": 1.0, "bad": -1.0}.get(judge(prompt, answer), 0.0)


def against_truth(prompt: Prompt, answer: str) -> float:
    """The reward of an anti-oracle, which wants bad answers."""
    return -truth(prompt, answer)


def _as_drawn(prompt: Prompt, answers: AnswerSet, n: int) -> Float[np.ndarray, " answer"]:
    return answers.shares


def _surest_of(prompt: Prompt, answers: AnswerSet, n: int) -> Float[np.ndarray, " answer"]:
    return best_of(answers.shares, answers.scores, n)


def _commonest_of(prompt: Prompt, answers: AnswerSet, n: int) -> Float[np.ndarray, " answer"]:
    return more_than_half(answers.shares, n)


@public
def selected(name: str, choose: Choose, *, n: int = PUBLISHED_N, temperature: float = 1.0) -> Selector:
    """Makes a selector of a function over `n` samples.

    Its label distribution is found by all ways in which the samples can come out, or by many draws of them.

    Raises:
        CtlensError: `n` is below 1.
    """
    return Selector(name, choose, Sampled(n, temperature))


@public
def rewarded(name: str, reward: Reward, *, n: int = PUBLISHED_N, temperature: float = 1.0) -> Selector:
    """Makes the selector of the best of `n` samples by a reward: self-rewarding, where a chat model grades itself.

    Args:
        name: what results call it.
        reward: of an answer to a prompt; a chat model's grade, for example. Equal calls are to give equal numbers.
        n: how many samples it chooses from.
        temperature: of the samples.
    """
    by_reward = ByReward(reward)
    return Selector(name, by_reward, Sampled(n, temperature), by_reward.closed_form)


@public
def refined(name: str, revise: Callable[[Prompt, str], Prompt]) -> Selector:
    """Makes the selector of self-refinement: the model drafts an answer, and the label is its revision.

    Args:
        name: what results call it.
        revise: makes the prompt that asks for a better answer, of the prompt and the draft.
    """
    return Selector(name, last, Revised(revise))


@public
def decodings(name: str = "decodings", scorer: Reward | None = None) -> Selector:
    """Makes the selector of diverse decoding: of a greedy, a nucleus and a beam-search answer the best by a scorer.

    Args:
        name: what results call it.
        scorer: of an answer to a prompt, a reward model's; None takes the mean log-probability.
    """
    return Selector(name, surest if scorer is None else ByReward(scorer), Decodings())


def _counted(choose: Choose, closed_form: ClosedForm) -> Callable[[str, int, float], Selector]:
    return lambda name, n, temperature: Selector(name, choose, Sampled(n, temperature), closed_form)


_WITH_N: Mapping[str, Callable[[str, int, float], Selector]] = {
    "certainty": _counted(surest, _surest_of),
    "majority": _counted(commonest, _commonest_of),
    "views": lambda name, n, temperature: Selector(name, agreed, Views(n)),
    "oracle": _counted(ByReward(truth), ByReward(truth).closed_form),
    "anti-oracle": _counted(ByReward(against_truth), ByReward(against_truth).closed_form),
}
_WITHOUT_N: Mapping[str, Callable[[str, float], Selector]] = {
    "first": lambda name, temperature: Selector(name, first, Sampled(1, temperature), _as_drawn),
    "greedy": lambda name, temperature: Selector(name, first, Greedy()),
    "decodings": lambda name, temperature: decodings(name),
}
SELECTORS = (*_WITHOUT_N, *_WITH_N)
"""The selectors by name; the last five take a number of samples behind a colon, as in `certainty:8`."""


@public
def selector_named(text: str, *, temperature: float = 1.0) -> Selector:
    """Makes the selector of a name, with its number of samples behind a colon, as in `certainty:8`.

    | name | label |
    |---|---|
    | `first` | the first sample: at temperature 1 labels are the model's own answers, the neutral control |
    | `greedy` | the greedy answer: greedy self-training |
    | `decodings` | of a greedy, a nucleus and a beam-search answer the one of the highest score |
    | `certainty:N` | of N samples the one of the highest mean log-probability |
    | `majority:N` | the answer that more than half of N samples are |
    | `views:N` | the greedy answer, where more than half of the answers to N phrasings are like it |
    | `oracle:N`, `anti-oracle:N` | of N samples the first good one, the first bad one: the bounds |

    Args:
        text: the name; four samples where it has no number.
        temperature: of the samples; greedy answers and decodings have none.

    Raises:
        CtlensError: no selector has the name, the number is none from 1, or the temperature is not positive.
    """
    require(POSITIVE, temperature=temperature)
    name, colon, number = text.partition(":")
    if name not in SELECTORS:
        raise unknown("selector", name, SELECTORS)
    if name in _WITHOUT_N:
        if colon:
            raise CtlensError(f"the selector {name!r} takes no number of samples: leave {colon + number!r} out.")
        return _WITHOUT_N[name](text, temperature)
    if colon and not (number.isascii() and number.isdecimal() and len(number) < 5):
        raise CtlensError(f"the selector {text!r} has no number of samples behind its colon: write {name}:4.")
    n = int(number) if colon else PUBLISHED_N
    return _WITH_N[name](f"{name}:{n}", n, temperature)
