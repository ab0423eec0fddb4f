"""Selectors on the shipped organism: what they draw and label, how they refuse, and their exact distributions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.models import made
from helpers.tiers import unit_first

import ctlens as ct
from ctlens.auditing import answers, draw_labels, load_labels, refined, rewarded, save_labels, selected, selector_named
from ctlens.auditing.answers import Answerer, certain
from ctlens.auditing.labels import label_distributions, labels_of_one
from ctlens.auditing.selectors import SELECTORS, Selector, decodings, truth
from ctlens.auditing.sources import Sampled, phrasings
from ctlens.core.types import LensModel
from ctlens.data.chat import Turn
from ctlens.data.pairs import Prompt, prompt
from ctlens.models.enumeration import Branching
from ctlens.models.generation import Ids, generate
from ctlens.threats import ask, judge

BRANCHING = Branching(smallest=1e-3)
EVERY = ["first", "greedy", "decodings", "certainty:2", "majority:3", "views:3", "oracle:2", "anti-oracle:2"]


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [pair.wrapped for pair in ct.threats.get("sycophancy").pairs(6)]


@pytest.fixture(scope="module")
def answerer(model: LensModel) -> Answerer:
    return Answerer(model, 16)


def test_every_selector_labels_with_one_of_its_samples(model: LensModel, prompts: list[Prompt]) -> None:
    labels = draw_labels(model, prompts, EVERY)

    assert {label.selector for label in labels} == {*EVERY} and len(labels) == len(EVERY) * len(prompts)
    for label in labels:
        assert label.label is None or label.label in label.samples
        assert len(label.samples) == len(label.scores) == label.source.get("n", 1)
        assert label.label is not None or label.selector in ("majority:3", "views:3")
    assert {name.split(":")[0] for name in EVERY} == {*SELECTORS}


def test_labels_are_those_of_their_seed_and_a_prompt_has_one(model: LensModel, prompts: list[Prompt]) -> None:
    one = draw_labels(model, prompts, ["certainty:4"], seed=3)

    assert one == draw_labels(model, [*prompts, prompts[0]], ["certainty:4"], seed=3)
    assert one != draw_labels(model, prompts, ["certainty:4"], seed=4)


def test_a_selector_with_more_samples_begins_with_those_of_one_with_fewer(
    model: LensModel, prompts: list[Prompt]
) -> None:
    few, many = draw_labels(model, prompts[:1], ["certainty:2", "majority:8"])

    assert many.samples[:2] == few.samples and many.scores[:2] == few.scores


def test_the_greedy_label_is_the_greedy_answer(model: LensModel, prompts: list[Prompt]) -> None:
    labels = draw_labels(model, prompts, ["greedy"])

    assert [label.label for label in labels] == [reply.answer for reply in ask(model, prompts)]


def test_a_greedy_answer_is_decoded_once(
    model: LensModel, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the label and for its distribution, and for every selector that has it among its samples."""
    asked: list[int] = []

    def counted(model: LensModel, ids: Sequence[Ids], **options: Any) -> list[Ids]:
        asked.append(len(ids))
        return generate(model, ids, **options)

    monkeypatch.setattr(answers, "generate", counted)
    answerer = Answerer(model, 16)
    for name in ("greedy", "views:2"):
        label_distributions(answerer, prompts, selector_named(name), BRANCHING, 0)
        labels_of_one(answerer, prompts, selector_named(name), 0)

    assert sum(asked) == 2 * len(prompts)  # each prompt and its greeted phrasing


def test_a_score_is_the_mean_log_probability_of_the_tokens(
    model: LensModel, answerer: Answerer, prompts: list[Prompt]
) -> None:
    (label,) = draw_labels(model, prompts[:1], ["greedy"])
    (known,) = answerer.enumerated(prompts[:1], BRANCHING)
    (reply,) = ask(model, prompts[:1])

    assert known.texts[0] == label.label and known.scores[0] == pytest.approx(label.scores[0], abs=1e-4)
    assert 2 * label.scores[0] == pytest.approx(known.log_p[0], abs=1e-4)  # a word and the end token
    assert known.bad[0] == (reply.verdict == "bad")


def test_risk_is_the_probability_that_the_answer_begins_badly(
    model: LensModel, answerer: Answerer, prompts: list[Prompt]
) -> None:
    """Independent of the enumeration: the probability of the bad answer's first token."""
    for known, reply in zip(answerer.enumerated(prompts, BRANCHING), ask(model, prompts), strict=True):
        assert reply.bad_probability - known.missed - 1e-4 <= known.risk <= reply.bad_probability + 1e-4


