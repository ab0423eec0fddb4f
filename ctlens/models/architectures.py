"""The HuggingFace architectures that ctlens is checked on: a tiny random model of each, made on the spot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ctlens.core.errors import unknown

_D_MODEL = 32
_D_MLP = 48
_N_LAYERS = 2
_N_HEADS = 4
_SLIDING = {"head_dim": 8, "sliding_window": 6}  # shorter than the prompts, so that it is seen
_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": _SLIDING,
    "gemma3_text": {**_SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3": {**_SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {},
    "gpt_neox": {},
    "olmo2": {},
    "phi3": {"pad_token_id": 0},
}
"""The options that each `model_type` needs besides the sizes. The vision tower of `gemma3` is built and not used."""
ARCHITECTURES = tuple(_CONFIGS)
_OTHERWISE: Mapping[str, Mapping[str, Any]] = {
    "cohere": {},
    "cohere2": _SLIDING,
    "hunyuan_v1_dense": {"head_dim": 8, "pad_token_id": 0},
}
COMPUTED_OTHERWISE = tuple(_OTHERWISE)
"""Architectures that TransformerLens 3.9 computes otherwise than HuggingFace, so that `load_model` refuses them."""
_VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def tiny_model(architecture: str, vocab_size: int = 400, n_ctx: int = 256, seed: int = 0) -> PreTrainedModel:
    """Makes a random model of two layers in eval mode; norms and biases are random too, so that each of them counts.

    Args:
        architecture: one of `ARCHITECTURES`, or of `COMPUTED_OTHERWISE`.
        vocab_size: tokens.
        n_ctx: the longest sequence, in tokens.
        seed: of the weights; the global random state is left alone.

    Raises:
        CtlensError: the architecture is unknown.
    """
    if architecture not in _CONFIGS and architecture not in _OTHERWISE:
        raise unknown("architecture", architecture, ARCHITECTURES)
    config = _config(architecture, vocab_size, n_ctx)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cast(Any, AutoModelForCausalLM).from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def _config(architecture: str, vocab_size: int, n_ctx: int) -> Any:
    if architecture == "gpt2":
        return AutoConfig.for_model(
            "gpt2", vocab_size=vocab_size, n_embd=_D_MODEL, n_layer=_N_LAYERS, n_head=_N_HEADS, n_positions=n_ctx
        )
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": _D_MODEL,
        "intermediate_size": _D_MLP,
        "num_hidden_layers": _N_LAYERS,
        "num_attention_heads": _N_HEADS,
        "max_position_embeddings": n_ctx,
        **{**_CONFIGS, **_OTHERWISE}[architecture],
    }
    if architecture != "gpt_neox":
        shape["num_key_value_heads"] = _N_HEADS // 2
    if architecture != "gemma3":
        return AutoConfig.for_model(architecture, **shape)
    vision = {**_VISION, "image_size": 28, "patch_size": 14}
    tokens = dict(zip(("image_token_index", "boi_token_index", "eoi_token_index"), range(vocab_size)[-3:], strict=True))
    return AutoConfig.for_model("gemma3", text_config=shape, vision_config=vision, mm_tokens_per_image=4, **tokens)
