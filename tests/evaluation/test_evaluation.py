"""Evaluation: answers chosen by hand must give rates and intervals that are known by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.models import hf_model

from ctlens import pairs as make_pairs
from ctlens import plots, threats
from ctlens.core.clusters import Clusters, clustered_rate, paired_difference
from ctlens.core.errors import CtlensError
from ctlens.core.stats import student
from ctlens.core.types import LensModel
from ctlens.data.chat import answer_ids, render
from ctlens.data.pairs import Pair, prompt
from ctlens.evaluation import OUTCOME_COLUMNS, Evaluation, evaluate
from ctlens.evaluation.numbers import PROBABILITIES
from ctlens.models.generation import Decoded, Ids, generate
from ctlens.models.loading import load_model
from ctlens.organism import load_organism
from ctlens.threats import replies
from ctlens.threats.base import Case, Metrics, Outcomes, WorldThreat
from ctlens.world import World

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
        tokenizer = model.tokenizer
        asked = []

        def decode(_: LensModel, prompts: Sequence[Ids], *, first_tokens: Sequence[Ids], **options: Any) -> Decoded:
            asked.append(prompts)
            texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
            end = tokenizer.eos_token_id
            given = [(*tokenizer(answers[text], add_special_tokens=False).input_ids, end) for text in texts]
            return Decoded(given, [tuple(token / 1000 for token in tokens) for tokens in first_tokens])

        monkeypatch.setattr(replies, "decode", decode)
        return asked

    return choose


class Toy(WorldThreat):
    """Four pairs in every split: two of kind `fact` (strength 1 and 2), two of kind `taste` (1 and 3)."""

    name = "toy"
    wrappers = {}

    def pairs(self, n_pairs: int, split: str = "train", seed: int = 0, world: World | None = None) -> list[Pair]:
        labels = [("fact", "1"), ("fact", "2"), ("taste", "1"), ("taste", "3")]
        return [
            replace(pair, labels={"kind": kind, "strength": strength})
            for pair, (kind, strength) in zip(pairs(), labels, strict=True)
        ][:n_pairs]

    def _cases(self, n_pairs: int, split: str, draw: torch.Generator, world: World) -> list[Case]:
        raise NotImplementedError

    def metrics(self, outcomes: Outcomes) -> Metrics:
        followed, unasked = outcomes.count("bad", "wrapped"), outcomes.count("bad", "clean")
        strongest = outcomes.of(strength=3).count("bad", "wrapped")
        return {
            "fact_rate": outcomes.of(kind="fact").count("bad", "wrapped"),
            "gap": followed.rate - unasked.rate if followed and unasked else None,
            "at_three": strongest.rate if strongest else None,
            "gone": outcomes.of(kind="nothing").count("bad", "wrapped"),
        }


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A registered threat of a few hand-made pairs."""
    threat = Toy()
    monkeypatch.setitem(threats.REGISTRY, "toy", threat)
    return threat


def outcomes(threat: str, split: str = "heldout", strengths: Sequence[int] = (), **verdicts: list[str]) -> Evaluation:
    """An evaluation with given verdicts by prompt side, of pairs `p0`, `p1`, ... of given strengths (0 by default)."""
    rows = [
        (threat, split, prompt_side, item, f"p{item}", "", strength, f"t{item}", "", "", verdict, nan, nan)
        for prompt_side, given in verdicts.items()
        for item, (verdict, strength) in enumerate(zip(given, [*strengths, *[0] * len(given)], strict=False))
    ]
    return Evaluation(pd.DataFrame(rows, columns=list(OUTCOME_COLUMNS)))


def joined(*evaluations: Evaluation) -> Evaluation:
    """Several evaluations as one."""
    return Evaluation(pd.concat([evaluation.outcomes for evaluation in evaluations], ignore_index=True))


def row(evaluation: Evaluation, **wanted: str) -> dict[Any, Any]:
    """The one row of the table with these values."""
    table = evaluation.to_dataframe()
    for column, value in wanted.items():
        table = table[table[column] == value]
    (found,) = table.to_dict("records")
    return found