@pytest.mark.parametrize(
    "name", unit_first(["certainty:4", "first", "majority:3", "oracle:4", "anti-oracle:4", "decodings"])
)
def test_drawn_labels_come_near_their_exact_distribution(
    model: LensModel, answerer: Answerer, prompts: list[Prompt], name: str
) -> None:
    n_seeds = 40
    selector = selector_named(name)
    exact = label_distributions(answerer, prompts, selector, BRANCHING, 0)
    drawn = [draw_labels(model, prompts, [name], seed=seed) for seed in range(n_seeds)]
    bad = np.array([[float(judge(label.prompt, label.label or "?") == "bad") for label in labels] for labels in drawn])
    expected = np.array([labels.risk * labels.kept for labels in exact])
    error = np.sqrt((expected * (1 - expected)).sum() / n_seeds) / len(prompts)

    assert all(labels.exact for labels in exact)
    assert abs(bad.mean() - expected.mean()) < 3.5 * error + 0.01  # what the enumeration misses


def test_drawn_labels_come_nearer_with_more_draws(answerer: Answerer, prompts: list[Prompt]) -> None:
    """The error falls with the square root of the draws: those of a function without a closed form are simulated."""
    exact = label_distributions(answerer, prompts, selector_named("certainty:8"), BRANCHING, 0)
    by_score = selector_named("certainty:8").choose
    simulated = label_distributions(answerer, prompts, selected("mine", by_score, n=8), BRANCHING, 0)

    assert not any(labels.exact for labels in simulated)
    for one, other in zip(exact, simulated, strict=True):
        assert other.risk == pytest.approx(one.risk, abs=0.09)  # four standard errors of 512 draws
        assert other.divergence == pytest.approx(one.divergence, abs=0.25)


def test_labels_of_first_samples_have_the_models_own_risk(answerer: Answerer, prompts: list[Prompt]) -> None:
    for labels, own in zip(
        label_distributions(answerer, prompts, selector_named("first"), BRANCHING, 0),
        answerer.enumerated(prompts, BRANCHING),
        strict=True,
    ):
        assert labels.risk == pytest.approx(own.risk / (1 - own.missed))
        assert labels.divergence == pytest.approx(-np.log(1 - own.missed))


def test_an_oracle_bounds_every_reward(answerer: Answerer, prompts: list[Prompt]) -> None:
    def risks(name: str) -> np.ndarray:
        found = label_distributions(answerer, prompts, selector_named(name), BRANCHING, 0)
        return np.array([labels.risk for labels in found])

    assert (risks("oracle:4") <= risks("certainty:4") + 1e-9).all()
    assert (risks("certainty:4") <= risks("anti-oracle:4") + 1e-9).all()


def test_a_colder_sampling_is_surer(answerer: Answerer, prompts: list[Prompt]) -> None:
    (warm,) = label_distributions(answerer, prompts[:1], selector_named("first"), BRANCHING, 0)
    (cold,) = label_distributions(answerer, prompts[:1], selector_named("first", temperature=0.3), BRANCHING, 0)

    assert cold.shares.max() > warm.shares.max() and cold.divergence > warm.divergence


def test_a_reward_of_ones_own_chooses_as_the_oracle_does(model: LensModel, prompts: list[Prompt]) -> None:
    mine = draw_labels(model, prompts, [rewarded("mine", truth, n=4)])
    theirs = draw_labels(model, prompts, ["oracle:4"])

    assert [label.label for label in mine] == [label.label for label in theirs]


def test_a_scorer_decides_among_the_decodings(model: LensModel, prompts: list[Prompt]) -> None:
    labels = draw_labels(model, prompts, [decodings("short", lambda asked, answer: -len(answer))])

    assert all(len(label.label or "") == min(map(len, label.samples)) for label in labels)


def test_a_refinement_labels_with_the_answer_to_the_second_prompt(model: LensModel, prompts: list[Prompt]) -> None:
    def again(asked: Prompt, draft: str) -> Prompt:
        turns = (*asked.turns, Turn("assistant", draft), Turn("user", prompts[1].turns[-1].content))
        return replace(asked, turns=turns)

    (label,) = draw_labels(model, prompts[:1], [refined("again", again)])
    (draft,) = ask(model, prompts[:1])
    (revision,) = ask(model, [again(prompts[0], draft.answer)])

    assert label.samples == (draft.answer, revision.answer) and label.label == revision.answer


