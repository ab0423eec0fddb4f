"""What cannot be loaded as it stands is refused in one sentence that says what to do, from a folder and from memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import Call, byte_level_tokenizer, hf_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ctlens.core.errors import CtlensError
from ctlens.core.types import device_named
from ctlens.models.hooks import run
from ctlens.models.loading import load_model
from ctlens.organism import load_organism

pytestmark = pytest.mark.boundary

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
QUANTISED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}
UNBRIDGED = {
    "gpt_neox": {"intermediate_size": 48, "attention_bias": False},
    "phi": {"intermediate_size": 48, "qk_layernorm": True},
    "cohere": {"intermediate_size": 48, "use_qk_norm": True},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
}


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(CtlensError) as error:
        load_model(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_weights_are_refused_by_the_name_of_their_method(method: str, hf_folder: Path) -> None:
    config = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTISED[method]}))
    assert f"{method} quantised" in refusal(hf_folder)
    hf = hf_model("llama")
    hf.config.quantization_config = QUANTISED[method]
    assert f"{method} quantised" in refusal(hf)


@pytest.mark.parametrize("kind", UNBRIDGED)
def test_a_layout_that_cannot_be_bridged_is_one_sentence_or_right(kind: str, tmp_path: Path) -> None:
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **UNBRIDGED[kind])).eval()
    hf.save_pretrained(tmp_path)
    for source in (hf, tmp_path):
        try:
            model = load_model(source)
        except CtlensError as error:
            assert type(hf).__name__ in str(error) and "\n" not in str(error)
        else:
            tokens = torch.arange(20).reshape(2, 10)
            hf.set_attn_implementation("eager")
            with torch.no_grad():
                torch.testing.assert_close(model(tokens), hf(tokens).logits, atol=1e-5, rtol=1e-4)


def test_an_adapter_beside_a_model_is_not_left_out(hf_folder: Path) -> None:
    (hf_folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "holds no adapter_model.safetensors" in refusal(hf_folder)


def test_a_model_with_an_adapter_in_memory_is_to_be_merged_first() -> None:
    class PeftModelForCausalLM(nn.Module):
        peft_config = {"default": None}

    assert "merge_and_unload" in refusal(PeftModelForCausalLM())


@pytest.mark.parametrize("source", [None, 3, {"config": 1}, nn.Linear(2, 2)], ids=lambda source: type(source).__name__)
def test_what_is_no_model_is_called_by_its_kind(source: Any) -> None:
    assert type(source).__name__ in refusal(source)


@pytest.mark.parametrize("content", ["a command", "tensors", "nothing"])
def test_weights_that_are_no_safetensors_are_refused_unread(content: str, hf_folder: Path) -> None:
    trace = hf_folder / "it_ran"
    next(hf_folder.glob("*.safetensors")).unlink()
    weights = hf_folder / "pytorch_model.bin"
    if content == "tensors":
        torch.save(hf_model("llama").state_dict(), weights)
    elif content == "a command":  # of the form whose reading runs it
        weights.write_bytes(b"cos\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR.")

    assert "holds no weights as safetensors" in refusal(hf_folder)
    assert not trace.exists()


@pytest.mark.parametrize("named", ["in the template", "an ordinary token"])
def test_a_token_without_an_embedding_is_named(named: str, hf_folder: Path) -> None:
    tokenizer = byte_level_tokenizer(chat=True)
    if named == "in the template":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
        tokenizer.chat_template = f"<|turn|>{tokenizer.chat_template}"
    else:
        tokenizer.add_tokens(["<|turn|>"])
    where = f"'<|turn|>' with number {len(tokenizer) - 1}, but the model has embeddings for {len(tokenizer) - 1} tokens"
    hf = hf_model("llama", vocab_size=len(tokenizer) - 1)
    assert where in refusal(hf, tokenizer=tokenizer)
    hf.save_pretrained(hf_folder)
    tokenizer.save_pretrained(hf_folder)
    assert where in refusal(hf_folder)
    hf.resize_token_embeddings(len(tokenizer))
    assert load_model(hf, tokenizer=tokenizer).tokenizer is tokenizer


def test_a_special_token_that_no_text_has_may_lack_an_embedding() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    model = load_model(hf_model("llama", vocab_size=len(tokenizer) - 1), tokenizer=tokenizer)
    with pytest.raises(CtlensError, match="'<image_soft_token>'.* leave it out"):
        run(model, torch.tensor([tokenizer("a <image_soft_token> in the text").input_ids]))


@pytest.mark.parametrize("name", ["cpuu", "meta", 3.5])
def test_a_device_that_is_not_here_is_refused_by_the_library_too(name: Any) -> None:
    with pytest.raises(CtlensError, match=f"^device {name} .*name cpu, cuda or mps"):
        device_named(name)
    with pytest.raises(CtlensError, match=f"^device ({name} |must be a text or a device, not {name})"):
        load_organism(device=name)


def test_the_automatic_device_is_an_accelerator_or_the_cpu(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    expected = torch.device("cpu")
    if torch.accelerator.is_available():
        expected = torch.accelerator.current_accelerator()
    assert device_named("auto") == expected
    assert next(load_organism(device="auto").parameters()).device.type == expected.type
    assert call("evaluate --device auto --n-prompts 2 --threats prefill").code == 0
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    assert device_named("auto") == torch.device("xpu")


def test_a_name_of_the_hub_is_answered_with_how_to_get_it(call: Call) -> None:
    ended = call("evaluate --model gpt2 --n-prompts 2")
    assert ended.code == 2 and "hf download NAME --local-dir FOLDER" in ended.err
