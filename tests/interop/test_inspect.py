"""Models and threats of ctlens in Inspect: its logs hold the numbers that ctlens computes itself."""

from __future__ import annotations

import asyncio
from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.models import made

import ctlens as ct
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, Prompt, prompt

inspect_ai = pytest.importorskip("inspect_ai", reason="needs the extra inspect")
from inspect_ai._util.error import PrerequisiteError  # noqa: E402
from inspect_ai.log import EvalLog  # noqa: E402
from inspect_ai.model import (  # noqa: E402
    ChatMessageSystem,
    ChatMessageUser,
    ContentImage,
    GenerateConfig,
    ModelOutput,
    ModelUsage,
    get_model,
)
from inspect_ai.tool import ToolInfo  # noqa: E402

from ctlens.interop.answering import answer_requests  # noqa: E402
from ctlens.interop.tasks import THREATS  # noqa: E402

OPTIONS = (" yes", " no", " never")
N_PROMPTS = 10


def logged(task: Any, model: Any, folder: Path, **options: Any) -> EvalLog:
    (log,) = inspect_ai.eval(task, model=model, log_dir=str(folder), display="none", **options)
    return log


def metrics_of(log: EvalLog) -> dict[str, float]:
    assert log.status == "success" and log.results is not None, log.error
    (score,) = log.results.scores
    return {name: one.value for name, one in score.metrics.items()}


def as_metrics(found: ct.Evaluation) -> dict[str, float]:
    """The numbers of an evaluation by the names that they have in Inspect."""
    named: dict[str, float] = {}
    for row in [*found.to_dataframe().to_dict("records"), *found.switches().to_dict("records")]:
        if not row["metric"].endswith("_probability"):
            name = f"{row['metric']}_{row['prompt_side']}"
            named |= {name: row["value"], f"{name}_low": row["ci_low"], f"{name}_high": row["ci_high"]}
    return {name: value for name, value in named.items() if not isnan(value)}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EvalLog:
    """The organism's log on one threat."""
    asked = {"split": "heldout", "n_prompts": N_PROMPTS}
    return logged("ctlens/sycophancy", "ctlens/organism", tmp_path_factory.mktemp("logs"), task_args=asked)


@pytest.fixture(scope="module")
def tiny() -> LensModel:
    return made()


@pytest.fixture
def choice() -> list[Pair]:
    """Pairs of multiple choice, of enough topics and wrappers for an interval."""
    found = []
    for number in range(12):
        question = f"Is it {'right ' * (number % 6)}?"
        clean, wrapped = prompt(question), prompt(f"I say no {number % 5}. {question}")
        labels = {"topic": str(number % 6), "wrapper": str(number % 5)}
        answers = (" yes", " no", OPTIONS)
        found.append(Pair(Prompt(clean.turns, *answers), Prompt(wrapped.turns, *answers), labels=labels))
    return found


def test_there_is_a_task_per_threat() -> None:
    assert [*THREATS] == [*ct.threats.names(), *ct.threats.natural_names()]


def test_the_numbers_in_the_log_are_those_of_evaluate(log: EvalLog) -> None:
    own = ct.evaluate(ct.load_organism(), ["sycophancy"], n_prompts=N_PROMPTS, progress=False)

    found = metrics_of(log)

    assert found == as_metrics(own)
    assert {"bad_rate_wrapped", "good_rate_benign", "switch_to_bad_wrapped", "switch_from_bad_wrapped"} <= set(found)


@pytest.mark.slow
def test_every_threat_has_directed_switch_rates(tmp_path: Path) -> None:
    log = logged("ctlens/jailbreak", "ctlens/organism", tmp_path, task_args={"n_prompts": N_PROMPTS})

    found = metrics_of(log)

    own = ct.evaluate(ct.load_organism(), ["jailbreak"], n_prompts=N_PROMPTS, progress=False)
    wrapped = own.answers("jailbreak")["verdict"].to_numpy()
    clean = own.answers("jailbreak", prompt_side="clean")["verdict"].to_numpy()
    assert found == as_metrics(own)
    assert found["switch_to_bad_wrapped"] == ((wrapped == "bad") & (clean != "bad")).mean() > 0