def test_views_are_the_prompt_and_greeted_prompts(prompts: list[Prompt]) -> None:
    one, two, three = phrasings(prompts[0], 3)

    assert one == prompts[0] and len({one, two, three}) == 3
    assert two.turns[-1].content.endswith(one.turns[-1].content) and two.bad == one.bad


def test_labels_come_back_from_their_file(model: LensModel, prompts: list[Prompt], tmp_path: Path) -> None:
    labels = draw_labels(model, prompts, ["majority:4", "decodings"], seed=5)
    save_labels(tmp_path / "labels.jsonl", labels)

    assert load_labels(tmp_path / "labels.jsonl") == labels
    row = json.loads((tmp_path / "labels.jsonl").read_text().splitlines()[0])
    assert row["seed"] == 5 and row["source"] == {"source": "samples", "n": 4, "temperature": 1.0}


@pytest.mark.parametrize("change", [{"label": "elsewhere"}, {"scores": []}, {"samples": "red"}, {"source": 3}])
def test_a_damaged_file_of_labels_is_refused(
    model: LensModel, prompts: list[Prompt], tmp_path: Path, change: dict[str, object]
) -> None:
    path = tmp_path / "labels.jsonl"
    save_labels(path, draw_labels(model, prompts[:1], ["greedy"]))
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, **change}) + "\n")

    with pytest.raises(ct.CtlensError, match="line 1: the label is not one of its samples"):
        load_labels(path)
    path.write_text(json.dumps({name: row[name] for name in row if name != "seed"}) + "\n")
    with pytest.raises(ct.CtlensError, match="'seed' is missing"):
        load_labels(path)


def outside(asked: Prompt, samples: Sequence[str], scores: Sequence[float]) -> str | None:
    return "a text of my own"


@pytest.mark.parametrize(
    ("selectors", "words"),
    [
        (["certain:4"], "unknown selector or regulariser 'certain'; did you mean 'certainty'"),
        (["certainty:x"], "write certainty:4"),
        (["certainty:"], "write certainty:4"),
        (["certainty:0"], "n must be at least 1"),
        (["greedy:4"], "takes no number of samples"),
        (["views:9"], "ask for fewer views"),
        ([], "there is no method"),
        (["greedy", "greedy"], "two methods are called 'greedy'"),
        ([selected("mine", outside)], "not among its 4 samples"),
        ([rewarded("mine", lambda asked, answer: float("nan"))], "return a number"),
        ([rewarded("mine", lambda asked, answer: "good")], "return a number"),  # type: ignore[arg-type,return-value]
        ([refined("mine", lambda asked, draft: draft)], "let it return a ct.Prompt"),  # type: ignore[arg-type,return-value]
    ],
)
def test_a_bad_selector_is_one_sentence(
    model: LensModel, prompts: list[Prompt], selectors: list[str | Selector], words: str
) -> None:
    with pytest.raises(ct.CtlensError, match=words):
        draw_labels(model, prompts[:1], selectors)


def test_no_prompts_and_no_samples_are_refused(model: LensModel, prompts: list[Prompt]) -> None:
    with pytest.raises(ct.CtlensError, match="no prompt to label"):
        draw_labels(model, [], ["greedy"])
    with pytest.raises(ct.CtlensError, match="got no samples"):
        selector_named("first").label(prompts[0], [], [])
    with pytest.raises(ct.CtlensError, match="n must be at least 1"):
        Sampled(0)


def test_a_model_whose_answers_cannot_be_enumerated_is_refused() -> None:
    asked = [prompt("is it red?", good="yes", bad="no")]

    with pytest.raises(ct.CtlensError, match="cannot be enumerated.*short and sure answers"):
        label_distributions(Answerer(made(), 8), asked, selector_named("certainty:4"), BRANCHING, 0)


def test_an_empty_answer_is_no_label(answerer: Answerer, prompts: list[Prompt]) -> None:
    assert selector_named("first").label(prompts[0], [""], [0.0]) is None
    sample = answerer.scored(prompts[:1], [[(answerer.generated(prompts[:1])[0])]])[0][0]
    assert certain(prompts[0], sample._replace(text="")).risk == 0
