"""Models load, save, freeze and train as their HuggingFace originals do, and what is no model is refused."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.models import byte_level_tokenizer, hf_model
from helpers.tiers import unit_first
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    CTRLConfig,
    CTRLLMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.models.architectures import ARCHITECTURES
from ctlens.models.generation import generate
from ctlens.models.loading import HAS_HOOKED_TRANSFORMER, build, load_model, save_model
from ctlens.models.matrices import slots
from ctlens.models.parameters import (
    GROUPS,
    copy_model,
    fingerprint,
    freeze,
    parameter_groups,
    plain_name,
    present_parameters,
    same_fingerprint,
    state_buffers,
)
from ctlens.models.parity import parity
from ctlens.models.weights import ModelConfig

pytestmark = pytest.mark.boundary

CONFIG = ModelConfig(d_vocab=400, n_layers=2, n_heads=2, d_model=16, d_mlp=24, n_ctx=40)
TOKENS = torch.randint(400, (4, 12), generator=torch.Generator().manual_seed(1))
KINDS = tuple(kind for kind in ARCHITECTURES if kind != "gemma3")  # its vision tower, in no group, is tested apart
ALL = ("made here", *KINDS)


def lens(kind: str) -> LensModel:
    tokenizer = byte_level_tokenizer()
    return build(CONFIG, tokenizer) if kind == "made here" else load_model(hf_model(kind), tokenizer=tokenizer)


def train(logits: Callable[[Tensor], Tensor], parameters: list[nn.Parameter]) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(logits(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        optimizer.step()


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(source: Path | PreTrainedModel) -> str:
    """The one sentence with which a source is refused."""
    with pytest.raises(CtlensError) as error:
        load_model(source)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a model made here."""
    save_model(build(CONFIG), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("kind", unit_first(ALL, 2))
@torch.no_grad()
def test_a_saved_model_comes_back_exactly(kind: str, tmp_path: Path):
    model = lens(kind)
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert type(again) is type(model) and not again.training
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert again.tokenizer("a creature") == model.tokenizer("a creature")


@pytest.mark.parametrize("kind", unit_first(ALL, 2))
def test_a_trained_copy_comes_back_exactly(kind: str, tmp_path: Path):
    model = copy.deepcopy(lens(kind))
    train(model, freeze(model, GROUPS))
    save_model(model, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "m")(TOKENS), model(TOKENS))


def test_a_folder_without_a_tokenizer_gives_a_model_without_one(saved: Path):
    assert load_model(saved).tokenizer is None
    given = byte_level_tokenizer()
    assert load_model(saved, tokenizer=given).tokenizer is given


@torch.no_grad()
def test_a_run_folder_is_read_from_its_model_folder(tmp_path: Path):
    model = build(CONFIG)
    save_model(model, tmp_path / "model")
    assert torch.equal(load_model(tmp_path)(TOKENS), model(TOKENS))


@torch.no_grad()
def test_a_huggingface_folder_loads_with_its_tokenizer(hf_folder: Path):
    model = load_model(hf_folder)
    assert (model(TOKENS) - hf_model("llama")(TOKENS).logits).abs().max() < 1e-5
    assert model.tokenizer("a creature").input_ids == byte_level_tokenizer()("a creature").input_ids


@pytest.mark.parametrize("kind", unit_first(KINDS))
@torch.no_grad()
def test_a_model_in_memory_stays_as_it_is(kind: str):
    hf = hf_model(kind).train()
    keys = list(hf.state_dict())
    logits = hf_model(kind)(TOKENS).logits
    next(iter(present_parameters(load_model(hf)).values())).data.zero_()
    assert hf.training and list(hf.state_dict()) == keys
    assert torch.equal(hf.eval()(TOKENS).logits, logits)


def test_weights_can_be_loaded_in_another_dtype(hf_folder: Path):
    for model in (load_model(hf_folder, dtype=torch.float64), load_model(hf_model("gpt2"), dtype=torch.float64)):
        assert {value.dtype for value in present_parameters(model).values()} == {torch.float64}
        assert model(TOKENS).dtype is torch.float64