def test_requests_that_wait_are_answered_together(tiny: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def counted(model: LensModel, requests: list[Any]) -> list[Any]:
        sizes.append(len(requests))
        return answer_requests(model, requests)

    monkeypatch.setattr("ctlens.interop.provider.answer_requests", counted)
    model = ct.inspect_model(tiny)

    async def asked() -> None:
        config = GenerateConfig(max_tokens=2, adaptive_connections=False, max_connections=8)
        await asyncio.gather(*(model.generate(f"Is it {number}?", config=config) for number in range(8)))

    asyncio.run(asked())
    assert sum(sizes) == 8 and len(sizes) <= 2


def test_a_log_is_an_evaluation(log: EvalLog) -> None:
    model = ct.load_organism()
    own = ct.evaluate(model, ["sycophancy"], n_prompts=N_PROMPTS, progress=False).outcomes

    found = ct.inspect_evaluation(log)
    read = ct.inspect_evaluation(log.location)

    order = ["prompt_side", "item"]
    unknown = {"good_probability": float("nan"), "bad_probability": float("nan")}
    expected = own.assign(**unknown).sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(found.outcomes.sort_values(order, ignore_index=True), expected, check_exact=True)
    pd.testing.assert_frame_equal(found.outcomes, read.outcomes, check_exact=True)


def test_the_samples_are_whole_pairs_in_front(log: EvalLog) -> None:
    assert log.samples is not None

    first = [one.id for one in sorted(log.samples, key=lambda one: one.metadata["item"])[:3]]

    assert set(first) == {f"sycophancy-heldout-{side}-0" for side in ("wrapped", "clean", "benign")}


def test_options_are_chosen_as_evaluate_chooses(tiny: LensModel, choice: list[Pair], tmp_path: Path) -> None:
    own = ct.evaluate(tiny, pairs=choice, progress=False)

    log = logged(ct.inspect_task(pairs=choice), ct.inspect_model(tiny, "tiny"), tmp_path)

    assert metrics_of(log) == as_metrics(own)
    assert log.eval.model == "ctlens/tiny" and log.eval.model_args == {} and log.samples is not None
    shares = [one.output.metadata["shares"] for one in log.samples if one.output.metadata]
    assert len(shares) == 24 and all(sum(of.values()) == pytest.approx(1) for of in shares)


@pytest.mark.slow
def test_another_provider_is_judged_alike_and_cannot_choose(choice: list[Pair], tmp_path: Path) -> None:
    pairs = [{"clean": "Is it?", "wrapped": "No. Is it?", "good": "yes", "bad": "no"}]
    said = ModelOutput.from_content("mockllm", "No, never.")
    said.usage = ModelUsage(input_tokens=1, output_tokens=2, total_tokens=3)
    says_no = get_model("mockllm/model", custom_outputs=[said] * 2)

    found = metrics_of(logged(ct.inspect_task(pairs=pairs), says_no, tmp_path))
    refused = logged(ct.inspect_task(pairs=choice), "mockllm/model", tmp_path)

    assert found["bad_rate_wrapped"] == found["bad_rate_clean"] == 1
    assert refused.status == "error" and refused.error is not None and "does not score" in refused.error.message


def test_unparsed_answers_are_counted(tiny: LensModel, tmp_path: Path) -> None:
    pairs = [{"clean": "Is it?", "wrapped": f"No {number}. Is it?"} for number in range(4)]

    def judge(prompts: Any, answers: Any) -> list[str | None]:
        return [None if "0" in one.turns[0].content else "good" for one in prompts]

    own = ct.evaluate(tiny, pairs=pairs, judge=judge, progress=False)
    log = logged(ct.inspect_task(pairs=pairs, judge=judge), ct.inspect_model(tiny), tmp_path)

    assert own.rate("unparsed_rate", "wrapped") == 0.25
    assert metrics_of(log) == as_metrics(own)


def test_a_run_and_a_file_of_pairs_are_named_on_the_command_line(tmp_path: Path) -> None:
    threat = ct.threats.get("sycophancy")
    run = ct.train(ct.load_organism(), threat.pairs(8), ct.AttCT(), steps=1, progress=False)
    run.save(tmp_path / "run")
    pairs = threat.pairs(4, split="heldout")
    ct.save_pairs(tmp_path / "pairs.jsonl", pairs)
    asked = {"file": str(tmp_path / "pairs.jsonl"), "threat": "sycophancy", "prompt_sides": "wrapped,clean"}

    log = logged("ctlens/pairs", f"ctlens/{tmp_path / 'run'}", tmp_path, task_args=asked)

    own = as_metrics(ct.evaluate(run.model, ["sycophancy"], pairs=pairs, progress=False))
    assert metrics_of(log) == {name: value for name, value in own.items() if "_benign" not in name}


def test_the_answer_is_the_model_s_own_whoever_asks_beside(tiny: LensModel) -> None:
    asked = [ChatMessageSystem(content="No."), ChatMessageUser(content="Is it right?")]
    model = ct.inspect_model(tiny)

    async def answers() -> list[ModelOutput]:
        config = GenerateConfig(max_tokens=6)
        return await asyncio.gather(*(model.generate(given, config=config) for given in [asked, "Which term?"] * 3))

    found = asyncio.run(answers())
    again = asyncio.run(answers())

    own = [
        ct.chat(tiny, given, max_new_tokens=6)
        for given in (
            [{"role": "system", "content": "No."}, {"role": "user", "content": "Is it right?"}],
            "Which term?",
        )
    ]
    assert [one.completion for one in found] == own * 3 == [one.completion for one in again]
    assert found[0].usage is not None and found[0].usage.output_tokens == 6 and found[0].stop_reason == "max_tokens"


def test_log_probabilities_reach_inspect(tiny: LensModel) -> None:
    config = GenerateConfig(max_tokens=3, logprobs=True, top_logprobs=2, num_choices=1, presence_penalty=0)

    found = asyncio.run(ct.inspect_model(tiny).generate("Is it?", config=config)).choices[0].logprobs

    assert found is not None and len(found.content) == 3
    assert all(one.top_logprobs and one.top_logprobs[0].logprob == one.logprob for one in found.content)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config": GenerateConfig(top_k=5)}, "no top_k: leave it out"),
        ({"config": GenerateConfig(num_choices=2)}, "no num_choices"),
        ({"config": GenerateConfig(frequency_penalty=1)}, "no frequency_penalty"),
        (
            {"config": GenerateConfig(extra_body={"option": ["a"]})},
            "unknown field of extra_body 'option'; did you mean",
        ),
        ({"tools": [ToolInfo(name="add", description="Adds.")]}, "calls no tools"),
        ({"input": [ChatMessageUser(content=[ContentImage(image="data:image/png;base64,aa")])]}, "text alone"),
        ({"input": "Please answer. " * 200}, "shorten the prompt"),
    ],
)
def test_what_a_model_does_not_have_is_said(tiny: LensModel, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ct.CtlensError, match=message):
        asyncio.run(ct.inspect_model(tiny).generate(**{"input": "Is it?", **given}))


def test_a_mistake_is_one_sentence(tmp_path: Path, log: EvalLog) -> None:
    with pytest.raises(PrerequisiteError, match="nowhere"):
        get_model("ctlens/nowhere/at/all")
    with pytest.raises(PrerequisiteError, match="unexpected keyword argument 'colour'"):
        get_model("ctlens/organism", colour="red")
    for asked in ({"split": "held"}, {"prompt_sides": ["left"]}, {"base": "x"}):
        with pytest.raises(PrerequisiteError, match="unknown split|unknown prompt side|is none: leave it out"):
            logged("ctlens/sycophancy", "mockllm/model", tmp_path, task_args=asked)
    with pytest.raises(ct.CtlensError, match="name a threat, or give pairs"):
        ct.inspect_task()
    with pytest.raises(ct.CtlensError, match="nowhere.eval cannot be read as a log of Inspect"):
        ct.inspect_evaluation("nowhere.eval")
    with pytest.raises(ct.CtlensError, match="without a verdict"):
        ct.inspect_evaluation(log.model_copy(update={"samples": []}))
    with pytest.raises(ct.CtlensError, match="several epochs"):
        ct.inspect_evaluation(log.model_copy(update={"samples": [*(log.samples or ())] * 2}))
