"""Export to HuggingFace: an original's weights come back, whatever was fused, and trained ones compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import Call, byte_level_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctlens.core.errors import CtlensError
from ctlens.models import export as huggingface
from ctlens.models import twins
from ctlens.models.architectures import ARCHITECTURES, tiny_model
from ctlens.models.export import export_huggingface, to_huggingface
from ctlens.models.loading import build, load_model, save_model
from ctlens.models.lora import LoRA, add_adapters
from ctlens.models.matrices import slots
from ctlens.models.parity import parity
from ctlens.models.weights import ModelConfig
from ctlens.organism import load_organism

pytestmark = pytest.mark.boundary

TOKENS = torch.randint(1, 380, (3, 12), generator=torch.Generator().manual_seed(1))


def logits(folder: Path, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        return model.eval()(tokens).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_was_loaded_comes_back_to_the_last_bit(architecture: str) -> None:
    original = tiny_model(architecture)
    again = to_huggingface(load_model(original))
    assert type(again) is type(original)
    expected, found = original.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "phi3"])
def test_a_fused_matrix_takes_each_part_to_its_own_place(architecture: str, tmp_path: Path) -> None:
    model = load_model(tiny_model(architecture), tokenizer=byte_level_tokenizer())
    for part, factor in {"q": 1.5, "k": -1.0, "v": 0.5}.items():
        slots(model, [part])[f"blocks.0.{part}"].weight.data.mul_(factor)

    export_huggingface(model, tmp_path / "out")

    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out"), model(TOKENS), atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == byte_level_tokenizer().get_vocab()


def test_an_organism_becomes_a_llama(tmp_path: Path) -> None:
    model = load_organism()
    export_huggingface(model, tmp_path / "out")
    tokens = torch.randint(5, 700, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out", tokens), model(tokens), atol=2e-4, rtol=1e-4)
    again = load_model(tmp_path / "out")
    assert again.tokenizer.chat_template == model.tokenizer.chat_template


def test_rotary_pairs_would_be_wrong_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    # The case that must fail: heads laid out as they are here, without moving the halves of rotary pairs apart.
    plain = "head d_model (half two) -> (head half two) d_model"
    layouts = {
        **huggingface.LLAMA_LAYOUT,
        "attn.W_Q": ("self_attn.q_proj", plain),
        "attn.W_K": ("self_attn.k_proj", plain),
    }
    monkeypatch.setattr(huggingface, "LLAMA_LAYOUT", layouts)
    with pytest.raises(CtlensError, match="cannot be exported: its logits would differ"):
        to_huggingface(load_organism())


def test_adapters_are_merged_in_what_is_written_and_stay_on_the_model(tmp_path: Path) -> None:
    model = load_model(tiny_model("gpt2"))
    added = add_adapters(model, LoRA(2, target_modules=("q", "v", "mlp_out")))
    for value in added:
        value.data += 0.2
    export_huggingface(model, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out"), model(TOKENS), atol=2e-5, rtol=1e-4)
    assert len(added) == 12 and all(value.requires_grad for value in added)


def test_generation_settings_survive_a_run_folder_and_the_export(tmp_path: Path) -> None:
    original: Any = tiny_model("llama")
    original.generation_config.eos_token_id = [1, 7]
    original.save_pretrained(tmp_path / "hf")
    save_model(load_model(tmp_path / "hf"), tmp_path / "ours")
    export_huggingface(load_model(tmp_path / "ours"), tmp_path / "out")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.generation_config.eos_token_id == [1, 7]


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    export_huggingface(load_model(tiny_model("qwen3"), dtype=torch.bfloat16), tmp_path / "out")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}


def test_an_unknown_layout_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "SPLIT_LAYERS", {})
    with pytest.raises(CtlensError, match="do not fit"):
        export_huggingface(load_model(tiny_model("gpt2")), tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(twins, "INTERLEAVED", "nothing")
    with pytest.raises(CtlensError, match="logits would differ"):
        export_huggingface(load_model(tiny_model("gpt_neox")), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_parity_sees_one_weight() -> None:
    original = tiny_model("olmo2")
    model = load_model(original)
    assert parity(model, original) < 1e-5
    next(iter(original.get_output_embeddings().parameters())).data[3, 2] += 1.0
    assert parity(model, original) > 1e-3


def test_the_command_exports_a_run(call: Call, tmp_path: Path) -> None:
    small = ModelConfig(d_vocab=400, n_layers=1, n_heads=2, d_model=16, d_mlp=16)
    model = build(small, byte_level_tokenizer())
    save_model(model, tmp_path / "run" / "model")
    ended = call(f"export --model {tmp_path}/run --out {tmp_path}/out")
    assert (ended.code, ended.err) == (0, "") and f"{tmp_path}/out" in ended.out
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out"), model(TOKENS), atol=1e-5, rtol=1e-5)
    again = call(f"export --model {tmp_path}/run --out {tmp_path}/out")
    assert again.code == 2 and "exists already" in again.err
