"""Closed forms against all ways in which samples can come out, and the slopes of eta against a fit."""

from __future__ import annotations

from itertools import product
from math import log

import numpy as np
import pytest

from ctlens.auditing.answers import AnswerSet
from ctlens.auditing.exact import (
    EDGES,
    PRODUCT_LIMIT,
    LabelDistribution,
    best_of,
    by_every_way,
    histogram,
    moments,
    more_than_half,
    slopes,
)
from ctlens.auditing.selectors import Choose, commonest, first, surest, truth
from ctlens.data.pairs import prompt

ASKED = prompt("?", good="blue", bad="red")
NS = (1, 2, 3, 4)


def answers(shares: list[float], scores: list[float], texts: str = "red blue green") -> AnswerSet:
    named = tuple(texts.split())
    return AnswerSet(
        named, np.array(shares), np.log(shares), np.array(scores), np.array([text == "red" for text in named])
    )


THREE = answers([0.5, 0.3, 0.2], [-0.7, -1.0, -1.0])


def by_all_ways(known: AnswerSet, choose: Choose, n: int) -> dict[str, float]:
    """The probability of each label by every tuple of n draws, written out."""
    found: dict[str, float] = {}
    for way in product(range(len(known.texts)), repeat=n):
        label = choose(ASKED, [known.texts[i] for i in way], [float(known.scores[i]) for i in way])
        if label is not None:
            found[label] = found.get(label, 0.0) + float(np.prod(known.shares[list(way)]))
    return found


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("scores", [[-0.7, -1.0, -1.2], [-1.0, -0.7, -1.2], [-1.0, -0.7, -0.7], [-1.0, -1.0, -1.0]])
def test_the_best_of_n_is_what_all_ways_give(n: int, scores: list[float]) -> None:
    known = answers([0.5, 0.3, 0.2], scores)
    expected = by_all_ways(known, surest, n)

    found = best_of(known.shares, known.scores, n)

    np.testing.assert_allclose(found, [expected.get(text, 0.0) for text in known.texts])
    assert found.sum() == pytest.approx(1)


@pytest.mark.parametrize("n", NS)
def test_more_than_half_is_what_all_ways_give(n: int) -> None:
    expected = by_all_ways(THREE, commonest, n)

    np.testing.assert_allclose(more_than_half(THREE.shares, n), [expected.get(text, 0.0) for text in THREE.texts])


def test_the_surest_of_n_without_ties_labels_badly_as_the_brief_says() -> None:
    """Where the bad answer is the surer of two, 1 - (1 - p)^n; where it is not, p^n."""
    surer, less = answers([0.85, 0.15], [-0.1, -2.0], "red blue"), answers([0.15, 0.85], [-2.0, -0.1], "red blue")

    assert best_of(surer.shares, surer.scores, 4)[0] == pytest.approx(1 - 0.15**4)
    assert best_of(less.shares, less.scores, 4)[0] == pytest.approx(0.15**4)


def test_an_order_of_the_answers_does_not_matter() -> None:
    turned = answers([0.2, 0.3, 0.5], [-1.0, -1.0, -0.7], "green blue red")

    np.testing.assert_allclose(best_of(turned.shares, turned.scores, 3)[::-1], best_of(THREE.shares, THREE.scores, 3))
    assert moments(turned) == pytest.approx(moments(THREE))


def choosing(choose: Choose) -> object:
    return lambda samples, scores: choose(ASKED, samples, scores)


def test_every_way_gives_what_the_closed_form_does() -> None:
    found = by_every_way([THREE] * 4, choosing(surest), 0)  # type: ignore[arg-type]

    assert found.exact and found.kept == pytest.approx(1)
    assert found.risk == pytest.approx(best_of(THREE.shares, THREE.scores, 4)[0])


def test_too_many_ways_are_drawn_and_come_near() -> None:
    assert PRODUCT_LIMIT < 3**6
    found = by_every_way([THREE] * 6, choosing(surest), 0)  # type: ignore[arg-type]
    again = by_every_way([THREE] * 6, choosing(surest), 0)  # type: ignore[arg-type]
    expected = best_of(THREE.shares, THREE.scores, 6)[0]

    assert not found.exact
    assert (
        found.risk == again.risk == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / PRODUCT_LIMIT))
    )


def test_a_dropped_label_is_missing_from_the_mass() -> None:
    found = by_every_way([THREE] * 2, choosing(commonest), 0)  # type: ignore[arg-type]

    assert found.kept == pytest.approx(0.25 + 0.09 + 0.04)
    assert found.risk == pytest.approx(0.25 / 0.38)


def test_the_divergence_of_labels_by_hand() -> None:
    log_p = np.log([0.5, 0.3, 0.2])
    labels = LabelDistribution(np.array([0.4, 0.1, 0.0]), log_p, np.array([True, False, False]), exact=True)

    assert labels.divergence == pytest.approx(0.8 * log(0.8 / 0.5) + 0.2 * log(0.2 / 0.3))
    assert by_every_way([THREE], choosing(first), 0).divergence == pytest.approx(0)  # type: ignore[arg-type]


def test_no_label_at_all_has_no_risk_and_no_divergence() -> None:
    none = by_every_way([THREE], lambda samples, scores: None, 0)

    assert none.kept == 0 and np.isnan([none.risk, none.divergence]).all()


def test_slopes_are_those_of_a_least_squares_line() -> None:
    """Of two prompts: pooled over all answers, and within prompts with a constant for each of them."""
    other = answers([0.6, 0.4], [-3.0, -2.0], "red blue")
    both = (THREE, other)
    score = np.concatenate([known.scores for known in both])
    bad = np.concatenate([known.bad for known in both]).astype(float)
    share = np.concatenate([known.shares for known in both])
    owner = np.repeat([0, 1], [3, 2])
    pooled = np.polyfit(score, bad, 1, w=np.sqrt(share))[0]
    dummies = np.stack([score, owner == 0, owner == 1], 1)
    root = np.sqrt(share)
    within = np.linalg.lstsq(dummies * root[:, None], bad * root, rcond=None)[0][0]

    found = slopes(np.array([moments(THREE), moments(other)]))

    assert found.pooled == pytest.approx(pooled) and found.within == pytest.approx(within)
    assert found.pooled * found.within < 0 or found.pooled != pytest.approx(found.within)


def test_answers_of_one_score_have_no_slope() -> None:
    assert np.isnan(slopes(np.array([moments(answers([0.5, 0.5], [-1.0, -1.0], "red blue"))]))).all()


def test_eta_is_tabulated_in_its_intervals() -> None:
    found = histogram(THREE)
    upper = np.array(EDGES[1:])

    assert found.shape == (2, len(EDGES) - 1)
    assert found.sum(1) == pytest.approx([1.0, 0.5])
    assert found[0, upper == -1.0] == pytest.approx(0.5) and found[1, upper == -1.0] == 0  # an edge is in the lower one
    assert found[1, upper == -0.7] == pytest.approx(0.5)


def test_the_truth_tells_good_from_bad_and_other() -> None:
    assert [truth(ASKED, text) for text in ("blue", "red", "green")] == [1.0, -1.0, 0.0]