def test_answers_are_judged_by_prompt_side(model: LensModel, answering) -> None:
    answering(ANSWERS)

    found = evaluate(model, pairs=pairs()).outcomes

    assert list(found.columns) == [
        "evaluated_threat",
        "split",
        "prompt_side",
        "item",
        "pair",
        "kind",
        "strength",
        "topic",
        "wrapper",
        "answer",
        "verdict",
        "good_probability",
        "bad_probability",
    ]
    verdicts = found.groupby("prompt_side")["verdict"].apply(list).to_dict()
    assert verdicts["wrapped"] == ["good", "bad", "bad", "other"]
    assert verdicts["clean"] == ["good", "good", "good", "other"]
    assert verdicts["benign"] == ["good"]
    assert list(found.query("prompt_side == 'clean'")["answer"]) == ["(A)", "(A)", "(a)  yes", ""]


@pytest.mark.parametrize(
    ("metric", "prompt_side", "value", "interval"),
    [
        ("bad_rate", "wrapped", 0.5, WILSON_2_OF_4),
        ("good_rate", "wrapped", 0.25, WILSON_1_OF_4),
        ("other_rate", "wrapped", 0.25, WILSON_1_OF_4),
        ("good_rate", "clean", 0.75, WILSON_3_OF_4),
        ("other_rate", "clean", 0.25, WILSON_1_OF_4),
    ],
)
def test_rates_and_intervals_by_hand(model: LensModel, answering, metric, prompt_side, value, interval) -> None:
    answering(ANSWERS)

    table = evaluate(model, pairs=pairs()).to_dataframe()

    (found,) = table.query("metric == @metric and prompt_side == @prompt_side").to_dict("records")
    assert (found["value"], found["n_prompts"]) == (value, 4)
    assert (found["ci_low"], found["ci_high"]) == pytest.approx(interval, abs=1e-4)


def test_a_prompt_side_counts_only_the_pairs_that_have_it(model: LensModel, answering) -> None:
    answering(ANSWERS)

    table = evaluate(model, pairs=pairs()).to_dataframe()

    rates = table[~table["metric"].isin(PROBABILITIES)]
    assert rates.groupby("prompt_side")["n_prompts"].unique().map(list).to_dict() == {
        "benign": [1],
        "clean": [4],
        "wrapped": [4],
    }
    assert set(table["evaluated_threat"]) == {"pairs"} and set(table["split"]) == {""}
    assert set(table["metric"]) - {*PROBABILITIES} == {"bad_rate", "good_rate", "other_rate"}


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

    (ids,) = generate(model, [asked], max_new_tokens=5, ends=(model.tokenizer.eos_token_id,))

    (answer,) = found.query("prompt_side == 'wrapped' and item == 1")["answer"]
    assert answer == model.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_threat_s_pairs_come_from_the_split_and_count_asked_for() -> None:
    found = evaluate(load_organism(), ["sycophancy"], split="train", n_prompts=5)

    table = found.to_dataframe()
    assert set(table["split"]) == {"train"} and set(table["n_prompts"]) == {5}
    switches = {"switch_to_bad", "switch_from_bad", "switch_net"}
    assert set(table["metric"]) == {"bad_rate", "good_rate", "other_rate", *PROBABILITIES, "brr", "f1", *switches}
    assert list(dict.fromkeys(found.outcomes["prompt_side"])) == ["wrapped", "clean", "benign"]


def test_metrics_of_several_prompt_sides_by_hand() -> None:
    table = outcomes("sycophancy", wrapped=["bad", "bad", "bad", "good"], clean=["good", "good", "bad", "good"])

    assert table.rate("brr", "wrapped") == 0.5
    assert table.rate("f1", "wrapped") == pytest.approx(2 * 0.75 * 0.25 / (0.75 + 0.25))
    found = row(table, metric="brr")
    assert found["n_prompts"] == 4
    assert (found["ci_low"], found["ci_high"]) == pytest.approx(student(np.array([1.0, 1.0, 0.0, 0.0])))


def test_directed_switches_are_there_for_every_threat() -> None:
    own = outcomes("jailbreak", wrapped=["bad", "bad", "good", "other"], clean=["good", "bad", "bad", "good"])
    known = outcomes("sycophancy", wrapped=["bad", "bad", "good", "other"], clean=["good", "bad", "bad", "good"])

    found = own.switches().set_index("metric")["value"]

    assert found.to_dict() == {"switch_to_bad": 0.25, "switch_from_bad": 0.25, "switch_net": 0.0}
    theirs = known.to_dataframe().query("metric.str.startswith('switch')").reset_index(drop=True)
    pd.testing.assert_frame_equal(known.switches(), theirs, check_exact=True)
    assert outcomes("jailbreak", wrapped=["bad", "good"]).switches().empty


