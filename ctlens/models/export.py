"""Export: a lens model becomes a folder that `transformers` loads, and its logits are compared before it is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from ctlens.core.errors import CtlensError
from ctlens.core.files import atomic_folder
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.models.bridges import huggingface_config
from ctlens.models.loading import made_config, quiet_huggingface
from ctlens.models.parity import apart_from
from ctlens.models.twins import huggingface_twin, unread
from ctlens.models.weights import ModelConfig, canonical_weights, copy_weights

LLAMA_LAYOUT = {
    "embed.W_E": ("model.embed_tokens", None),
    "ln1.w": ("input_layernorm", None),
    "attn.W_Q": ("self_attn.q_proj", "head d_model (half two) -> (head two half) d_model"),
    "attn.W_K": ("self_attn.k_proj", "head d_model (half two) -> (head two half) d_model"),
    "attn.W_V": ("self_attn.v_proj", "head d_model d_head -> (head d_head) d_model"),
    "attn.W_O": ("self_attn.o_proj", "head d_head d_model -> d_model (head d_head)"),
    "ln2.w": ("post_attention_layernorm", None),
    "mlp.W_in": ("mlp.up_proj", "d_in d_out -> d_out d_in"),
    "mlp.W_gate": ("mlp.gate_proj", "d_in d_out -> d_out d_in"),
    "mlp.W_out": ("mlp.down_proj", "d_in d_out -> d_out d_in"),
    "ln_final.w": ("model.norm", None),
    "unembed.W_U": ("lm_head", "d_in d_out -> d_out d_in"),
}
"""Llama's layer for each weight of a model made here, and the einops pattern to Llama's layout. Rotary pairs are
adjacent here and half a head apart in a Llama."""


@public
def export_huggingface(model: LensModel, folder: str | Path) -> Path:
    """Writes a new folder that `transformers.AutoModelForCausalLM` loads, with equal logits; adapters are merged.

    Fused matrices, which are trained in parts, are put together again; models made here become
    Llamas. The HuggingFace model is run on random tokens before anything is written.

    Args:
        model: from `ctlens.load_model`, `ctlens.build` or a training.
        folder: where weights, configuration and tokenizer go.

    Raises:
        CtlensError: the folder exists and is not empty, the architecture is not HuggingFace's, or it has weights whose
            layout is not known, so that the logits would be others.
    """
    with atomic_folder(folder) as work, quiet_huggingface():
        to_huggingface(model).save_pretrained(work)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(work)
    return Path(folder)


@torch.no_grad()
def to_huggingface(model: LensModel) -> PreTrainedModel:
    """Makes a HuggingFace model, with weights of its own, of equal logits; raises as `export_huggingface`."""
    made = made_config(model)
    if made:
        hf = unread(_llama_config(made), model)
        targets = {name: parameter.data for name, parameter in hf.named_parameters()}
        copy_weights(targets, _llama_weights(canonical_weights(model)))
    elif huggingface_config(model) is None:
        raise CtlensError(
            f"a {type(model).__name__} of your own has no architecture in HuggingFace's transformers, so it cannot be "
            "exported: keep it as a run or with save_model."
        )
    else:
        hf = huggingface_twin(model)
    apart = apart_from(model, hf)
    if not apart.is_rounding:
        raise CtlensError(
            f"{type(hf).__name__} cannot be exported: its logits would differ by {apart.largest:.2g}; "
            "keep the model as a run or with save_model."
        )
    return hf


def _llama_config(config: ModelConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=config.d_vocab,
        hidden_size=config.d_model,
        intermediate_size=config.d_mlp,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        max_position_embeddings=config.n_ctx,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def _llama_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    for name, weight in weights.items():
        block, _, rest = name.removeprefix("blocks.").partition(".") if name.startswith("blocks.") else ("", "", name)
        layer, pattern = LLAMA_LAYOUT[rest]
        layer_name = f"model.layers.{block}.{layer}" if block else layer
        sizes = {"two": 2} if pattern and "two" in pattern else {}
        converted[f"{layer_name}.weight"] = rearrange(weight, pattern, **sizes) if pattern else weight
    return converted
