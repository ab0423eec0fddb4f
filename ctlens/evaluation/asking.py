"""From pairs to outcomes: each distinct prompt is asked once, and every answer is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import TypeAlias

import pandas as pd

from ctlens import threats as threat_registry
from ctlens.core.errors import CtlensError
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import PROMPT_SIDES, Pair, Prompt, clusters_of, short_digest
from ctlens.evaluation.result import OUTCOME_COLUMNS, OWN_PAIRS, Evaluation
from ctlens.threats import Judge, Threat, ask

_Asked: TypeAlias = tuple[tuple[str, str], str, int, Pair, Prompt]
"""What is asked: the threat and split, the prompt side, the pair's number, the pair, and its prompt of that side."""


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
    named = [threat if isinstance(threat, Threat) else threat_registry.get(threat) for threat in threats or ()]
    if pairs is None:
        named = named or list(threat_registry.REGISTRY.values())
        groups = _threat_pairs(named, split, n_prompts, seed)
    else:
        groups = {(_name_of_own(named), ""): list(pairs)}
    asked = [
        (group_labels, prompt_side, item, pair, prompt)
        for group_labels, group in groups.items()
        for prompt_side in PROMPT_SIDES
        for item, pair in enumerate(group)
        if (prompt := pair.side(prompt_side)) is not None
    ]
    if not asked:
        raise CtlensError("there is nothing to evaluate: give at least one pair.")
    by_name = {threat.name: threat for threat in named}
    known = {id(pair): _known(pair, by_name.get(name)) for (name, _), group in groups.items() for pair in group}
    judges = {threat.name: judge or threat.judge for threat in named}
    rows = []
    for deciding, group in _by_judge(asked, judges, judge).items():
        replies = ask(
            model,
            [prompt for *_, prompt in group],
            max_new_tokens=max_new_tokens,
            judge=deciding,
            per_token=per_token,
            progress=progress,
        )
        rows += [
            (*group_labels, prompt_side, item, *known[id(pair)], *astuple(reply))
            for (group_labels, prompt_side, item, pair, _), reply in zip(group, replies, strict=True)
        ]
    return Evaluation(pd.DataFrame(rows, columns=list(OUTCOME_COLUMNS)))


def _by_judge(
    asked: Sequence[_Asked], judges: Mapping[str, Judge | None], judge: Judge | None
) -> dict[Judge | None, list[_Asked]]:
    """Groups what is asked by the judge of its threat; `judge` is that of pairs without a threat."""
    groups: dict[Judge | None, list[_Asked]] = {}
    for one in asked:
        (name, _), *_ = one
        groups.setdefault(judges.get(name, judge), []).append(one)
    return groups


def _threat_pairs(
    threats: Sequence[Threat], split: str | Sequence[str], n_prompts: int, seed: int
) -> dict[tuple[str, str], list[Pair]]:
    """Draws the pairs of each threat and split."""
    splits = [split] if isinstance(split, str) else split
    return {
        (threat.name, name): threat.pairs(n_prompts, split=name, seed=seed) for threat in threats for name in splits
    }


def _name_of_own(threats: Sequence[Threat]) -> str:
    """Finds the threat name of the user's own pairs: the threat whose metrics they get, or `OWN_PAIRS`."""
    names = [threat.name for threat in threats]
    if len(names) > 1:
        raise CtlensError(f"pairs of your own get the metrics of one threat: name one of {', '.join(names)}.")
    return names[0] if names else OWN_PAIRS


def _known(pair: Pair, threat: Threat | None) -> tuple[str, str, int, str, str]:
    """Makes the values of the columns `pair`, `kind`, `strength`, `topic` and `wrapper`."""
    strength = pair.labels.get("strength", "0")
    if not str(strength).isdecimal():
        raise CtlensError(
            f"the label 'strength' of a pair is {strength!r}, not a whole number: write it as '2', or leave it out."
        )
    topic, wrapper = clusters_of(pair)
    digest = short_digest(pair.clean, pair.wrapped, pair.benign)
    return digest, pair.labels.get("kind", ""), int(strength), topic, wrapper
