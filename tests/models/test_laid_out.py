"""Models whose blocks accelerate keeps on disk: analyses find in them what they find in whole ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.sharded_models import REFUSED, numbers, refusal
from transformers import AutoModelForCausalLM, PreTrainedModel

import ctlens as ct
from ctlens.core.errors import CtlensError
from ctlens.losses import ACT
from ctlens.models.export import export_huggingface
from ctlens.models.loading import load_model
from ctlens.training import Trainer

pytestmark = pytest.mark.slow

ON_DISK = {"model.layers.1": "disk", "model.layers.2": "disk"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_huggingface(ct.load_organism(), tmp_path_factory.mktemp("models") / "hf")


def laid_out(folder: Path, **elsewhere: str) -> PreTrainedModel:
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    parts += [f"model.layers.{layer}" for layer in range(4)]
    layout = {part: elsewhere.get(part, "cpu") for part in parts}
    options = {"device_map": layout, "offload_folder": folder.parent / "off", "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def test_analyses_of_a_model_with_blocks_on_disk_find_what_they_find_in_a_whole_one(folder: Path) -> None:
    whole = load_model(folder)
    parts = load_model(laid_out(folder, **ON_DISK), tokenizer=whole.tokenizer)
    assert any(value.is_meta for value in parts.parameters())

    expected = numbers(whole)
    found = numbers(parts)
    assert found.keys() == expected.keys() and all(expected.values())
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-5, rel=1e-5), name


def test_what_takes_weights_that_lie_on_disk_is_refused(folder: Path) -> None:
    parts = load_model(laid_out(folder, **ON_DISK), tokenizer=load_model(folder).tokenizer)
    for work in REFUSED.values():
        assert "split among processes or lie on disk" in refusal(work, parts)
    with pytest.raises(CtlensError, match="split among processes or lie on disk"):
        Trainer(parts, ct.threats.get("sycophancy").pairs(4), ACT())


@pytest.mark.parametrize("part", ["model.embed_tokens", "lm_head"])
def test_the_ends_of_a_model_must_lie_on_a_device(folder: Path, part: str) -> None:
    with pytest.raises(CtlensError, match="the embedding and the unembedding must lie on a device"):
        load_model(laid_out(folder, **{part: "disk"}))
