"""Whatever people have in the place of pairs becomes the same pairs, and what is none is refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import ctlens as ct
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import encode
from ctlens.data.chat import Turn, render
from ctlens.data.formats import load_pairs
from ctlens.data.inputs import as_pairs, as_prompts, save_pairs
from ctlens.data.pairs import Pair, Prompt, prompt

CLEAN = ["is it red?", "is it blue?"]
WRAPPED = ["my teacher says no. is it red?", "my teacher says no. is it blue?"]
GOOD, BAD = ["yes", "no"], ["no", "yes"]
PAIRS = [Pair(prompt(c, g, b), prompt(w, g, b)) for c, w, g, b in zip(CLEAN, WRAPPED, GOOD, BAD, strict=True)]
ROWS = [{"clean": c, "wrapped": w, "good": g, "bad": b} for c, w, g, b in zip(CLEAN, WRAPPED, GOOD, BAD, strict=True)]
loose: Any = ct


class DataSet:
    """A data set of HuggingFace's `datasets`, as far as it is used: columns, and every row with every column."""

    column_names = ["clean", "wrapped", "good", "bad", "target"]

    def __iter__(self) -> Any:
        return iter([{**row, "target": None} for row in ROWS])


FORMS: dict[str, Callable[[], Any]] = {
    "pairs": lambda: PAIRS,
    "an iterator": lambda: iter(PAIRS),
    "dictionaries": lambda: ROWS,
    "both": lambda: (PAIRS[0], ROWS[1]),
    "a table": lambda: pd.DataFrame(ROWS),
    "a table with holes": lambda: pd.DataFrame([{**ROWS[0], "target": None}, {**ROWS[1], "target": float("nan")}]),
    "a data set": DataSet,
    "arrays": lambda: {name: np.array(column) for name, column in pd.DataFrame(ROWS).items()},
    "columns": lambda: {"clean": CLEAN, "wrapped": WRAPPED, "good": GOOD, "bad": BAD, "target": [None, None]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pairs(form: str) -> None:
    assert as_pairs(FORMS[form]()) == PAIRS


def test_a_real_data_set_gives_the_same_pairs() -> None:
    datasets: Any = pytest.importorskip("datasets")
    given = datasets.Dataset.from_list(ROWS)

    assert as_pairs(given) == PAIRS
    assert ct.pairs(given["clean"], given["wrapped"], good=given["good"], bad=given["bad"]) == PAIRS
    with pytest.raises(CtlensError, match="not one dictionary of 'train': name a split of a data set"):
        as_pairs(datasets.DatasetDict(train=given))


def test_tuples_hold_texts_messages_and_prompts() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "is it red?"}]
    turns = (Turn("system", "Be brief."), Turn("user", "is it red?"))

    found = as_pairs([("is it red?", messages), (prompt("is it red?", "yes"), Prompt(turns))])

    assert found == [Pair(prompt("is it red?"), Prompt(turns)), Pair(prompt("is it red?", "yes"), Prompt(turns))]


def test_a_message_in_parts_is_the_text_of_its_parts() -> None:
    parts = [{"type": "text", "text": "is it "}, {"type": "text", "text": "red?"}]
    assert ct.prompt([{"role": "user", "content": parts}]) == prompt("is it red?")
    with pytest.raises(CtlensError, match="and a text as content"):
        ct.prompt([{"role": "user", "content": [*parts, {"type": "image_url", "image_url": "x"}]}])


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"labels": {"topic": "a"}, "labels.topic": "b"}, "'labels' and 'labels.topic' both hold labels"),
        ({"labels.": "b"}, "the field 'labels.' names no label"),
        ({"benign_good": "yes"}, "'benign_good' is there and 'benign' is not"),
        ({"good": 3}, "'good' must be a text that is not blank, not 3"),
    ],
)
def test_no_field_of_a_row_is_dropped_without_a_word(more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CtlensError, match=sentence):
        as_pairs([{**ROWS[0], **more}])


