"""Objects show themselves by shapes, labels and rates, and never by every number."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import hf_model, made

import ctlens as ct
from ctlens.core.shown import Shown, shown, table_of
from ctlens.models.parameters import copy_model, present_parameters

PAIRS = ct.threats.get("sycophancy").pairs(6, split="heldout")


@dataclass(frozen=True)
class Held(Shown):
    """A result with a large array."""

    values: np.ndarray
    name: str


def test_a_dataclass_shows_its_shapes_and_labels() -> None:
    held = Held(np.zeros((30, 40), np.float32), "<z>")

    assert repr(held) == "Held(values: float32[30, 40], name: <z>)"
    assert held._repr_html_() == table_of("Held", {"values": "float32[30, 40]", "name": "<z>"})
    assert "<td>&lt;z&gt;</td>" in held._repr_html_()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3, dtype=torch.bfloat16), "bfloat16[2, 3]"),
        (np.arange(5).reshape(1, 5), "int64[1, 5]"),
        ((), "none"),
        ({}, "none"),
        ("x" * 90, "x" * 60 + "..."),
        (0.5, "0.5"),
        (None, "None"),
        (list("abcdefgh"), "a, b, c, d, e, f, ... (8)"),
        (ct.TrainConfig(), "TrainConfig"),
    ],
)
def test_values_in_a_few_words(value: Any, text: str) -> None:
    assert shown(value) == text


@pytest.fixture(scope="module")
def run() -> ct.Run:
    return ct.train(ct.load_organism(), PAIRS, "act", steps=2, progress=False)


def test_a_run_shows_what_was_trained_how_far_and_its_last_losses(run: ct.Run) -> None:
    text = repr(run)

    assert len(text) < 400
    for part in ("losses: act", "steps: 2 of 2 (all steps)", "trained: attn", "of 4 layers, 96 wide"):
        assert part in text
    assert f"act {run.history.series('act')[-1]:.4g}" in text and "<th>losses</th><td>act</td>" in run._repr_html_()


def test_results_and_threats_are_short_and_have_a_table(run: ct.Run) -> None:
    shift = ct.analysis.residual_shift(ct.load_organism(), run.model, PAIRS, progress=False)
    objects = (shift, run.history, ct.threats.get("facts"), ct.threats.get("sycophancy"))

    for one in objects:
        assert len(repr(one)) < 600 and "\n" not in repr(one)
        assert one._repr_html_().startswith("<table>")
    assert all(f"{field.name}: " in repr(shift) for field in fields(shift))
    assert "8 in train" in repr(ct.threats.get("sycophancy")) and "{hint}" in ct.threats.get("sycophancy")._repr_html_()


def test_an_evaluation_shows_the_rates_that_its_table_has() -> None:
    found = ct.evaluate(ct.load_organism(), ["sycophancy"], n_prompts=12, progress=False)

    (row,) = found.summary().to_dict("records")
    assert row["bad wrapped"].value == found.rate("bad_rate", "wrapped")
    assert f"{row['bad wrapped'].value:.0%} [" in repr(found) and "sycophancy" in found._repr_html_()
    assert {"brr", "f1"} <= set(found.metrics()["metric"]) and "bad_rate" not in set(found.metrics()["metric"])


def test_a_model_shows_its_sizes_and_so_does_its_copy() -> None:
    model: Any = ct.adopt(made())
    n_parameters = sum(weight.numel() for weight in present_parameters(model).values())
    assert repr(model) == (
        f"{type(model).__name__}(parameters: {n_parameters:,}, layers: 2, "
        f"width: 32, 4 heads of 8, vocabulary: {model.cfg.d_vocab})"
    )
    assert repr(copy_model(model)) == repr(model)
    llama = ct.load_model(hf_model("llama"))
    assert repr(llama).startswith("TransformerBridge(parameters: ") and len(repr(llama)) < 200
    text = model._repr_html_()

    assert f"<th>layers</th><td>{model.cfg.n_layers}</td>" in text and len(text) < 600
    assert f"{n_parameters:,}" in text
    copied: Any = copy_model(model)
    assert copied._repr_html_() == text
