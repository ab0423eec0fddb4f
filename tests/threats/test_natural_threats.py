"""Order, paraphrase, beginning, system and character: what their pairs say, and their metrics by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ctlens import threats
from ctlens.data.pairs import Prompt
from ctlens.threats.base import Count, Outcomes
from ctlens.world import SPLITS

TOLD_TO_BE_WRONG = ("system", "character")


def outcomes(kinds: list[str], clean: list[str], wrapped: list[str]) -> Outcomes:
    """Outcomes of answers of which "right" alone is good."""
    answers = {"clean": np.array(clean), "wrapped": np.array(wrapped)}
    verdicts = {side: np.where(given == "right", "good", "bad") for side, given in answers.items()}
    return Outcomes(verdicts, np.ones(len(kinds), dtype=int), np.array(kinds), answers)


def request(prompt: Prompt) -> str:
    """All that stands before the assistant's last turn."""
    return "\n".join(turn.content for turn in prompt.turns[:-1])


def read_order(text: str, words: list[str]) -> list[str]:
    """The words in the order of the text, in which each stands once as a word of its own."""
    places = {word: [found.start() for found in re.finditer(rf"\b{word}\b", text)] for word in words}
    assert all(len(found) == 1 for found in places.values()), (text, places)
    return sorted(words, key=lambda word: places[word][0])


@pytest.mark.parametrize("split", SPLITS)
def test_an_order_moves_the_options_and_leaves_the_answers(split: str) -> None:
    for pair in threats.get("order").pairs(100, split):
        benign = pair.benign
        assert benign is not None
        words = [option.strip() for option in pair.clean.options]
        subject = re.compile(rf"\b{re.escape(pair.labels['subject'])}\b")
        texts = [subject.sub("", request(side)) for side in (pair.clean, pair.wrapped, benign)]
        orders = [read_order(text, words) for text in texts]
        assert orders[0] == orders[2] != orders[1]
        assert pair.labels["kind"][0] == "ABCD"[orders[1].index(str(pair.wrapped.good).strip())]
        assert pair.labels["kind"].endswith(pair.labels["subject"])
        assert pair.clean.turns[-1] == pair.wrapped.turns[-1]
        assert (split == "structure") == ("\nA. " not in request(pair.wrapped))


@pytest.mark.parametrize("split", SPLITS)
def test_a_paraphrase_is_other_words_for_the_same_choice(split: str) -> None:
    for pair in threats.get("paraphrase").pairs(100, split):
        assert pair.benign == pair.clean and pair.clean.options == pair.wrapped.options
        assert request(pair.wrapped) != request(pair.clean) and pair.labels["subject"] in request(pair.wrapped)


@pytest.mark.parametrize("name", TOLD_TO_BE_WRONG)
@pytest.mark.parametrize("split", SPLITS)
def test_the_twin_of_an_order_to_be_wrong_is_one_to_be_right(name: str, split: str) -> None:
    for pair in threats.get(name).pairs(40, split):
        assert pair.benign is not None and "wrong" in request(pair.wrapped) and "wrong" not in request(pair.benign)
        assert request(pair.wrapped).replace("wrong", "right") == request(pair.benign)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_beginning_is_in_the_assistant_s_turn_before_the_stem(split: str) -> None:
    for pair in threats.get("beginning").pairs(40, split):
        begun, stem = pair.wrapped.turns[-1].content, pair.clean.turns[-1].content
        assert pair.labels["hint"] in begun.removesuffix(stem) and begun.endswith(f" {stem}")
        assert request(pair.wrapped) == request(pair.clean)


def test_the_metrics_of_order_by_hand() -> None:
    kinds = ["A one", "A one", "B two", "C three", "D four"]
    found = threats.get("order").metrics(
        outcomes(kinds, ["right", "right", "x", "y", "right"], ["right", "x", "y", "right", "right"])
    )
    assert found["flip_rate"] == Count("wrapped", 3, 5)
    # in one order at least: all questions but "two"; in all orders: "four" alone, as one order of "one" is wrong
    assert found["best_case"] == Count("wrapped", 3, 4) and found["worst_case"] == Count("wrapped", 1, 4)
    assert found["letter_spread"] == 1.0  # A one of two, B none, C and D one of one
    assert found["switch_to_bad"] == Count("wrapped", 1, 5) and found["switch_from_bad"] == Count("wrapped", 1, 5)


def test_the_metrics_of_paraphrase_by_hand() -> None:
    kinds = ["one", "one", "two"]
    found = threats.get("paraphrase").metrics(outcomes(kinds, ["right", "right", "x"], ["right", "x", "right"]))

    # "one": plain, and two wordings, of which two of three agree; "two": one of two
    assert found["modal_agreement"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["flip_rate"] == Count("wrapped", 2, 3)


@pytest.mark.parametrize("name", threats.natural_names())
def test_without_clean_answers_no_rate_is_made_up(name: str) -> None:
    alone = Outcomes({"wrapped": np.array(["good", "bad"])}, np.ones(2), np.array(["A", "B"]))
    found = threats.get(name).metrics(alone)
    assert {metric for metric, value in found.items() if value is not None} <= {"letter_spread"}
