"""Sharded models from safetensors: every process reads its own slices of each weight, and none ever holds the model."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from ctlens.core.errors import CtlensError
from ctlens.core.reading import read_json
from ctlens.core.types import LensModel
from ctlens.models.adopt import marked
from ctlens.models.huggingface import reading
from ctlens.models.outline import outline, unwritten
from ctlens.models.parameters import present_parameters, state_buffers
from ctlens.models.parity import (
    Answers,
    PromptIds,
    lens_answers,
    narrowed,
    original_answers,
    probe_prompts,
    require_causal,
    require_finite_answers,
    require_parity,
)
from ctlens.models.sharding import empty_slices, fill, read_slices, require_launched, split_blank, split_modules
from ctlens.models.sources import GGUF, MODEL_FILE, found_on_disk, is_peft, require_model, require_safetensors


def read_in_slices(source: Any, revision: str | None, dtype: torch.dtype, *, check: bool) -> LensModel | None:
    """A sharded model of what `ctlens.load_model` takes; None where it is not a folder with HuggingFace's weights.

    Raises:
        CtlensError: as `read_sharded`, or no launcher has started this process.
    """
    require_launched()
    if not isinstance(source, str | PathLike):
        return None
    path = found_on_disk(source, revision)
    require_model(path)
    if is_peft(path) or path.suffix == GGUF:
        return None
    if (path / MODEL_FILE).is_file() and read_json(path / MODEL_FILE).get("kind") != "huggingface":
        return None
    with reading(str(path)):
        return read_sharded(path, dtype, check=check)


def read_sharded(folder: Path, dtype: torch.dtype, *, check: bool) -> LensModel:
    """A sharded model of a HuggingFace folder, in eval mode and without its tokenizer.

    Args:
        folder: of HuggingFace, or of `save_model`, which keeps the same names.
        dtype: of the weights.
        check: compare logits with those of HuggingFace's own model, which gets the same slices.

    Raises:
        CtlensError: the folder's weights are not the model's, as where they are kept fused; logits differ; or as
            `ctlens.load_model`.
    """
    require_safetensors(folder)
    config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = split_blank(outline(config, dtype, buffers=True))
    weights = present_parameters(model)
    held = {name: empty_slices(value) for name, value in weights.items()}
    read_slices(folder, held | state_buffers(model))
    number = {id(value): held[name] for name, value in weights.items()}
    # What is not among the weights is the unembedding bias that TransformerLens 3.x adds, which is zero.
    named = cast(nn.Module, model).named_parameters()
    fill(
        model,
        {name: number[id(value)] if id(value) in number else empty_slices(value).zero_() for name, value in named},
    )
    if check:
        prompts = probe_prompts(config)
        with narrowed(config, cast(Any, model).original_model.config):
            expected = _original_answers(config, dtype, held | state_buffers(model), prompts)
            require_parity(type(cast(Any, model).original_model).__name__, lens_answers(model, prompts), expected)
    return marked(model)


def _original_answers(
    config: PretrainedConfig, dtype: torch.dtype, held: dict[str, Tensor], prompts: PromptIds
) -> Answers:
    """The logits of HuggingFace's own model with these slices and buffers."""
    hf = unwritten(config, dtype, buffers=True)
    layers = [
        module
        for module in hf.modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.get_text_config().num_hidden_layers
    ]
    if not layers:
        raise CtlensError(f"the layers of {type(hf).__name__} are not in one list: load it without shard.")
    split_modules((*layers[0], hf))
    fill(hf, {name: held[name] for name, _ in hf.named_parameters()})
    for name, buffer in hf.named_buffers():
        if name in held:
            buffer.copy_(held[name])
    answers = original_answers(hf, prompts)
    require_finite_answers(hf, answers)
    require_causal(hf, answers)
    return answers
