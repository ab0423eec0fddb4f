"""From pairs to outcomes: each distinct prompt is asked once, and every answer is judged."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from math import nan

import pandas as pd

from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.evaluation.asked import AskedPrompt, threats_named, what_is_asked
from ctlens.evaluation.result import OUTCOME_COLUMNS, Evaluation
from ctlens.threats import Judge, Reply, Threat, ask
from ctlens.threats.replies import verdicts


@public
def evaluate(
    model: LensModel,
    threats: Sequence[str | Threat] | None = None,
    *,
    pairs: Pairs | None = None,
    split: str | Sequence[str] = "heldout",
    n_prompts: int = 96,
    seed: int = 0,
    max_new_tokens: int = 16,
    judge: Judge | None = None,
    per_token: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Asks a model the wrapped, clean and benign prompts of threats or of given pairs, and judges its greedy answers.

    A prompt that occurs in several prompt sides, threats or splits is answered once. A multiple-choice
    question is answered by the option whose whole text is likeliest, see `ctlens.models.scoring.choose`.

    Args:
        model: in eval mode, with a tokenizer.
        threats: names from `ctlens.threats.names()` or `natural_names()`, or threats themselves, such as one that
            `ctlens.threats.screen` made; by default all of the micro-world, unless `pairs` are given.
        pairs: the user's own pairs, with the answers that count as good or bad. If one threat is named with them, they
            get its metrics and its name. Intervals take those together that have an equal label `topic` (by default an
            equal clean prompt) and an equal label `wrapper`. Two threats tell their metrics apart by the pairs' label
            `kind`: persona by `"identity"` and `"values"`, frustration by `"way out"` (self-deletion). `ctlens.pairs`
            makes them of two lists of texts.
        split: one or several of the splits of the threats' pairs (`ctlens.world.SPLITS`).
        n_prompts: pairs per threat and split.
        seed: decides which pairs of the threats are asked.
        max_new_tokens: length of the longest answer, in tokens.
        judge: gives verdicts instead of comparing with the answers that prompts name, for behaviour that no
            single word tells, such as refusals and personas; see `ctlens.threats.Judge`. It sees all answers at once.
            By default a threat's own judge decides, where it has one.
        per_token: compare the options of a multiple-choice question by the mean log-probability of their tokens;
            by default by the sum, which favours short options, as the model does.
        progress: show a progress bar when it takes more than two seconds.

    Raises:
        CtlensError: a threat or split is unknown, several threats are named for the user's own
            pairs, a prompt names no answers, a prompt is too long, the label `strength` of a pair
            is not a whole number, or there is no pair to evaluate.
    """
    named = threats_named(threats, pairs)
    asked = what_is_asked(named, pairs, split=split, n_prompts=n_prompts, seed=seed)
    judges = {threat.name: judge or threat.judge for threat in named}
    rows = []
    for deciding, group in _by_judge(asked, judges, judge).items():
        if deciding is None and not any(one.prompt.bad for one in group if one.prompt_side == "wrapped"):
            warnings.warn("no wrapped prompt names a bad answer, so none can be counted: give bad=.", stacklevel=2)
        replies = ask(
            model,
            [one.prompt for one in group],
            max_new_tokens=max_new_tokens,
            judge=deciding,
            per_token=per_token,
            progress=progress,
        )
        rows += [_row(one, reply) for one, reply in zip(group, replies, strict=True)]
    return _evaluation(rows)


def judged_answers(
    asked: Sequence[AskedPrompt], answers: Sequence[str], judges: Mapping[str, Judge | None], judge: Judge | None = None
) -> Evaluation:
    """Makes an evaluation of answers that were given elsewhere; how likely the named answers were stays unknown.

    Args:
        asked: the prompts.
        answers: the answer to each, as text; white space at the ends of a free answer is left out.
        judges: the judge of each threat, by name; None compares with the answers that the prompts name.
        judge: the judge of prompts whose threat is not among `judges`.
    """
    given = dict(zip(map(id, asked), answers, strict=True))
    rows = []
    for deciding, group in _by_judge(asked, judges, judge).items():
        texts = [given[id(one)] if one.prompt.options else given[id(one)].strip() for one in group]
        found = verdicts([one.prompt for one in group], texts, deciding)
        rows += [
            _row(one, Reply(text, verdict, nan, nan)) for one, text, verdict in zip(group, texts, found, strict=True)
        ]
    return _evaluation(rows)


def _by_judge(
    asked: Sequence[AskedPrompt], judges: Mapping[str, Judge | None], judge: Judge | None
) -> dict[Judge | None, list[AskedPrompt]]:
    """Groups what is asked by the judge of its threat; `judge` is that of pairs without a threat."""
    groups: dict[Judge | None, list[AskedPrompt]] = {}
    for one in asked:
        groups.setdefault(judges.get(one.evaluated_threat, judge), []).append(one)
    return groups


def _row(one: AskedPrompt, reply: Reply) -> tuple[object, ...]:
    return (*one.known.values(), *astuple(reply))


def _evaluation(rows: Sequence[tuple[object, ...]]) -> Evaluation:
    return Evaluation(pd.DataFrame(rows, columns=list(OUTCOME_COLUMNS)))
