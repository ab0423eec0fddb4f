"""The page on evaluation with other tools: its programs run, and its tasks of lm-eval read what is exported."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.documents import blocks
from helpers.models import Call, byte_level_tokenizer
from jinja2 import Environment

import ctlens as ct

PAGE = "docs/evaluating.md"
ROOT = Path(__file__).parents[1]


def rendered(template: str, row: dict[str, Any]) -> str:
    return Environment().from_string(template).render(row)


@pytest.mark.slow
def test_the_programs_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("inspect_ai", reason="needs the extra inspect")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}

    for example in blocks(PAGE, "python"):
        exec(example, names)

    assert len(names["answers"]) == 24 and len(names["found"].outcomes) == 24
    assert {"base", "attct"} == set(names["cost"].text_table()["model"])


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks(PAGE, "bash") for line in block.splitlines() if line.startswith("ctlens ")]
    assert [line.split()[1] for line in lines] == ["prompts", "prompts", "capability"]

    for line in lines:
        if " judge " in line:
            rows = [json.loads(row) for row in Path("prompts.jsonl").read_text().splitlines()]
            given = [json.dumps({"id": row["id"], "answer": row["bad"] or row["good"]}) for row in rows]
            Path("answers.jsonl").write_text("\n".join(given))
        assert call(line.removeprefix("ctlens ")).code == 0


def test_the_command_of_inspect_names_what_is_there() -> None:
    pytest.importorskip("inspect_ai", reason="needs the extra inspect")
    from inspect_ai._util.registry import registry_lookup

    (line,) = [line for line in blocks(PAGE, "bash")[0].splitlines() if line.startswith("inspect eval")]
    _, _, task, *options = shlex.split(line)
    asked = [option.split("=") for option in options if "=" in option]

    made: Any = registry_lookup("task", task)
    (found,) = [made(**{name: int(value) if value.isdecimal() else value for name, value in asked})]

    assert options[:2] == ["--model", "ctlens/organism"]
    assert len(found.dataset) == 3 * 24


@pytest.mark.parametrize(("number", "threat"), [(0, "facts"), (1, "free_facts")])
def test_a_task_of_lm_eval_reads_what_is_exported(tmp_path: Path, number: int, threat: str) -> None:
    task = yaml.safe_load(blocks(PAGE, "yaml")[number])
    file = tmp_path / task["dataset_kwargs"]["data_files"]
    ct.export_prompts(file, [threat], n_prompts=4, tokenizer=byte_level_tokenizer(chat=True))
    rows = [json.loads(line) for line in file.read_text().splitlines()]

    assert task["dataset_path"] == "json" and task["task"] == f"ctlens_{threat}"
    for row in rows:
        assert rendered(task["doc_to_text"], row) == row["text"] != ""
        target = rendered(task["doc_to_target"], row)
        assert (row["options"][int(target)] if row["options"] else target) == row["good"]
        if "doc_to_choice" in task:
            assert task["doc_to_choice"] == "{{options}}" and len(row["options"]) == 2


def test_the_fields_and_the_metrics_on_the_page_are_those_there_are(tmp_path: Path) -> None:
    page = (ROOT / PAGE).read_text()
    ct.export_prompts(tmp_path / "a.jsonl", ["sycophancy"], n_prompts=8, tokenizer=ct.load_organism().tokenizer)
    row = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    table = page.split("| field | what it is |")[1].split("\n\n")[0]
    fields = [name for line in table.splitlines() for name in re.findall(r"`([a-z_]+)`", line.split(" | ")[0])]
    metrics = set(re.findall(r"`((?:bad|good|switch)_\w+_(?:wrapped|clean|benign))`", page))

    found = ct.judge_answers(tmp_path / "a.jsonl", {name: "red" for name in ids(tmp_path / "a.jsonl")}).to_dataframe()

    assert set(fields) == set(row)
    assert metrics and metrics <= set(found["metric"] + "_" + found["prompt_side"])


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]
