"""Pairs of a few tokens, a model to patch, and results worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ctlens.analysis import Patching, patch
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.models.loading import HAS_HOOKED_TRANSFORMER
from helpers.models import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer(chat=True)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TEXTS = (("Is 1?", "no. Is 1?"), ("Is it right?", "I, no: no. Is it right?"), ("2?", "Sure. 2?"))
PAIRS = [Pair(prompt(clean, "the", "a"), prompt(wrapped, "the", "a")) for clean, wrapped in TEXTS]
EQUAL = Pair(prompt("7 1 5 2?", "the", "a"), prompt("7 3 5 4?", "the", "a"))
VECTORS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_post")


BLOCK_KINDS: dict[str, dict[str, Any]] = {
    "learned positions": {"normalization_type": "LN", "act_fn": "gelu_new"},
    "grouped queries": {"n_key_value_heads": 2, "gated_mlp": True},
    "side by side": {"normalization_type": "LN", "act_fn": "gelu", "parallel_attn_mlp": True, "rotary_dim": 4},
    "unscaled": {"use_attn_scale": False, "act_fn": "relu"},
}
_ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 8}


def hooked(kind: str) -> LensModel:
    """A random `HookedTransformer`; no weight, norm or bias is left at a value that hides a mistake."""
    if not HAS_HOOKED_TRANSFORMER:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"d_vocab": 400, "n_layers": 3, "n_heads": 4, "d_model": 32, "d_head": 8, "d_mlp": 48, "n_ctx": 128}
    options = sizes | {"act_fn": "silu", "normalization_type": "RMS"} | BLOCK_KINDS[kind]
    if kind != "learned positions":
        options = _ROTARY | options
    model: Any = HookedTransformer(HookedTransformerConfig(**options, seed=0)).eval()
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    model.tokenizer = TOKENIZER
    return model


def logit_diff(model: LensModel, ids: tuple[int, ...], hooks: list[Any]) -> float:
    """The logit of the good answer less that of the bad one, by one forward pass under hooks."""
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits = model(torch.tensor([ids]))[0, -1]
    good = model.tokenizer("the", add_special_tokens=False)["input_ids"][0]
    bad = model.tokenizer("a", add_special_tokens=False)["input_ids"][0]
    return float(logits[good] - logits[bad])


def swept(model: LensModel, pairs: list[Pair], site: str, **options: Any) -> Patching:
    return patch(model, pairs, **{"site": site, "direction": "denoising", "progress": False} | options)


def one_site(values: Any, target: Any, source: Any, **labels: Any) -> Patching:
    """A result worked out by hand: one metric, one layer, `[position, pair]`."""
    arrays = (np.array(values, float)[None, None], np.array([target], float), np.array([source], float))
    nameless = ("",) * len(values)
    given = {"metrics": ("logit_diff",), "tokens": nameless, "kinds": nameless, "positions": "each"} | labels
    rest = {"layers": (0,), "site": "resid_pre", "direction": "denoising", "window": "shared", "path": "hooks"}
    return Patching(*arrays, **rest | given)