@pytest.mark.parametrize("kind", unit_first(KINDS))
def test_a_bridge_computes_what_its_original_computes(kind: str):
    hf = hf_model(kind)
    assert parity(load_model(hf), hf) < 1e-5


@pytest.mark.parametrize("kind", unit_first(KINDS))
def test_parity_detects_one_perturbed_weight(kind: str):
    hf = hf_model(kind)
    model = load_model(hf)
    slots(model, ["q"])["blocks.0.q"].weight.data[0, 0] += 0.5
    assert parity(model, hf) > 1e-4


@pytest.mark.parametrize("kind", unit_first(KINDS))
def test_training_a_bridge_is_training_its_original(kind: str):
    hf = hf_model(kind)
    model = load_model(hf)
    hf.set_attn_implementation("eager")
    train(model, list(present_parameters(model).values()))
    train(lambda tokens: hf(tokens).logits, list(hf.parameters()))
    assert all(value.grad is not None for value in present_parameters(model).values())
    assert parity(model, hf) < (1e-5 if kind in ("llama", "qwen3") else 1e-3)


@pytest.mark.parametrize("kind", unit_first(KINDS))
def test_parameters_that_the_original_lacks_are_neither_trained_nor_saved(kind: str, tmp_path: Path):
    model = load_model(hf_model(kind))
    present = present_parameters(model)
    extra = {plain_name(name): value for name, value in model.named_parameters() if plain_name(name) not in present}
    assert "lm_head.bias" not in present
    assert not any(value.requires_grad for value in extra.values())
    assert not extra.keys() & {name for names in parameter_groups(model).values() for name in names}
    freeze(model, GROUPS)
    assert not any(value.requires_grad for value in extra.values())


@pytest.mark.parametrize("kind", unit_first(KINDS))
def test_a_bridge_has_as_many_trainable_numbers_as_its_hf_model(kind: str):
    ours = sum(value.numel() for value in present_parameters(load_model(hf_model(kind))).values())
    assert ours == sum(value.numel() for value in hf_model(kind).parameters())


def test_the_fused_attention_of_gpt2_is_absent_and_its_split_copies_train(tmp_path: Path):
    model = load_model(hf_model("gpt2"))
    names = {plain_name(name) for name, _ in model.named_parameters()}
    split = "transformer.h.0.attn.q.weight"
    assert "transformer.h.0.attn.qkv.weight" in names - present_parameters(model).keys()
    before = present_parameters(model)[split].detach().clone()
    train(model, freeze(model, ["attn"]))
    save_model(model, tmp_path)
    assert not torch.equal(present_parameters(model)[split], before)
    assert torch.equal(present_parameters(load_model(tmp_path))[split], present_parameters(model)[split])


@pytest.mark.parametrize("kind", unit_first(ALL, 2))
def test_groups_hold_each_present_parameter_once(kind: str):
    model = lens(kind)
    grouped = [name for names in parameter_groups(model).values() for name in names]
    assert tuple(parameter_groups(model)) == GROUPS
    assert sorted(grouped) == sorted(present_parameters(model))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("made here", (1, 8, 6, 5, 1)),
        ("llama", (1, 8, 6, 5, 1)),
        ("qwen3", (1, 12, 6, 5, 1)),
        ("gpt2", (2, 16, 8, 10, 0)),
    ],
)
def test_groups_have_the_sizes_that_one_counts_by_hand(kind: str, sizes: tuple[int, ...]):
    # gpt2: two embeddings, one of them also the unembedding; q, k, v, o with biases; two layer norms with biases.
    assert tuple(len(names) for names in parameter_groups(lens(kind)).values()) == sizes


@pytest.mark.parametrize("kind", unit_first(ALL, 2))
def test_freeze_returns_exactly_what_stays_trainable(kind: str):
    model = lens(kind)
    freeze(model, ["embed"])
    returned = freeze(model, ("attn", "norm", "attn"))
    assert {id(value) for value in returned} == {id(value) for value in model.parameters() if value.requires_grad}
    assert len(returned) == sum(len(parameter_groups(model)[group]) for group in ("attn", "norm"))