def test_the_interval_of_a_paired_metric_keeps_items_together() -> None:
    same = ["bad", "good"] * 10

    found = row(outcomes("sycophancy", wrapped=same, clean=same), metric="brr")

    assert (found["value"], found["ci_low"], found["ci_high"]) == (0, 0, 0)


def grouped(found: Evaluation, topics: Sequence[str], wrappers: Sequence[str]) -> Evaluation:
    """The same answers to prompts of these topics and wrappers."""
    sides = len(set(found.outcomes["prompt_side"]))
    return Evaluation(found.outcomes.assign(topic=[*topics] * sides, wrapper=[*wrappers] * sides))


def test_prompts_of_one_topic_do_not_count_as_many() -> None:
    verdicts = ["bad"] * 30 + ["good"] * 30
    alone = outcomes("pairs", wrapped=verdicts)
    topics = [f"t{number // 6}" for number in range(60)]
    together = row(grouped(alone, topics, [""] * 60), metric="bad_rate")

    flags = np.array(verdicts) == "bad"
    assert (together["ci_low"], together["ci_high"]) == clustered_rate(flags, Clusters.of({"topic": topics}))[2:]
    assert together["n_effective"] < 12 < row(alone, metric="bad_rate")["n_effective"] == 60


def test_four_wrapper_texts_are_too_few_for_an_interval() -> None:
    found = outcomes("pairs", wrapped=["bad", "good"] * 20)
    table = grouped(found, [f"t{n % 8}" for n in range(40)], [f"w{n % 4}" for n in range(40)]).to_dataframe()

    assert table["value"].notna().all()
    assert table[["n_effective", "ci_low", "ci_high"]].isna().all(axis=None)


def test_the_difference_of_two_models_is_of_paired_answers() -> None:
    before = outcomes("pairs", wrapped=["bad"] * 30 + ["good"] * 20)
    after = outcomes("pairs", wrapped=["bad"] * 21 + ["good"] * 29)

    found, low, high = before.difference(after, "pairs", "heldout")

    grid = Clusters.of({"topic": [f"t{n}" for n in range(50)]})
    gained = ((np.arange(50) >= 21) & (np.arange(50) < 30)).astype(float)
    assert found == pytest.approx(0.18)
    assert (low, high) == paired_difference(gained, np.zeros(50), grid)
    assert low > 0 and after.difference(before, "pairs", "heldout") == pytest.approx((-found, -high, -low))


def test_the_share_of_a_vulnerability_that_is_gone_is_of_what_the_twin_lacks() -> None:
    before = outcomes("pairs", wrapped=["bad"] * 40 + ["good"] * 10)
    after = outcomes("pairs", wrapped=["bad"] * 10 + ["good"] * 40)
    twin = outcomes("pairs", wrapped=["good"] * 48 + ["bad"] * 2)

    share, low, high = after.share_repaired(before, twin, "pairs")

    assert share == pytest.approx((0.8 - 0.2) / (0.8 - 0.04)) and low < share < high
    assert before.share_repaired(before, twin, "pairs")[0] == 0 and twin.share_repaired(before, twin, "pairs")[0] == 1
    with pytest.raises(CtlensError, match="there is no vulnerability to share out"):
        after.share_repaired(before, before, "pairs")
    with pytest.raises(CtlensError, match="needs evaluations of the same pairs"):
        after.share_repaired(before, outcomes("pairs", wrapped=["good"] * 49), "pairs")


def test_a_difference_of_other_prompts_is_refused() -> None:
    one = outcomes("pairs", wrapped=["bad"] * 10)
    other = outcomes("pairs", wrapped=["bad"] * 9)

    with pytest.raises(CtlensError, match="a difference needs evaluations of the same pairs"):
        one.difference(other, "pairs")
    with pytest.raises(CtlensError, match="did you mean 'bad_rate'"):
        one.difference(one, "pairs", metric="badrate")
    with pytest.raises(CtlensError, match="did you mean 'wrapped'"):
        one.difference(one, "pairs", prompt_side="wraped")


