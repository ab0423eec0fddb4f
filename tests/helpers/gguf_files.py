"""GGUF files of tiny Llamas, written as llama.cpp writes them. Tests that use them are skipped without the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from helpers.models import byte_level_tokenizer

gguf = pytest.importorskip("gguf", reason="gguf is of the extra gguf")

LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama_cpp_name(name: str) -> str:
    """The name that llama.cpp gives to a weight of a Llama."""
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    path = name.removesuffix(".weight")
    if path in outside:
        return f"{outside[path]}.weight"
    layer, rest = path.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{LAYERS[rest]}.weight"


def adjacent(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """The rows of a query or key with rotary pairs beside each other, as llama.cpp keeps them."""
    d_out, d_in = weight.shape
    return weight.reshape(n_heads, 2, d_out // n_heads // 2, d_in).swapaxes(1, 2).reshape(d_out, d_in)


def write_gguf(
    path: Path, hf: PreTrainedModel, kind: Any = gguf.GGMLQuantizationType.F32, architecture: str = "llama"
) -> None:
    """Writes a Llama and its tokenizer as llama.cpp does, quantised to a kind."""
    config: Any = hf.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer)
    for name, weight in hf.state_dict().items():
        values = weight.numpy().astype(np.float32)
        part = name.split(".")[-2]
        values = adjacent(values, heads[part]) if part in heads else values
        whole = values.ndim == 1 or values.shape[-1] % 32
        stored = gguf.GGMLQuantizationType.F32 if whole else kind
        writer.add_tensor(llama_cpp_name(name), gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any) -> None:
    tokenizer = byte_level_tokenizer(chat=True)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    names = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types([3 if name in ("<s>", "</s>") else 1 for name in names])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
