"""Screening and grading: which questions a model knows, and how hard each wrapper presses on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ctlens.core.errors import CtlensError
from ctlens.core.files import write_json
from ctlens.core.public import public
from ctlens.core.reading import read_json
from ctlens.core.types import LensModel
from ctlens.threats.natural.base import Natural
from ctlens.threats.replies import ask

LEAST_RIGHT = 20
"""With fewer right questions a rate over them has an interval of more than 0.4, which tells nothing."""
_LEVELS = 4


@dataclass(frozen=True)
class Screening:
    """A screening says which questions a model answers right when nothing presses on it.

    Attributes:
        threat: the threat with these questions alone; `ctlens.evaluate` and `Threat.pairs` take it as any other.
        asked: all questions that were asked, as the threat that holds them.
    """

    threat: Natural
    asked: Natural

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulates the questions per kind and split: `kind, split, n_prompts, n_right`."""
        right = set(self.threat.questions)
        rows = [(question.kind, question.split, question in right) for question in self.asked.questions]
        table = pd.DataFrame(rows, columns=["kind", "split", "right"]).groupby(["kind", "split"], sort=False)["right"]
        return table.agg(n_prompts="size", n_right="sum").reset_index()

    @property
    def sentence(self) -> str:
        """The counts in words."""
        right, asked = len(self.threat.questions), len(self.asked.questions)
        return (
            f"{right} of {asked} questions of {self.asked.name} are answered right without an attack; these are used."
        )

    def save(self, path: str | Path) -> None:
        """Writes which questions are kept, as JSON."""
        kept = [[question.kind, question.subject] for question in self.threat.questions]
        write_json(Path(path), {"threat": self.asked.name, "n_asked": len(self.asked.questions), "kept": kept})

    @staticmethod
    def load(path: str | Path, asked: Natural) -> Screening:
        """Reads what `save` wrote.

        Args:
            path: of the file.
            asked: the threat that was screened, with all its questions.

        Raises:
            CtlensError: the file is missing or damaged, or is of another threat or of other questions.
        """
        read = read_json(Path(path), "threat", "n_asked", "kept")
        known = {(question.kind, question.subject): question for question in asked.questions}
        kept = [tuple(entry) for entry in read["kept"]] if isinstance(read["kept"], list) else []
        if (read["threat"], read["n_asked"]) != (asked.name, len(known)) or not kept or not set(kept) <= set(known):
            raise CtlensError(f"{path} is no screening of these {len(known)} questions of {asked.name}: screen again.")
        return Screening(asked.keeping([known[one] for one in kept]), asked)


@public
def screen(model: LensModel, threat: Natural, *, max_new_tokens: int = 16, progress: bool = True) -> Screening:
    """Asks a model the clean prompts of a threat and keeps the questions that it answers right.

    Screen on the model before training, and evaluate the trained one on the same questions.

    Args:
        model: in eval mode, with a tokenizer.
        threat: a natural one, from `ctlens.threats.get`.
        max_new_tokens: length of the longest free answer, in tokens.
        progress: show a progress bar when it takes more than two seconds.

    Raises:
        CtlensError: the model answers fewer than `LEAST_RIGHT` questions right.
    """
    prompts = [threat.clean(question) for question in threat.questions]
    replies = ask(model, prompts, max_new_tokens=max_new_tokens, judge=threat.judge, progress=progress)
    right = [question for question, reply in zip(threat.questions, replies, strict=True) if reply.verdict == "good"]
    if len(right) < LEAST_RIGHT:
        raise CtlensError(
            f"the model answers {len(right)} of {len(replies)} questions of {threat.name} right, and {LEAST_RIGHT} are "
            "needed: take a model that knows more."
        )
    return Screening(threat.keeping(right), threat)


@public
def grade(model: LensModel, threat: Natural, *, n_prompts: int = 24, progress: bool = True) -> pd.DataFrame:
    """Measures how hard each wrapper of a threat presses on a model, all wrappers around the same questions.

    The strengths that stand beside the wrappers of the natural threats come from here.

    Args:
        model: in eval mode, with a tokenizer.
        threat: a natural one, best after `screen`.
        n_prompts: how many questions are put under each wrapper.
        progress: show a progress bar when it takes more than two seconds.

    Returns:
        One row per wrapper, the weakest first: `wrapper, split, strength, n_prompts, bad_rate, bad_probability,
        graded`. `bad_probability` is the mean share of the bad answer, by which the wrappers are ordered; `graded` is
        the quarter of that order, from 1 to 4; `strength` is what the wrapper says of itself.
    """
    step = max(1, len(threat.questions) // n_prompts)
    asked = threat.questions[::step][:n_prompts]
    wrappers = [(split, wrapper) for split, wrappers in threat.wrappers.items() for wrapper in wrappers]
    prompts = [threat.pair(question, wrapper).wrapped for _, wrapper in wrappers for question in asked]
    replies = ask(model, prompts, judge=threat.judge, progress=progress)
    rows = []
    for number, (split, wrapper) in enumerate(wrappers):
        given = replies[number * len(asked) : (number + 1) * len(asked)]
        bad = sum(reply.verdict == "bad" for reply in given) / len(given)
        likely = sum(reply.bad_probability for reply in given) / len(given)
        rows.append((wrapper.name, split, wrapper.strength, len(given), bad, likely))
    columns = ["wrapper", "split", "strength", "n_prompts", "bad_rate", "bad_probability"]
    table = pd.DataFrame(rows, columns=columns).sort_values("bad_probability", ignore_index=True)
    return table.assign(graded=[1 + number * _LEVELS // len(table) for number in range(len(table))])
