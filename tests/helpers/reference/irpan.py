"""Irpan et al. 2025 (arXiv 2510.27062): equation 1, and supervised fine-tuning on the clean prompt's answer."""

from __future__ import annotations

from torch import Tensor


def act(clean: list[Tensor], wrapped: list[Tensor], suffix: int, weight: float) -> float:
    """The squared distance of states `[token, d]`, in expectation over layers and the tokens of the suffix."""
    terms = [
        float(((h_wrapped[-back] - h_clean[-back]) ** 2).sum())
        for h_clean, h_wrapped in zip(clean, wrapped, strict=True)
        for back in range(1, suffix + 1)
    ]
    return weight * sum(terms) / len(terms)


def bct(logits: Tensor, answer: list[int]) -> float:
    """Negative log-likelihood of the answer's tokens, which end the sequence that `logits` belong to."""
    log_p = logits[-1 - len(answer) : -1].log_softmax(-1)
    return -sum(float(row[token]) for row, token in zip(log_p, answer, strict=True)) / len(answer)
