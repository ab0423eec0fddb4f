"""Prompts that go to other tools as JSONL, and the evaluation of what comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.models import Call, byte_level_tokenizer, made

import ctlens as ct
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.evaluation.prompt_files import read_prompts
from ctlens.models.generation import end_tokens, generate

OPTIONS = (" yes", " no", " never")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def judged_columns(found: ct.Evaluation) -> pd.DataFrame:
    table = found.outcomes.drop(columns=["good_probability", "bad_probability"])
    return table.sort_values(["evaluated_threat", "split", "prompt_side", "item"], ignore_index=True)


def numbers(found: ct.Evaluation) -> pd.DataFrame:
    """Every number but the mean probabilities."""
    return found.to_dataframe().query("not metric.str.endswith('_probability')").reset_index(drop=True)


@pytest.fixture
def choice() -> list[Pair]:
    """Two pairs of multiple choice."""
    wrapped = [prompt(text) for text in ("I say no. Is it right?", "I say no. Is it the best answer?")]
    clean = [prompt(text) for text in ("Is it right?", "Is it the best answer?")]
    return [
        Pair(Prompt(one.turns, " yes", " no", OPTIONS), Prompt(other.turns, " yes", " no", OPTIONS))
        for one, other in zip(clean, wrapped, strict=True)
    ]


@pytest.mark.slow
def test_what_another_tool_answers_is_judged_as_what_ctlens_asks(tmp_path: Path) -> None:
    model = ct.load_organism()
    threats = ["sycophancy", "jailbreak", "persona"]
    asked = ct.evaluate(model, threats, split=["heldout", "train"], n_prompts=12, progress=False)

    file = tmp_path / "prompts.jsonl"
    n_rows = ct.export_prompts(file, threats, split=["heldout", "train"], n_prompts=12, tokenizer=model.tokenizer)
    rows = rows_of(file)
    # Another tool: it knows the texts of the file alone.
    ids = [tuple(model.tokenizer(row["text"], add_special_tokens=False).input_ids) for row in rows]
    texts = model.tokenizer.batch_decode(generate(model, ids, ends=end_tokens(model)), skip_special_tokens=True)
    given = [{"id": row["id"], "answer": text} for row, text in zip(rows, texts, strict=True)]
    found = ct.judge_answers(file, write_rows(tmp_path / "answers.jsonl", given[::-1]))

    assert n_rows == len(rows) == len({row["id"] for row in rows}) == len(asked.outcomes)
    own = judged_columns(asked).assign(answer="")
    pd.testing.assert_frame_equal(judged_columns(found).assign(answer=""), own, check_exact=True)
    pd.testing.assert_frame_equal(numbers(found), numbers(asked), check_exact=True)
    assert "switch_to_bad" in set(numbers(found)["metric"])


def test_a_row_holds_the_messages_and_the_answers(tmp_path: Path, choice: list[Pair]) -> None:
    named = prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it?"}], "yes")
    file = tmp_path / "prompts.jsonl"

    ct.export_prompts(file, pairs=[Pair(named, named, labels={"topic": "a", "strength": "2"})])
    first, second = rows_of(file)
    ct.export_prompts(file, pairs=choice)

    assert first["id"] == "pairs-wrapped-0" and second["id"] == "pairs-clean-0"
    assert first["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it?"}]
    assert (first["good"], first["bad"], first["options"]) == ("yes", None, [])
    assert (first["topic"], first["strength"], first["wrapper"]) == ("a", 2, "")
    assert rows_of(file)[0]["options"] == list(OPTIONS) and "text" not in first


def test_what_is_written_is_read_as_it_was(tmp_path: Path, choice: list[Pair]) -> None:
    file = tmp_path / "prompts.jsonl"

    ct.export_prompts(file, pairs=choice)

    found = list(read_prompts(file).values())
    assert [one.prompt for one in found] == [pair.wrapped for pair in choice] + [pair.clean for pair in choice]


def test_the_text_is_the_prompt_as_its_template_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    tokenizer = byte_level_tokenizer(chat=True)

    ct.export_prompts(file, pairs=[{"clean": "Is it?", "wrapped": "No. Is it?"}], tokenizer=tokenizer)

    assert rows_of(file)[1]["text"] == "<s><|user|>\nIs it?</s>\n<|assistant|>\n"


def test_options_are_told_apart_by_the_whole_of_them(tmp_path: Path) -> None:
    options = (" no", " no way", " maybe")
    asked = Prompt(prompt("Is it?").turns, " maybe", " no", options)
    file = tmp_path / "prompts.jsonl"
    ct.export_prompts(file, pairs=[Pair(asked, asked)] * 3)
    sides = {side: [f"pairs-{side}-{item}" for item in range(3)] for side in ("wrapped", "clean")}

    answers = [" no way", "no", "No, it is not."]
    found = ct.judge_answers(file, dict(zip(sides["wrapped"] + sides["clean"], answers * 2, strict=True)))

    assert found.answers("pairs")["verdict"].tolist() == ["other", "bad", "bad"]


def test_the_samples_that_lm_eval_logs_are_answers(tmp_path: Path, choice: list[Pair]) -> None:
    file = tmp_path / "prompts.jsonl"
    ct.export_prompts(file, pairs=choice)
    scores = [
        [["-3.0", "False"], ["-1.0", "True"], ["-9.0", "False"]],
        [[-0.5, True], [-1.0, False], [-2.0, False]],
        [[-1.0, False], [-1.0, False], [-2.0, False]],
        [[-9.0, False], [-8.0, False], [-7.0, False]],
    ]
    samples = [{"doc": row, "filtered_resps": given} for row, given in zip(rows_of(file), scores, strict=True)]

    found = ct.judge_answers(file, write_rows(tmp_path / "samples.jsonl", samples))

    assert found.answers("pairs")["answer"].tolist() == [" no", " yes"]
    assert found.answers("pairs", prompt_side="clean")["answer"].tolist() == ["", " never"]
    assert found.rate("bad_rate", "wrapped") == 0.5 and found.rate("other_rate", "clean") == 1


def test_free_answers_come_from_lm_eval_too(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    ct.export_prompts(file, pairs=[{"clean": "Is it?", "wrapped": "No. Is it?", "good": "yes", "bad": "no"}])
    samples = [{"doc": row, "filtered_resps": ["no, it is not"]} for row in rows_of(file)]

    found = ct.judge_answers(file, write_rows(tmp_path / "samples.jsonl", samples))

    assert found.rate("bad_rate", "wrapped") == 1


def test_the_judge_of_a_threat_and_one_of_your_own(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    ct.export_prompts(file, ["free_facts"], n_prompts=6)
    rows = rows_of(file)

    said = {row["id"]: f"I think that it is {row['good']}." for row in rows}  # no answer begins with the word
    found = ct.judge_answers(file, said)
    unsure = ct.judge_answers(file, said, judge=lambda prompts, answers: [None] * len(answers))

    assert found.rate("good_rate", "wrapped") == 1
    assert unsure.rate("unparsed_rate", "wrapped") == 1


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"pairs-wrapped-0": "no"}, "1 prompts have no answer, the first 'pairs-clean-0'"),
        ({"pairs-wrapped-0": "no", "pairs-clean-0": "no", "x": "no"}, "answer to 'x', which is not in"),
        ([{"id": "pairs-wrapped-0", "answer": 3}], "line 1: a row needs an 'id' and an 'answer'"),
        ([{"id": "pairs-wrapped-0", "answer": "a"}] * 2, "line 2: 'pairs-wrapped-0' is answered twice"),
        ([{"doc": {"id": "pairs-wrapped-0"}, "filtered_resps": []}], "line 1: a row needs an 'id' and an 'answer'"),
    ],
)
def test_answers_that_are_not_one_per_prompt_are_refused(tmp_path: Path, answers: Any, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    ct.export_prompts(file, pairs=[{"clean": "Is it?", "wrapped": "No. Is it?", "good": "yes", "bad": "no"}])
    given = answers if isinstance(answers, dict) else write_rows(tmp_path / "answers.jsonl", answers)

    with pytest.raises(ct.CtlensError, match=message):
        ct.judge_answers(file, given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": "2"}, "'strength' is '2', as no exported prompt has it"),
        ({"prompt_side": "left"}, "no prompt that ctlens exported"),
        ({"options": "yes"}, "no prompt that ctlens exported"),
        ({"messages": []}, "'messages' must be"),
        ({"item": 0, "prompt_side": "wrapped"}, "stands twice"),
    ],
)
def test_a_file_that_was_changed_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    ct.export_prompts(file, pairs=[{"clean": "Is it?", "wrapped": "No. Is it?", "good": "yes", "bad": "no"}])
    first, second = rows_of(file)

    with pytest.raises(ct.CtlensError, match=message):
        ct.judge_answers(write_rows(file, [first, second | change]), {})


def test_token_ids_are_refused_and_so_is_an_empty_file(tmp_path: Path) -> None:
    model = made()
    ids = model.tokenizer("Is it?").input_ids
    (tmp_path / "empty.jsonl").write_text("")

    with pytest.raises(ct.CtlensError, match="pairs-wrapped-0 is given as token ids"):
        ct.export_prompts(tmp_path / "new.jsonl", pairs=ct.pairs([ids], [ids]))
    with pytest.raises(ct.CtlensError, match="holds no prompt"):
        ct.judge_answers(tmp_path / "empty.jsonl", {})
    assert not (tmp_path / "new.jsonl").exists()


def test_the_commands_write_and_judge(tmp_path: Path, call: Call) -> None:
    file = tmp_path / "prompts.jsonl"

    written = call(f"prompts export --threats sycophancy --n-prompts 4 --out {file}")
    again = call(f"prompts export --threats sycophancy --n-prompts 4 --out {file}")
    answers = write_rows(tmp_path / "a.jsonl", [{"id": row["id"], "answer": row["good"]} for row in rows_of(file)])
    judged = call(f"prompts judge {file} {answers} --json --out {tmp_path / 'numbers.csv'}")

    assert written.code == 0 and "12 prompts" in written.out
    assert again.code == 2 and "exists already" in again.err
    table = json.loads(judged.out)["tables"]["How often answers are bad and good"]
    assert table[0]["bad wrapped"]["value"] == 0 and table[0]["good clean"]["value"] == 1
    assert set(pd.read_csv(tmp_path / "numbers.csv")["metric"]) >= {"bad_rate", "switch_net"}
