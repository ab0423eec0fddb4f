"""The outline of a model: all its shapes from a HuggingFace configuration, and none of its numbers."""

from __future__ import annotations

from typing import Any, cast
from unittest import mock

import torch
from accelerate import init_empty_weights
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.utilities import quantization
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.models.adopt import bridge_only
from ctlens.models.huggingface import reading
from ctlens.models.parameters import without


def outline(config: PretrainedConfig, dtype: torch.dtype = torch.float32, *, buffers: bool = False) -> LensModel:
    """Makes the lens model of a HuggingFace configuration without its numbers, on torch's meta device.

    Its passes tell the shapes of everything and compute nothing; see `ctlens.models.counting`.

    Args:
        config: HuggingFace's.
        dtype: of the weights.
        buffers: whether buffers have numbers, which follow from the configuration.

    Raises:
        CtlensError: the configuration is of no causal language model that TransformerLens bridges.
    """
    with reading(f"a model of the type {config.model_type}", "Name another config.json"):
        if config.is_encoder_decoder:
            raise CtlensError(f"{config.model_type} is no causal language model: name a decoder, such as llama.")
        hf = unwritten(config, dtype, buffers=buffers)
        # TransformerLens reads fused weights to split them, and refuses those without numbers; shapes split as well.
        with mock.patch.object(quantization, "unreadable_weight_reason", return_value=None):
            bridge = build_bridge_from_module(hf, architecture=type(hf).__name__, hf_config=hf.config, tokenizer=None)
    model = cast(LensModel, bridge.eval())
    return without(model, bridge_only(model))


def unwritten(config: PretrainedConfig, dtype: torch.dtype, *, buffers: bool) -> PreTrainedModel:
    """HuggingFace's model of a configuration, in eval mode; arguments as of `outline`."""
    with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
        hf = cast(Any, AutoModelForCausalLM).from_config(config, dtype=dtype, attn_implementation="eager").eval()
    hf.tie_weights()  # each of the weights that are one got numbers, or none, by itself
    return hf
