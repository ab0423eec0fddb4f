"""Weights of the models made here under one set of names, whatever TransformerLens version holds them.

The canonical names and layouts are those of `HookedTransformer` (`blocks.0.attn.W_Q` is
`[head, d_model, d_head]`); a native `TransformerBridge` keeps the same numbers in linear layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ctlens.core.arguments import require_types
from ctlens.core.config import generator
from ctlens.core.errors import CtlensError
from ctlens.core.limits import AT_LEAST_1, require_fields
from ctlens.core.types import LensModel
from ctlens.models.parameters import present_parameters, present_weights

SPLIT_HEADS = "(head d_head) d_model -> head d_model d_head"
TRANSPOSED = "d_out d_in -> d_in d_out"
NATIVE_LAYOUT = {
    "tok_embed.weight": ("embed.W_E", None),
    "ln1.weight": ("ln1.w", None),
    "attn.q.weight": ("attn.W_Q", SPLIT_HEADS),
    "attn.k.weight": ("attn.W_K", SPLIT_HEADS),
    "attn.v.weight": ("attn.W_V", SPLIT_HEADS),
    "attn.o.weight": ("attn.W_O", "d_model (head d_head) -> head d_head d_model"),
    "ln2.weight": ("ln2.w", None),
    "mlp.in.weight": ("mlp.W_in", TRANSPOSED),
    "mlp.gate.weight": ("mlp.W_gate", TRANSPOSED),
    "mlp.out.weight": ("mlp.W_out", TRANSPOSED),
    "ln_out.weight": ("ln_final.w", None),
    "head.weight": ("unembed.W_U", TRANSPOSED),
}


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-like model: RMSNorm, rotary positions (adjacent pairs), gated SiLU MLP, no biases.

    Attributes:
        d_vocab: number of tokens.
        n_layers, n_heads, d_model, d_mlp: sizes; `d_head` is `d_model / n_heads`.
        n_ctx: the longest sequence, in tokens.
    """

    d_vocab: int
    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 96
    d_mlp: int = 256
    n_ctx: int = 128

    def __post_init__(self) -> None:
        require_types(self)
        require_fields(self, dict.fromkeys(("d_vocab", "n_layers", "n_heads", "d_model", "d_mlp", "n_ctx"), AT_LEAST_1))
        if self.d_model % (2 * self.n_heads):
            raise CtlensError(
                f"d_model must be an even multiple of n_heads {self.n_heads}, not {self.d_model}: take a multiple of "
                f"{2 * self.n_heads}."
            )

    @property
    def d_head(self) -> int:
        """The width of one attention head."""
        return self.d_model // self.n_heads


def is_bias(name: str) -> bool:
    """Tells whether a parameter of a model made here is a bias; biases stay zero and frozen."""
    last = name.rsplit(".", 1)[-1]
    return last == "bias" or last.startswith("b_")


def initial_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Draws random weights by canonical name, the same on every TransformerLens version.

    Matrices are normal with standard deviation `0.8 / sqrt(d_model)`, TransformerLens's own
    initialisation; norms are one.
    """
    draw = generator(seed, "weights")
    scale = 0.8 / math.sqrt(config.d_model)
    return {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=draw) * scale
        for name, shape in _shapes(config).items()
    }


def canonical_weights(model: LensModel) -> dict[str, Tensor]:
    """Copies the weights of a model made here, adapters added, by canonical name, without the frozen biases."""
    views = _views(model, present_weights(model))
    return {name: view.clone(memory_format=torch.contiguous_format) for name, view in views.items()}


def load_weights(model: LensModel, weights: Mapping[str, Tensor]) -> None:
    """Copies weights with canonical names into a model made here; raises as `copy_weights` does."""
    copy_weights(_views(model, present_parameters(model)), weights)


def copy_weights(targets: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copies every weight into the target of the same name, or none of them.

    Raises:
        CtlensError: a weight is missing, left over or of another shape.
    """
    odd = sorted(targets.keys() ^ weights.keys())
    if odd:
        raise CtlensError(
            f"the weights do not fit the model: only one of them has {', '.join(odd[:3])}. Use its own weights."
        )
    for name, target in targets.items():
        if target.shape != weights[name].shape:
            here = tuple(target.shape)
            there = tuple(weights[name].shape)
            raise CtlensError(
                f"the weights do not fit the model: {name} has shape {there}, but {here} in the model. "
                "Use the model's own weights."
            )
    for name, target in targets.items():
        target.copy_(weights[name])


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    d = config.d_model
    split = (config.n_heads, config.d_model, config.d_head)
    block: dict[str, tuple[int, ...]] = {"ln1.w": (d,), "attn.W_Q": split, "attn.W_K": split, "attn.W_V": split}
    block |= {"attn.W_O": (config.n_heads, config.d_head, d), "ln2.w": (d,)}
    block |= {"mlp.W_in": (d, config.d_mlp), "mlp.W_gate": (d, config.d_mlp), "mlp.W_out": (config.d_mlp, d)}
    shapes: dict[str, tuple[int, ...]] = {"embed.W_E": (config.d_vocab, d)}
    for layer in range(config.n_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | {"ln_final.w": (d,), "unembed.W_U": (d, config.d_vocab)}


def _views(model: LensModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model made here by canonical name and in canonical layout, sharing their memory."""
    views = {}
    for name, weight in weights.items():
        if is_bias(name):
            continue
        canonical, pattern = _layout(name)
        sizes = {"head": model.cfg.n_heads} if pattern and "(head" in pattern else {}
        views[canonical] = rearrange(weight.data, pattern, **sizes) if pattern else weight.data
    return views


def _layout(name: str) -> tuple[str, str | None]:
    """The canonical name, and the einops pattern to the canonical layout (None where layouts agree)."""
    if name in NATIVE_LAYOUT:
        return NATIVE_LAYOUT[name]
    if not name.startswith("layers."):
        return name, None
    _, layer, rest = name.split(".", 2)
    canonical, pattern = NATIVE_LAYOUT[rest]
    return f"blocks.{layer}.{canonical}", pattern
