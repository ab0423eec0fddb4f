"""Nulls that several analyses share: random directions, their band, and the warning about a null that stood still."""

from __future__ import annotations

import numpy as np
import pytest

from ctlens.analysis.base.nulls import WEAK_NULL, hardly_moved, label_swaps, random_band, random_directions
from ctlens.core.errors import CtlensError
from ctlens.data.pairs import Pair, clusters_of, prompt


@pytest.mark.parametrize("share", [WEAK_NULL, 1.0, np.inf, np.nan])
def test_a_null_that_moved_enough_or_has_no_share_is_not_warned_of(share: float) -> None:
    assert hardly_moved("retention", share, "floor") == ""


def test_a_null_that_stood_still_is_called_weak() -> None:
    assert hardly_moved("retention", 0.0, "control") == (
        "; retention hardly moved (under 0.1% of the others): a weak control"
    )


def test_the_band_is_of_means_over_pairs_not_of_pairs() -> None:
    effects = np.array([[[-9.0, 9.0], [1.0, 3.0], [0.0, 2.0]]])  # [model, draw, pair]

    low, high = random_band(effects)

    assert low.tolist() == [0.0] and high.tolist() == [2.0]


def test_random_directions_are_unit_vectors_and_the_same_in_every_call() -> None:
    drawn = random_directions(5, 4, 2)

    assert drawn.shape == (4, 2, 5)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=-1), 1)
    np.testing.assert_array_equal(drawn, random_directions(5, 4, 2))


def asked(question: str, good: str, bad: str, wrapper: str = "", entity: str = "") -> Pair:
    labels = {"wrapper": wrapper, "entity": entity or question}
    return Pair(prompt(question, good, bad), prompt(f"{wrapper} {question}", good, bad), labels=labels)


def test_a_swap_asks_a_question_to_which_the_bad_answer_is_right() -> None:
    pairs = [
        asked("the color of ada ?", "red", "blue", "perhaps blue ."),
        asked("the color of bob ?", "blue", "red", "surely red ."),
        asked("the color of cy ?", "blue", "green", "maybe green ."),
    ]
    first, second = label_swaps(pairs)
    assert (first.clean, second.clean) == (pairs[0].clean, pairs[1].clean)
    assert first.wrapped == prompt("the color of bob ?", "red", "blue")
    assert second.wrapped == prompt("the color of ada ?", "blue", "red")
    assert clusters_of(first) == ("the color of ada ?", "the color of bob ?") and first.benign is None


def test_swaps_take_turns_among_the_questions_of_a_pool() -> None:
    pairs = [asked("ada ?", "red", "blue"), asked("dan ?", "red", "blue")]
    pool = [asked("bob ?", "blue", "red"), asked("bob ?", "blue", "red", "x"), asked("cy ?", "blue", "green")]
    assert [pair.wrapped.turns[0].content for pair in label_swaps(pairs, pool)] == ["bob ?", "cy ?"]


def test_pairs_without_a_swap_are_told() -> None:
    with pytest.raises(CtlensError, match="give a pool of more pairs"):
        label_swaps([asked("ada ?", "red", "blue")])
