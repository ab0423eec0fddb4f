"""Natural pairs on a bridged chat model: each value of a sweep is what plain hooks on the HuggingFace model give."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from helpers.models import byte_level_tokenizer, hf_model
from transformers import AutoModelForCausalLM

import ctlens as ct
from ctlens.data.pairs import Pair
from ctlens.models.smollm2 import has_smollm2

ROOT = Path(__file__).parents[3]
REAL = ROOT / "runs" / "models" / "smollm2"
SITES = ("resid_pre", "attn_out", "mlp_out")
OPTIONS: Any = {"site": SITES, "direction": "denoising", "progress": False}


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, which has the restatement: a tokenizer, a HuggingFace model and PyTorch's hooks."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, "real_model", raising=False)
    import real_model  # type: ignore[import-not-found]

    return real_model


def behind_the_question(n_pairs: int) -> list[Pair]:
    drawn = ct.threats.get("facts").pairs(8 * n_pairs, split="structure")
    return [pair for pair in drawn if pair.labels["wrapper"].startswith("behind")][:n_pairs]


@pytest.mark.boundary
def test_every_value_of_natural_pairs_is_that_of_hooks_on_the_huggingface_model(plainly: ModuleType) -> None:
    hf = hf_model("llama", n_ctx=512)
    model = ct.load_model(hf_model("llama", n_ctx=512), tokenizer=byte_level_tokenizer(chat=True))
    pairs = behind_the_question(2)
    found = ct.analysis.patch(model, pairs, **OPTIONS)

    for number, pair in enumerate(pairs):
        plain = plainly.Plain.of(model.tokenizer, pair)
        stem = pair.clean.turns[-1].content
        assert model.tokenizer.decode(plain.clean[-plain.shared :]).split("<|assistant|>\n")[-1].startswith(stem)
        backs = range(1, plain.shared + 1, 20)
        for site in SITES:
            values = found[site].values[0, :, [-back for back in backs], number].T
            expected = [[plainly.by_huggingface(hf, plain, site, layer, back) for back in backs] for layer in range(2)]
            np.testing.assert_allclose(values, expected, atol=1e-5)
            assert np.abs(values - found[site].target[0, number]).max() > 1e-3  # some patch changes the answer
            assert found[site].path == "suffix"


@pytest.mark.slow
@pytest.mark.skipif(not has_smollm2(REAL), reason="make smollm2 has not written the real chat model")
def test_the_real_model_goes_the_fast_way_to_the_values_of_huggingface(plainly: ModuleType) -> None:
    model = ct.load_model(REAL)
    hf: Any = AutoModelForCausalLM.from_pretrained(REAL)
    pairs = behind_the_question(2)
    layers = (0, model.cfg.n_layers - 1)
    found = ct.analysis.patch(model, pairs, layers=layers, **OPTIONS)

    for number, pair in enumerate(pairs):
        plain = plainly.Plain.of(model.tokenizer, pair)
        for site in SITES:
            for index, layer in enumerate(layers):
                expected = plainly.by_huggingface(hf, plain, site, layer, back=1)
                assert found[site].values[0, index, -1, number] == pytest.approx(expected, abs=1e-4)
            assert found[site].path == "suffix"
