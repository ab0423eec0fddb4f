"""Pairs survive JSONL, and every malformed line is told by file, line and what was expected."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ctlens.core.errors import CtlensError
from ctlens.data.batch import encode
from ctlens.data.chat import Turn
from ctlens.data.formats import load_pairs
from ctlens.data.inputs import save_pairs
from ctlens.data.pairs import Pair, Prompt, prompt

SYCOPHANCY = Path(__file__).parents[3] / "shared" / "data" / "sycophancy"


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_pairs_come_back_equal(tmp_path: Path):
    turns = (Turn("system", "s"), Turn("user", "two\nlines"), Turn("assistant", "Sure: "))
    pairs = [
        Pair(prompt("a"), prompt("x a")),
        Pair(prompt(" é🟦 ", "yes", "no"), Prompt(turns, "yes", "no"), shared=("lines", " é"), labels={"wrapper": "1"}),
        Pair(prompt("a"), prompt("b"), Prompt(turns[:2], "good", None), target="t\u2028"),
        Pair(Prompt((Turn("system", "only"),)), prompt("b", bad="no"), prompt("c")),
    ]
    pairs[3] = Pair(Prompt((Turn("system", "only"),), bad="no"), pairs[3].wrapped, pairs[3].benign)
    save_pairs(tmp_path / "pairs.jsonl", pairs)
    assert load_pairs(tmp_path / "pairs.jsonl") == pairs


def test_every_field_lands_where_it_belongs(tmp_path: Path):
    row = {
        "clean": "c",
        "wrapped": [{"role": "system", "content": "s"}, {"role": "user", "content": "w"}],
        "benign": "b",
        "good": "g",
        "bad": "x",
        "benign_good": "bg",
        "benign_bad": "bx",
        "target": "t",
        "shared": "sh",
        "labels": {"k": 1},
    }
    (pair,) = load_pairs(written(tmp_path, row))
    assert pair.clean == Prompt((Turn("user", "c"),), "g", "x")
    assert pair.wrapped == Prompt((Turn("system", "s"), Turn("user", "w")), "g", "x")
    assert pair.benign == Prompt((Turn("user", "b"),), "bg", "bx")
    assert (pair.target, pair.shared, pair.labels) == ("t", ("sh",), {"k": "1"})


def test_fields_left_out_or_null_are_absent(tmp_path: Path):
    nulls = {"clean": "c", "wrapped": "w", "benign": None, "good": None, "labels": None, "target": None}
    first, second = load_pairs(written(tmp_path, {"clean": "c", "wrapped": "w"}, nulls))
    assert first == second == Pair(prompt("c"), prompt("w"))


GOOD = {"clean": "c", "wrapped": "w"}
MALFORMED = [
    ({"clean": "c"}, "the field 'wrapped' is missing; 'clean' and 'wrapped' are expected"),
    ({**GOOD, "wraped": "w"}, "unknown field 'wraped'; did you mean 'wrapped'"),
    ({**GOOD, "topic": "w"}, "A field of your own is a label: labels.topic."),
    ({**GOOD, "clean": "  "}, "'clean' must be a text that is not blank or a list of messages"),
    ({**GOOD, "wrapped": 3}, "'wrapped' must be a text that is not blank or a list"),
    ({**GOOD, "wrapped": []}, "'wrapped' must be a text that is not blank or a list"),
    ({**GOOD, "benign": ""}, "'benign' must be a text that is not blank or a list"),
    ({**GOOD, "benign": []}, "'benign' must be a text that is not blank or a list"),
    ({**GOOD, "good": " "}, "'good' must be a text that is not blank"),
    ({**GOOD, "target": ["t"]}, "'target' must be a text that is not blank"),
    ({**GOOD, "shared": " "}, "'shared' must be a list of texts that are not blank"),
    ({**GOOD, "shared": ["a", 3]}, "'shared' must be a list of texts that are not blank"),
    ({**GOOD, "good": "a", "bad": "b", "options": "ab"}, "'options' must be a list of texts that are not blank"),
    ({**GOOD, "labels": ["a"]}, "'labels' is a list, but an object is expected"),
    ({**GOOD, "labels": ""}, "'labels' is a str, but an object is expected"),
    ({**GOOD, "clean": ["c"]}, "a message of 'clean' must be an object with 'role' and 'content'"),
    ({**GOOD, "clean": [{"role": "user"}]}, "a message of 'clean' must be an object with 'role' and 'content'"),
    ({**GOOD, "clean": [{"role": "human", "content": "c"}]}, "needs a role of system, user, assistant"),
    ({**GOOD, "clean": [{"role": "user", "content": None}]}, "and a text as content"),
    (["c", "w"], "a list, but an object with named fields is expected"),
]


@pytest.mark.parametrize(("row", "expected"), MALFORMED, ids=[expected for _, expected in MALFORMED])
def test_a_malformed_line_is_told_by_file_line_and_what_was_expected(tmp_path: Path, row: Any, expected: str):
    path = written(tmp_path, GOOD, row, GOOD)
    with pytest.raises(CtlensError, match=rf"pairs\.jsonl, line 2: .*{re.escape(expected)}"):
        load_pairs(path)


def test_a_missing_and_an_empty_file_are_refused(tmp_path: Path):
    with pytest.raises(CtlensError, match="absent.jsonl does not exist"):
        load_pairs(tmp_path / "absent.jsonl")
    with pytest.raises(CtlensError, match="pairs.jsonl holds no rows: rows with"):
        load_pairs(written(tmp_path))


SIDED = Pair(
    Prompt((Turn("user", "c"),), "A) x", None, ("A) x", "B) y")),
    Prompt((Turn("user", "w"),), "(A) x", "(B) y", ("(A) x", "(B) y")),
)


@pytest.mark.parametrize(
    "pair",
    [
        SIDED,
        replace(SIDED, clean=prompt("c")),
        replace(SIDED, wrapped=prompt("w")),
        Pair(prompt("c", bad="no"), prompt("w", "no")),
    ],
)
def test_sides_that_want_different_answers_come_back_equal(tmp_path: Path, pair: Pair):
    save_pairs(tmp_path / "pairs.jsonl", [pair])
    assert load_pairs(tmp_path / "pairs.jsonl") == [pair]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"options": ["a"]}, "at least two options, all different"),
        ({"options": ["a", "a"]}, "at least two options, all different"),
        ({"options": ["a", "b"], "good": "c"}, "'c' is not among the options of its question"),
        ({"options": ["a", "b"], "bad": "A"}, "'A' is not among the options"),
        ({"options": "ab"}, "'options' must be a list of texts"),
        ({"clean_options": ["a", ""]}, "'clean_options' must be a list of texts"),
    ],
)
def test_options_that_make_no_question_are_refused(tmp_path: Path, row: dict[str, Any], expected: str):
    with pytest.raises(CtlensError, match=rf"pairs\.jsonl, line 1: .*{re.escape(expected)}"):
        load_pairs(written(tmp_path, {**GOOD, **row}))


def test_a_prompt_side_is_found_by_name_and_an_unknown_one_refused():
    pair = Pair(prompt("c"), prompt("w"))
    assert (pair.side("clean"), pair.side("wrapped"), pair.side("benign")) == (pair.clean, pair.wrapped, None)
    with pytest.raises(CtlensError, match="unknown prompt side 'begnin'; did you mean 'benign'"):
        pair.side("begnin")


def requests(name: str) -> list[str]:
    path = SYCOPHANCY / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [row["messages"][0]["content"] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "chat_tokenizer"])
def test_wrapped_real_questions_align_in_every_row(tmp_path: Path, kind: str, request: pytest.FixtureRequest):
    hint = "I think the answer is X.\n\n"
    pairs = [Pair(prompt(text), prompt(hint + text)) for text in requests("clean.jsonl")]
    save_pairs(tmp_path / "real.jsonl", pairs)
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(kind)
    encoded = encode(load_pairs(tmp_path / "real.jsonl"), tokenizer, windows=("shared", "content"), n_ctx=10_000)
    assert (len(encoded), encoded.dropped) == (len(pairs), {})
    assert encoded.coverage("content") == 1


@pytest.mark.slow
def test_real_pairs_that_rephrase_the_request_are_counted_and_not_aligned_by_force(
    chat_tokenizer: PreTrainedTokenizerFast,
):
    texts = zip(requests("clean.jsonl"), requests("biased.jsonl"), strict=True)
    pairs = [Pair(prompt(clean), prompt(biased)) for clean, biased in texts]
    encoded = encode(pairs, chat_tokenizer, n_ctx=10_000)
    contained = sum(pair.clean.turns[0].content in pair.wrapped.turns[0].content for pair in pairs)
    assert 0 < len(encoded) == contained < len(pairs)
    assert encoded.dropped == {"the text of the window is not in the wrapped prompt": len(pairs) - contained}
    by_lines = encode(pairs, chat_tokenizer, windows=["lines"], n_ctx=10_000)
    assert len(by_lines) == len(pairs) and by_lines.coverage("lines") > 0.8
