"""Devices and half precision: every loss and analysis runs in bfloat16 near its float32 numbers, or says why not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import Call, byte_level_tokenizer, hf_model
from helpers.tiers import unit_first

from ctlens import analysis, evaluate, losses
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel, widened
from ctlens.data.inputs import save_pairs
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import ACT, AttCT
from ctlens.models.loading import load_model
from ctlens.models.lora import LoRA, load_adapters, save_adapters
from ctlens.training import TrainConfig, train

QUESTIONS = ("Is it right?", "When a creature experiences feeling, what?", "Please answer.", "Which term is it?")
PAIRS = [
    Pair(prompt(q, "yes", "no"), prompt(f"{hint} {q}", "yes", "no"), target="(A)")
    for q in QUESTIONS
    for hint in ("I don't think it's right.", "I may be in the minority here, but:")
]
CONFIG = TrainConfig(steps=2, batch_size=4, lr=1e-3, max_new_tokens=3, trainable=LoRA(2), retention=1.0)
ON_PAIRS = [losses.get(name) for name in losses.names() if name != "rmct"]
ON_PAIRS += [ACT(distance="relative"), AttCT(keys="lifted")]


def lens(dtype: torch.dtype) -> LensModel:
    return load_model(hf_model("llama"), tokenizer=byte_level_tokenizer(chat=True), dtype=dtype)


FULL, HALF = lens(torch.float32), lens(torch.bfloat16)


@pytest.mark.parametrize("loss", unit_first(ON_PAIRS), ids=lambda loss: str(loss)[:40])
def test_every_loss_takes_steps_in_bfloat16_near_those_in_float32(loss: losses.Loss) -> None:
    full = train(FULL, PAIRS, loss, config=replace(CONFIG, memory="all"), progress=False)
    half = train(HALF, PAIRS, loss, config=replace(CONFIG, memory="layers"), progress=False)
    here = full.history.series(loss.name)[0]
    there = half.history.series(loss.name)[0]
    assert there == pytest.approx(here, rel=0.1)
    assert np.isfinite(half.history.series("total")).all() and half.history.series("grad_norm")[0] > 0


def test_adapters_are_float32_beside_weights_in_bfloat16_and_small_steps_are_kept(tmp_path: Path) -> None:
    run = train(HALF, PAIRS, ACT(), config=replace(CONFIG, lr=1e-6, steps=4, warmup=0.0), progress=False)
    adapters = [value for value in run.model.parameters() if value.requires_grad]
    assert {value.dtype for value in adapters} == {torch.float32}
    assert all(value.abs().max() > 0 for value in adapters)  # B started at zero
    frozen = {value.dtype for value in run.model.parameters() if not value.requires_grad}
    assert frozen == {torch.bfloat16}
    save_adapters(run.model, tmp_path / "a")
    again = lens(torch.bfloat16)
    load_adapters(again, tmp_path / "a")
    tokens = torch.arange(1, 20)[None]
    assert torch.equal(again(tokens), run.model(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_not_trained(dtype: torch.dtype) -> None:
    with pytest.raises(CtlensError, match="too coarse to train.*train adapters"):
        train(lens(dtype), PAIRS, ACT(), config=replace(CONFIG, trainable=("attn",)), progress=False)


def test_half_precision_is_widened_and_nothing_else() -> None:
    for dtype in (torch.float32, torch.float64):
        values = torch.ones(2, dtype=dtype)
        assert widened(values) is values
    assert widened(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32


OPTIONS: dict[str, Any] = {"progress": False}
PATCH: dict[str, Any] = {"site": "resid_post", "direction": "denoising", "positions": "last", **OPTIONS}
ANALYSES = {
    "evaluate": lambda model: evaluate(model, pairs=PAIRS, max_new_tokens=2, **OPTIONS).to_dataframe()[["value"]],
    "patch": lambda model: analysis.patch(model, PAIRS, **PATCH).to_dataframe(),
    "attention_diff": lambda model: analysis.attention_diff(model, model, PAIRS, **OPTIONS).to_dataframe(),
    "residual_shift": lambda model: analysis.residual_shift(model, model, PAIRS, **OPTIONS).to_dataframe(),
    "cross_loss": lambda model: analysis.cross_loss(model, {"same": model}, PAIRS, **OPTIONS).to_dataframe(),
    "logit_lens": lambda model: analysis.logit_lens(model, PAIRS, **OPTIONS).to_dataframe(),
}


def numbers_of(name: str, model: LensModel) -> np.ndarray:
    table = ANALYSES[name](model).select_dtypes(["float", "bool"])
    return table.astype(float).to_numpy()


@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_runs_in_bfloat16(name: str) -> None:
    found = numbers_of(name, HALF)
    expected = numbers_of(name, FULL)
    assert found.shape == expected.shape
    assert np.isfinite(found).mean() == pytest.approx(np.isfinite(expected).mean(), abs=0.2)


def test_shares_of_logits_ask_for_float32() -> None:
    analysis.logit_attribution(FULL, PAIRS, progress=False)
    with pytest.raises(CtlensError, match="add up to the logits in float32 alone: load the model in float32"):
        analysis.logit_attribution(HALF, PAIRS, progress=False)


def test_a_patch_in_bfloat16_is_near_that_in_float32() -> None:
    full = analysis.patch(FULL, PAIRS, **PATCH).values
    half = analysis.patch(HALF, PAIRS, **PATCH).values
    assert np.corrcoef(full.ravel(), half.ravel())[0, 1] > 0.99


@pytest.fixture
def place(tmp_path: Path) -> Path:
    hf_model("llama").save_pretrained(tmp_path / "hf")
    byte_level_tokenizer(chat=True).save_pretrained(tmp_path / "hf")
    save_pairs(tmp_path / "own.jsonl", PAIRS)
    return tmp_path


@pytest.mark.slow
def test_the_commands_take_a_dtype(call: Call, place: Path) -> None:
    call("--help")
    common = f"--model {place}/hf --pairs {place}/own.jsonl --dtype bfloat16 --device cpu"
    short = "--steps 1 --batch-size 2 --quiet"
    for line in (
        f"train {common} --loss attct --lora-rank 2 {short} --out {place}/run",
        f"evaluate {common}",
        f"patch {common} --site resid_post --direction denoising --positions last --quiet --out {place}/patch",
    ):
        ended = call(line)
        assert (ended.code, ended.err) == (0, ""), line
    assert load_model(place / "run", dtype=torch.bfloat16)(torch.arange(5)[None]).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device cuda", "--device cuda cannot be used here"),
        ("--device cpuu", "--device cpuu cannot be used here"),
        ("--dtype bfloat61", "did you mean 'bfloat16'"),
        ("--dtype bfloat16", "too coarse to train"),
    ],
)
def test_what_this_machine_has_not_is_one_sentence(call: Call, place: Path, options: str, message: str) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is one")
    call("--help")
    before = sorted(place.iterdir())
    ended = call(f"train --model {place}/hf --pairs {place}/own.jsonl --loss act --quiet {options} --out {place}/run")
    assert ended.code == 2 and message in ended.err and ended.err.count("\n") == 1
    assert sorted(place.iterdir()) == before
