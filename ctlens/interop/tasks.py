"""Threats as tasks of Inspect: their prompts as a data set, ctlens's verdicts, and its rates with their intervals.

Inspect imports this file whenever it starts, so everything that is slow to import waits for the task that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isnan, nan
from typing import TYPE_CHECKING, Any

from inspect_ai import Epochs, Task, task
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, GenerateConfig
from inspect_ai.model import get_model as model_of_the_task
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver

if TYPE_CHECKING:
    from ctlens.data.pairs import Prompt
    from ctlens.evaluation import Evaluation
    from ctlens.evaluation.asked import AskedPrompt
    from ctlens.threats import Judge, Threat

THREATS = (
    *("sycophancy", "jailbreak", "persona", "prefill", "frustration", "conditional"),
    *("facts", "free_facts", "order", "paraphrase", "beginning", "system", "character"),
)
"""The names of the tasks: those of the micro-world's threats, and of the natural ones."""
_MESSAGES: Mapping[str, Callable[..., ChatMessage]] = {
    "system": ChatMessageSystem,
    "user": ChatMessageUser,
    "assistant": ChatMessageAssistant,
}


def task_of(asked: Sequence[AskedPrompt], max_new_tokens: int = 16, judge: Judge | None = None) -> Task:
    """Makes a task of the prompts of an evaluation, pair by pair, so that a limit leaves whole pairs.

    Args:
        asked: the prompts of one threat and split.
        max_new_tokens: length of the longest answer, in tokens.
        judge: gives the verdicts; None for that of the threat, if it has one.
    """
    by_pair = sorted(asked, key=lambda one: one.item)
    return Task(
        MemoryDataset([_sample(one) for one in by_pair], name=asked[0].evaluated_threat),
        solver=answered(),
        scorer=verdict(judge),
        config=GenerateConfig(temperature=0, max_tokens=max_new_tokens),
        epochs=Epochs(1, "mode"),
    )


def _sample(one: AskedPrompt) -> Sample:
    prompt = one.prompt
    messages = [_MESSAGES[turn.role](content=turn.content) for turn in prompt.turns]
    answers = {"good": prompt.good, "bad": prompt.bad, "options": list(prompt.options)}
    return Sample(input=messages, target=prompt.good or "", id=one.name, metadata={**one.known, **answers})


