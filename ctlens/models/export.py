"""Export: a model becomes a folder for `transformers`, its adapters one for `peft`, and first logits are compared."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
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
from ctlens.models.huggingface import pretrained, quiet_huggingface, reading
from ctlens.models.loading import load_model, made_config
from ctlens.models.lora import adapter_tensors, adapters_off
from ctlens.models.matrices import CANONICAL_NAMES
from ctlens.models.parameters import require_whole
from ctlens.models.parity import apart_from
from ctlens.models.peft import Update, add_updates, base_mark, peft_updates, read_peft, write_peft
from ctlens.models.sources import found_on_disk
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
    require_whole(model)
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
    _require_equal(model, hf, "keep the model as a run or with save_model")
    return hf


@public
def export_peft(model: LensModel, folder: str | Path, *, base: str | PathLike[str] = "") -> Path:
    """Writes a model's adapters into a new folder as PEFT reads them, with equal logits; their base is not copied.

    A matrix that HuggingFace keeps fused with others gets one update with the ranks of all of them. The HuggingFace
    model with what was written is run on random tokens before the folder gets its name.

    Args:
        model: with adapters, from a training by a `LoRA` or with `load_adapters`.
        folder: where configuration, weights and tokenizer go.
        base: the folder or the name on the hub that PEFT will load the base from; by default the one that the model was
            loaded from, whose weights are then compared. For a model made here, the folder of `export_huggingface`.

    Raises:
        CtlensError: the folder exists and is not empty, the model has no adapters or a base that is not HuggingFace's,
            the base has no name or other weights by now, or logits would differ.
    """
    name = str(base) or getattr(huggingface_config(model), "name_or_path", "")
    if not name:
        raise CtlensError("the adapters' base has no name that PEFT could load it by: give its folder with base=.")
    with adapters_off(model):
        hf = to_huggingface(model)
    if not base:
        _require_weights(name, hf)
    made = made_config(model)
    mark = base_mark(load_model(hf, check=False, dtype=hf.dtype) if made else model)
    with atomic_folder(folder) as work:
        write_peft(work, _llama_updates(model) if made else peft_updates(model), base=name, mark=mark, hf=hf)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(work)
        add_updates(hf, read_peft(work).updates)
        _require_equal(model, hf, "keep the adapters as a run or with save_adapters")
    return Path(folder)


def _require_weights(name: str, hf: PreTrainedModel) -> None:
    """Refuses a base whose weights were trained, or got adapters merged, since it was loaded."""
    with reading(name):
        loaded = pretrained(found_on_disk(name), hf.dtype).state_dict()
    if any(not torch.equal(value.cpu(), loaded[key]) for key, value in hf.state_dict().items()):
        raise CtlensError(
            f"the adapters are on other weights than those of {name}, which the model was loaded from: write their own "
            "with export_huggingface inside adapters_off, and give that folder with base=."
        )


def _llama_updates(model: LensModel) -> dict[str, Update]:
    """The updates of the adapters on a model made here, by layer of the Llama that `to_huggingface` makes of it."""
    lora, tensors = adapter_tensors(model)
    updates = {}
    for name in (name.removesuffix(".A") for name in tensors if name.endswith(".A")):
        _, block, matrix = name.split(".")
        layer, pattern = LLAMA_LAYOUT[CANONICAL_NAMES[matrix]]
        B = tensors[f"{name}.B"]
        if "two" in (pattern or ""):  # outputs are moved as those of the weight are
            B = rearrange(B, "(head half two) rank -> (head two half) rank", head=model.cfg.n_heads, two=2)
        updates[f"model.layers.{block}.{layer}"] = Update(tensors[f"{name}.A"].cpu(), B.cpu(), lora.alpha / lora.rank)
    return updates


def _require_equal(model: LensModel, hf: PreTrainedModel, instead: str) -> None:
    apart = apart_from(model, hf)
    if not apart.is_rounding:
        raise CtlensError(
            f"{type(hf).__name__} cannot be exported: its logits would differ by {apart.largest:.2g}; {instead}."
        )


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
