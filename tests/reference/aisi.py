"""The losses of the code of *Consistency Training Can Entrench Misalignment* (arXiv 2606.03810), at last tokens."""

from __future__ import annotations

from torch import Tensor


def act(blocks_clean: list[Tensor], blocks_wrapped: list[Tensor], last: int, scale: float) -> float:
    """The mean square between raw block outputs `[token, d]` of one model, scaled inside the square."""
    layers = []
    for clean, wrapped in zip(blocks_clean, blocks_wrapped, strict=True):
        scaled = [scale**0.5 * value for value in (wrapped[-last:] - clean[-last:]).flatten().tolist()]
        layers.append(sum(value**2 for value in scaled) / len(scaled))
    return sum(layers) / len(layers)