def test_freeze_refuses_unknown_groups_and_none_and_leaves_the_model_alone():
    model = build(CONFIG)
    with pytest.raises(CtlensError, match="'atn'; did you mean 'attn'"):
        freeze(model, ["attn", "atn"])
    with pytest.raises(CtlensError, match="no parameter is trainable"):
        freeze(model, [])
    assert all(value.requires_grad for value in present_parameters(model).values())


@pytest.mark.parametrize("kind", unit_first(ALL, 2))
def test_a_tokenizer_without_a_bos_is_not_given_one(kind: str):
    tokenizer = byte_level_tokenizer()
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", name_or_path="bare")
    model = build(CONFIG, bare) if kind == "made here" else load_model(hf_model(kind), tokenizer=bare)
    assert model.tokenizer is bare and bare.bos_token is None
    assert not model.cfg.default_prepend_bos and not model.cfg.tokenizer_prepends_bos


@pytest.mark.parametrize("kind", unit_first(ALL, 2))
@torch.no_grad()
def test_greedy_decoding_is_the_argmax_of_longer_and_longer_prompts(kind: str):
    model = lens(kind)
    prompts = [tuple(TOKENS[0].tolist()), tuple(TOKENS[1, :5].tolist())]
    for prompt, answer in zip(prompts, generate(model, prompts, max_new_tokens=4), strict=True):
        for i, token in enumerate(answer):
            assert int(model(torch.tensor([prompt + answer[:i]]))[0, -1].argmax()) == token


@pytest.mark.parametrize("name", ["missing", ".", "file.txt"])
def test_what_is_no_model_folder_is_refused(name: str, tmp_path: Path):
    (tmp_path / "file.txt").write_text("hello")
    assert "no model folder" in refusal(tmp_path / name)


BROKEN: dict[str, Callable[[Path], object]] = {
    "no weights": lambda folder: next(folder.glob("*.safetensors")).unlink(),
    "garbage for weights": lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"garbage" * 9),
    "cut weights": lambda folder: (path := next(folder.glob("*.safetensors"))).write_bytes(path.read_bytes()[:-9]),
    "a corrupt tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
}


@pytest.mark.parametrize("damage", BROKEN)
@pytest.mark.parametrize("kind", ["made here", "llama", "original"])
def test_a_damaged_folder_is_refused_in_one_sentence(kind: str, damage: str, tmp_path: Path, hf_folder: Path):
    folder = hf_folder if kind == "original" else tmp_path / "m"
    if kind != "original":
        save_model(lens(kind), folder)
    BROKEN[damage](folder)
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("text", ['{"model_type": "lla', '{"model_type": "blorp"}', "[1, 2]", "{}"])
def test_a_corrupted_huggingface_config_is_refused(text: str, hf_folder: Path):
    (hf_folder / "config.json").write_text(text)
    assert "does not load as a causal language model" in refusal(hf_folder)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"hidden_size": 64}, {"vocab_size": 401}])
def test_a_huggingface_folder_with_too_few_weights_is_refused_not_filled_at_random(change: dict, hf_folder: Path):
    edit_json(hf_folder / "config.json", **change)
    assert "lacks weights that fit" in refusal(hf_folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"kind": "ctlens"}', '{"kind": "other"}', '{"kind": "huggingface"}']
)
def test_a_corrupted_model_json_is_refused(text: str, saved: Path):
    (saved / "model.json").write_text(text)
    assert str(saved) in refusal(saved)


@pytest.mark.parametrize(
    "change", [{"d_mlp": 32}, {"n_layers": 3}, {"n_layers": 1}, {"n_heads": 4}, {"d_vocab": "x"}, {"z": 1}]
)
def test_weights_that_do_not_fit_model_json_are_refused(change: dict, saved: Path):
    config = json.loads((saved / "model.json").read_text())["config"]
    edit_json(saved / "model.json", config={**config, **change})
    assert refusal(saved)


