"""Pairs of a few tokens, a model to patch, and results worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ctlens.analysis import Patching, patch
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.models.loading import build
from ctlens.models.weights import ModelConfig
from helpers.models import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer(chat=True)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TEXTS = (("Is 1?", "no. Is 1?"), ("Is it right?", "I, no: no. Is it right?"), ("2?", "Sure. 2?"))
PAIRS = [Pair(prompt(clean, "the", "a"), prompt(wrapped, "the", "a")) for clean, wrapped in TEXTS]
EQUAL = Pair(prompt("7 1 5 2?", "the", "a"), prompt("7 3 5 4?", "the", "a"))
VECTORS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_post")


def made(**sizes: int) -> LensModel:
    config = {"d_vocab": 400, "n_layers": 2, "n_heads": 4, "d_model": 32, "d_mlp": 48, "n_ctx": 256} | sizes
    model = build(ModelConfig(**config), TOKENIZER)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw) * parameter.requires_grad
    return model


def swept(model: LensModel, pairs: list[Pair], site: str, **options: Any) -> Patching:
    return patch(model, pairs, **{"site": site, "direction": "denoising", "progress": False} | options)


def one_site(values: Any, target: Any, source: Any, **labels: Any) -> Patching:
    """A result worked out by hand: one metric, one layer, `[position, pair]`."""
    arrays = (np.array(values, float)[None, None], np.array([target], float), np.array([source], float))
    given = {"metrics": ("logit_diff",), "tokens": ("",) * len(values), "positions": "each"} | labels
    rest = {"layers": (0,), "site": "resid_pre", "direction": "denoising", "window": "shared", "path": "hooks"}
    return Patching(*arrays, **given, **rest)
