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


def bct(logits_clean: Tensor, logits_wrapped: Tensor, last: int, temperature: float) -> float:
    """Cross-entropy to the clean side's distributions at the last tokens, times the squared temperature."""
    tokens = []
    for clean, wrapped in zip(logits_clean[-last:], logits_wrapped[-last:], strict=True):
        target = (clean / temperature).softmax(-1)
        log_q = (wrapped / temperature).log_softmax(-1)
        tokens.append(-sum(float(p) * float(q) for p, q in zip(target, log_q, strict=True)))
    return temperature**2 * sum(tokens) / len(tokens)
