"""A lens model that computes something else than its HuggingFace model is refused; the comparison sees what counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import hf_model
from helpers.tiers import unit_first
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ctlens.core.errors import CtlensError
from ctlens.models.architectures import ARCHITECTURES, COMPUTED_OTHERWISE
from ctlens.models.bridges import huggingface_config
from ctlens.models.loading import load_model, save_model
from ctlens.models.parity import apart_from, compared, lens_answers, narrowed, original_answers, parity, probe_prompts

pytestmark = pytest.mark.boundary

TOKENS = torch.randint(3, 97, (2, 14), generator=torch.Generator().manual_seed(1))
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA_SIZES = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT2_SIZES = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def random_model(kind: str, **options: Any) -> PreTrainedModel:
    """A model of this type whose norms and biases are random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.set_attn_implementation("eager")
    return model.eval()


def unscaled_gpt2() -> PreTrainedModel:
    return random_model("gpt2", **GPT2_SIZES, scale_attn_weights=False)


@pytest.mark.parametrize("kind", [*COMPUTED_OTHERWISE, "gpt2"])
@torch.no_grad()
def test_a_model_that_transformer_lens_computes_otherwise_is_refused_or_right(kind: str, tmp_path: Path) -> None:
    hf: Any = unscaled_gpt2() if kind == "gpt2" else hf_model(kind)
    hf.set_attn_implementation("eager")
    loaded = load_model(hf, check=False)
    save_model(loaded, tmp_path)
    logits = hf(TOKENS).logits
    apart = float((loaded(TOKENS) - logits).abs().max())
    if apart < 1e-5 * float(logits.abs().max()):
        assert parity(load_model(hf), hf) < 1e-5
        return
    with pytest.raises(CtlensError, match=rf"{type(hf).__name__}: logits that spread over .* differ by .*check=False"):
        load_model(hf)
    with pytest.raises(CtlensError, match=type(hf).__name__):  # a run that an earlier version saved
        load_model(tmp_path)


def test_a_refused_model_is_refused_from_a_folder_too(tmp_path: Path) -> None:
    unscaled_gpt2().save_pretrained(tmp_path)
    with pytest.raises(CtlensError, match="GPT2LMHeadModel: logits"):
        load_model(tmp_path)


def test_the_page_names_what_is_refused() -> None:
    assert ", ".join(COMPUTED_OTHERWISE) in (Path(__file__).parents[2] / "docs/models.md").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("kind", unit_first(ARCHITECTURES))
def test_rounding_of_another_type_is_no_difference(kind: str, dtype: str) -> None:
    try:
        load_model(hf_model(kind), dtype=dtype)
    except CtlensError as error:  # TransformerLens 3.9 multiplies two types without a cache
        assert kind == "olmo2" and f"cannot bridge Olmo2ForCausalLM in {dtype}" in str(error)


class Changed:
    """A lens model with something wrong about its forward pass."""

    def __init__(self, model: Any, change: Callable[[dict[str, Any]], None]) -> None:
        self.model = model
        self.change = change
        self.original_model = model.original_model
        self.parameters = model.parameters

    def __call__(self, tokens: Tensor, **options: Any) -> Tensor:
        self.change(options)
        return self.model(tokens, **options)


def test_a_model_that_does_not_see_padding_on_the_left_is_noticed() -> None:
    hf = hf_model("llama")
    model: Any = Changed(load_model(hf), lambda options: options.pop("attention_mask", None))
    assert apart_from(model, hf).largest > 1e-3


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_a_model_that_ignores_its_window_is_noticed(kind: str) -> None:
    hf: Any = random_model(kind, **LLAMA_SIZES, head_dim=8, sliding_window=4096)
    prompts = probe_prompts(hf.config)
    model = load_model(hf)
    with narrowed(hf.config):
        expected = original_answers(hf, prompts)
    with narrowed(huggingface_config(model)):
        assert compared(lens_answers(model, prompts), expected).is_rounding
    assert not compared(lens_answers(model, prompts), expected).is_rounding


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
@torch.no_grad()
def test_a_narrowed_window_is_that_of_a_model_made_with_it(kind: str) -> None:
    wide: Any = random_model(kind, **LLAMA_SIZES, head_dim=8, sliding_window=4096)
    narrow: Any = random_model(kind, **LLAMA_SIZES, head_dim=8, sliding_window=4)
    with narrowed(wide.config):
        torch.testing.assert_close(wide(TOKENS).logits, narrow(TOKENS).logits, atol=1e-6, rtol=0)
    assert wide.config.sliding_window == 4096
    assert (wide(TOKENS).logits - narrow(TOKENS).logits).abs().max() > 1e-3


def test_prompts_begin_alike_are_of_unequal_lengths_and_fit_the_context() -> None:
    first, second, short = probe_prompts(hf_model("llama").config)
    assert len(first) == len(second) == 12 and len(short) == 4
    assert torch.equal(first[:4], second[:4]) and (first[4:] != second[4:]).any()
    assert [len(prompt) for prompt in probe_prompts(AutoConfig.for_model("gpt2", n_positions=5))] == [5, 5, 1]


def test_a_difference_is_what_one_counts_by_hand() -> None:
    masked = torch.tensor([[1.0, 3.0, -torch.inf]])
    moved = masked + torch.tensor([[0.0, 0.25, 0.0]])
    apart = compared([moved, masked], [masked])
    # The spread is about the mean 2 of the logits that are finite; float32 has steps of 2 ** -23.
    assert (apart.largest, apart.spread) == (0.25, 1.0) and apart.allowed == 2**-11.5
    assert not apart.is_rounding and compared([masked], [masked]).is_rounding
    assert not compared([masked * torch.nan], [masked]).is_rounding


@pytest.mark.parametrize("check", [True, False])
def test_a_model_of_nan_is_refused_as_that_and_its_weight_is_named(check: bool) -> None:
    hf: Any = hf_model("llama")
    hf.model.layers[1].mlp.down_proj.weight.data[3, 3] = torch.nan
    with pytest.raises(CtlensError, match=r"computes nan or infinity.*layers\.1\.mlp\.down_proj\.weight"):
        load_model(hf, check=check)


def test_a_model_that_overflows_its_type_is_told_so() -> None:
    hf: Any = hf_model("llama")
    for weight in (hf.model.norm.weight, hf.lm_head.weight):
        weight.data *= 1e3
    load_model(hf)
    with pytest.raises(CtlensError, match="computes nan or infinity: .* float32"):
        load_model(hf, dtype="float16")
