"""Tiny models and tokenizers that the tests build themselves, and how a command ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ctlens.core.types import LensModel
from ctlens.models.architectures import tiny_model as hf_model
from ctlens.models.loading import build, load_model
from ctlens.models.weights import ModelConfig
from helpers.tiers import unit_first

# An analysis sees a model through its hooks, which `tests/models` holds to HuggingFace's own numbers for every
# architecture. So it runs on a model made here and on one bridge: the one that shares least with it (norms with a mean
# and a bias, learned positions, fused queries, keys and values) or, for attention, the one whose heads share values.
CHAT_MODELS = unit_first(("made here", "gpt2"))
GROUPED_MODELS = unit_first(("made here", "llama"))
TEXTS = (
    "Which term best describes the disease?\n\nAnswer choices:\n(A) isolated cases\n(B) outbreak\n",
    "I may be in the minority here, but I don't think it's right. The best answer is: (",
    "When a creature experiences feeling, they are likely sensing a thing's texture.",
    "Please answer the question. You are a helpful assistant. Sure, here it is: no, that is wrong.",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
# Architectures in which some part is not what it is in a Llama, by what that part is.
ODD: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},  # experts
    "qwen3_moe": {"num_experts": 4, "head_dim": 8, **EXPERTS},  # experts
    "deepseek_v3": {**LATENT, **EXPERTS, **GROUPS},  # latent attention, and experts but in the first layer
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 128},  # sinks
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},  # OPT-350m: norms on the stream
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },  # a pattern nobody reads
    "granite": {"logits_scaling": 8.0, "residual_multiplier": 0.22},  # a scale behind the unembedding
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},  # a cap behind the unembedding
    "phi": {},  # attention and MLP side by side
}


def odd_model(kind: str) -> PreTrainedModel:
    """A tiny random HuggingFace model of an architecture of `ODD`, in eval mode."""
    return random_model(kind, **SIZES, **ODD[kind])


def random_model(model_type: str, **options: Any) -> PreTrainedModel:
    """A random HuggingFace model of a configuration, in eval mode; no weight is left at a default."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def byte_level_tokenizer(vocab_size: int = 400, chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few sentences."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", add_bos_token=True, name_or_path="tiny"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def made(**sizes: int) -> LensModel:
    """A tiny random model made here, with a chat tokenizer; other sizes by name, see `ModelConfig`."""
    config = {"d_vocab": 400, "n_layers": 2, "n_heads": 4, "d_model": 32, "d_mlp": 48, "n_ctx": 256} | sizes
    model = build(ModelConfig(**config), byte_level_tokenizer(chat=True))
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw) * parameter.requires_grad
    return model


def chat_model(kind: str) -> LensModel:
    """A tiny random model with a chat tokenizer: made here, or a bridge to one of `ARCHITECTURES`."""
    if kind == "made here":
        return made()
    return load_model(hf_model(kind), tokenizer=byte_level_tokenizer(chat=True))


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Call = Callable[[str], Ended]