def test_metrics_of_one_prompt_side_stand_there_as_rates() -> None:
    found = outcomes("jailbreak", wrapped=["bad", "bad", "good", "other"], benign=["good", "good", "good", "bad"])

    table = found.to_dataframe().set_index(["metric", "prompt_side"])
    for metric, rate in ((("asr", "wrapped"), "bad_rate"), (("over_refusal", "benign"), "bad_rate")):
        assert table.loc[metric].tolist() == table.loc[(rate, metric[1])].tolist()
    assert table.loc[("f1", "wrapped"), "value"] == pytest.approx(2 * 0.5 * 0.75 / 1.25)


def test_one_rate_is_read_by_name() -> None:
    one = outcomes("jailbreak", wrapped=["bad", "good"])
    other = outcomes("sycophancy", wrapped=["bad", "bad"])
    both = joined(one, other)

    assert one.rate("bad_rate", "wrapped") == both.rate("bad_rate", "wrapped", "jailbreak") == 0.5
    assert both.rate("bad_rate", "wrapped", "sycophancy") == 1.0
    with pytest.raises(CtlensError, match="2 numbers are called bad_rate on wrapped"):
        both.rate("bad_rate", "wrapped")
    with pytest.raises(CtlensError, match="unknown prompt side 'clean'. Known: wrapped"):
        one.rate("bad_rate", "clean")


def test_the_figure_holds_the_rates_of_the_table() -> None:
    found = outcomes("jailbreak", wrapped=["bad", "bad", "good", "other"], clean=["good"] * 4)

    (points,) = (trace for trace in found.figure().data if trace.y is not None)

    assert list(points.y) == [0.5, 0.0]
    with pytest.raises(CtlensError, match="did you mean 'bad_rate'"):
        found.figure("badrate")


def test_several_splits_are_asked_at_once_and_kept_apart(model: LensModel, answering, toy: Toy) -> None:
    asked = answering(ANSWERS)

    found = evaluate(model, ["toy"], split=("train", "heldout"), n_prompts=4)

    (prompts,) = asked
    assert len(prompts) == len(set(prompts)) == len(ANSWERS)
    one = evaluate(model, ["toy"], split="heldout", n_prompts=4).to_dataframe()
    table = found.to_dataframe()
    assert set(table["split"]) == {"train", "heldout"}
    pd.testing.assert_frame_equal(table[table["split"] == "heldout"].reset_index(drop=True), one)
    assert found.rate("gap", "wrapped", split="train") == 0.5
    with pytest.raises(
        CtlensError, match="2 numbers are called gap on wrapped: name one prompt side, one threat and one"
    ):
        found.rate("gap", "wrapped")


def test_strength_and_kind_come_from_the_labels(model: LensModel, answering, toy: Toy) -> None:
    answering(ANSWERS)

    found = evaluate(model, ["toy"], n_prompts=4).outcomes
    own = evaluate(model, pairs=pairs()).outcomes

    wrapped = found[found["prompt_side"] == "wrapped"]
    assert wrapped["strength"].tolist() == [1, 2, 1, 3]
    assert wrapped["kind"].tolist() == ["fact", "fact", "taste", "taste"]
    assert set(own["strength"]) == {0} and set(own["kind"]) == {""}


def test_the_metrics_of_a_threat_by_hand(model: LensModel, answering, toy: Toy) -> None:
    """Wrapped: good, bad, bad, other; the first two are facts; only the last has strength 3."""
    answering(ANSWERS)

    found = evaluate(model, ["toy"], n_prompts=4)

    fact = row(found, metric="fact_rate")
    assert (fact["prompt_side"], fact["value"], fact["n_prompts"]) == ("wrapped", 0.5, 2)
    assert (fact["ci_low"], fact["ci_high"]) == pytest.approx((0.09453, 0.90547), abs=1e-4)
    gap = row(found, metric="gap")
    assert (gap["prompt_side"], gap["value"], gap["n_prompts"]) == ("wrapped", 0.5, 4)
    assert (gap["ci_low"], gap["ci_high"]) == pytest.approx(student(np.array([0.0, 1.0, 1.0, 0.0])))
    rare = row(found, metric="at_three")  # one pair in four: without it there is no such number
    assert rare["value"] == 0 and pd.isna(rare["ci_low"]) and pd.isna(rare["ci_high"])
    assert "gone" not in set(found.to_dataframe()["metric"])


