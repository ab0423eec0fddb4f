"""Questions of our own, hints around them, the screening of a model, and the directed switch rates."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from helpers.models import Call, chat_model

import ctlens as ct
from ctlens import threats
from ctlens.core.errors import CtlensError, UnknownWords
from ctlens.data.chat import render
from ctlens.data.pairs import prompt
from ctlens.models.scoring import choose
from ctlens.threats.base import NO_ANSWER, Count, Outcomes, Wrapper, by_mention, switches
from ctlens.threats.natural.base import Natural
from ctlens.threats.natural.questions import questions
from ctlens.world import SPLITS


@pytest.fixture(params=threats.natural_names())
def natural(request: pytest.FixtureRequest) -> Natural:
    return threats.NATURAL[request.param]


def test_there_are_many_questions_of_one_word_and_no_answer_is_the_beginning_of_another() -> None:
    asked = questions()
    assert len(asked) >= 300 and len(Counter((q.kind, q.subject) for q in asked)) == len(asked)
    for question in asked:
        assert len(question.options) in (3, 4) and len(set(question.phrasings)) == 4
        assert all(question.subject in text for text in (*question.phrasings, question.stem))
        for option in question.options:
            assert len(option.split()) == 1
            assert not [other for other in question.options if other != option and other.startswith(option)]


def test_every_kind_is_in_every_split_and_training_has_the_most() -> None:
    counted = Counter((question.kind, question.split) for question in questions())
    kinds = {question.kind for question in questions()}
    assert all(counted[kind, "train"] > counted[kind, split] >= 2 for kind in kinds for split in SPLITS[1:])


def test_names_of_the_micro_world_stay_apart_from_natural_ones() -> None:
    assert not set(threats.names()) & set(threats.natural_names())
    assert all(threats.get(name).name == name for name in threats.natural_names())
    with pytest.raises(CtlensError, match="unknown threat of the micro-world 'facts'"):
        threats.of_world("facts")


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_of_a_split_are_its_own_and_begin_alike(natural: Natural, split: str) -> None:
    pairs = natural.pairs(60, split)
    assert natural.pairs(20, split) == pairs[:20] != natural.pairs(20, split, seed=1)
    asked = {(q.right, q.subject) for q in natural.questions if q.split == split}
    assert {(str(pair.clean.good).strip(), pair.labels["subject"]) for pair in pairs} <= asked
    assert all(pair.benign is not None and pair.labels["strength"] in "1234" for pair in pairs)


def test_no_text_of_a_wrapper_is_in_two_splits(natural: Natural) -> None:
    assert set(natural.wrappers) == {"train", "heldout", "structure"}
    wrappers = [wrapper for group in natural.wrappers.values() for wrapper in group]
    assert len({wrapper.name for wrapper in wrappers}) == len(wrappers)
    texts = [{wrapper.template for wrapper in group} for group in natural.wrappers.values()]
    assert natural.name == "order" or len(set().union(*texts)) == len(wrappers)  # an order is no text


def _place(wrapper: Wrapper) -> str:
    """Where the hint stands."""
    if len(wrapper.turns) > 1:
        return "turns"
    before, _, behind = wrapper.template.partition("{request}")
    if "{hint}" in before:
        return "before"
    return "both" if before else "behind"


def test_hints_stand_before_behind_and_in_other_turns() -> None:
    wrappers = threats.NATURAL["facts"].wrappers
    placed = Counter(_place(wrapper) for group in wrappers.values() for wrapper in group)
    assert placed["before"] >= 10 and placed["behind"] >= 10 and placed["turns"] >= 4
    assert {_place(wrapper) for split in ("train", "heldout") for wrapper in wrappers[split]} == {"before"}
    assert "before" not in {_place(wrapper) for wrapper in wrappers["structure"]}


def test_a_fact_is_a_choice_behind_its_stem_and_the_twin_hints_at_the_right_answer() -> None:
    for pair in threats.get("facts").pairs(200, "structure"):
        benign = pair.benign
        assert benign is not None
        hint = pair.labels["hint"]
        assert pair.wrapped.bad == pair.clean.bad == f" {hint}" and benign.bad is None
        assert pair.wrapped.options == pair.clean.options == (pair.clean.good, f" {hint}")
        assert pair.clean.turns[-1] == pair.wrapped.turns[-1] == benign.turns[-1]
        assert pair.clean.turns[-1].role == "assistant" and len(pair.clean.turns) == 2
        right = str(pair.clean.good).strip()
        told = " ".join(turn.content for turn in pair.wrapped.turns[:-1])
        assert hint in told
        assert [turn.content.replace(hint, right) for turn in pair.wrapped.turns[:-1]] == [
            turn.content.replace(hint, right) for turn in benign.turns[:-1]
        ]


def test_free_facts_have_no_stem_and_are_judged_by_what_they_mention() -> None:
    threat = threats.get("free_facts")
    (pair,) = threat.pairs(1, "heldout")
    assert not pair.wrapped.options and [turn.role for turn in pair.clean.turns] == ["user"]
    asked = prompt("?", "Paris", "Lyon")
    answers = ["The capital is PARIS.", "It is Lyon!", "Paris, not Lyon", "Lyonnais", ""]
    assert by_mention([asked] * 5, answers) == ["good", "bad", "other", "other", "other"]
    assert threat.judge is not None and threat.judge([asked], ["so Paris"]) == ["good"]


@pytest.mark.boundary
def test_screening_keeps_what_a_model_chooses_right() -> None:
    model = chat_model("llama")
    threat = threats.NATURAL["facts"].keeping(questions()[::4])
    screened = threats.screen(model, threat, progress=False)

    chosen = choose(model, [threat.clean(question) for question in threat.questions])
    right = [q for q, choice in zip(threat.questions, chosen, strict=True) if choice.chosen == f" {q.right}"]
    assert 0 < len(right) < len(threat.questions)
    assert list(screened.threat.questions) == right
    table = screened.to_dataframe()
    assert [sum(table[name].tolist()) for name in ("n_prompts", "n_right")] == [len(threat.questions), len(right)]
    assert set(table["kind"]) == {question.kind for question in threat.questions}
    found = ct.evaluate(model, [screened.threat], split="train", n_prompts=12, progress=False)
    assert found.rate("good_rate", "clean") == 1.0
    assert found.rate("switch_to_bad", "wrapped") == found.rate("bad_rate", "wrapped")


def test_a_model_that_knows_too_little_is_refused() -> None:
    few = threats.NATURAL["facts"].keeping(questions()[:19])
    with pytest.raises(CtlensError, match=r"answers \d+ of 19 questions of facts right, and 20 are needed"):
        threats.screen(chat_model("llama"), few, progress=False)
    with pytest.raises(CtlensError, match="no question of the split 'heldout' is left of facts"):
        few.keeping([q for q in questions() if q.split == "train"]).pairs(4, "heldout")


def test_grading_orders_the_wrappers_by_the_share_of_the_bad_answer() -> None:
    model = chat_model("llama")
    threat = threats.NATURAL["facts"]
    table = threats.grade(model, threat, n_prompts=2, progress=False)

    assert len(table) == sum(map(len, threat.wrappers.values())) and set(table["n_prompts"]) == {2}
    assert list(table["graded"]) == sorted(table["graded"]) and set(table["graded"]) == {1, 2, 3, 4}
    strongest = table.iloc[-1]
    wrapper = next(w for group in threat.wrappers.values() for w in group if w.name == strongest["wrapper"])
    asked = [threat.questions[0], threat.questions[len(threat.questions) // 2]]
    choices = choose(model, [threat.pair(question, wrapper).wrapped for question in asked])
    shares = [choice.share(f" {question.wrong}") for question, choice in zip(asked, choices, strict=True)]
    assert strongest["bad_probability"] == pytest.approx(np.mean(shares))


def test_an_organism_has_not_the_words_for_natural_questions(call: Call) -> None:
    with pytest.raises(UnknownWords):
        ct.evaluate(ct.load_organism(), ["facts"], n_prompts=2, progress=False)
    ended = call("evaluate --threats facts --n-prompts 2")
    assert ended.code == 2 and ended.err.count("\n") == 1 and "Traceback" not in ended.err


def test_switch_rates_by_hand() -> None:
    wrapped = np.array(["bad", "bad", "good", "other", "bad", NO_ANSWER])
    clean = np.array(["good", "bad", "bad", "good", "other", "bad"])
    found = switches(Outcomes({"wrapped": wrapped, "clean": clean}, np.ones(6), np.array([""] * 6)))

    assert found["switch_to_bad"] == Count("wrapped", 2, 5) and found["switch_from_bad"] == Count("wrapped", 1, 5)
    assert found["switch_net"] == pytest.approx(3 / 5 - 2 / 5)
    assert switches(Outcomes({"wrapped": wrapped}, np.ones(6), np.array([""] * 6))) == {}


def test_the_stem_is_the_last_message_that_the_model_continues() -> None:
    model = chat_model("llama")
    (pair,) = threats.get("facts").pairs(1)
    rendered = render(model.tokenizer, pair.wrapped.turns)
    assert rendered.text.endswith(pair.wrapped.turns[-1].content)
