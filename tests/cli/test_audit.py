"""`ctlens audit`, from the command to its folder."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from helpers.models import Call

from ctlens.auditing import Audit, load_labels

SMALL = "audit --quiet --threat sycophancy --n-pairs 8 --n-prompts 8 --steps 1 --methods greedy,certainty:2 --out new"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_audit_leaves_labels_tables_and_figures(call: Call, place: Path) -> None:
    ended = call(f"{SMALL} --pools wrapped,mixed")

    assert ended.code == 0, ended.err
    assert "certainty:2" in ended.out and "predicted" in ended.out and "Labels, tables and figures: new" in ended.out
    found = Audit.load(place / "new/audit/audit.safetensors")
    table = pd.read_csv(place / "new/audit.csv")
    assert found.pools == ("wrapped", "mixed") and len(table) == len(found.to_dataframe("gives_in"))
    assert {label.selector for label in load_labels(place / "new/audit/labels.jsonl")} == {"greedy", "certainty:2"}
    assert (place / "new/figures/mixed.html").is_file() and {"eta.csv", "signs.csv", "strength.csv"} <= {
        path.name for path in (place / "new").iterdir()
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--methods greedi", "unknown selector or regulariser 'greedi'"),
        ("--pools wrapt", "unknown pool 'wrapt'"),
        ("--n-pairs 0", "n_pairs must be at least 1"),
        ("--temperature 0", "temperature must be a positive number"),
        ("--model new1 --model new1", "names a model twice"),
        ("--threat facts", "unknown threat of the micro-world 'facts'"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(call: Call, place: Path, options: str, words: str) -> None:
    ended = call(f"{SMALL} {options}")

    assert ended.code == 2 and words in ended.err and ended.err.count("\n") == 1
    assert not list(place.iterdir())
