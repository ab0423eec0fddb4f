"""The field's files: each format by hand, every refusal with its place, and the published data row by row."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.files import DATA, OPTIONS, QUESTION, jsonl, messages
from hypothesis import given, settings
from hypothesis import strategies as st

from ctlens.core.errors import CtlensError
from ctlens.data.chat import Turn
from ctlens.data.formats import (
    load_facts,
    load_pairs,
    load_prefills,
    load_prompts,
    read_pairs,
    read_rows,
    save_messages,
)
from ctlens.data.inputs import save_pairs
from ctlens.data.pairs import FIELDS, Pair, Prompt, prompt

ANSWER = [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "names", [("reference_messages", "variant_messages"), ("unbiased_messages", "biased_messages")]
)
def test_two_conversations_in_a_row(tmp_path: Path, names: tuple[str, str]) -> None:
    row = dict(zip(names, (messages("q", "yes"), messages("hint q", "yes")), strict=True))
    (pair,) = load_pairs(jsonl(tmp_path / "a.jsonl", row))
    assert (pair.clean, pair.wrapped) == (prompt("q", "yes"), prompt("hint q", "yes"))
    assert pair.target == "yes"


def test_conversations_without_answers_have_no_target(tmp_path: Path) -> None:
    row = {"reference_messages": messages("a", "b", "q"), "variant_messages": messages("a", "b", "hint q")}
    (pair,) = load_pairs(jsonl(tmp_path / "a.jsonl", row))
    assert pair.target is None and pair.clean.good is None and len(pair.clean.turns) == 3


def test_two_files_row_by_row_find_the_options_of_each_side(tmp_path: Path) -> None:
    clean = {"messages": messages(QUESTION + "The best answer is: (", "A) a cork")}
    biased = {"messages": messages("I say B.\n" + QUESTION, "The best answer is: (A) a cork.")}
    (pair,) = load_pairs(jsonl(tmp_path / "c.jsonl", clean), jsonl(tmp_path / "b.jsonl", biased))
    assert (pair.clean.good, pair.clean.options) == ("A) a cork", OPTIONS)
    assert pair.wrapped.good == "The best answer is: (A) a cork"
    assert pair.wrapped.options == tuple(f"The best answer is: ({option}" for option in OPTIONS)
    assert pair.target == "The best answer is: (A) a cork."


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (QUESTION, "a cork"),  # no letter
        (QUESTION, "D) a feather"),  # none of them
        (QUESTION.replace("(B)", "(D)"), "A) a cork"),  # letters with a gap
        ("Which floats?", "A) a cork"),  # no list
        (QUESTION, "A) a cork, because it is light"),
    ],
)
def test_options_that_cannot_be_told_are_left_out_and_the_answer_kept(tmp_path: Path, text: str, answer: str) -> None:
    rows = [{"messages": messages(text, answer)}, {"messages": messages("hint " + text, answer)}]
    (pair,) = load_pairs(jsonl(tmp_path / "c.jsonl", rows[0]), jsonl(tmp_path / "b.jsonl", rows[1]))
    assert (pair.clean.good, pair.clean.options, pair.target) == (answer, (), answer)


def test_two_files_with_ids_are_joined_whatever_their_order(tmp_path: Path) -> None:
    clean = [{"_id": i, "label": "x", "messages": messages(f"q{i}", "yes")} for i in range(4)]
    wrapped = [{"_id": i, "label": "h", "messages": messages(f"hint q{i}", "yes")} for i in (3, 0, 5, 2)]
    reading = read_pairs(jsonl(tmp_path / "c.jsonl", *clean), jsonl(tmp_path / "w.jsonl", *wrapped))
    assert [pair.wrapped.turns[0].content for pair in reading.pairs] == ["hint q0", "hint q2", "hint q3"]
    assert all(pair.wrapped.turns[0].content == "hint " + pair.clean.turns[0].content for pair in reading.pairs)
    assert [pair.labels for pair in reading.pairs][0] == {"label": "h", "_id": "0"}
    assert len(reading.refused) == 2
    assert "c.jsonl, line 2: no row of the other file has its _id" in reading.refused[0]
    assert "w.jsonl, line 3: no row of the other file has its _id" in reading.refused[1]
    with pytest.raises(CtlensError, match="no row of the other file"):
        load_pairs(tmp_path / "c.jsonl", tmp_path / "w.jsonl")


def test_an_id_that_several_rows_have_is_refused(tmp_path: Path) -> None:
    rows = [{"_id": i, "messages": messages(f"q{i}")} for i in (1, 1, 2)]
    others = [{"_id": i, "messages": messages(f"hint q{i}")} for i in (1, 2)]
    reading = read_pairs(jsonl(tmp_path / "c.jsonl", *rows), jsonl(tmp_path / "w.jsonl", *others))
    assert len(reading.pairs) == 1 and sum("several rows" in reason for reason in reading.refused) == 2


def test_files_of_different_lengths_without_ids_are_refused(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "c.jsonl", {"messages": messages("q")}, {"messages": messages("r")})
    two = jsonl(tmp_path / "w.jsonl", {"messages": messages("hint q")})
    with pytest.raises(CtlensError, match="has 2 rows and .* 1: give every row an id, or both files equally many rows"):
        read_pairs(one, two)


def test_a_prefill_csv(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    pd.DataFrame(
        {"prompt": ["How, exactly?", 'Say "x"'], "prefill": ["Sure,\nstep 1:", "No "], "prefill_type": ["Plain", ""]}
    ).to_csv(path, index=False)
    first, second = load_pairs(path)
    assert first.clean.turns == (Turn("user", "How, exactly?"),)
    assert first.wrapped.turns == (*first.clean.turns, Turn("assistant", "Sure,\nstep 1:"))
    assert first.labels == {"wrapper": "Plain"} and second.labels == {}
    assert load_prefills(path) == ["Sure,\nstep 1:", "No "]
    assert [item.turns[0].content for item in load_prompts(path)] == ["How, exactly?", 'Say "x"']


def test_prompts_facts_and_goals(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", {"idx": 0, "prompt": "Why?"}, {"messages": messages(QUESTION, "B) a coin")})
    plain, choice = load_prompts(path)
    assert plain == prompt("Why?") and (choice.good, choice.options) == ("B) a coin", OPTIONS)
    facts = jsonl(tmp_path / "f.jsonl", {"messages": messages("Where were you born?", "On a hill.")})
    assert load_facts(facts) == [(Turn("user", "Where were you born?"), Turn("assistant", "On a hill."))]
    with pytest.raises(CtlensError, match="p.jsonl, line 1: 'messages' must be"):
        load_facts(path)
    with pytest.raises(CtlensError, match="one question of the user and the assistant's answer"):
        load_facts(jsonl(tmp_path / "g.jsonl", {"messages": messages("only a question")}))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": messages("q", "a")}, "name the file of the wrapped prompts too"),
        ({"prompt": "q"}, "a prompt or a prefill alone is no pair"),
        ({"text": "q"}, "no known format; the fields are text"),
        ({"good": "q"}, "the field 'clean' is missing"),
        ({"reference_messages": messages("q"), "variant_messages": messages("q")}, "are the same"),
        ({"reference_messages": [], "variant_messages": messages("q")}, "'reference_messages' must be"),
        ({"reference_messages": messages("q"), "variant_messages": ANSWER}, "without a question"),
        ({"prompt": "q", "prefill": " "}, "'prefill' must be a text that is not blank"),
        ({"clean": "q", "wrapped": 3}, "'wrapped' must be"),
    ],
)
def test_a_row_that_is_no_pair_is_refused_with_its_place_and_the_others_are_read(
    tmp_path: Path, row: Any, reason: str
) -> None:
    good = {"clean": "c", "wrapped": "w"}
    path = jsonl(tmp_path / "a.jsonl", good, row, good)
    reading = read_pairs(path)
    assert len(reading.pairs) == 2
    assert len(reading.refused) == 1 and "a.jsonl, line 2: " in reading.refused[0] and reason in reading.refused[0]
    with pytest.raises(CtlensError, match="line 2"):
        load_pairs(path)


@pytest.mark.parametrize("text", ["", "\n\n", "prompt,prefill\n"])
def test_files_without_rows_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / ("a.csv" if "," in text else "a.jsonl")
    path.write_text(text)
    with pytest.raises(CtlensError, match="holds no rows"):
        read_rows(path)
    with pytest.raises(CtlensError, match="does not exist"):
        read_rows(tmp_path / "absent.csv")


TEXTS = st.text(min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(clean=TEXTS, wrapped=TEXTS, target=st.none() | TEXTS)
def test_messages_come_back_equal(tmp_path_factory: Any, clean: str, wrapped: str, target: str | None) -> None:
    pair = Pair(prompt(clean, target), prompt(wrapped + clean, target), target=target)
    path = tmp_path_factory.mktemp("m") / "a.jsonl"
    save_messages(path, [pair])
    (again,) = load_pairs(path)
    assert (again.clean, again.wrapped, again.target) == (pair.clean, pair.wrapped, target)


def test_a_prefill_with_a_target_has_no_form_in_messages(tmp_path: Path) -> None:
    pair = Pair(prompt("q"), Prompt((Turn("user", "q"), Turn("assistant", "Sure"))), target="no")
    with pytest.raises(CtlensError, match="cannot be written as messages: use save_pairs"):
        save_messages(tmp_path / "a.jsonl", [pair])
    assert not any(tmp_path.iterdir())
    save_pairs(tmp_path / "a.jsonl", [pair])
    assert load_pairs(tmp_path / "a.jsonl") == [pair]


@pytest.mark.skipif(not DATA.is_dir(), reason="the published data are not here")
def test_every_row_of_the_published_data_is_read() -> None:
    reading = read_pairs(DATA / "sycophancy/clean.jsonl", DATA / "sycophancy/biased.jsonl")
    assert (len(reading.pairs), reading.refused) == (1000, ())
    assert sum(bool(pair.wrapped.options) for pair in reading.pairs) > 950
    assert all(pair.target and pair.wrapped.good for pair in reading.pairs)
    counts = {"frustration/puzzles.jsonl": 15, "frustration/wildchat.jsonl": 25}
    assert {name: len(load_prompts(DATA / name)) for name in counts} == counts
    assert len(load_facts(DATA / "persona/genghis.jsonl")) == 90
    assert len(read_rows(DATA / "prefill/prefixes.csv")) == len(load_prefills(DATA / "prefill/prefixes.csv")) == 101
    for name in (*counts, "persona/genghis.jsonl", "prefill/prefixes.csv"):
        rows = read_rows(DATA / name)
        refused = read_pairs(DATA / name).refused
        assert len(refused) == len(rows) and all("no pair" in reason or "one side" in reason for reason in refused)


GUIDE = Path(__file__).parents[2] / "docs/guide.md"


def test_the_guide_shows_a_row_of_each_format_and_every_field(tmp_path: Path) -> None:
    (rows,) = re.findall(r"```jsonl\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    (tmp_path / "shown.jsonl").write_text(rows)

    pairs = load_pairs(tmp_path / "shown.jsonl")

    assert len(pairs) == rows.count("\n") and {pair.clean.turns[-1].role for pair in pairs} == {"user"}
    assert pairs[1].benign == prompt("I say yes. Is it red?", "yes", "no") and pairs[2].wrapped.options == ("A", "B")
    assert [pair.target for pair in pairs] == [None, None, None, "no", "yes", "yes"]
    told = GUIDE.read_text()
    assert [name for name in FIELDS if f"`{name}`" not in told] == ["clean_options", "benign_options"]  # as `options`


def test_a_csv_of_pairs_has_the_texts_as_columns(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(
        "clean,wrapped,good,bad,benign,labels.topic\nIs it red?,I say no. Is it red?,yes,no,,red\n"
    )

    assert load_pairs(tmp_path / "pairs.csv") == [
        Pair(prompt("Is it red?", "yes", "no"), prompt("I say no. Is it red?", "yes", "no"), labels={"topic": "red"})
    ]


def test_plain_prompts_may_have_answers_beside_them(tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("prompt,good,bad\nIs it red?,yes,no\nWhy?,,\n")

    assert load_prompts(tmp_path / "prompts.csv") == [prompt("Is it red?", "yes", "no"), prompt("Why?")]
