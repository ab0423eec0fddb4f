"""The replies of a model to prompts: its greedy answers, their verdicts, and how likely good and bad answers were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, NamedTuple

from ctlens.core.errors import CtlensError, unknown
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.batch import require_room
from ctlens.data.chat import Rendered, opening_token, render
from ctlens.data.inputs import Prompts
from ctlens.data.pairs import Prompt
from ctlens.models.adopt import adopt
from ctlens.models.generation import decode, end_tokens
from ctlens.models.kv_cache import Begin, Ids, begin
from ctlens.models.scoring import Choice, choose
from ctlens.threats.base import UNPARSED, VERDICTS, Judge
from ctlens.threats.base import judge as by_opening


@dataclass(frozen=True)
class Reply:
    """A reply is what a model answers to one prompt, with its verdict.

    Attributes:
        answer: the greedy answer as text; to a multiple-choice question the likeliest option, empty for a tie.
        verdict: `"good"`, `"bad"`, `"other"`, or `"unparsed"` where a judge could not tell.
        good_probability, bad_probability: the probability that the answer begins with the first token of the
            prompt's good and of its bad answer. NaN for an answer that the prompt does not name, or that has no
            token of its own because it fuses with the prompt's end; both are NaN if the two begin with the same
            token. For a multiple-choice question, their shares among the options.
    """

    answer: str
    verdict: str
    good_probability: float
    bad_probability: float


@public
def ask(
    model: LensModel,
    prompts: Prompts,
    *,
    max_new_tokens: int = 16,
    judge: Judge | None = None,
    per_token: bool = False,
    progress: bool = False,
) -> list[Reply]:
    """Asks a model every prompt; equal prompts are decoded once.

    A prompt with options is not decoded: the option whose whole text is likeliest is the answer, see
    `ctlens.models.scoring.choose`. With a judge, every prompt is answered freely.

    Args:
        model: in eval mode, with a tokenizer.
        prompts: the prompts, each with its good or bad answer, unless there is a judge.
        max_new_tokens: length of the longest answer, in tokens.
        judge: gives the verdicts, see `Judge`; None judges by the answers that the prompts name.
        per_token: compare options by the mean log-probability of their tokens instead of the sum.
        progress: show a progress bar when it takes more than two seconds.

    Raises:
        CtlensError: a prompt names no answer and there is no judge, a prompt does not fit the
            context, or the judge does not give one verdict per prompt.
    """
    adopt(model)
    options = {"max_new_tokens": max_new_tokens, "judge": judge, "per_token": per_token, "progress": progress}
    return replies_to(model, prompts, **options)


def replies_to(
    model: LensModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    judge: Judge | None = None,
    per_token: bool = False,
    progress: bool = False,
    begin: Begin = begin,
) -> list[Reply]:
    """The replies of `ask`; `begin` runs the prompts."""
    distinct = list(dict.fromkeys(prompts))
    chosen = [prompt for prompt in distinct if prompt.options and judge is None]
    if judge is None:
        for prompt in distinct:
            by_opening(prompt, "")  # refuses a prompt without answers before the work of decoding
    choices = [
        choice.per_token if per_token else choice for choice in choose(model, chosen, progress=progress, begin=begin)
    ]
    replies = dict(zip(chosen, map(_of_choice, chosen, choices), strict=True))
    free = [prompt for prompt in distinct if prompt not in replies]
    if free:
        replies |= _answered(model, free, max_new_tokens, judge, progress, begin)
    return [replies[prompt] for prompt in prompts]


def _of_choice(prompt: Prompt, choice: Choice) -> Reply:
    verdict = _by_option(prompt, choice.chosen)
    return Reply(choice.chosen or "", verdict, choice.share(prompt.good), choice.share(prompt.bad))


def _by_option(prompt: Prompt, option: str | None) -> str:
    """The verdict on a chosen option; None where no option is ahead of the others."""
    verdicts = {prompt.bad: "bad", prompt.good: "good", None: "other"}
    return verdicts.get(option, "other")


def _answered(
    model: LensModel, prompts: Sequence[Prompt], max_new_tokens: int, judge: Judge | None, progress: bool, begin: Begin
) -> dict[Prompt, Reply]:
    """Lets the model answer prompts freely; `prompts` are distinct and at least one."""
    tokenizer = model.tokenizer
    asked = {turns: render(tokenizer, turns) for turns in dict.fromkeys(prompt.turns for prompt in prompts)}
    ids = {turns: rendered.ids for turns, rendered in asked.items()}
    for row in ids.values():
        require_room(len(row) + max_new_tokens, model.cfg.n_ctx, "a prompt with its answer")
    openings = {prompt: _openings(tokenizer, prompt, asked[prompt.turns]) for prompt in prompts}
    openings_of = [(ids[prompt.turns], openings[prompt]) for prompt in prompts]
    decoded = _decoded(model, openings_of, max_new_tokens, progress, begin)
    answers = [decoded[ids[prompt.turns]].answer for prompt in prompts]
    replies = {}
    for prompt, answer, verdict in zip(prompts, answers, verdicts(prompts, answers, judge), strict=True):
        likely = decoded[ids[prompt.turns]].first_probabilities
        by_side = {side: likely[token] for side, token in openings[prompt].items()}
        replies[prompt] = Reply(answer, verdict, by_side.get("good", nan), by_side.get("bad", nan))
    return replies


class _Answer(NamedTuple):
    """An answer as the model decoded it, and the probability of each token that a named answer begins with."""

    answer: str
    first_probabilities: Mapping[int, float]


def _decoded(
    model: LensModel, asked: Sequence[tuple[Ids, Mapping[str, int]]], max_new_tokens: int, progress: bool, begin: Begin
) -> dict[Ids, _Answer]:
    """Decodes each prompt once, with the openings of all answers that are asked of it.

    Prompts of equal tokens may name different answers: `asked` holds, per prompt, its tokens and its openings.
    """
    first_tokens: dict[Ids, dict[int, None]] = {row: {} for row, _ in asked}
    for row, openings in asked:
        first_tokens[row].update(dict.fromkeys(openings.values()))
    decoded = decode(
        model,
        list(first_tokens),
        first_tokens=[tuple(tokens) for tokens in first_tokens.values()],
        max_new_tokens=max_new_tokens,
        ends=end_tokens(model),
        progress=progress,
        begin=begin,
    )
    texts = model.tokenizer.batch_decode(decoded.answers, skip_special_tokens=True)
    return {
        row: _Answer(text.strip(), dict(zip(tokens, probabilities, strict=True)))
        for (row, tokens), text, probabilities in zip(
            first_tokens.items(), texts, decoded.first_probabilities, strict=True
        )
    }


def verdicts(prompts: Sequence[Prompt], answers: Sequence[str], judge: Judge | None = None) -> list[str]:
    """Gives the verdict on answers that were given, whoever gave them.

    Args:
        prompts: what was asked.
        answers: the answer to each; of a multiple-choice question an option, or free words that begin with one.
        judge: gives the verdicts, see `Judge`; None judges by the answers that the prompts name.

    Raises:
        CtlensError: a prompt names no answer and there is no judge, or the judge does not give one verdict per prompt.
    """
    if judge is None:
        return [_by_answer(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    given = list(judge(prompts, answers))
    if len(given) != len(prompts):
        raise CtlensError(
            f"the judge gave {len(given)} verdicts on {len(prompts)} answers: let it give one verdict per answer."
        )
    for verdict in given:
        if verdict is not None and verdict not in VERDICTS:
            raise unknown("verdict of the judge", verdict, VERDICTS)
    return [UNPARSED if verdict is None else verdict for verdict in given]


def _by_answer(prompt: Prompt, answer: str) -> str:
    """The verdict by the answers that a prompt names: a whole option counts as that one, whatever it begins with."""
    chosen = [option for option in prompt.options if option.strip() == answer.strip()]
    return _by_option(prompt, chosen[0]) if chosen else by_opening(prompt, answer)


def _openings(tokenizer: Any, prompt: Prompt, asked: Rendered) -> dict[str, int]:
    """Finds the first token of a prompt's good and bad answer, by side; empty if both begin with the same."""
    named = {"good": prompt.good, "bad": prompt.bad}
    found = {side: opening_token(tokenizer, asked, answer) for side, answer in named.items() if answer is not None}
    tokens = {side: token for side, token in found.items() if token is not None}
    return tokens if len(set(tokens.values())) == len(tokens) else {}
