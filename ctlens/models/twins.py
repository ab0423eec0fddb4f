"""Twins: a HuggingFace model with the weights of a bridge, whose split layers are put together again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ctlens.core.types import LensModel
from ctlens.models.bridges import generation_config, huggingface_config
from ctlens.models.parameters import persistent_buffers, present_weights, state_buffers
from ctlens.models.weights import copy_weights

# HuggingFace's name of a layer, and the layers that a bridge has instead, in the order of the layer's outputs.
SPLIT_LAYERS = {
    "attn.c_attn": ("attn.q", "attn.k", "attn.v"),
    "attn.c_proj": ("attn.o",),
    "attention.query_key_value": ("attention.q", "attention.k", "attention.v"),
    "attention.dense": ("attention.o",),
    "self_attn.qkv_proj": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "self_attn.o_proj": ("self_attn.o",),
    "mlp.gate_up_proj": ("mlp.gate", "mlp.in"),
}
INTERLEAVED = "attention.query_key_value"  # GPT-NeoX keeps the query, key and value of a head together


def unread(config: PretrainedConfig, like: LensModel) -> PreTrainedModel:
    """A HuggingFace model of this configuration, in eval mode, whose weights are still to be filled in.

    Args:
        config: HuggingFace's.
        like: the model whose device and dtype it gets.
    """
    first = next(like.parameters())
    with torch.random.fork_rng():
        options = {"dtype": first.dtype, "attn_implementation": "eager"}
        hf: Any = cast(Any, AutoModelForCausalLM).from_config(config, **options)
    return hf.to(first.device).eval()


@torch.no_grad()
def huggingface_twin(model: LensModel) -> PreTrainedModel:
    """A HuggingFace model with the configuration, weights and buffers of a bridge to one; nothing is compared.

    Raises:
        CtlensError: the bridge has weights whose layout is not known.
    """
    hf = unread(huggingface_config(model), model)
    targets = {name: parameter.data for name, parameter in hf.named_parameters()} | persistent_buffers(hf)
    copy_weights(targets, _joined(hf, present_weights(model)) | state_buffers(model))
    if (generation := generation_config(model)) is not None:
        cast(Any, hf).generation_config = generation
    return hf


def _joined(hf: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A bridge's weights under HuggingFace's names and in its layouts; unsplit weights stay as they are."""
    left = dict(weights)
    joined: dict[str, Tensor] = {}
    for name, module in hf.named_modules():
        prefix, parts = next(
            ((name.removesuffix(key), parts) for key, parts in SPLIT_LAYERS.items() if name.endswith(key)), ("", ())
        )
        for kind, _ in module.named_parameters(recurse=False):
            found = [f"{prefix}{part}.{kind}" for part in parts]
            if found and all(part in left for part in found):
                joined[f"{name}.{kind}"] = _join([left.pop(part) for part in found], module, name, hf)
    return {**left, **joined}


def _join(parts: list[Tensor], module: nn.Module, name: str, hf: Any) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if name.endswith(INTERLEAVED):
        heads = hf.config.num_attention_heads
        return rearrange(parts, "three (head d_head) ... -> (head three d_head) ...", head=heads)
    fused = torch.cat(parts)
    return fused.T if isinstance(module, Conv1D) and fused.ndim == 2 else fused
