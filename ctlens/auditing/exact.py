"""Closed forms: which label a selector gives with which probability, how far that is from the model, and eta.

All of them take the distribution of one prompt's answers as known, by enumeration. With answers `a` of probability
`p_a` and `n` independent draws:

- best of n by a score `s`, the first on ties: with `F(s)` the probability of a score of at most `s`, and `F(s-)` of one
  below it, `P(label = a) = p_a / (F(s_a) - F(s_a-)) * (F(s_a)^n - F(s_a-)^n)`. Certainty is this with the mean
  log-probability as the score, an oracle with the truth;
- more than half of n: `P(label = a) = P(Binomial(n, p_a) > n / 2)`, and no label with the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import comb, floor, prod
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ctlens.auditing.answers import AnswerSet
from ctlens.core.config import generator

PRODUCT_LIMIT = 512
"""Where the samples of a prompt can come out in more ways, a selector without a closed form is simulated, so often."""

EDGES = (-np.inf, -4.0, -3.0, -2.0, -1.5, -1.0, -0.7, -0.5, -0.35, -0.2, -0.1, -0.05, -0.02, 0.0)
"""The edges of the intervals of the score, in nats, in which eta is tabulated; chosen by eye."""


def best_of(
    shares: Float[np.ndarray, " answer"], scores: Float[np.ndarray, " answer"], n: int
) -> Float[np.ndarray, " answer"]:
    """Computes the probability that each answer is the best of `n` draws by its score, the first on ties.

    >>> best_of(np.array([0.5, 0.3, 0.2]), np.array([1.0, 2.0, 2.0]), 2)  # both draws are the first: 0.25
    array([0.25, 0.45, 0.3 ])
    """
    values, rank = np.unique(scores, return_inverse=True)
    of_score = np.bincount(rank, shares, len(values))
    upto = np.cumsum(of_score).clip(max=1.0)
    below = np.concatenate([[0.0], upto[:-1]])
    chosen = upto**n - below**n
    return shares * (chosen / np.where(of_score > 0, of_score, 1.0))[rank]


def more_than_half(shares: Float[np.ndarray, " answer"], n: int) -> Float[np.ndarray, " answer"]:
    """Computes the probability that each answer is more than half of `n` draws; the rest is that of none.

    >>> more_than_half(np.array([0.5, 0.5]), 3), more_than_half(np.array([0.5, 0.5]), 2)
    (array([0.5, 0.5]), array([0.25, 0.25]))
    """
    counts = range(floor(n / 2) + 1, n + 1)
    terms = [comb(n, count) * shares**count * (1 - shares) ** (n - count) for count in counts]
    return np.sum(terms, axis=0)


class LabelDistribution(NamedTuple):
    """A label distribution says which answers a prompt's label is, and how often it has none.

    Attributes:
        shares: of each label, summing to the probability that there is one.
        log_p: of each label, its log-probability in the model's own distribution.
        bad: of each label, whether it is a bad answer.
        exact: whether it was computed, and not simulated.
    """

    shares: Float[np.ndarray, " label"]
    log_p: Float[np.ndarray, " label"]
    bad: np.ndarray
    exact: bool

    @property
    def kept(self) -> float:
        """The probability that the prompt gets a label."""
        return float(self.shares.sum())

    @property
    def risk(self) -> float:
        """The probability that a label is bad, given that there is one; NaN where there never is."""
        return float(self.shares[self.bad].sum() / self.kept) if self.kept > 0 else float("nan")

    @property
    def divergence(self) -> float:
        """The KL divergence of the labels from the model's own answers, in nats; NaN where there is never a label.

        It is that of the prompt in the shift of arXiv 2606.03810, `Delta_dist = E_x KL( Q_label(. | x) || P(. | x) )`.
        """
        if self.kept <= 0:
            return float("nan")
        given = self.shares > 0
        shares = self.shares[given] / self.kept
        return float((shares * (np.log(shares) - self.log_p[given])).sum())


def by_closed_form(answers: AnswerSet, shares: Float[np.ndarray, " answer"]) -> LabelDistribution:
    """Makes the label distribution of closed-form shares; an empty answer is no label."""
    said = np.array([bool(text) for text in answers.texts])
    return LabelDistribution(np.where(said, shares, 0.0), answers.log_p, answers.bad, exact=True)


def by_every_way(
    slots: Sequence[AnswerSet], choose: Callable[[Sequence[str], Sequence[float]], str | None], seed: int
) -> LabelDistribution:
    """Finds the label distribution of any selector, by all ways in which its samples can come out, or by many draws.

    Args:
        slots: of each sample, the answers that it may be.
        choose: the selector, of the samples and their scores.
        seed: decides the draws where there are more than `PRODUCT_LIMIT` ways.
    """
    sizes = [len(slot.texts) for slot in slots]
    exact = prod(sizes) <= PRODUCT_LIMIT
    ways: Sequence[tuple[int, ...]] = list(product(*map(range, sizes))) if exact else _drawn(slots, seed)
    shares: dict[str, float] = {}
    log_p: dict[str, float] = {}
    bad: dict[str, bool] = {}
    for way in ways:
        chances = [float(slot.shares[number]) for slot, number in zip(slots, way, strict=True)]
        texts = [slot.texts[number] for slot, number in zip(slots, way, strict=True)]
        scores = [float(slot.scores[number]) for slot, number in zip(slots, way, strict=True)]
        label = choose(texts, scores)
        if label is None:
            continue
        which = texts.index(label)
        shares[label] = shares.get(label, 0.0) + (prod(chances) if exact else 1 / PRODUCT_LIMIT)
        log_p[label] = float(slots[which].log_p[way[which]])
        bad[label] = bool(slots[which].bad[way[which]])
    return LabelDistribution(
        np.array([*shares.values()]), np.array([*log_p.values()]), np.array([*bad.values()], dtype=bool), exact
    )


def _drawn(slots: Sequence[AnswerSet], seed: int) -> list[tuple[int, ...]]:
    """Draws `PRODUCT_LIMIT` ways in which the samples of the slots come out."""
    draw = np.random.default_rng(generator(seed, "audit", "ways").initial_seed())
    columns = [draw.choice(len(slot.texts), PRODUCT_LIMIT, p=slot.shares).tolist() for slot in slots]
    return list(zip(*columns, strict=True))


class Moments(NamedTuple):
    """The moments of one prompt's answers, of which the slopes of eta are made.

    Attributes:
        score: the mean of the score, in nats.
        square: the mean of its square.
        bad: the share of bad answers among those that were enumerated.
        product: the mean of the score where the answer is bad, and of 0 elsewhere.
    """

    score: float
    square: float
    bad: float
    product: float


def moments(answers: AnswerSet) -> Moments:
    """Computes the moments of one prompt's answers, as the model gives them."""
    shares = answers.shares
    return Moments(
        float(shares @ answers.scores),
        float(shares @ answers.scores**2),
        float(shares @ answers.bad),
        float(shares @ (answers.scores * answers.bad)),
    )


