"""The pairs of a file as the subject of a study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ctlens.core.errors import CtlensError
from ctlens.data.inputs import save_pairs
from ctlens.evaluation.result import OWN_PAIRS
from ctlens.organism import load_organism
from ctlens.study.source import FilePairs, evaluated, splits_of, start_model, subject
from ctlens.threats import get


@pytest.fixture
def file(tmp_path: Path) -> str:
    save_pairs(tmp_path / "pairs.jsonl", get("sycophancy").pairs(60))
    return str(tmp_path / "pairs.jsonl")


def test_no_clean_prompt_is_trained_on_and_held_out(file: str) -> None:
    source = FilePairs(file)

    trained = source.pairs(100)
    held = source.pairs(100, "heldout")

    assert len(trained) + len(held) == 60 and len(held) >= 5
    assert not {pair.clean for pair in trained} & {pair.clean for pair in held}


def test_what_is_held_out_does_not_depend_on_the_seed(file: str) -> None:
    source = FilePairs(file)

    assert source.pairs(9, "heldout", 0) == source.pairs(9, "heldout", 1)
    assert source.pairs(30, "train", 0) != source.pairs(30, "train", 1)
    assert source.pairs(5, "train", 1) == source.pairs(30, "train", 1)[:5]


def test_a_file_stands_for_the_threat(file: str) -> None:
    assert subject("jailbreak").name == "jailbreak"
    assert subject("whatever", file).name == OWN_PAIRS and splits_of(file) == ("heldout",)


def test_evaluation_is_on_what_is_held_out(file: str) -> None:
    found = evaluated(load_organism(), [subject(OWN_PAIRS, file)], ["heldout"], 8).outcomes

    assert set(found["split"]) == {"heldout"} and set(found["evaluated_threat"]) == {OWN_PAIRS}
    assert len(found) == 8 * 3


def test_another_split_is_refused(file: str) -> None:
    with pytest.raises(CtlensError, match="unknown split of a file 'structure'"):
        FilePairs(file).pairs(4, "structure")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"clean": "a", "wrapped": "b a"}] * 2, "pair 1 names no good and bad answer"),
        ([{"clean": "a", "wrapped": "b a", "good": "x", "bad": "y"}] * 3, "has one clean prompt"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(rows: list, message: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))

    with pytest.raises(CtlensError, match=message):
        FilePairs(str(tmp_path / "pairs.jsonl")).pairs(4)


def test_a_start_is_loaded_once() -> None:
    assert start_model("") is start_model("")
    assert next(start_model("", "cpu", "bfloat16").parameters()).dtype == torch.bfloat16