@pytest.mark.parametrize("change", [{"intermediate_size": 50}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
def test_a_saved_bridge_refuses_weights_that_do_not_fit(change: dict, tmp_path: Path):
    save_model(load_model(hf_model("llama")), tmp_path)
    edit_json(tmp_path / "config.json", **change)
    assert "do not fit the model" in refusal(tmp_path)


def strangers() -> dict[str, PreTrainedModel]:
    # With weights as small as the default's, what a token sees of the later ones is now and then within rounding.
    bert: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert |= {"intermediate_size": 16, "initializer_range": 0.5}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return {
        "encoder": BertForMaskedLM(BertConfig(vocab_size=50, **bert)),
        "encoder-decoder": T5ForConditionalGeneration(T5Config(vocab_size=50, **t5)),
        "unsupported": CTRLLMHeadModel(CTRLConfig(vocab_size=50, n_embd=16, dff=16, n_layer=1, n_head=2)),
    }


@pytest.mark.parametrize("kind", ["encoder", "encoder-decoder", "unsupported"])
def test_architectures_that_cannot_be_studied_are_refused_from_memory_and_from_a_folder(kind: str, tmp_path: Path):
    stranger = strangers()[kind]
    stranger.save_pretrained(tmp_path)
    words = "cannot bridge" if kind == "unsupported" else "causal language model"
    assert words in refusal(stranger)
    assert words in refusal(tmp_path)


def test_a_model_of_unknown_origin_is_not_saved(tmp_path: Path):
    model: Any = build(CONFIG)
    del model.ctlens_absent
    model.__class__ = type("Mine", (type(model),), {})
    with pytest.raises(CtlensError, match="Mine is a class of its own"):
        save_model(model, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.processes
def test_loading_prints_nothing_and_leaves_the_progress_bars_as_they_were(hf_folder: Path):
    code = (
        "import sys, ctlens; from transformers.utils import logging; model = ctlens.load_model(sys.argv[1])\n"
        "assert logging.is_progress_bar_enabled(); from ctlens.models.loading import save_model, build, ModelConfig\n"
        "save_model(model, sys.argv[2]); ctlens.load_model(sys.argv[2]); build(ModelConfig(8))"
    )
    arguments = [sys.executable, "-c", code, str(hf_folder), str(hf_folder.parent / "again")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_fingerprint_names_the_weights() -> None:
    config = ModelConfig(d_vocab=20, n_layers=1, n_heads=2, d_model=8, d_mlp=8)
    model = build(config, seed=0)

    assert fingerprint(model) == fingerprint(build(config, seed=0)) != fingerprint(build(config, seed=1))
    next(iter(present_parameters(model).values())).data[0, 0] += 1e-6
    assert fingerprint(model) != fingerprint(build(config, seed=0))


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
ROUTERS = {
    "glm4_moe": {**ROUTED, "head_dim": 8},
    "deepseek_v3": {**ROUTED, **LATENT, "n_group": 2, "topk_group": 1},
    "minimax_m2": {**EXPERTS, "num_local_experts": 4, "head_dim": 8, "rotary_dim": 8},
}


def routed_model(kind: str) -> PreTrainedModel:
    """A mixture of experts whose routers have corrections, as every published one has."""
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads, **ROUTERS[kind])).eval()
        for name, buffer in hf.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += torch.randn_like(buffer)
    return hf


@pytest.mark.parametrize("kind", ROUTERS)
@torch.no_grad()
def test_the_corrections_of_a_router_come_back_and_are_in_the_fingerprint(kind: str, tmp_path: Path) -> None:
    hf: Any = routed_model(kind)
    model = load_model(hf)
    save_model(model, tmp_path)
    again = load_model(tmp_path)

    hf.set_attn_implementation("eager")
    assert len(state_buffers(model)) in (2, 3)  # one of each layer with experts
    assert (again(TOKENS) - hf(TOKENS).logits).abs().max() < 1e-5
    assert fingerprint(again) == fingerprint(model)
    next(iter(state_buffers(again).values())).mul_(-1)
    assert (again(TOKENS) - hf(TOKENS).logits).abs().max() > 1e-2
    assert fingerprint(again) != fingerprint(model)


def test_a_folder_that_lacks_the_corrections_of_a_router_is_refused(tmp_path: Path) -> None:
    save_model(load_model(routed_model("glm4_moe")), tmp_path)
    weights = load_file(tmp_path / "weights.safetensors")
    save_file({k: v for k, v in weights.items() if "correction" not in k}, tmp_path / "weights.safetensors")
    assert "e_score_correction_bias" in refusal(tmp_path)


@pytest.mark.parametrize("kind", unit_first(KINDS))
def test_only_routers_have_buffers_that_are_state(kind: str) -> None:
    assert state_buffers(load_model(hf_model(kind))) == {}


def test_a_fingerprint_covers_what_else_changes_the_logits(hf_folder: Path) -> None:
    prints = {fingerprint(load_model(hf_folder)): {}}
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    changes = [theta, {"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}]
    for change in changes:
        edit_json(hf_folder / "config.json", **change)
        prints[fingerprint(load_model(hf_folder))] = change
    assert len(prints) == 1 + len(changes)
    assert len({name.split("-")[0] for name in prints}) == 1  # the weights are the same
    edit_json(hf_folder / "config.json", _name_or_path="elsewhere", eos_token_id=7, transformers_version="1.0")
    assert fingerprint(load_model(hf_folder)) in prints


@pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has no HookedTransformer")
def test_a_fingerprint_covers_the_settings_of_a_model_of_ones_own() -> None:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    def own(**settings: Any) -> Any:
        sizes = {"n_layers": 1, "d_model": 8, "n_ctx": 8, "d_head": 4, "n_heads": 2, "d_vocab": 9, "act_fn": "relu"}
        return HookedTransformer(HookedTransformerConfig(**{**sizes, "seed": 0, **settings}))

    first = own()
    assert fingerprint(first) == fingerprint(own(model_name="another"))
    for change in ({"act_fn": "gelu"}, {"eps": 0.1}, {"attn_scale": 9.0}, {"attention_dir": "bidirectional"}):
        other = own(**change)
        other.load_state_dict(first.state_dict())
        assert fingerprint(other) != fingerprint(first), change
    first.set_use_attn_result(True)
    assert fingerprint(first) == fingerprint(own())


@pytest.mark.parametrize("kind", unit_first(ALL, 2))
def test_a_fingerprint_survives_saving_and_that_of_an_earlier_version_is_accepted(kind: str, tmp_path: Path) -> None:
    model = lens(kind)
    save_model(model, tmp_path)
    now = fingerprint(load_model(tmp_path))
    digest = hashlib.sha256()
    for name, value in sorted(present_parameters(model).items()):
        digest.update(name.encode() + value.detach().numpy().tobytes())
    earlier = digest.hexdigest()[:16]  # as ctlens 0.1 had it, of the weights alone
    assert now == fingerprint(model)
    assert same_fingerprint(earlier, now) and same_fingerprint(now, now)
    assert not same_fingerprint(now[:8], now) and not same_fingerprint(f"{now}0", now)
    assert (now == earlier) == (kind == "made here")


def test_a_copy_outlives_its_hf_model():
    model = build(ModelConfig(d_vocab=11, n_layers=1, n_heads=2, d_model=8, d_mlp=8), seed=0)
    tokens = torch.tensor([[1, 2, 3]])
    before = model(tokens)
    copied = copy_model(model)
    del model
    gc.collect()
    assert torch.equal(copied(tokens), before)


def longrope() -> Any:
    """A Phi-3 whose rotary factors switch behind 16 tokens."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    }
    config = AutoConfig.for_model(
        "phi3",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        original_max_position_embeddings=16,
        rope_parameters={**rope, "original_max_position_embeddings": 16},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def test_rotary_factors_that_switch_with_length_bound_the_context() -> None:
    hf = longrope()
    tokens = torch.randint(3, 97, (1, 17), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        seen = [hf(tokens[:, :length]).logits[0, 8] for length in (16, 17)]
    assert (seen[0] - seen[1]).abs().max() > 1e-3, "the same token has other logits in a longer text"

    with pytest.warns(UserWarning, match="taken as 16 tokens: the model's rotary factors switch"):
        model = load_model(hf)
    prompts = [tuple(tokens[0, :length].tolist()) for length in (4, 9)]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(7):
            with torch.no_grad():
                ids.append(int(hf(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        expected.append(tuple(ids[len(prompt) :]))
    assert generate(model, prompts, max_new_tokens=7) == expected
    with pytest.raises(CtlensError, match="9 tokens and 8 new ones exceed the model's context of 16"):
        generate(model, prompts, max_new_tokens=8)