class Slopes(NamedTuple):
    """The slopes of eta(s) = P(bad | score = s), per nat: of the line that comes nearest to eta.

    Attributes:
        pooled: over the answers to all prompts together, as arXiv 2606.03810 has it.
        within: of the same within prompts, which is what a selector meets: it compares the answers to one prompt.
    """

    pooled: float
    within: float


def slopes(of_prompts: Float[np.ndarray, "prompt 4"]) -> Slopes:
    """Computes the slopes of eta over prompts, from a row of `Moments` for each; NaN where no score differs.

    >>> slopes(np.array([[-1.0, 1.5, 0.5, -0.75]]))  # bad answers score 0.5 lower than the others do
    Slopes(pooled=-0.5, within=-0.5)
    """
    if not len(of_prompts):
        return Slopes(float("nan"), float("nan"))
    score, square, bad, together = of_prompts.T
    within = _ratio((together - score * bad).mean(), (square - score**2).mean())
    pooled = _ratio(
        together.mean() - score.mean() * bad.mean(),
        square.mean() - score.mean() ** 2,
    )
    return Slopes(pooled, within)


def _ratio(covariance: float, variance: float) -> float:
    return float(covariance / variance) if variance > 1e-12 else float("nan")


def histogram(answers: AnswerSet) -> Float[np.ndarray, "2 bin"]:
    """Sums the shares of one prompt's answers, of all and of the bad, in each interval of the score, see `EDGES`."""
    within = np.searchsorted(EDGES, answers.scores, side="left").clip(1, len(EDGES) - 1) - 1
    n_bins = len(EDGES) - 1
    return np.stack(
        [np.bincount(within, answers.shares, n_bins), np.bincount(within, answers.shares * answers.bad, n_bins)]
    )
