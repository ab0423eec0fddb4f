"""GGUF files: their weights become plain ones, and what HuggingFace cannot read is refused in one sentence."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gguf_files import adjacent, gguf, write_gguf
from helpers.models import Call, byte_level_tokenizer, hf_model
from transformers import AutoModelForCausalLM

import ctlens as ct
from ctlens.core.errors import CtlensError
from ctlens.data.pairs import Pair, prompt
from ctlens.models.loading import load_model, load_tokenizer, save_model

pytestmark = pytest.mark.boundary

TOKENS = torch.randint(1, 380, (3, 12), generator=torch.Generator().manual_seed(1))


def refusal(source: str | Path) -> str:
    with pytest.raises(CtlensError) as error:
        load_model(source)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in float32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, hf_model("llama"))
    return path


@torch.no_grad()
def test_a_file_gives_the_model_that_was_written_into_it(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model(file)

    assert capfd.readouterr() == ("", "")
    assert (model(TOKENS) - hf_model("llama")(TOKENS).logits).abs().max() < 1e-5
    assert model.tokenizer.chat_template == byte_level_tokenizer(chat=True).chat_template
    text = "Which term best describes the disease?"
    expected = byte_level_tokenizer()(text).input_ids
    assert model.tokenizer(text).input_ids in (expected, expected[1:])  # llama.cpp's flag says whether a BOS is added
    assert load_tokenizer(str(file)).get_vocab() == model.tokenizer.get_vocab()


@torch.no_grad()
def test_quantised_weights_become_the_plain_ones_that_they_stand_for(tmp_path: Path) -> None:
    original = hf_model("llama")
    write_gguf(tmp_path / "q8.gguf", original, gguf.GGMLQuantizationType.Q8_0)
    expected = hf_model("llama")
    for name, parameter in expected.named_parameters():
        if parameter.ndim == 2 and parameter.shape[-1] % 32 == 0:
            heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2], 0)
            values = parameter.numpy()
            rounded = gguf.quants.quantize(adjacent(values, heads) if heads else values, gguf.GGMLQuantizationType.Q8_0)
            rows = gguf.quants.dequantize(rounded, gguf.GGMLQuantizationType.Q8_0)
            if heads:
                d_out, d_in = rows.shape
                rows = rows.reshape(heads, d_out // heads // 2, 2, d_in).swapaxes(1, 2).reshape(d_out, d_in)
            parameter.data = torch.from_numpy(rows.copy())

    model = load_model(tmp_path / "q8.gguf")

    assert (model(TOKENS) - expected(TOKENS).logits).abs().max() < 1e-5
    assert (model(TOKENS) - original(TOKENS).logits).abs().max() > 1e-4


def test_what_came_from_a_file_is_trained_saved_and_exported_like_any_model(file: Path, tmp_path: Path) -> None:
    model = load_model(file)
    pairs = [Pair(prompt("Is it right?"), prompt("I don't think it's right. Is it right?"))] * 2
    config = ct.TrainConfig(steps=1, batch_size=2, lr=1e-2, max_new_tokens=2)
    trained = ct.train(model, pairs, ct.ACT(), config=config, progress=False).model
    with torch.no_grad():
        answers = trained(TOKENS)
        assert not torch.equal(answers, model(TOKENS))
        save_model(trained, tmp_path / "saved")
        assert torch.equal(load_model(tmp_path / "saved")(TOKENS), answers)
        ct.export_huggingface(trained, tmp_path / "hf")
        hf: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert (hf(TOKENS).logits - answers).abs().max() < 1e-5


def test_a_file_that_cannot_be_read_is_refused_by_its_name(file: Path, tmp_path: Path, call: Call) -> None:
    write_gguf(tmp_path / "blorp.gguf", hf_model("llama"), architecture="blorp")
    (tmp_path / "garbage.gguf").write_bytes(b"garbage" * 99)
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-4000])
    (tmp_path / "folder.gguf").mkdir()

    assert "architecture blorp is not supported" in refusal(tmp_path / "blorp.gguf")
    for name in ("garbage", "cut", "folder", "missing"):
        assert f"{name}.gguf" in refusal(str(tmp_path / f"{name}.gguf"))
    ended = call(f"evaluate --model {tmp_path}/blorp.gguf --n-prompts 2")
    assert ended.code == 2 and ended.err.count("\n") == 1 and "blorp" in ended.err


def test_a_missing_package_is_named_with_how_to_get_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'ctlens[gguf]'" in refusal(file)
    with pytest.raises(CtlensError, match="package gguf"):
        load_tokenizer(file)
