"""Prompts for other tools: a row of JSONL per prompt of an evaluation, and the evaluation of answers that come back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ctlens import threats as threat_registry
from ctlens.core.errors import CtlensError
from ctlens.core.files import write_text
from ctlens.core.public import public
from ctlens.core.reading import read_jsonl
from ctlens.data.chat import TOKENS, render
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import PROMPT_SIDES, Prompt, turns_of
from ctlens.evaluation.asked import AskedPrompt, threats_named, what_is_asked
from ctlens.evaluation.asking import judged_answers
from ctlens.evaluation.result import Evaluation
from ctlens.models.scoring import Choice
from ctlens.threats import Judge, Threat

_KNOWN: Mapping[str, type] = {
    field.name: int if field.name in ("item", "strength") else str
    for field in fields(AskedPrompt)
    if field.name != "prompt"
}
"""What a row says of a prompt beside its texts, and the type of each."""
_SCORED = "filtered_resps"
"""The field of what lm-eval writes with `--log_samples` that holds the answer, or a score per option."""


@public
def export_prompts(
    path: str | Path,
    threats: Sequence[str | Threat] | None = None,
    *,
    pairs: Pairs | None = None,
    split: str | Sequence[str] = "heldout",
    n_prompts: int = 96,
    seed: int = 0,
    tokenizer: Any = None,
) -> int:
    """Writes the prompts that `ctlens.evaluate` would ask as JSONL, for a tool that asks them of any model.

    A row has `id`; `messages`, each with `role` and `content`, of which a last one of the assistant is the answer's
    beginning; the answers `good` and `bad` (null where there is none) and the `options` of a multiple-choice question,
    as they continue the prompt; the columns of `Evaluation.outcomes` that say what the prompt is; and with a tokenizer
    `text`, the prompt as its chat template writes it. `judge_answers` reads the answers back.

    Args:
        path: of the new file.
        threats, pairs, split, n_prompts, seed: what is asked, as in `ctlens.evaluate`; `ctlens.pairs` makes pairs of
            two lists of texts.
        tokenizer: of the model that is to be asked. Its `text` goes to the model as it is; without a chat template
            one BOS comes in front of it, where the tokenizer has one.

    Returns:
        How many prompts there are.

    Raises:
        CtlensError: as `ctlens.evaluate`, or a prompt is given as token ids, which other tools cannot read.
    """
    named = threats_named(threats, pairs)
    asked = what_is_asked(named, pairs, split=split, n_prompts=n_prompts, seed=seed)
    rows = []
    for one in asked:
        row = _row(one)
        if tokenizer is not None:
            row["text"] = render(tokenizer, one.prompt.turns).text
        rows.append(row)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def _row(one: AskedPrompt) -> dict[str, Any]:
    prompt = one.prompt
    if any(turn.role == TOKENS for turn in prompt.turns):
        raise CtlensError(f"the prompt {one.name} is given as token ids, which other tools cannot read: give its text.")
    messages = [{"role": turn.role, "content": turn.content} for turn in prompt.turns]
    answers = {"good": prompt.good, "bad": prompt.bad, "options": list(prompt.options)}
    return {"id": one.name, "messages": messages, **answers, **one.known}


@public
def judge_answers(
    prompts: str | Path, answers: str | Path | Mapping[str, str], *, judge: Judge | None = None
) -> Evaluation:
    """Judges answers that another tool got to exported prompts, as `ctlens.evaluate` judges those it gets itself.

    The rates, metrics and intervals are computed alike. How likely the good and the bad answer were is not known.

    Args:
        prompts: the file of `export_prompts`.
        answers: a JSONL file with an `id` and an `answer` per row, or the file that lm-eval writes with
            `--log_samples`; or the answers by id. Of a multiple-choice question an answer is one of its options, and
            where lm-eval has scored these, the likeliest.
        judge: as of `ctlens.evaluate`.

    Raises:
        CtlensError: a file is missing or damaged, or there is not one answer to each prompt.
    """
    asked = read_prompts(prompts)
    given = dict(answers) if isinstance(answers, Mapping) else _read_answers(answers, asked)
    if unknown := [name for name in given if name not in asked]:
        raise CtlensError(f"there is an answer to {unknown[0]!r}, which is not in {prompts}: give the file it is from.")
    if missing := [name for name in asked if name not in given]:
        raise CtlensError(f"{len(missing)} prompts have no answer, the first {missing[0]!r}: answer all of {prompts}.")
    known = {one.evaluated_threat for one in asked.values()} & {
        *threat_registry.names(),
        *threat_registry.natural_names(),
    }
    judges = {name: judge or threat_registry.get(name).judge for name in known}
    return judged_answers(list(asked.values()), [given[name] for name in asked], judges, judge)


def read_prompts(path: str | Path) -> dict[str, AskedPrompt]:
    """Reads the prompts that `export_prompts` wrote, by their names.

    Raises:
        CtlensError: the file is missing or damaged, or two rows have one name.
    """
    found: dict[str, AskedPrompt] = {}
    for number, row in read_jsonl(path):
        one = _asked(row, f"{path}, line {number}")
        if one.name in found:
            raise CtlensError(f"{path}, line {number}: the prompt {one.name!r} stands twice: remove one.")
        found[one.name] = one
    if not found:
        raise CtlensError(f"{path} holds no prompt: export some with ctlens.export_prompts.")
    return found


def _asked(row: Mapping[str, Any], where: str) -> AskedPrompt:
    for name, kind in _KNOWN.items():
        if type(row.get(name)) is not kind:
            raise CtlensError(f"{where}: '{name}' is {row.get(name)!r}, as no exported prompt has it: export again.")
    options = row.get("options")
    answers = [row.get("good"), row.get("bad"), *(options if isinstance(options, list) else [0])]
    if row["prompt_side"] not in PROMPT_SIDES or not all(text is None or isinstance(text, str) for text in answers):
        raise CtlensError(f"{where}: the row is no prompt that ctlens exported: export again.")
    good, bad, *texts = answers
    prompt = Prompt(turns_of(row.get("messages"), "messages", where), good, bad, tuple(texts))
    return AskedPrompt(**{name: row[name] for name in _KNOWN}, prompt=prompt)


def _read_answers(path: str | Path, asked: Mapping[str, AskedPrompt]) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        name, answer = _answer(row, asked, where)
        if name in found:
            raise CtlensError(f"{where}: {name!r} is answered twice: leave one answer.")
        found[name] = answer
    return found


def _answer(row: Mapping[str, Any], asked: Mapping[str, AskedPrompt], where: str) -> tuple[str, str]:
    """The name of a prompt and the answer to it."""
    name, answer = row.get("id"), row.get("answer")
    document = row.get("doc")
    if isinstance(document, Mapping) and isinstance(row.get(_SCORED), list):
        name = str(document.get("id"))
        options = asked[name].prompt.options if name in asked else ()
        answer = _likeliest(options, row[_SCORED]) if options else next(iter(row[_SCORED]), None)
    if not isinstance(name, str) or not isinstance(answer, str):
        raise CtlensError(f"{where}: a row needs an 'id' and an 'answer', both texts, or to be a sample of lm-eval.")
    return name, answer


def _likeliest(options: Sequence[str], given: Sequence[Any]) -> str | None:
    """The option that lm-eval scored best, of a pair per option: its log-probability, and whether it is the greedy one.

    It is empty for a tie, as in `ctlens.evaluate`, and None where there are no such scores.
    """
    scores = list(_numbers(given))
    if len(scores) != len(options):
        return None
    return Choice(tuple(options), tuple(scores), (1,) * len(scores)).chosen or ""


def _numbers(given: Sequence[Any]) -> Iterator[float]:
    """The first of each pair; lm-eval writes numbers as they are or as texts."""
    for pair in given:
        try:
            yield float(pair[0])
        except (TypeError, ValueError, IndexError, KeyError):
            return