def test_a_label_of_a_table_has_a_column_to_itself() -> None:
    (found,) = as_pairs(pd.DataFrame([{**ROWS[0], "labels.topic": "red", "labels.strength": 3}]))
    assert found == replace(PAIRS[0], labels={"topic": "red", "strength": "3"})


def test_rows_are_those_of_the_published_files() -> None:
    row = {
        "reference_messages": [{"role": "user", "content": "a?"}],
        "variant_messages": np.array([{"role": "user", "content": "x a?"}, {"role": "assistant", "content": "b"}]),
    }

    (pair,) = as_pairs([row])

    assert pair == Pair(prompt("a?", "b"), prompt("x a?", "b"), target="b")


@pytest.mark.parametrize(
    "given", [[*zip(CLEAN, WRAPPED, strict=True)], pd.DataFrame({"clean": CLEAN, "wrapped": WRAPPED})]
)
def test_whatever_makes_pairs_can_be_saved(given: Any, tmp_path: Path) -> None:
    save_pairs(tmp_path / "pairs.jsonl", given)
    assert load_pairs(tmp_path / "pairs.jsonl") == as_pairs(given)


def test_two_lists_make_pairs_with_answers_twins_targets_and_labels() -> None:
    assert ct.pairs(CLEAN, WRAPPED, good=GOOD, bad=BAD) == PAIRS
    assert ct.pairs(pd.Series(CLEAN), WRAPPED, good=pd.Series(GOOD), bad=BAD) == PAIRS
    (first, second) = ct.pairs(
        CLEAN, WRAPPED, good="yes", benign=["a", "b"], target=["t", "u"], labels=[{"topic": "1"}, {"topic": "2"}]
    )
    assert first == Pair(prompt(CLEAN[0], "yes"), prompt(WRAPPED[0], "yes"), prompt("a"), "t", labels={"topic": "1"})
    assert (second.wrapped.good, second.wrapped.bad, second.target, second.labels) == ("yes", None, "u", {"topic": "2"})


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: loose.pairs(["a"], ["b", "c"]), "there are 1 clean prompts and 2 of wrapped: give one per pair."),
        (lambda: loose.pairs(CLEAN, WRAPPED, good=["yes"]), "there are 2 clean prompts and 1 of good: give one per"),
        (lambda: loose.pairs("a", "b"), "clean must be a list of prompts, not 'a'. Make one of a text or of chat"),
        (
            lambda: loose.pairs([1, 2], ["a", "b"]),
            "clean must be a list of prompts, not a int at number 1: a prompt is",
        ),
        (lambda: loose.prompt([{"role": "user"}]), "a prompt: a message of 'text' must be an object with 'role' and"),
        (lambda: loose.save_pairs("a.jsonl", "a"), "pairs must be a list of pairs, not 'a'"),
        (lambda: loose.pairs(CLEAN, WRAPPED, good=" "), "the good answer of a prompt is blank: give a text"),
        (lambda: loose.save_pairs("a.jsonl", {}), "pairs must be a list of pairs, not an empty dictionary"),
        (
            lambda: loose.pairs(CLEAN, WRAPPED, good="no", bad="no"),
            "'no' is both the good and the bad answer of a pair",
        ),
        (
            lambda: loose.save_pairs("a.jsonl", {"clean": CLEAN, "wrapped": WRAPPED[:1]}),
            "pairs must be a list of pairs, not one dictionary of 'clean', 'wrapped'",
        ),
        (
            lambda: loose.save_pairs("a.jsonl", {"clean": [5, 7], "wrapped": [5, 6]}),
            "pairs must be a list of pairs, not one dictionary of 'clean', 'wrapped'",
        ),
        (
            lambda: loose.save_pairs("a.jsonl", [{**ROWS[0], "7": "red"}]),
            "pairs must be a list of pairs, but number 1: unknown field '7'. Known: clean, wrapped, benign, good, bad, "
            "options, clean_good, clean_bad, clean_options, benign_good, benign_bad, benign_options, .... A field of "
            "your own is a label: labels.7.",
        ),
        (
            lambda: loose.patch_one(ct.load_organism(), "a", "z", 0),
            "pair must be a pair, not a str: a pair is a tuple of",
        ),
    ],
)
def test_what_makes_no_pairs_is_refused(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(CtlensError) as refusal:
        call()
    assert str(refusal.value).startswith(sentence) and "\n" not in str(refusal.value)


ORGANISM_PAIRS = ct.threats.get("sycophancy").pairs(4, split="heldout")


def ids_of(model: LensModel, asked: Prompt) -> tuple[int, ...]:
    return render(model.tokenizer, asked.turns).ids


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_token_ids_are_rendered_as_they_are_and_align_as_their_text(make: Callable[[Any], Any], tmp_path: Path) -> None:
    model = ct.load_organism()
    sides = [[ids_of(model, side) for side in (pair.clean, pair.wrapped)] for pair in ORGANISM_PAIRS]

    found = as_pairs([(make(clean), make(wrapped)) for clean, wrapped in sides])
    encoded = encode(found, model.tokenizer, n_ctx=model.cfg.n_ctx)
    expected = encode(ORGANISM_PAIRS, model.tokenizer, n_ctx=model.cfg.n_ctx)

    assert [[row.clean.ids, row.wrapped.ids] for row in encoded.rows] == sides
    assert [row.alignments for row in encoded.rows] == [row.alignments for row in expected.rows]
    save_pairs(tmp_path / "pairs.jsonl", found)
    assert load_pairs(tmp_path / "pairs.jsonl") == found


def test_token_ids_that_are_no_text_are_refused() -> None:
    model = ct.load_organism()
    with pytest.raises(CtlensError, match="a prompt of token ids is one turn of numbers below"):
        render(model.tokenizer, as_prompts([[10**6]])[0].turns)
    with pytest.raises(CtlensError, match="a prompt of token ids is one turn of numbers below"):
        render(model.tokenizer, (Turn("tokens", "a b"),))


@pytest.mark.slow
def test_a_training_and_an_analysis_take_any_form() -> None:
    model = ct.load_organism()
    rows = [
        {
            "clean": pair.clean.turns[0].content,
            "wrapped": pair.wrapped.turns[0].content,
            "good": pair.wrapped.good,
            "bad": pair.wrapped.bad,
        }
        for pair in ORGANISM_PAIRS
    ]
    plain = ct.train(model, as_pairs(rows), "act", steps=2, progress=False).history
    assert ct.train(model, pd.DataFrame(rows), "act", steps=2, progress=False).history == plain
    options: Any = {"site": "z", "direction": "noising", "progress": False}
    found = [
        ct.analysis.patch(model, given, **options).to_dataframe() for given in (as_pairs(rows), pd.DataFrame(rows))
    ]
    pd.testing.assert_frame_equal(*found)


def test_a_model_answers_a_text_messages_a_prompt_and_tokens_alike() -> None:
    model = ct.load_organism()
    pair = ORGANISM_PAIRS[0]
    text = pair.clean.turns[0].content

    found = {
        ct.chat(model, given)
        for given in (text, [{"role": "user", "content": text}], pair.clean, ids_of(model, pair.clean))
    }

    assert len(found) == 1 and found.pop().startswith(str(pair.clean.good))
    with pytest.raises(CtlensError, match="shorten the prompt"):
        ct.chat(model, [5] * model.cfg.n_ctx)


def test_pairs_are_not_written_into_a_table(tmp_path: Path) -> None:
    with pytest.raises(CtlensError, match=r"written as JSONL, and .*pairs.csv would be read as a table"):
        save_pairs(tmp_path / "pairs.csv", [("is it red ?", "i say no . is it red ?")])

    assert not (tmp_path / "pairs.csv").exists()
