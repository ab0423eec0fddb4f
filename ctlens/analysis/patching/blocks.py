"""A model's blocks as plain functions of its weights, for the models whose blocks are known.

Known are pre-norm blocks of causal attention (rotary or with positions in the embedding, also with grouped queries)
and a plain or gated MLP, in sequence or in parallel. These functions believe the model's configuration; `Suffix.agrees`
tests them against the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from einops import rearrange
from jaxtyping import Complex, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ctlens.core.types import LensModel
from ctlens.models.parameters import is_whole


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh formula, written as a sigmoid: more than twice as fast on a CPU as PyTorch's own.

    >>> x = torch.linspace(-6, 6, 101)
    >>> torch.allclose(gelu_tanh(x), F.gelu(x, approximate="tanh"), atol=1e-6)
    True
    """
    if x.requires_grad:
        return F.gelu(x, approximate="tanh")
    slope = 2 * math.sqrt(2 / math.pi)
    return (x * x).mul_(0.044715 * slope).add_(slope).mul_(x).sigmoid_().mul_(x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}
_FUSES = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether this PyTorch has oneDNN's product with an activation behind it, which `torch.compile` uses on CPUs."""
NORMS = {"LN": True, "RMS": False}
"""The norms that are known, and whether each subtracts the mean."""
_POSITION_EMBEDDINGS = ("rotary", "standard")
# Settings of TransformerLens that change a block, with the values at which they do not.
_UNUSED: dict[str, tuple[object, ...]] = {
    "attention_dir": ("causal",),
    "use_local_attn": (False,),
    "window_size": (None,),
    "use_qk_norm": (False,),
    "use_normalization_before_and_after": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "use_NTK_by_parts_rope": (False,),
    "attn_scores_soft_cap": (None, -1.0),
    "output_logits_soft_cap": (None, -1.0),
    "dtype": (torch.float32,),
}

BlockRows: TypeAlias = Float[Tensor, "job row _"]
Numbers: TypeAlias = Int[Tensor, "*shape"] | slice
Factors: TypeAlias = Complex[Tensor, "pos _"]
Hidden: TypeAlias = Float[Tensor, "*shape"]
"""The number added to each score: 0 at keys that a query sees, minus infinity at others."""


@dataclass(frozen=True)
class Linear:
    """A linear layer: a weight `[in, out]`, as products of few rows are fastest, and its bias."""

    weight: Float[Tensor, "in out"]
    bias: Float[Tensor, " out"] | None

    def __call__(self, rows: Tensor) -> Tensor:
        """The outputs for rows of inputs."""
        return F.linear(rows, self.weight.T, self.bias)

    def add_to(self, stream: Tensor, rows: Tensor) -> Tensor:
        """Adds the outputs for rows of inputs to the stream, in place unless a gradient is wanted."""
        if rows.requires_grad:
            return stream + self(rows)
        stream.view(-1, stream.shape[-1]).addmm_(rows.reshape(-1, rows.shape[-1]), self.weight)
        return stream if self.bias is None else stream.add_(self.bias)

    def columns(self, chosen: slice) -> Linear:
        """The layer that gives some of the outputs."""
        return Linear(self.weight[:, chosen], None if self.bias is None else self.bias[chosen])


@dataclass(frozen=True)
class Norm:
    """A layer norm, or an RMS norm, which does not subtract the mean."""

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"] | None
    centred: bool
    eps: float

    def __call__(self, rows: Tensor) -> Tensor:
        """The normed rows."""
        if self.centred:
            return F.layer_norm(rows, self.weight.shape, self.weight, self.bias, self.eps)
        return F.rms_norm(rows, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True)
