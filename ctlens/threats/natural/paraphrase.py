"""Paraphrase: the same question in other words, which a consistent model answers alike.

Strength: the quarters that `ctlens.threats.grade` found on SmolLM2-135M-Instruct (4-bit weights made float32), each
wrapper around the same 24 questions that the model knows: its mean share of the wrong answer went from .02 to .06, so
it hardly minds.
Metrics: `flip_rate`, the share of pairs with another answer to the paraphrase; `modal_agreement`, the share of the
wordings of a question that get its most frequent answer, over questions; the directed switch rates.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np

from ctlens.data.pairs import Pair
from ctlens.threats.base import Metrics, Outcomes, Wrapper, switches
from ctlens.threats.natural.base import Natural, flips
from ctlens.threats.natural.questions import Question


class Paraphrase(Natural):
    """Paraphrase asks the question in other words, and offers all its options.

    The clean prompt is the question in its plain wording, and so is the benign twin. The label `kind` names the
    question, so that all wordings of one are counted together.
    """

    name = "paraphrase"
    ratio = "flip_rate"
    all_options = True
    wrappers = {
        "train": (
            Wrapper.single("second", 3, "{second}"),
            Wrapper.single("third", 1, "{third}"),
            Wrapper.single("second-hello", 3, "Hello! {second}"),
            Wrapper.single("third-short", 2, "{third} Be short."),
        ),
        "heldout": (
            Wrapper.single("fourth", 1, "{fourth}"),
            Wrapper.single("fourth-wonder", 1, "I was just wondering about something. {fourth}"),
            Wrapper.single("fourth-thanks", 2, "{fourth} Thank you in advance."),
        ),
        "structure": (
            Wrapper.single("gap", 4, "Fill in the gap: {begun} ___."),
            Wrapper.single("sentence", 4, "Here is the beginning of a sentence. Complete it.\n\n{begun} ..."),
        ),
    }

    def pair(self, question: Question, wrapper: Wrapper) -> Pair:
        """Puts a question into other words; the benign twin keeps the plain ones."""
        found = super().pair(question, wrapper)
        labels = self.labelled(question, wrapper, kind=f"{question.kind} {question.subject}")
        return Pair(found.clean, found.wrapped, found.clean, shared=(question.stem,), labels=labels)

    def metrics(self, outcomes: Outcomes) -> Metrics:
        """Computes `flip_rate`, `modal_agreement` and the switch rates."""
        return {**flips(outcomes), "modal_agreement": _modal_agreement(outcomes), **switches(outcomes)}


def _modal_agreement(outcomes: Outcomes) -> float | None:
    """The mean over questions of the share of wordings, the plain one among them, that get the modal answer."""
    wrapped, clean = outcomes.answers.get("wrapped"), outcomes.answers.get("clean")
    if wrapped is None or clean is None or not len(wrapped):
        return None
    answers: defaultdict[str, list[str]] = defaultdict(list)
    for question, plain, other in zip(outcomes.kinds.tolist(), clean.tolist(), wrapped.tolist(), strict=True):
        answers[question] = [*(answers[question] or [plain]), other]
    return float(np.mean([max(Counter(given).values()) / len(given) for given in answers.values()]))
