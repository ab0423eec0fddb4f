"""Irpan et al. 2025 (arXiv 2510.27062), equation 1."""

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