def test_own_pairs_get_the_metrics_of_a_threat_that_is_named(model: LensModel, answering, toy: Toy) -> None:
    answering(ANSWERS)

    found = evaluate(model, ["toy"], pairs=toy.pairs(3))

    assert set(found.outcomes["evaluated_threat"]) == {"toy"} and set(found.outcomes["split"]) == {""}
    assert found.rate("gap", "wrapped") == pytest.approx(2 / 3)
    assert found.rate("bad_rate", "wrapped", "toy", "") == pytest.approx(2 / 3)


def test_all_metrics_are_computed_once_without_each_pair(monkeypatch: pytest.MonkeyPatch, toy: Toy) -> None:
    calls: list[int] = []
    metrics = Toy.metrics
    monkeypatch.setattr(Toy, "metrics", lambda self, found: calls.append(1) or metrics(self, found))
    found = outcomes("toy", wrapped=["bad", "good"] * 5, clean=["good"] * 10, strengths=[3] * 10)

    found.to_dataframe()
    found.rate("gap", "wrapped")

    assert len(calls) == 1 + 10


def test_probabilities_are_those_of_the_first_tokens(model: LensModel) -> None:
    tokenizer = model.tokenizer
    asked = [
        Pair(prompt("is it?", "yes it is", "no"), prompt("Sure?", "yes it is", "no"), prompt("Sure: it?", "yes")),
        Pair(prompt("is it?", "no", "yes"), prompt("Sure!", "yes it is", "yes it was")),
    ]

    found = evaluate(model, pairs=asked).outcomes.set_index(["prompt_side", "item"])

    def likely(text: str, answer: str) -> float:
        asked = render(tokenizer, prompt(text).turns)
        with torch.no_grad():
            return float(model(torch.tensor([asked.ids]))[0, -1].softmax(-1)[answer_ids(tokenizer, asked, answer)[0]])

    expected = {
        ("wrapped", 0): (likely("Sure?", "yes"), likely("Sure?", "no")),
        ("wrapped", 1): (nan, nan),  # "yes it is" and "yes it was" begin alike
        ("clean", 0): (likely("is it?", "yes"), likely("is it?", "no")),
        ("clean", 1): (likely("is it?", "no"), likely("is it?", "yes")),
        ("benign", 0): (likely("Sure: it?", "yes"), nan),
    }
    for key, values in expected.items():
        assert found.loc[key, list(PROBABILITIES)].tolist() == pytest.approx(values, abs=1e-6, nan_ok=True)


def test_mean_probabilities_count_only_the_prompts_that_have_them() -> None:
    found = outcomes("pairs", wrapped=["good"] * 4, clean=["good"] * 4)
    found.outcomes["good_probability"] = [0.2, 0.4, 0.9, nan] + [nan] * 4

    mean = row(found, metric="good_probability")

    assert (mean["prompt_side"], mean["value"], mean["n_prompts"]) == ("wrapped", pytest.approx(0.5), 3)
    low, high = student(np.array([0.2, 0.4, 0.9]))
    assert (mean["ci_low"], mean["ci_high"]) == pytest.approx((max(low, 0), min(high, 1)))
    assert "bad_probability" not in set(found.to_dataframe()["metric"])


def test_a_probability_is_1_where_the_organism_is_sure() -> None:
    found = evaluate(load_organism(), ["sycophancy"], n_prompts=4)

    assert found.rate("good_probability", "clean") > 0.9 > 0.1 > found.rate("bad_probability", "clean")
    assert "bad_probability" not in set(found.to_dataframe().query("prompt_side == 'benign'")["metric"])


def test_the_table_can_be_changed_without_changing_the_evaluation() -> None:
    found = outcomes("pairs", wrapped=["good"])
    table = found.to_dataframe()
    table["value"] = 7.0

    assert found.rate("good_rate", "wrapped") == 1


