"""Damaged and hostile files of every format that is read: what they hold, or one sentence that says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.fuzzing import FUZZ, damaged, ended, refused_in_a_sentence
from helpers.models import byte_level_tokenizer, made
from helpers.study_folder import write_study
from hypothesis import given, settings
from hypothesis import strategies as st

import ctlens as ct
from ctlens.core.errors import CtlensError
from ctlens.data.formats import load_facts, load_pairs, load_prefills, load_prompts, read_pairs
from ctlens.data.pairs import Pair, prompt
from ctlens.evaluation import Evaluation
from ctlens.study.claims import read_claims
from ctlens.study.results import read_results

pytestmark = pytest.mark.fuzz

PAIR = {
    "clean": "Is it right?",
    "wrapped": [{"role": "user", "content": "I don't think so.\nIs it right?"}],
    "good": "yes",
    "bad": "no",
    "target": "yes",
    "labels": {"strength": "1"},
}
MESSAGES = {
    "_id": "a",
    "messages": [{"role": "user", "content": "Is it?\n(A) yes\n(B) no"}, {"role": "assistant", "content": "A) yes"}],
}
WRAPPED = {**MESSAGES, "messages": [{"role": "user", "content": "I say (B). Is it?\n(A) yes\n(B) no"}]}
SIDES = {"reference_messages": MESSAGES["messages"], "variant_messages": WRAPPED["messages"]}
Read = Callable[[Path], Any]


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def other(path: Path, content: bytes) -> Path:
    """A second file beside the first."""
    beside = path.with_name("other.jsonl")
    beside.write_bytes(content)
    return beside


TEXTS: dict[str, tuple[str, bytes, Read]] = {
    "pairs": ("a.jsonl", jsonl(PAIR, PAIR), load_pairs),
    "conversations": ("a.jsonl", jsonl(SIDES, SIDES), load_pairs),
    "two files": ("a.jsonl", jsonl(MESSAGES), lambda path: load_pairs(path, other(path, jsonl(WRAPPED)))),
    "prompts": ("a.jsonl", jsonl({"prompt": "Why?"}, MESSAGES), load_prompts),
    "facts": ("a.jsonl", jsonl(MESSAGES, MESSAGES), load_facts),
    "prefills": ("a.csv", b'prompt,prefill,prefill_type\n"Why, then?",Sure:,x\nHow?,"Yes, ""so"":",y\n', load_prefills),
    "prefilled pairs": ("a.csv", b"prompt,prefill\nWhy?,Sure:\nHow?,Yes:\n", load_pairs),
}
HOSTILE = (
    b"",
    b"\n\n",
    b"\xff\xfe\x00",
    b"\xef\xbb\xbf" + jsonl(PAIR),
    b"null\n",
    b"3\n",
    b"[]\n",
    b"{}\n",
    b"[" * 100_000,
    b'{"clean":' * 100_000,
    b'{"clean": ' + b"9" * 10_000 + b', "wrapped": "b"}\n',
    b'{"clean": "\\ud83d", "wrapped": "\\ud83d b"}\n',
    b'{"clean": "a", "clean": "b", "wrapped": "c a"}\n',
    b'{"clean": NaN, "wrapped": Infinity}\n',
    b'{"clean": "a", "wrapped": "b a", "labels": {"strength": NaN}}\n',
    b'{"clean": "a", "wrapped": "b a", "labels": [1]}\n',
    b'{"clean": "a", "wrapped": "b a", "options": {"x": 1}}\n',
    b'{"clean": [], "wrapped": []}\n',
    b'{"clean": [{"role": "robot", "content": "a"}], "wrapped": "a"}\n',
    b'{"clean": [{"role": "user"}], "wrapped": "a"}\n',
    jsonl(PAIR, PAIR).replace(b"\n", b"\r"),
    jsonl(PAIR).decode().encode("utf-16"),
    b"prompt,prefill\n" + b'"' * 999 + b"\n",
    b"prompt,prompt\na,b\n",
    b"prompt,prefill\na,b,c,d\n",
    json.dumps([PAIR, PAIR], indent=2).encode(),
)
"""Whole files, each of a kind that some reader has ended in a traceback on."""


@pytest.mark.parametrize("kind", TEXTS)
@settings(FUZZ, max_examples=30)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(kind: str, data: st.DataObject, tmp_path: Path) -> None:
    name, whole, read = TEXTS[kind]
    path = tmp_path / name
    path.write_bytes(data.draw(damaged(whole)))

    refused_in_a_sentence(read, path)


@pytest.mark.parametrize("number", range(len(HOSTILE)))
@pytest.mark.parametrize("kind", TEXTS)
def test_a_hostile_file_is_read_or_refused(kind: str, number: int, tmp_path: Path) -> None:
    name, whole, read = TEXTS[kind]
    path = tmp_path / name
    path.write_bytes(whole)
    assert not refused_in_a_sentence(read, path)

    path.write_bytes(HOSTILE[number])
    refused_in_a_sentence(read, path)


@settings(FUZZ, max_examples=40)
@given(content=damaged(jsonl(PAIR, SIDES, {"prompt": "Why?", "prefill": "Sure:"})))
def test_what_is_read_of_a_damaged_file_is_written_and_read_again(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    try:
        pairs = list(read_pairs(path).pairs)
    except CtlensError:
        return
    assert all(isinstance(pair, Pair) for pair in pairs)
    if pairs:
        ct.save_pairs(tmp_path / "b.jsonl", pairs)
        assert ct.load_pairs(tmp_path / "b.jsonl") == pairs
        (tmp_path / "b.jsonl").unlink()


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_the_commands_on_pairs_end_hostile_files_with_code_0_or_2(number: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    byte_level_tokenizer().save_pretrained("model")
    Path("a.jsonl").write_bytes(HOSTILE[number])

    for line in (
        "inspect a.jsonl --model model",
        "convert a.jsonl --out b.jsonl",
        "wrap a.jsonl --threat jailbreak --out c.jsonl",
    ):
        before = {*Path().iterdir()}
        found = ended("pairs", *line.split())
        assert found.code in (0, 2), found.err
        assert found.code == 0 or ({*Path().iterdir()} == before and found.err.count("\n") == 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's tables, an evaluation and a run."""
    place = tmp_path_factory.mktemp("folder")
    write_study(place / "study")
    model = made()
    pairs = [Pair(prompt("Is it right?", "yes", "no"), prompt("No. Is it right?", "yes", "no"))]
    ct.evaluate(model, pairs=pairs).save(place / "evaluation.csv")
    settings_of_run = ct.TrainConfig(steps=1, batch_size=1)
    ct.train(model, pairs, ct.ACT(), config=settings_of_run, progress=False).save(place / "run")
    return place


TABLES: dict[str, Callable[[Path], Any]] = {
    "study/results.csv": lambda place: read_results(place / "study/results.csv"),
    "study/claims.csv": lambda place: read_claims(place / "study/claims.csv"),
    "evaluation.csv": lambda place: Evaluation.load(place / "evaluation.csv"),
    "run/config.json": lambda place: ct.load_run(place / "run"),
    "run/environment.json": lambda place: ct.load_run(place / "run"),
    "run/history.csv": lambda place: ct.load_run(place / "run"),
}


@pytest.mark.parametrize("name", TABLES)
@settings(FUZZ, max_examples=12)
@given(data=st.data())
def test_a_damaged_file_of_a_study_or_a_run_is_read_or_refused(
    name: str, data: st.DataObject, folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "copy"
    shutil.copytree(folder, place, dirs_exist_ok=True)
    (place / name).write_bytes(data.draw(damaged((folder / name).read_bytes())))

    refused_in_a_sentence(TABLES[name], place)