class Block:
    """The weights of one block, and its parts as functions of them.

    Attributes:
        qkv: queries, keys and values of all heads in one product; the two numbers that a rotation turns stand side
            by side.
        q: the queries alone.
        kv: the keys and values alone.
        turns: the rotary factors `[pos, half of d_head]`, complex; None without rotary positions.
        mlp_in: into the MLP, the gate's outputs in front if it is gated.
        product_bias: added to the gated product.
        parallel: whether the MLP reads what the attention reads, instead of its sum with the attention's output.
    """

    ln1: Norm
    ln2: Norm
    qkv: Linear
    q: Linear
    kv: Linear
    d_head: int
    scale: float
    turns: Tensor | None
    out: Linear
    mlp_in: Linear
    mlp_out: Linear
    activation: Callable[[Tensor], Tensor]
    gated: bool
    product_bias: Tensor | None
    parallel: bool

    def queries(self, normed: BlockRows, positions: Numbers) -> BlockRows:
        """The queries of rows normed by `ln1`, at their positions: `[job, row]`, or a slice that all jobs share."""
        return self._turned(self.q(normed), self.n_queries, positions)

    def keys(self, normed: BlockRows, positions: Numbers) -> BlockRows:
        """The keys and values of rows normed by `ln1`, side by side."""
        return self._turned(self.kv(normed), self.kv.weight.shape[1] // 2, positions)

    def queries_and_keys(self, normed: BlockRows, positions: Numbers) -> tuple[BlockRows, BlockRows]:
        """The queries, and the keys and values, of rows normed by `ln1`."""
        turned = self.n_queries + self.kv.weight.shape[1] // 2
        found = self._turned(self.qkv(normed), turned, positions)
        return found[..., : self.n_queries], found[..., self.n_queries :]

    @property
    def n_queries(self) -> int:
        """The numbers in the queries of all heads."""
        return self.q.weight.shape[1]

    def _turned(self, found: BlockRows, width: int, positions: Numbers) -> BlockRows:
        """Turns the first `width` outputs by their positions, in place."""
        if self.turns is not None:
            pairs = found[..., :width].unflatten(-1, (-1, self.d_head // 2, 2))
            torch.view_as_complex(pairs).mul_(self.turns[positions][..., None, :])
        return found

    def attend(self, q: BlockRows, kv: Float[Tensor, "job key _"], hidden: Hidden) -> BlockRows:
        """Computes every head's `z`, side by side, from queries, and keys and values side by side."""
        k, v = kv.chunk(2, -1)
        heads = [part.unflatten(-1, (-1, self.d_head)).transpose(1, 2) for part in (q, k, v)]
        grouped = q.shape[-1] != k.shape[-1]
        z = F.scaled_dot_product_attention(*heads, attn_mask=hidden, scale=self.scale, enable_gqa=grouped)
        return z.transpose(1, 2).flatten(-2)

    def finish(self, x: BlockRows, z: BlockRows) -> BlockRows:
        """Turns the stream in front of the block into that behind it, in place, from every head's `z`."""
        states = self._states(x) if self.parallel else None
        x = self.out.add_to(x, z)
        return self.mlp_out.add_to(x, self._states(x) if states is None else states)

    def behind(self, before: BlockRows, attention: BlockRows) -> BlockRows:
        """The stream behind the block, from that in front of it and attention's output, which is overwritten."""
        middle = attention.add_(before)
        return self.add_mlp(middle, before if self.parallel else middle)

    def add_mlp(self, stream: BlockRows, read: BlockRows) -> BlockRows:
        """Adds to a stream what the MLP writes, in place, from the stream it reads."""
        return self.mlp_out.add_to(stream, self._states(read))

    def _states(self, rows: BlockRows) -> BlockRows:
        """The MLP's states behind its activation, from the stream it reads."""
        normed = self.ln2(rows)
        if not self.gated:
            return self._activated(normed)
        gate, up = self.mlp_in(normed).chunk(2, -1)
        activated = self.activation(gate)
        product = activated * up if up.requires_grad else activated.mul_(up)
        return product if self.product_bias is None else product.add_(self.product_bias)

    def _activated(self, normed: BlockRows) -> BlockRows:
        """The activated outputs of `mlp_in`; oneDNN activates each tile of the product while it is in the cache."""
        if self.activation is gelu_tanh and _FUSES and normed.device.type == "cpu" and not normed.requires_grad:
            product = torch.ops.mkldnn._linear_pointwise
            return product(normed, self.mlp_in.weight.T, self.mlp_in.bias, "gelu", [], "tanh")
        return self.activation(self.mlp_in(normed))


@dataclass(frozen=True)
class Unembedding:
    """The final norm, and the unembedding behind it, whose weight is `[out, in]`."""

    norm: Norm
    weight: Float[Tensor, "d_vocab d_model"]
    bias: Float[Tensor, " d_vocab"] | None

    def __call__(self, rows: Tensor) -> Tensor:
        """The logits of rows of the last stream."""
        return F.linear(self.norm(rows), self.weight, self.bias)


@torch.no_grad()
def read_blocks(model: LensModel, length: int) -> list[Block] | None:
    """The blocks of a model for sequences up to a length; None if they are not all known or there.

    The weights are copies, so blocks are read anew for every sweep.
    """
    cfg: Any = model.cfg
    if not _known(cfg) or not hasattr(model, "ln_final") or not is_whole(model):
        return None
    try:
        factors = _factors(model, length)
        return [_block(block, cfg, factors) for block in cast(Any, model).blocks]
    except (AttributeError, TypeError, RuntimeError, ValueError):  # a weight is absent or laid out otherwise
        return None


def read_block(model: LensModel, number: int, length: int) -> Block:
    """One block of a model of which `read_blocks` knows all, with the weights that it has now."""
    return _block(cast(Any, model).blocks[number], model.cfg, _factors(model, length))


def read_unembedding(model: LensModel) -> Unembedding:
    """The final norm and the unembedding of a model whose blocks are known."""
    parts = cast(Any, model)
    return Unembedding(_read_norm(parts.ln_final, parts.cfg), parts.W_U.T, getattr(parts, "b_U", None))


def _known(cfg: Any) -> bool:
    plain = all(getattr(cfg, name, values[0]) in values for name, values in _UNUSED.items())
    kinds = (
        cfg.normalization_type in NORMS,
        cfg.positional_embedding_type in _POSITION_EMBEDDINGS,
        cfg.act_fn in ACTIVATIONS,
    )
    return plain and all(kinds)


def _block(block: Any, cfg: Any, factors: Factors | None) -> Block:
    attn = block.attn
    mlp = block.mlp
    kept = torch.arange(cfg.d_head)
    turned = kept if factors is None else _side_by_side(cfg, 2 * factors.shape[1])
    parts = [_of_heads(attn, name, order) for name, order in (("Q", turned), ("K", turned), ("V", kept))]
    biases = [part.bias for part in parts if part.bias is not None]
    bias = torch.cat(biases) if len(biases) == len(parts) else None
    qkv = Linear(torch.cat([part.weight for part in parts], 1), _unless_zero(bias))
    n_queries = parts[0].weight.shape[1]
    gated = getattr(mlp, "W_gate", None) is not None
    entering = [mlp.W_gate, mlp.W_in] if gated else [mlp.W_in]
    return Block(
        ln1=_read_norm(block.ln1, cfg),
        ln2=_read_norm(block.ln2, cfg),
        qkv=qkv,
        q=qkv.columns(slice(n_queries)),
        kv=qkv.columns(slice(n_queries, None)),
        d_head=cfg.d_head,
        scale=_scale(cfg),
        turns=None if factors is None else _turns(factors, cfg.d_head // 2),
        out=Linear(rearrange(attn.W_O, "head d_head d_model -> (head d_head) d_model"), _unless_zero(attn.b_O)),
        mlp_in=Linear(torch.cat(entering, 1), None if gated else _unless_zero(mlp.b_in)),
        mlp_out=Linear(mlp.W_out, _unless_zero(mlp.b_out)),
        activation=ACTIVATIONS[cfg.act_fn],
        gated=gated,
        product_bias=_unless_zero(mlp.b_in) if gated else None,
        parallel=bool(getattr(cfg, "parallel_attn_mlp", False)),
    )


def _of_heads(attn: Any, name: str, order: Numbers) -> Linear:
    """The queries, keys or values of all heads; grouped keys and values are not repeated.

    Args:
        attn: the attention.
        name: `"Q"`, `"K"` or `"V"`.
        order: in which to put the outputs of each head.
    """
    grouped = getattr(attn, f"_W_{name}", None) is not None
    prefix = "_" if grouped else ""
    weight = getattr(attn, f"{prefix}W_{name}")
    bias = getattr(attn, f"{prefix}b_{name}")
    matrix = rearrange(weight[..., order], "head d_model d_head -> d_model (head d_head)")
    return Linear(matrix, None if bias is None else bias[:, order].flatten())


def _unless_zero(bias: Tensor | None) -> Tensor | None:
    return bias if bias is not None and bool(bias.any()) else None


def _read_norm(norm: Any, cfg: Any) -> Norm:
    """Reads a norm of a model with the configuration `cfg`."""
    centred = NORMS[cfg.normalization_type]
    return Norm(norm.w, norm.b if centred else None, centred, cfg.eps)


def _scale(cfg: Any) -> float:
    if not getattr(cfg, "use_attn_scale", True):
        return 1.0
    return 1 / float(cfg.attn_scale) if cfg.attn_scale and cfg.attn_scale > 0 else cfg.d_head**-0.5


def _side_by_side(cfg: Any, turning: int) -> Int[Tensor, " d_head"]:
    """The order that puts the two partners of every rotary pair side by side, where that many numbers turn.

    Queries and keys are put into it alike, which changes none of their products.
    """
    order = torch.arange(cfg.d_head)
    if getattr(cfg, "rotary_adjacent_pairs", False):
        return order
    return torch.cat([torch.stack(order[:turning].chunk(2), 1).flatten(), order[turning:]])


def _factors(model: Any, length: int) -> Factors | None:
    """The rotary factor of every position and pair of numbers that turns; None without rotary positions.

    A bridge's own module says it: HuggingFace's base, share of the head and scaling are not all in the configuration
    that TransformerLens makes of HuggingFace's.
    """
    cfg = model.cfg
    if cfg.positional_embedding_type != "rotary":
        return None
    positions = torch.arange(length, device=model.W_U.device)
    own = getattr(model, "rotary_emb", None)
    if own is not None:
        cos, sin = own(model.W_U, positions[None])
        turning = cos.shape[-1]  # each factor stands there twice, once per partner
        return torch.complex(cos[0, :, : turning // 2].contiguous(), sin[0, :, : turning // 2].contiguous())
    turning = cfg.rotary_dim or cfg.d_head
    powers = torch.arange(0, turning, 2, device=positions.device, dtype=torch.float32) / turning
    angles = positions[:, None] * float(cfg.rotary_base) ** -powers
    return torch.polar(torch.ones_like(angles), angles)


def _turns(factors: Factors, pairs: int) -> Factors:
    """The factors of all pairs of a head: 1 for those that do not turn."""
    still = factors.new_ones(factors.shape[0], pairs - factors.shape[1])
    return torch.cat([factors, still], 1)