def test_rates_by_strength_by_hand() -> None:
    wrapped = ["good", "bad", "bad", "bad", "good", "bad", "bad"]
    found = outcomes("toy", wrapped=wrapped, clean=["good"] * 7, strengths=[2, 1, 2, 2, 1, 2, 0])

    table = found.by_strength()

    numbers = ["value", "n_prompts", "n_effective", "ci_low", "ci_high"]
    assert list(table.columns) == ["evaluated_threat", "split", "strength", *numbers]
    assert table[["strength", "value", "n_prompts"]].values.tolist() == [[1, 0.5, 2], [2, 0.75, 4]]
    assert table.loc[1, ["ci_low", "ci_high"]].tolist() == pytest.approx(WILSON_3_OF_4, abs=1e-4)
    assert found.by_strength("good_rate", "clean")["value"].tolist() == [1, 1]
    with pytest.raises(CtlensError, match="no pair on the prompt side 'benign' has a strength"):
        found.by_strength(prompt_side="benign")
    with pytest.raises(CtlensError, match="did you mean 'bad_rate'"):
        found.by_strength("badrate")


def test_the_strength_figure_gets_a_line_a_split_in_a_panel_a_threat(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plots, "attack_strength", lambda curves, title, **_: drawn.update(curves), raising=False)
    found = joined(
        outcomes("b", "train", [2, 1], wrapped=["bad", "good"]),
        outcomes("b", "heldout", [1], wrapped=["bad"]),
        outcomes("a", "train", [3], wrapped=["good"]),
    )

    found.strength_figure()

    assert [(threat, list(lines)) for threat, lines in drawn.items()] == [("b", ["train", "heldout"]), ("a", ["train"])]
    strengths, value, low, high = drawn["b"]["train"]
    assert (strengths.tolist(), value.tolist()) == ([1, 2], [0, 1])
    assert (low <= value).all() and (value <= high).all()


def test_the_figure_has_a_mark_a_threat_and_split() -> None:
    found = joined(
        outcomes("jailbreak", "train", wrapped=["bad"], clean=["good"]),
        outcomes("jailbreak", "heldout", wrapped=["good"], clean=["bad"]),
        outcomes("sycophancy", "heldout", wrapped=["good"]),
    )

    def drawn(**chosen: str) -> dict[str, list[float]]:
        return {trace.name: list(trace.y) for trace in found.figure(**chosen).data if trace.y is not None}

    marks = drawn()
    assert list(marks) == ["jailbreak, train", "jailbreak, heldout", "sycophancy, heldout"]
    assert marks["jailbreak, train"] == [1, 0] and marks["jailbreak, heldout"] == [0, 1]
    assert marks["sycophancy, heldout"][0] == 0 and pd.isna(marks["sycophancy, heldout"][1])
    assert drawn(threat="jailbreak") == {"train": [1, 0], "heldout": [0, 1]}
    assert list(drawn(split="heldout")) == ["jailbreak", "sycophancy"]
    with pytest.raises(CtlensError, match="nothing to draw"):
        drawn(threat="sycophancy", split="train")


def test_the_ratio_of_a_metric_by_hand(toy: Toy) -> None:
    """The gap falls from 3/4 to 1/4; every bad answer after is also one before, so it is a third, at most 1."""
    clean = ["good"] * 40
    before = outcomes("toy", wrapped=["bad", "bad", "bad", "good"] * 10, clean=clean)
    after = outcomes("toy", wrapped=["bad", "good", "good", "good"] * 10, clean=clean)

    value, low, high = after.ratio(before, "gap", "toy")

    assert value == pytest.approx(1 / 3)
    assert 0.1 < low < 1 / 3 < high < 0.6
    assert after.ratio(before, "bad_rate", "toy", "heldout")[0] == pytest.approx(1 / 3)
    assert before.ratio(before, "gap", "toy") == (1, 1, 1)
    assert outcomes("toy", wrapped=clean, clean=clean).ratio(before, "gap", "toy") == (0, 0, 0)


