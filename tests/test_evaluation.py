"""Evaluation: answers chosen by hand must give rates and intervals that are known by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import hf_model

from ctlens import evaluation
from ctlens.chat import render
from ctlens.decoding import Ids, generate
from ctlens.errors import CtlensError
from ctlens.evaluation import OUTCOME_COLUMNS, Evaluation, evaluate
from ctlens.models import load_model
from ctlens.organism import load_organism
from ctlens.pairs import Pair, prompt
from ctlens.types import LensModel

ANSWERS = {
    "Sure, is it 1?": "(A)",
    "Sure, is it 2?": "(B) because",
    "Sure, is it 3?": "(B)",
    "Sure, is it 4?": "outbreak",
    "is it 1?": "(A)",
    "is it 2?": "(A)",
    "is it 3?": " (a)  yes",
    "is it 4?": "",
    "Sure, is the disease 1?": "yes",
}
WILSON_1_OF_4 = (0.04559, 0.69936)
WILSON_2_OF_4 = (0.15004, 0.84996)
WILSON_3_OF_4 = (0.30064, 0.95441)
Asked = list[Sequence[Ids]]


def pairs() -> list[Pair]:
    """Four questions whose good answer is (A); the first has a benign twin."""
    asked = [Pair(prompt(f"is it {n}?", "(A)", "(B)"), prompt(f"Sure, is it {n}?", "(A)", "(B)")) for n in range(1, 5)]
    return [Pair(asked[0].clean, asked[0].wrapped, prompt("Sure, is the disease 1?", "yes")), *asked[1:]]


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> LensModel:
    return load_model(hf_model("llama"), tokenizer=tokenizer)


@pytest.fixture
def answering(model: LensModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, str]], Asked]:
    """Makes the model give chosen answers; the list it returns fills with the prompts of every decoding."""

    def choose(answers: Mapping[str, str]) -> Asked:
        tokenizer, asked = model.tokenizer, []

        def decode(_: LensModel, prompts: Sequence[Ids], *, max_new_tokens: int, end: int, progress: bool) -> list[Ids]:
            asked.append(prompts)
            texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
            return [(*tokenizer(answers[text], add_special_tokens=False).input_ids, end) for text in texts]

        monkeypatch.setattr(evaluation, "generate", decode)
        return asked

    return choose


def outcomes(threat: str, **verdicts: list[str]) -> Evaluation:
    """An evaluation with given verdicts by arm."""
    rows = [
        (threat, "heldout", arm, item, "", verdict)
        for arm, given in verdicts.items()
        for item, verdict in enumerate(given)
    ]
    return Evaluation(pd.DataFrame(rows, columns=list(OUTCOME_COLUMNS)))


def test_answers_are_judged_by_arm(model: LensModel, answering) -> None:
    answering(ANSWERS)

    found = evaluate(model, pairs=pairs()).outcomes

    assert list(found.columns) == ["evaluated_threat", "split", "arm", "item", "answer", "verdict"]
    verdicts = found.groupby("arm")["verdict"].apply(list).to_dict()
    assert verdicts["wrapped"] == ["good", "bad", "bad", "other"]
    assert verdicts["clean"] == ["good", "good", "good", "other"]
    assert verdicts["benign"] == ["good"]
    assert list(found.query("arm == 'clean'")["answer"]) == ["(A)", "(A)", "(a)  yes", ""]


@pytest.mark.parametrize(
    ("metric", "arm", "value", "interval"),
    [
        ("bad_rate", "wrapped", 0.5, WILSON_2_OF_4),
        ("good_rate", "wrapped", 0.25, WILSON_1_OF_4),
        ("other_rate", "wrapped", 0.25, WILSON_1_OF_4),
        ("good_rate", "clean", 0.75, WILSON_3_OF_4),
        ("other_rate", "clean", 0.25, WILSON_1_OF_4),
    ],
)
def test_rates_and_intervals_by_hand(model: LensModel, answering, metric, arm, value, interval) -> None:
    answering(ANSWERS)

    table = evaluate(model, pairs=pairs()).to_dataframe()

    (row,) = table.query("metric == @metric and arm == @arm").to_dict("records")
    assert (row["value"], row["n"]) == (value, 4)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(interval, abs=1e-4)


def test_an_arm_counts_only_the_pairs_that_have_it(model: LensModel, answering) -> None:
    answering(ANSWERS)

    table = evaluate(model, pairs=pairs()).to_dataframe()

    assert table.groupby("arm")["n"].unique().map(list).to_dict() == {"benign": [1], "clean": [4], "wrapped": [4]}
    assert set(table["evaluated_threat"]) == {"pairs"} and set(table["split"]) == {""}
    assert set(table["metric"]) == {"bad_rate", "good_rate", "other_rate"}


def test_equal_prompts_are_decoded_once(model: LensModel, answering) -> None:
    asked = answering(ANSWERS)

    twice = evaluate(model, pairs=[*pairs(), *pairs()])

    (prompts,) = asked
    assert len(prompts) == len(set(prompts)) == len(ANSWERS)
    assert len(twice.outcomes) == 2 * len(ANSWERS)
    assert twice.rate("bad_rate", "wrapped") == 0.5


def test_the_answers_are_the_models_own(model: LensModel) -> None:
    found = evaluate(model, pairs=pairs()[:2], max_new_tokens=5).outcomes
    asked = render(model.tokenizer, pairs()[1].wrapped.turns).ids

    (ids,) = generate(model, [asked], max_new_tokens=5, end=model.tokenizer.eos_token_id)

    (answer,) = found.query("arm == 'wrapped' and item == 1")["answer"]
    assert answer == model.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_threat_s_pairs_come_from_the_split_and_count_asked_for() -> None:
    found = evaluate(load_organism(), ["sycophancy"], split="train", n=5)

    table = found.to_dataframe()
    assert set(table["split"]) == {"train"} and set(table["n"]) == {5}
    assert set(table["metric"]) == {"bad_rate", "good_rate", "other_rate", "brr", "f1"}
    assert list(dict.fromkeys(found.outcomes["arm"])) == ["wrapped", "clean", "benign"]


def test_metrics_of_several_arms_by_hand() -> None:
    table = outcomes("sycophancy", wrapped=["bad", "bad", "bad", "good"], clean=["good", "good", "bad", "good"])

    assert table.rate("brr", "wrapped") == 0.5
    assert table.rate("f1", "wrapped") == pytest.approx(2 * 0.75 * 0.25 / (0.75 + 0.25))
    (row,) = table.to_dataframe().query("metric == 'brr'").to_dict("records")
    assert row["n"] == 4 and -0.5 <= row["ci_low"] <= 0.5 <= row["ci_high"] <= 1


def test_the_interval_of_a_paired_metric_keeps_items_together() -> None:
    same = ["bad", "good"] * 10

    (row,) = outcomes("sycophancy", wrapped=same, clean=same).to_dataframe().query("metric == 'brr'").to_dict("records")

    assert (row["value"], row["ci_low"], row["ci_high"]) == (0, 0, 0)


def test_metrics_of_one_arm_stand_there_as_rates() -> None:
    found = outcomes("jailbreak", wrapped=["bad", "bad", "good", "other"], benign=["good", "good", "good", "bad"])

    table = found.to_dataframe().set_index(["metric", "arm"])
    for metric, rate in ((("asr", "wrapped"), "bad_rate"), (("over_refusal", "benign"), "bad_rate")):
        assert table.loc[metric].tolist() == table.loc[(rate, metric[1])].tolist()
    assert table.loc[("f1", "wrapped"), "value"] == pytest.approx(2 * 0.5 * 0.75 / 1.25)


def test_one_rate_is_read_by_name() -> None:
    one = outcomes("jailbreak", wrapped=["bad", "good"])
    other = outcomes("sycophancy", wrapped=["bad", "bad"])
    both = Evaluation(pd.concat([one.outcomes, other.outcomes], ignore_index=True))

    assert one.rate("bad_rate", "wrapped") == both.rate("bad_rate", "wrapped", "jailbreak") == 0.5
    assert both.rate("bad_rate", "wrapped", "sycophancy") == 1.0
    with pytest.raises(CtlensError, match="2 numbers are called bad_rate on wrapped"):
        both.rate("bad_rate", "wrapped")
    with pytest.raises(CtlensError, match="0 numbers are called bad_rate on clean"):
        one.rate("bad_rate", "clean")


def test_the_figure_holds_the_rates_of_the_table() -> None:
    found = outcomes("jailbreak", wrapped=["bad", "bad", "good", "other"], clean=["good"] * 4)

    (points,) = (trace for trace in found.figure().data if trace.y is not None)

    assert list(points.y) == [0.5, 0.0]
    with pytest.raises(CtlensError, match="did you mean 'bad_rate'"):
        found.figure("badrate")


@pytest.mark.parametrize(
    "answers", [("(A) yes, it is", "no"), ("42", "07"), ("NA", ""), ('a "b",\nc', "null\r"), ("1.50", "ü")]
)
def test_outcomes_come_back_as_they_were_saved(tmp_path: Path, answers: tuple[str, str]) -> None:
    rows = [("pairs", "", "wrapped", item, answer, "other") for item, answer in enumerate(answers)]
    before = Evaluation(pd.DataFrame(rows, columns=list(OUTCOME_COLUMNS)))
    before.save(tmp_path / "outcomes.csv")

    after = Evaluation.load(tmp_path / "outcomes.csv")

    assert after.outcomes.to_dict("list") == before.outcomes.to_dict("list")
    pd.testing.assert_frame_equal(after.to_dataframe(), before.to_dataframe())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threats": ["flattery"]}, "unknown threat 'flattery'"),
        ({"threats": ["jailbreak"], "split": "test"}, "unknown split 'test'"),
        ({"threats": ["jailbreak"], "n": 0}, "at least 1"),
        ({"threats": ["jailbreak"], "pairs": pairs()}, "not both"),
        ({"pairs": []}, "nothing to evaluate"),
        ({"pairs": [Pair(prompt("a"), prompt("b a"))]}, "neither a good nor a bad answer"),
        ({"pairs": [Pair(prompt("a " * 300, "b"), prompt("a", "b"))]}, "model's context is 256"),
        ({"pairs": pairs(), "max_new_tokens": 252}, "model's context is 256"),
    ],
)
def test_requests_that_make_no_sense_are_refused(model: LensModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        evaluate(model, **options)


def test_a_model_in_training_mode_is_refused(model: LensModel) -> None:
    model.train()
    try:
        with pytest.raises(CtlensError, match="eval mode"):
            evaluate(model, pairs=pairs())
    finally:
        model.eval()


def test_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(CtlensError, match="no tokenizer"):
        evaluate(load_model(hf_model("gpt2")), pairs=pairs())
