"""What the page on extending adds works as it stands there."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.documents import blocks
from helpers.models import hf_model

import ctlens as ct
from ctlens import losses
from ctlens.losses.base import VectorLoss
from ctlens.models.loading import load_model

DISTANCE, LOSS, REGISTERED, _, THREAT, ANALYSIS, _ = blocks("docs/extending.md", "python")
NEIGHBOURS = {
    LOSS: ("ctlens.losses", "ctlens.losses.act"),
    THREAT: ("ctlens.threats.natural.facts",),
    ANALYSIS: ("ctlens.analysis.outputs.gap_recovered",),
}
"""The files beside which each is added, the last of them its own kind: what these import, it needs too."""


def made(example: str, **more: Any) -> dict[str, Any]:
    """The names after an example has run beside its neighbours."""
    names = {**more}
    for module in NEIGHBOURS[example]:
        names |= vars(import_module(module))
    exec(example, names)
    return names


def test_the_loss_is_one_of_the_family(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {**vars(import_module("ctlens.losses.distances"))}
    exec(DISTANCE, names)
    names = made(LOSS, absolute_error=names["absolute_error"])
    exec(REGISTERED, names)
    assert names["_KINDS"][:-1] == losses._KINDS
    monkeypatch.setattr(losses, "LOSSES", {kind.name: kind for kind in names["_KINDS"]})

    loss = losses.get("l1act", layers="last")

    assert isinstance(loss, VectorLoss)
    assert loss.hook_names(load_model(hf_model("llama"), tokenizer=tokenizer)) == ["blocks.1.hook_resid_post"]
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
    assert loss.distances["l1"](x, y) == 3


@pytest.mark.parametrize("split", ["train", "entities", "heldout", "structure"])
def test_the_threat_hints_at_the_wrong_answer_and_its_twin_at_the_right_one(split: str) -> None:
    threat = made(THREAT)["Deadline"]()

    for pair in threat.pairs(12, split):
        wrapped = pair.wrapped.turns[0].content
        benign = pair.benign.turns[0].content
        assert pair.clean.turns[0].content in wrapped
        assert f" {pair.labels['hint']}" == pair.wrapped.bad and pair.labels["hint"] in wrapped
        assert pair.benign.good.strip() in benign and pair.labels["hint"] not in benign


def test_the_analysis_finds_the_same_as_its_neighbour(tmp_path: Path) -> None:
    names = made(ANALYSIS)
    base = ct.load_organism()
    pairs = ct.threats.get("sycophancy").pairs(12, split="heldout")

    found = names["preference"]({"base": base}, pairs)
    found.save(tmp_path / "found.safetensors")
    again = names["Preference"].load(tmp_path / "found.safetensors")

    expected = ct.analysis.gap_recovered(base, {"same": base}, pairs, progress=False).logit_diffs[0, 0]
    assert np.array_equal(again.logit_diffs, expected[None])
    row = again.to_dataframe().iloc[0]
    assert row["value"] == pytest.approx(expected.mean()) and (row["model"], row["n_pairs"]) == ("base", 12)
    assert found.figure().data[0].x == pytest.approx([expected.mean()])
