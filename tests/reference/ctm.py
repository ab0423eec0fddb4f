"""Cross-entropy as in the code of rate-matching consistency training; its other losses are those of `stack`."""

from __future__ import annotations

from torch import Tensor


def bct(logits: Tensor, ids: tuple[int, ...], weights: list[float]) -> float:
    """Weighted negative log-likelihood: `weights` has one entry for each token but the first, 1 on the answer."""
    log_p = logits[:-1].log_softmax(-1)
    surprises = [-float(log_p[step][token]) for step, token in enumerate(ids[1:])]
    return sum(w * s for w, s in zip(weights, surprises, strict=True)) / sum(weights)
