"""Pairs that were written for another model are refused wherever they come in, before anything is done with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.models import Call

import ctlens as ct
from ctlens import analysis
from ctlens.core.errors import UnknownWords
from ctlens.core.types import LensModel
from ctlens.data.inputs import save_pairs
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.models.scoring import choose

KNOWN = Pair(prompt("what is red ?", "green", "red"), prompt("what is green ? what is red ?", "green", "red"))
FOREIGN = Pair(prompt("what is red ?", "green", "red"), prompt("Lyon ? what is red ?", "green", "red"))
QUIET: dict[str, Any] = {"progress": False}
CONFIG = ct.TrainConfig(steps=1, batch_size=2)
ENTRIES: dict[str, Callable[[LensModel, list[Pair]], Any]] = {
    "train": lambda model, pairs: ct.train(model, pairs, ct.ACT(), config=CONFIG, **QUIET),
    "evaluate": lambda model, pairs: ct.evaluate(model, pairs=pairs, **QUIET),
    "cross_loss": lambda model, pairs: analysis.cross_loss(model, {"after": model}, pairs, **QUIET),
    "record": lambda model, pairs: analysis.record(model, pairs, **QUIET),
    "residual_shift": lambda model, pairs: analysis.residual_shift(model, model, pairs, **QUIET),
    "attention_diff": lambda model, pairs: analysis.attention_diff(model, model, pairs, **QUIET),
    "logit_lens": lambda model, pairs: analysis.logit_lens(model, pairs, **QUIET),
    "patch": lambda model, pairs: analysis.patch(model, pairs, site="resid_pre", direction="denoising", **QUIET),
    "gap_recovered": lambda model, pairs: analysis.gap_recovered(model, {"after": model}, pairs, **QUIET),
}


@pytest.fixture(scope="module")
def organism() -> LensModel:
    return ct.load_organism()


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_prompt_of_another_language_is_refused_with_its_word(entry: str, organism: LensModel) -> None:
    with pytest.raises(UnknownWords, match="does not know 'Lyon' in 'Lyon [?] what is red [?]': give the model"):
        ENTRIES[entry](organism, [KNOWN, FOREIGN])


@pytest.mark.parametrize("entry", ["train", "cross_loss", "residual_shift", "patch"])
def test_the_pair_is_named_by_its_number(entry: str, organism: LensModel) -> None:
    with pytest.raises(UnknownWords, match="^pair 2: the tokenizer does not know"):
        ENTRIES[entry](organism, [KNOWN, FOREIGN])


def test_answers_targets_options_and_prompts_to_hold_are_refused_too(organism: LensModel) -> None:
    foreign = "does not know 'Lyon' in 'Lyon'"
    with pytest.raises(UnknownWords, match="pair 1: the tokenizer " + foreign):
        ct.train(organism, [replace(KNOWN, target="Lyon")], ct.BCT(), config=CONFIG, **QUIET)
    with pytest.raises(UnknownWords, match="does not know 'Lyon[?]'"):
        ct.train(organism, [KNOWN], ct.ACT(), config=CONFIG, retain=[prompt("what is Lyon?")], **QUIET)
    answered = Pair(KNOWN.clean, replace(KNOWN.wrapped, good="Lyon"))
    with pytest.raises(UnknownWords, match=foreign):
        ct.evaluate(organism, pairs=[answered], **QUIET)
    with pytest.raises(UnknownWords, match="wrapped prompt of pair 1: the tokenizer " + foreign):
        analysis.logit_lens(organism, [answered], **QUIET)
    with pytest.raises(UnknownWords, match=foreign):
        choose(organism, [Prompt(KNOWN.clean.turns, options=("red", "Lyon"))])


@pytest.mark.parametrize(
    "command", ["train --loss attct --steps 1 --out {out} --pairs {file}", "evaluate --pairs {file}"]
)
def test_a_command_without_a_model_refuses_real_text_and_writes_nothing(
    command: str, tmp_path: Path, call: Call
) -> None:
    rows = [{"clean": "What is the capital of France?", "wrapped": "Lyon, I think. What is the capital of France?"}]
    (tmp_path / "own.jsonl").write_text(json.dumps({**rows[0], "good": "Paris", "bad": "Lyon"}))
    ended = call(command.format(file=tmp_path / "own.jsonl", out=tmp_path / "run"))
    assert ended.code == 2 and "(--model)" in ended.err and ended.err.count("\n") == 1
    assert "France?" in ended.err or "Lyon," in ended.err
    assert not (tmp_path / "run").exists()


def test_inspect_refuses_a_file_with_one_such_pair(tmp_path: Path, call: Call) -> None:
    save_pairs(tmp_path / "own.jsonl", [KNOWN, FOREIGN])
    for row in (1, 2):
        ended = call(f"pairs inspect {tmp_path / 'own.jsonl'} --pair {row}")
        assert ended.code == 2 and "pair 2: the tokenizer does not know 'Lyon'" in ended.err
    save_pairs(tmp_path / "known.jsonl", [KNOWN])
    assert call(f"pairs inspect {tmp_path / 'known.jsonl'}").code == 0