@solver
def answered() -> Solver:
    """Lets the model answer; to a multiple-choice question, by the option that is the likeliest."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        options = state.metadata["options"]
        if not options:
            return await generate(state)
        from ctlens.interop.provider import OPTIONS, CtlensAPI

        if not isinstance(model_of_the_task().api, CtlensAPI):
            raise PrerequisiteError(
                f"{state.sample_id} is answered by the likeliest of some texts, which the provider of {state.model} "
                "does not score: take a model of ctlens, or a threat that is answered freely, such as free_facts."
            )
        return await generate(state, extra_body={OPTIONS: options})

    return solve


@metric
def rates() -> Metric:
    """Every number of `Evaluation.to_dataframe`, called `bad_rate_wrapped`, with the ends of its 95% interval.

    There are the rates of good, bad and other answers on each prompt side, of answers that could not be judged where
    there are any, the threat's own metrics, and for every threat the directed switch rates, as `switch_to_bad_wrapped`.
    An interval is over topics and wrapper texts, and absent where these are too few.
    """

    def computed(scores: list[SampleScore]) -> Mapping[str, float | None]:
        found = evaluation_of((one.sample_metadata or {}, one.score) for one in scores)
        numbers: dict[str, float | None] = {}
        for row in [*found.to_dataframe().to_dict("records"), *found.switches().to_dict("records")]:
            name = f"{row['metric']}_{row['prompt_side']}"
            ends = {f"{name}_low": row["ci_low"], f"{name}_high": row["ci_high"]}
            numbers |= {key: None if isnan(value) else value for key, value in {name: row["value"], **ends}.items()}
        return numbers

    return computed


@scorer(metrics=[rates()])
def verdict(judge: Judge | None = None) -> Scorer:
    """Ctlens's verdict on an answer: `good`, `bad` or `other`, or `unparsed` where a judge cannot tell.

    Args:
        judge: gives the verdicts; None for that of the threat, if it has one.
    """

    async def score(state: TaskState, target: Target) -> Score:
        from ctlens import threats
        from ctlens.threats.replies import verdicts

        name = state.metadata["evaluated_threat"]
        deciding = judge or (threats.get(name).judge if name in THREATS else None)
        answer = state.output.completion
        (found,) = verdicts([_prompt(state)], [answer], deciding)
        return Score(value=found, answer=answer)

    return score


def _prompt(state: TaskState) -> Prompt:
    """The prompt of a sample, as a judge sees it."""
    from ctlens.data.chat import Turn
    from ctlens.data.pairs import Prompt

    messages = [ChatMessageUser(content=state.input)] if isinstance(state.input, str) else state.input
    known = state.metadata
    turns = tuple(Turn(one.role, one.text) for one in messages)
    return Prompt(turns, known["good"], known["bad"], tuple(known["options"]))


def evaluation_of(scores: Iterable[tuple[Mapping[str, Any], Score]]) -> Evaluation:
    """Makes an evaluation of what a log holds: the metadata of each sample, and its score."""
    import pandas as pd

    from ctlens.evaluation import OUTCOME_COLUMNS, Evaluation

    rows = []
    for metadata, one in scores:
        given = {"answer": one.answer or "", "verdict": one.value, "good_probability": nan, "bad_probability": nan}
        row = {**metadata, **given}
        rows.append([row[column] for column in OUTCOME_COLUMNS])
    return Evaluation(pd.DataFrame(rows, columns=list(OUTCOME_COLUMNS)))


def _threat_task(name: str) -> None:
    """Gives Inspect the task of a threat."""

    @task(name=name)
    def of_threat(
        split: str = "heldout",
        n_prompts: int = 96,
        seed: int = 0,
        prompt_sides: str | list[str] | None = None,
        max_new_tokens: int = 16,
        base: str | None = None,
    ) -> Task:
        with _in_a_sentence():
            from ctlens import threats
            from ctlens.evaluation.asked import what_is_asked

            threat = threats.get(name)
            if base is not None:
                threat = _screened(threat, base)
            asked = what_is_asked([threat], split=split, n_prompts=n_prompts, seed=seed)
            return task_of(_on(prompt_sides, asked), max_new_tokens)


for _name in THREATS:
    _threat_task(_name)


@task(name="pairs")
def of_pairs(
    file: str, threat: str | None = None, prompt_sides: str | list[str] | None = None, max_new_tokens: int = 16
) -> Task:
    """The task of a file of one's own pairs; with a threat they get its metrics and its judge."""
    with _in_a_sentence():
        from ctlens import threats
        from ctlens.data.formats import load_pairs
        from ctlens.evaluation.asked import what_is_asked

        named = [] if threat is None else [threats.get(threat)]
        return task_of(_on(prompt_sides, what_is_asked(named, load_pairs(file))), max_new_tokens)


@contextmanager
def _in_a_sentence() -> Iterator[None]:
    """Lets Inspect print the sentence of a mistake, without a traceback."""
    from ctlens.core.errors import CtlensError

    try:
        yield
    except CtlensError as error:
        raise PrerequisiteError(str(error)) from None


def _on(prompt_sides: str | list[str] | None, asked: Sequence[AskedPrompt]) -> list[AskedPrompt]:
    """The prompts of some sides, named in a list or between commas; None for all."""
    from ctlens.core.errors import unknown
    from ctlens.data.pairs import PROMPT_SIDES

    if prompt_sides is None:
        return list(asked)
    named = prompt_sides.split(",") if isinstance(prompt_sides, str) else prompt_sides
    if other := [side for side in named if side not in PROMPT_SIDES]:
        raise unknown("prompt side", other[0], PROMPT_SIDES)
    return [one for one in asked if one.prompt_side in named]


def _screened(threat: Threat, base: str) -> Threat:
    """A natural threat with the questions alone that a model answers right without an attack."""
    from ctlens.core.errors import CtlensError
    from ctlens.models.loading import load_model
    from ctlens.threats import Natural, screen

    if not isinstance(threat, Natural):
        raise CtlensError(f"base= screens the questions of natural threats, and {threat.name} is none: leave it out.")
    return screen(load_model(base), threat, progress=False).threat
