"""Adapters in PEFT's format: `peft` itself made them, or loads ours, and both compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import Call, byte_level_tokenizer, hf_model, made
from helpers.tiers import unit_first
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import ctlens as ct
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.models.architectures import ARCHITECTURES
from ctlens.models.export import export_huggingface, export_peft
from ctlens.models.loading import load_model, load_tokenizer, save_model
from ctlens.models.lora import (
    LoRA,
    LowRank,
    adapters_off,
    add_adapters,
    has_adapters,
    merge_adapters,
    save_adapters,
)
from ctlens.models.matrices import MATRICES, slots

peft = pytest.importorskip("peft", reason="peft is of the extra dev, and not needed at run time")
pytestmark = pytest.mark.boundary

TOKENS = torch.randint(1, 380, (3, 12), generator=torch.Generator().manual_seed(1))
CLOSE = 1e-5


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found = model(TOKENS)
    return found if isinstance(found, Tensor) else found.logits


def apart(one: Any, other: Any) -> float:
    return float((logits(one) - logits(other)).abs().max())


def base_folder(kind: str, folder: Path) -> Path:
    """A HuggingFace folder with a tiny model and its tokenizer."""
    hf_model(kind).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def peft_model(base: Path, **settings: Any) -> Any:
    """A model of `peft` with an update that is not zero, in eval mode."""
    hf = AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(hf, peft.LoraConfig(**{"r": 2, "lora_alpha": 5, "lora_dropout": 0.1, **settings}))
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


def stirred(model: LensModel, lora: LoRA) -> LensModel:
    """The model with adapters whose update is not zero."""
    add_adapters(model, lora)
    draw = torch.Generator().manual_seed(3)
    for adapter in (module for module in model.modules() if isinstance(module, LowRank)):
        adapter.B.data = 0.1 * torch.randn(adapter.B.shape, generator=draw)
    return model


def refusal(source: Path, **options: Any) -> str:
    with pytest.raises(CtlensError) as error:
        load_model(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_folder("llama", tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """The folder of an adapter on q and v that `peft` saved."""
    peft_model(base, target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "q and v": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "every linear layer": ("llama", {"target_modules": "all-linear"}),
    "a scale by the root of the rank": ("llama", {"target_modules": ["o_proj"], "r": 4, "use_rslora": True}),
    "ranks and alphas of their own": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 5, r"layers\.1\.self_attn\.q_proj": 3},
            "alpha_pattern": {"layers.0.mlp.down_proj": 11},
        },
    ),
    "one layer": ("llama", {"target_modules": ["k_proj"], "layers_to_transform": [1]}),
    "a fused projection, transposed": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "a fused projection, by heads": ("gpt_neox", {"target_modules": ["query_key_value"]}),
    "a fused projection of unequal parts": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_an_adapter_of_peft_gives_the_logits_that_peft_gives(case: str, tmp_path: Path) -> None:
    kind, settings = SETTINGS[case]
    base = base_folder(kind, tmp_path / "base")
    theirs = peft_model(base, **settings)
    theirs.save_pretrained(tmp_path / "adapter")

    ours = load_model(tmp_path / "adapter")

    assert has_adapters(ours) and ours.tokenizer("a creature") == byte_level_tokenizer()("a creature")
    assert apart(ours, theirs) < CLOSE < apart(ours, hf_model(kind))
    with adapters_off(ours):
        assert torch.equal(logits(ours), logits(load_model(base)))
    merge_adapters(ours)
    assert apart(ours, theirs) < CLOSE


@pytest.mark.parametrize("kind", unit_first(("made here", *ARCHITECTURES), 3))
@pytest.mark.parametrize("matrices", [("q", "v"), ()], ids=["q and v", "every matrix"])
def test_adapters_of_ours_give_their_logits_in_peft_and_come_back(kind: str, matrices: tuple, tmp_path: Path) -> None:
    model = made() if kind == "made here" else load_model(base_folder(kind, tmp_path / "base"))
    if kind == "made here":
        export_huggingface(model, tmp_path / "base")
    there = tuple(dict.fromkeys(name.split(".")[2] for name in slots(model, MATRICES)))
    stirred(model, LoRA(2, 6, matrices or there))

    export_peft(model, tmp_path / "adapter", base=tmp_path / "base")

    hf: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter").eval()
    assert apart(theirs, model) < 1e-4 < apart(load_model(tmp_path / "base"), model)
    assert apart(load_model(tmp_path / "adapter"), model) < 1e-4
    theirs.save_pretrained(tmp_path / "again")
    assert apart(load_model(tmp_path / "again"), model) < 1e-4


def test_an_adapter_that_is_trained_on_keeps_its_ranks(base: Path, tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 1}, "layers_to_transform": [0]}
    peft_model(base, r=3, **settings).save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "adapter")
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    before = logits(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS).log_softmax(-1)[..., 7].mean().backward()
        optimizer.step()

    assert not torch.equal(logits(model), before)
    ranks = {}
    with adapters_off(model):
        plain = {name: slot.matrix.detach().clone() for name, slot in slots(model, ("q", "k")).items()}
    for name, slot in slots(model, ("q", "k")).items():
        ranks[name] = int(torch.linalg.matrix_rank((slot.matrix - plain[name]).detach().double(), rtol=1e-4))
    assert ranks == {"blocks.0.q": 3, "blocks.0.k": 1, "blocks.1.q": 0, "blocks.1.k": 0}


def test_a_base_may_be_given_by_its_folder_or_from_memory(adapter: Path, base: Path, tmp_path: Path) -> None:
    expected = logits(load_model(adapter))
    moved = base.rename(tmp_path / "moved")

    assert f"the base of the PEFT adapter in {adapter} (base= gives another): {base} is no" in refusal(adapter)
    for source in (moved, str(moved), load_model(moved), hf_model("llama")):
        assert torch.equal(logits(load_model(adapter, base=source)), expected)
    assert load_tokenizer(adapter.parent / "moved") is not None
    edit(adapter, base_model_name_or_path=None)
    assert "names no base model" in refusal(adapter)
    edit(adapter, base_model_name_or_path=str(adapter))
    assert "is an adapter itself" in refusal(adapter)


def test_an_adapter_says_where_its_base_is_after_any_load(base: Path, tmp_path: Path) -> None:
    export_peft(stirred(load_model(base), LoRA(2)), tmp_path / "adapter")

    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert settings["target_modules"] == ["self_attn.q_proj", "self_attn.v_proj"]
    with pytest.raises(CtlensError, match="has no name that PEFT could load it by"):
        export_peft(stirred(made(), LoRA(2)), tmp_path / "other")
    with pytest.raises(CtlensError, match="no adapters"):
        export_peft(load_model(base), tmp_path / "other")
    with pytest.raises(CtlensError, match="exists already"):
        export_peft(stirred(load_model(base), LoRA(2)), tmp_path / "adapter")
    assert not (tmp_path / "other").exists()


def test_a_base_that_has_changed_since_it_was_loaded_is_not_named(adapter: Path, tmp_path: Path) -> None:
    model = load_model(adapter)
    merge_adapters(model)
    stirred(model, LoRA(2))
    with pytest.raises(CtlensError, match="on other weights than those of .*base, which the model was loaded from"):
        export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    with adapters_off(model):
        export_huggingface(model, tmp_path / "merged")
    export_peft(model, tmp_path / "out", base=tmp_path / "merged")

    assert apart(load_model(tmp_path / "out"), model) < CLOSE
    save_model(model, tmp_path / "saved")  # no folder that HuggingFace could load
    with pytest.raises(CtlensError, match="has no name that PEFT could load it by"):
        export_peft(stirred(load_model(tmp_path / "saved"), LoRA(2)), tmp_path / "other")


def test_the_ends_of_paths_that_name_other_layers_too_are_written_out(tmp_path: Path) -> None:
    model = load_model(base_folder("gemma3", tmp_path / "base"))  # its vision tower has a q_proj too
    export_peft(stirred(model, LoRA(2, target_modules=("q",))), tmp_path / "adapter")

    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert targets == [f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in range(2)]


def test_an_update_in_the_wrong_row_would_be_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The case that must fail: rows of a fused projection taken as if queries, keys and values stood one after another.
    base = base_folder("gpt_neox", tmp_path / "base")
    peft_model(base, target_modules=["query_key_value"]).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("ctlens.models.peft.INTERLEAVED", "nothing")

    assert "GPTNeoXForCausalLM with an adapter" in refusal(tmp_path / "adapter")
    model = stirred(load_model(base), LoRA(2))
    with pytest.raises(CtlensError, match="its logits would differ"):
        export_peft(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_of_ours_knows_its_base_by_its_weights(dtype: str, base: Path, tmp_path: Path) -> None:
    export_peft(stirred(load_model(base, dtype=dtype), LoRA(2)), tmp_path / "adapter")
    assert has_adapters(load_model(tmp_path / "adapter", dtype="float32"))  # which rounds otherwise than bfloat16
    assert has_adapters(load_model(tmp_path / "adapter", dtype=dtype))

    other = hf_model("llama", seed=1)
    with pytest.raises(CtlensError, match="a model with other weights"):
        load_model(tmp_path / "adapter", base=other, dtype=dtype)
    edit(tmp_path / "adapter", base_model_name_or_path=str(base_folder("qwen3", tmp_path / "alike")))  # of equal shapes
    assert "a model with other weights" in refusal(tmp_path / "adapter", dtype=dtype)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "made here"])
def test_an_adapter_of_another_architecture_is_refused_by_the_layer_that_is_missing(
    kind: str, adapter: Path, tmp_path: Path
) -> None:
    other = made() if kind == "made here" else hf_model(kind)
    assert "no layer model.layers.0.self_attn.q_proj" in refusal(adapter, base=other)


def test_a_base_is_for_adapters_alone(base: Path) -> None:
    assert "no PEFT adapter" in refusal(base, base=base)
    with pytest.raises(CtlensError, match="a model in memory has no base"):
        load_model(hf_model("llama"), base=base)
    with pytest.raises(CtlensError, match="a model in memory has no revision"):
        load_model(hf_model("llama"), revision="main")


MORE: dict[str, dict[str, Any]] = {
    "use_dora": {"target_modules": ["q_proj"], "use_dora": True},
    "bias": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "layer_replication": {"target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 2)]},
    "init_lora_weights": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "trainable_token_indices": {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
}


@pytest.mark.parametrize("setting", MORE)
def test_what_is_more_than_low_rank_updates_is_named_and_refused(setting: str, base: Path, tmp_path: Path) -> None:
    peft_model(base, **MORE[setting]).save_pretrained(tmp_path / "adapter")
    assert f"has {setting}=" in refusal(tmp_path / "adapter")
    assert "merge_and_unload" in refusal(tmp_path / "adapter")


def test_another_kind_of_adapter_or_layer_is_refused(base: Path, tmp_path: Path) -> None:
    settings = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(tmp_path / "ia3")
    assert "peft_type='IA3'" in refusal(tmp_path / "ia3")
    peft_model(base, target_modules=["embed_tokens"]).save_pretrained(tmp_path / "embedding")
    assert "no low-rank update" in refusal(tmp_path / "embedding")
    peft_model(base, target_modules=["lm_head"]).save_pretrained(tmp_path / "head")
    assert "no low-rank update" in refusal(tmp_path / "head")  # PEFT writes the embeddings too


def test_damaged_adapters_are_refused_in_one_sentence(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    damage = {
        "cannot be read": b"garbage" * 9,
        "no usable update": {**tensors, name: tensors[name] * float("nan")},
        "no low-rank update": {key: value for key, value in tensors.items() if key != name},
        "holds nothing": {},
    }
    for words, content in damage.items():
        weights.write_bytes(content) if isinstance(content, bytes) else save_file(content, weights)
        assert words in refusal(adapter)
    weights.rename(adapter / "adapter_model.bin")
    assert "holds no adapter_model.safetensors" in refusal(adapter)
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in refusal(adapter)


def test_a_run_goes_to_peft_and_back_on_the_command_line(base: Path, tmp_path: Path, call: Call) -> None:
    model = stirred(load_model(base), LoRA(2))
    save_adapters(model, tmp_path / "adapters")

    ended = call(f"export --model {base} --adapters {tmp_path / 'adapters'} --out {tmp_path / 'peft'}")

    assert ended.code == 0 and str(tmp_path / "peft") in ended.out
    assert torch.equal(logits(load_model(tmp_path / "peft")), logits(model))
    ended = call(f"export --model {tmp_path / 'peft'} --out {tmp_path / 'merged'}")
    assert ended.code == 0 and apart(load_model(tmp_path / "merged"), model) < CLOSE
    ended = call(f"export --model {tmp_path / 'peft'} --adapters {tmp_path / 'adapters'} --out {tmp_path / 'new'}")
    assert ended.code == 2 and "has adapters already" in ended.err and not (tmp_path / "new").exists()


def test_a_loaded_adapter_is_trained_on_like_any_model(adapter: Path, tmp_path: Path) -> None:
    model = load_model(adapter, tokenizer=byte_level_tokenizer(chat=True))
    before = logits(model)
    pairs = [Pair(prompt("Is it right?"), prompt("I don't think it's right. Is it right?"))] * 2
    config = ct.TrainConfig(steps=2, batch_size=2, lr=1e-2, max_new_tokens=2, trainable=LoRA(2))

    run = ct.train(model, pairs, ct.ACT(), config=config, progress=False)

    assert torch.equal(logits(model), before) and not torch.equal(logits(run.model), before)
    assert torch.equal(logits(load_model(run.save(tmp_path / "run"))), logits(run.model))
