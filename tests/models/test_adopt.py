"""A TransformerLens model that somebody brings is trained, saved, loaded and exported, or refused in the beginning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import byte_level_tokenizer, hf_model, odd_model
from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import ctlens as ct
from ctlens.core.errors import CtlensError, NotFinite
from ctlens.core.types import LensModel
from ctlens.models.adopt import adopt, tried_hooks
from ctlens.models.bridges import is_bridge
from ctlens.models.hooks import editing, resolve, run_capturing
from ctlens.models.loading import HAS_HOOKED_TRANSFORMER, load_model, save_model
from ctlens.models.parameters import copy_model, evaluating, fingerprint, present_parameters

pytestmark = pytest.mark.boundary
TOKENS = torch.arange(24).reshape(2, 12) + 5
SIZES: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 32,
    "n_ctx": 256,
    "d_head": 8,
    "d_mlp": 48,
    "d_vocab": 400,
    "seed": 0,
}
GPT: dict[str, Any] = {"act_fn": "gelu", "normalization_type": "LN"}
LLAMA: dict[str, Any] = {
    "act_fn": "silu",
    "gated_mlp": True,
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
}
LLAMA |= {"rotary_dim": 8, "n_heads": 4, "n_key_value_heads": 2}


def with_tokenizer(model: Any) -> LensModel:
    """Random norms and biases too, so that each of them counts."""
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    model.tokenizer = byte_level_tokenizer(chat=True)
    return model.eval()


def booted(kind: str, folder: Path) -> LensModel:
    """What `boot_transformers` gives, as somebody who knows nothing of ctlens gets it."""
    return booted_from(hf_model(kind), folder)


def booted_from(hf: PreTrainedModel, folder: Path) -> LensModel:
    hf.save_pretrained(folder)
    byte_level_tokenizer(chat=True).save_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu").eval()  # type: ignore[return-value]


def hooked(**settings: Any) -> LensModel:
    if not HAS_HOOKED_TRANSFORMER:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    return with_tokenizer(HookedTransformer(HookedTransformerConfig(**SIZES, **settings)))


def native() -> LensModel:
    return with_tokenizer(TransformerBridge.boot_native(TransformerBridgeConfig(**SIZES, **GPT)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS)


def trained(model: LensModel) -> ct.Run:
    pairs = ct.threats.get("sycophancy").pairs(4)
    return ct.train(model, pairs, ct.losses.get("act"), config=ct.TrainConfig(steps=1, lr=1e-2), progress=False)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_a_booted_bridge_trains_saves_loads_and_exports(kind: str, tmp_path: Path) -> None:
    model = booted(kind, tmp_path / "booted")
    before = logits(model)

    run = trained(model)
    run.save(tmp_path / "run")
    ct.export_huggingface(run.model, tmp_path / "hf")

    assert not torch.equal(logits(run.model), before) and torch.equal(logits(model), before)
    assert torch.equal(logits(ct.load_run(tmp_path / "run").model), logits(run.model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True, attn_implementation="eager")
    torch.testing.assert_close(plain.eval()(TOKENS).logits, logits(run.model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_booted_bridge_has_the_parameters_of_a_loaded_model(kind: str, tmp_path: Path) -> None:
    model = booted(kind, tmp_path)

    assert adopt(model) is model
    assert set(present_parameters(model)) == set(present_parameters(load_model(tmp_path)))


OWN: dict[str, Callable[[], LensModel]] = {
    "gpt": lambda: hooked(**GPT),
    "llama": lambda: hooked(**LLAMA, output_logits_soft_cap=2.0),
    "native": native,
}


@pytest.mark.parametrize("kind", OWN)
def test_a_model_of_ones_own_comes_back_with_equal_logits(kind: str, tmp_path: Path) -> None:
    model = OWN[kind]()
    run = trained(model)
    run.save(tmp_path / "run")

    loaded = ct.load_run(tmp_path / "run").model

    assert type(loaded) is type(model) and loaded.tokenizer is not None
    assert fingerprint(loaded) == fingerprint(run.model) != fingerprint(model)
    assert torch.equal(logits(loaded), logits(run.model))
    with pytest.raises(CtlensError, match="cannot be exported"):
        ct.export_huggingface(run.model, tmp_path / "hf")


def test_a_fingerprint_names_the_settings_too() -> None:
    capped = hooked(**LLAMA, output_logits_soft_cap=2.0)
    free = hooked(**LLAMA)

    assert fingerprint(capped).partition("-")[0] == fingerprint(free).partition("-")[0]
    assert fingerprint(adopt(capped)) != fingerprint(adopt(free))


def test_a_model_in_memory_is_copied() -> None:
    model = native()

    copied = load_model(model, dtype="float64")

    assert next(copied.parameters()).dtype == torch.float64 and next(model.parameters()).dtype == torch.float32
    torch.testing.assert_close(logits(copied).float(), logits(model), atol=1e-5, rtol=1e-5)


def test_a_hooked_transformer_is_not_loaded_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(hooked(**GPT), tmp_path)
    monkeypatch.setattr("ctlens.models.loading.HAS_HOOKED_TRANSFORMER", False)

    with pytest.raises(CtlensError, match="transformer-lens<4"):
        load_model(tmp_path)


def processed(**options: bool) -> LensModel:
    model: Any = hooked(**GPT)
    settings = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False}
    model.process_weights_(**{**settings, **options})
    return model


def compatible(folder: Path) -> LensModel:
    model: Any = booted("gpt2", folder)
    model.enable_compatibility_mode(no_processing=True)
    return model


def unscaled(folder: Path) -> LensModel:
    """A GPT-2 whose scores are not divided by the root of the heads' size; TransformerLens divides them."""
    hf = hf_model("gpt2")
    config = GPT2Config(**{**hf.config.to_dict(), "scale_attn_weights": False})
    again = GPT2LMHeadModel(config).eval()
    again.load_state_dict(hf.state_dict())
    return booted_from(again, folder)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folded": (lambda _: processed(fold_ln=True), "norms are folded"),
    "centred": (lambda _: processed(center_writing_weights=True), "weights are centred"),
    "compatibility": (compatible, "compatibility mode"),
    "unscaled": (unscaled, "does not compute what HuggingFace computes for GPT2LMHeadModel"),
    "huggingface": (
        lambda _: hf_model("llama"),
        "TransformerLens model( or a Recording)?(, not a LlamaForCausalLM|: pass it to ctlens.load_model)",
    ),
    "text": (lambda _: "gpt2", "model.* (not|this is) 'gpt2'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_studied_is_refused_by_everything_that_takes_a_model(kind: str, tmp_path: Path) -> None:
    make, words = REFUSED[kind]
    model = make(tmp_path)
    pairs = ct.threats.get("sycophancy").pairs(4)

    for work in (
        lambda: adopt(model),
        lambda: trained(model),
        lambda: ct.evaluate(model, pairs=pairs, progress=False),
        lambda: ct.analysis.states(model, pairs, progress=False),
        lambda: save_model(model, tmp_path / "saved"),
    ):
        with pytest.raises(CtlensError, match=words):
            work()


def test_folding_after_adoption_is_seen() -> None:
    model: Any = hooked(**GPT)
    adopt(model).process_weights_(fold_ln=True)  # type: ignore[attr-defined]

    with pytest.raises(CtlensError, match="norms are folded"):
        adopt(model)


def test_a_model_that_was_refused_once_is_refused_again(tmp_path: Path) -> None:
    model: Any = booted("llama", tmp_path)
    next(model.parameters()).data.fill_(torch.nan)

    for _ in range(2):
        with pytest.raises(NotFinite, match="is not finite"):
            adopt(model)


def test_a_bias_that_the_architecture_lacks_is_refused(tmp_path: Path) -> None:
    model: Any = booted("llama", tmp_path)
    bias = model.unembed.original_component.bias
    if not isinstance(bias, nn.Parameter):
        pytest.skip("TransformerLens 4 adds no parameter")
    bias.data[3] = 1.0

    with pytest.raises(CtlensError, match="unembedding has a bias, which LlamaForCausalLM has not"):
        adopt(model)


def test_a_model_without_a_tokenizer_is_refused_where_text_is_read() -> None:
    model: Any = native()
    model.tokenizer = None

    assert adopt(model) is model
    with pytest.raises(CtlensError, match="no tokenizer"):
        trained(model)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mixtral", {"blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"}),
        ("qwen3_moe", {"blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"}),
        ("deepseek_v3", {"blocks.0.attn.hook_z", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"}),
        ("opt", {"blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid"}),
        ("granite", set()),
        ("phi", set()),
    ],
)
def test_the_hooks_that_are_not_what_their_names_say(kind: str, expected: set[str]) -> None:
    trial = tried_hooks(load_model(odd_model(kind)))

    assert set(trial.odd) == expected
    assert set(trial.read_only) == (
        {f"blocks.{layer}.attn.hook_pattern" for layer in range(2)} if kind == "opt" else set()
    )


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "olmo2", "phi3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_hook_of_a_checked_architecture_is_refused(kind: str, dtype: str) -> None:
    if (kind, dtype) == ("olmo2", "bfloat16"):  # a bridge does not run it
        with pytest.raises(CtlensError, match="cannot bridge Olmo2ForCausalLM in bfloat16"):
            load_model(hf_model(kind), dtype=dtype)
        return
    trial = tried_hooks(load_model(hf_model(kind), dtype=dtype))

    assert not trial.odd and not trial.read_only


def test_a_hook_is_refused_by_itself_and_others_go_on() -> None:
    model = load_model(odd_model("deepseek_v3"))

    with pytest.raises(CtlensError, match="blocks.1.mlp.hook_post is not what its name says.*experts.*name mlp_out"):
        resolve(model, "mlp_post")
    with pytest.raises(CtlensError, match="8 heads where the attention has 4"):
        run_capturing(model, TOKENS, ["blocks.0.attn.hook_z"], grad=False)
    assert resolve(model, "mlp_post", 0) == ["blocks.0.mlp.hook_post"]  # the first layer has no experts
    _, found = run_capturing(model, TOKENS, resolve(model, "pattern"), grad=False)
    assert all(pattern.shape == (2, 4, 12, 12) for pattern in found.values())


def test_a_pattern_that_no_head_reads_can_be_read_and_not_edited() -> None:
    model = load_model(odd_model("gpt_neo"))
    name = resolve(model, "pattern", 0)[0]
    _, found = run_capturing(model, TOKENS, [name], grad=False)

    torch.testing.assert_close(found[name].sum(-1), torch.ones(2, 4, 12))
    with (
        pytest.raises(CtlensError, match="can be read on this model, and not edited"),
        editing(model, {name: torch.zeros_like}),
    ):
        model(TOKENS)


def test_the_names_of_a_hooked_transformer_are_believed() -> None:
    model = hooked(**GPT)

    assert not is_bridge(model) and not hasattr(adopt(model), "ctlens_trial")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_evaluating_gives_every_module_its_own_mode_back(kind: str, tmp_path: Path) -> None:
    model: Any = booted(kind, tmp_path)
    modules = [*model.modules(), *model.original_model.modules()]
    model.train()
    model.blocks[0].eval()
    before = [module.training for module in modules]
    with evaluating(model):
        assert not any(module.training for module in modules)
    assert [module.training for module in modules] == before


def test_a_copy_draws_no_number_from_the_callers_generator(tmp_path: Path) -> None:
    model: Any = booted("gpt2", tmp_path)  # with dropout
    model.train()
    before = torch.get_rng_state()
    copy_model(model)
    assert torch.equal(torch.get_rng_state(), before) and model.training