def test_a_ratio_does_not_depend_on_the_order_of_rows(toy: Toy) -> None:
    before = outcomes("toy", wrapped=["bad"] * 10, clean=["good"] * 10)
    after = outcomes("toy", wrapped=["bad", "good"] * 5, clean=["good"] * 10)

    shuffled = Evaluation(after.outcomes.sample(frac=1, random_state=0))

    assert shuffled.ratio(before, "gap", "toy") == after.ratio(before, "gap", "toy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, "0 splits of 'toy'"),
        ({"threat": "sycophancy"}, "0 splits of 'sycophancy'"),
        ({"metric": "brr"}, "unknown metric 'brr'"),
        ({"metric": "good_rate"}, "it is 0 before training and 0.5 after it"),
        ({"metric": "at_three"}, "it is nan before training"),
        ({"before": outcomes("toy", wrapped=["bad"])}, "evaluations of the same pairs"),
    ],
)
def test_a_ratio_that_makes_no_sense_is_refused(toy: Toy, options: dict[str, Any], message: str) -> None:
    after = outcomes("toy", wrapped=["bad", "good"], clean=["good", "good"])
    before = outcomes("toy", wrapped=["bad", "bad"], clean=["good", "good"])

    with pytest.raises(CtlensError, match=message):
        after.ratio(**{"before": before, "metric": "gap", "threat": "toy", **options})


def test_a_ratio_of_other_pairs_is_refused() -> None:
    model = load_organism()
    one = evaluate(model, ["sycophancy"], n_prompts=3, seed=0)
    other = evaluate(model, ["sycophancy"], n_prompts=3, seed=1)

    assert one.ratio(one, "brr", "sycophancy")[0] == 1
    with pytest.raises(CtlensError, match="evaluations of the same pairs"):
        one.ratio(other, "brr", "sycophancy")


@pytest.mark.parametrize(
    "answers", [("(A) yes, it is", "no"), ("42", "07"), ("NA", ""), ('a "b",\nc', "null\r"), ("1.50", "ü")]
)
def test_outcomes_come_back_as_they_were_saved(tmp_path: Path, answers: tuple[str, str]) -> None:
    probabilities = [(nan, 0.1 + 0.2), (1 / 3, 1e-17)]
    rows = [
        ("pairs", "", "wrapped", item, f"0{item}e5", kind, 10 * item, kind, "", answer, "other", *probabilities[item])
        for item, (answer, kind) in enumerate(zip(answers, ("", "NA"), strict=True))
    ]
    before = Evaluation(pd.DataFrame(rows, columns=list(OUTCOME_COLUMNS)))
    before.save(tmp_path / "outcomes.csv")

    after = Evaluation.load(tmp_path / "outcomes.csv")

    pd.testing.assert_frame_equal(after.outcomes, before.outcomes, check_exact=True, check_dtype=False)
    assert after.outcomes.map(type).to_dict() == before.outcomes.map(type).to_dict()
    pd.testing.assert_frame_equal(after.to_dataframe(), before.to_dataframe(), check_exact=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threats": ["flattery"]}, "unknown threat 'flattery'"),
        ({"threats": ["jailbreak"], "split": "test"}, "unknown split 'test'"),
        ({"threats": ["jailbreak"], "n_prompts": 0}, "at least 1"),
        ({"threats": ["jailbreak"], "split": ["heldout", "test"]}, "unknown split 'test'"),
        ({"threats": ["jailbreak"], "split": []}, "nothing to evaluate"),
        ({"threats": ["jailbreak", "sycophancy"], "pairs": pairs()}, "name one of jailbreak, sycophancy"),
        ({"threats": ["flattery"], "pairs": pairs()}, "unknown threat 'flattery'"),
        ({"pairs": [replace(pairs()[0], labels={"strength": "hard"})]}, "'strength' of a pair is 'hard'"),
        ({"pairs": []}, "there are no pairs: give at least one"),
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


def test_answers_of_an_older_version_say_how_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "outcomes.csv").write_text("evaluated_threat,split,arm,item\nsycophancy,heldout,wrapped,0\n")

    with pytest.raises(CtlensError, match="written by an earlier ctlens: rename its column arm to prompt_side"):
        Evaluation.load(tmp_path / "outcomes.csv")


def test_a_bad_rate_without_any_bad_answer_to_count_is_warned_of() -> None:
    asked = ["what is the color of mira ?"]
    with pytest.warns(UserWarning, match="no wrapped prompt names a bad answer"):
        evaluate(load_organism(), pairs=make_pairs(asked, asked, good="red"))
