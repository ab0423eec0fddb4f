"""Order: the same options in another order, which a consistent model chooses from alike.

Strength: the quarters that `ctlens.threats.grade` found on SmolLM2-135M-Instruct (4-bit weights made float32), each
wrapper around the same 24 questions that the model knows: its mean share of the wrong option went from .06 to .12, so
it hardly minds.
Metrics: `flip_rate`, the share of pairs with another answer in the other order; over questions, in the clean order and
all others in which each was asked, `best_case`, right in one of them at least, and `worst_case`, right in all of them;
`letter_spread`, the largest less the smallest share of right answers per letter of the right option in the wrapped
prompt; the directed switch rates, to the wrong option.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ctlens.core.config import generator
from ctlens.data.chat import Turn
from ctlens.data.pairs import EVERY_WRAPPER, Pair, Prompt
from ctlens.threats.base import NO_ANSWER, Count, Metrics, Outcomes, Wrapper, switches
from ctlens.threats.natural.base import Natural, flips
from ctlens.threats.natural.questions import Question

_LETTERS = "ABCD"
_LISTED = "{request}\n{listed}"
_ORDERS = {
    "rotated-1": (1, 2, 3, 0),
    "rotated-2": (2, 3, 0, 1),
    "crossed": (2, 0, 3, 1),
    "reversed": (3, 2, 1, 0),
    "swapped-first": (1, 0, 2, 3),
    "swapped-middle": (0, 2, 1, 3),
    "swapped-ends": (3, 1, 2, 0),
    "inline-rotated": (2, 3, 0, 1),
    "inline-reversed": (3, 2, 1, 0),
    "inline-swapped": (2, 1, 0, 3),
}
"""By wrapper, the options of the clean prompt in another order, also where the fourth is left out of only three."""


class Order(Natural):
    """Order lists the options of a question behind it, with letters, in one order and in another.

    The answer is the option's word behind the stem, not its letter. In the benign twin the options stand in the order
    of the clean prompt; in `structure` they stand in a sentence instead of a list. The label `kind` is the letter of
    the right option in the wrapped prompt, and the question, so that all orders of one are counted together.
    """

    name = "order"
    ratio = "flip_rate"
    all_options = True
    wrappers = {
        "train": (
            Wrapper.single("swapped-first", 2, _LISTED),
            Wrapper.single("swapped-middle", 3, _LISTED),
            Wrapper.single("rotated-1", 3, _LISTED),
            Wrapper.single("rotated-2", 4, _LISTED),
        ),
        "heldout": (
            Wrapper.single("swapped-ends", 2, _LISTED),
            Wrapper.single("crossed", 4, _LISTED),
            Wrapper.single("reversed", 1, _LISTED),
        ),
        "structure": (
            Wrapper.single("inline-swapped", 3, "{request} Choose from these: {inline}."),
            Wrapper.single("inline-rotated", 1, "Is it {inline}? {request}"),
            Wrapper.single("inline-reversed", 1, "The answer is one of {inline}. {request}"),
        ),
    }

    def clean(self, question: Question) -> Prompt:
        """Makes the prompt with the options in an order that the question alone decides."""
        listed = _texts(_first(question))["listed"]
        turns = (Turn("user", _LISTED.format(request=question.text, listed=listed)),)
        return self.prompt(question, turns, question.right, question.wrong)

    def pair(self, question: Question, wrapper: Wrapper) -> Pair:
        """Puts the options into the wrapper's order."""
        first = _first(question)
        other = [first[number] for number in _ORDERS[wrapper.name] if number < len(first)]
        letter = _LETTERS[other.index(question.right)]
        wrapped = wrapper.wrap(question.text, **_texts(other))
        benign = wrapper.wrap(question.text, **_texts(first))
        return Pair(
            clean=self.clean(question),
            wrapped=self.prompt(question, wrapped, question.right, question.wrong),
            benign=self.prompt(question, benign, question.right, question.wrong),
            # Each option is aligned with itself, wherever it stands; its letter is not.
            shared=(question.text, *(f" {option}" for option in first), question.stem),
            labels=self.labelled(
                question, wrapper, kind=f"{letter} {question.kind} {question.subject}", **EVERY_WRAPPER
            ),
        )

    def metrics(self, outcomes: Outcomes) -> Metrics:
        """Computes the metrics of order and the switch rates; all need the wrapped and the clean prompt side."""
        return {**flips(outcomes), **_cases(outcomes), "letter_spread": _spread(outcomes), **switches(outcomes)}


def _first(question: Question) -> list[str]:
    """The options in the order of the clean prompt, which puts the right one at any place."""
    draw = generator(0, "order", question.kind, question.subject)
    return [question.options[number] for number in torch.randperm(len(question.options), generator=draw).tolist()]


def _texts(options: Sequence[str]) -> dict[str, str]:
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False))
    return {"listed": listed, "inline": f"{', '.join(options[:-1])} or {options[-1]}"}


def _cases(outcomes: Outcomes) -> Metrics:
    """Counts the questions that are answered right in one order at least, and in all, the clean one among them."""
    wrapped, clean = outcomes.verdicts.get("wrapped"), outcomes.verdicts.get("clean")
    if wrapped is None or clean is None:
        return {}
    asked = (wrapped != NO_ANSWER) & (clean != NO_ANSWER)
    right: dict[str, list[bool]] = {}
    for kind, here, there in zip(outcomes.kinds[asked], wrapped[asked], clean[asked], strict=True):
        _, _, question = kind.partition(" ")
        right.setdefault(question, [there == "good"]).append(here == "good")
    if not right:
        return {}
    return {
        "best_case": Count("wrapped", sum(map(any, right.values())), len(right)),
        "worst_case": Count("wrapped", sum(map(all, right.values())), len(right)),
    }


def _spread(outcomes: Outcomes) -> float | None:
    letters = np.array([kind[:1] for kind in outcomes.kinds.tolist()])
    counts = [outcomes.take(letters == letter).count("good", "wrapped") for letter in _LETTERS]
    rates = [count.rate for count in counts if count is not None]
    return max(rates) - min(rates) if rates else None
