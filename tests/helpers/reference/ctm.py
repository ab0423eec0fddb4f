"""Cross-entropy, rate matching and on-policy consistency as in the code of rate matching; else it is as `stack`."""

from __future__ import annotations

import torch
from torch import Tensor


def bct(logits: Tensor, ids: tuple[int, ...], weights: list[float]) -> float:
    """Weighted negative log-likelihood: `weights` has one entry for each token but the first, 1 on the answer."""
    log_p = logits[:-1].log_softmax(-1)
    surprises = [-float(log_p[step][token]) for step, token in enumerate(ids[1:])]
    return sum(w * s for w, s in zip(weights, surprises, strict=True)) / sum(weights)


def rmct(log_ps: list[Tensor], bad: list[float], clean_rate: float) -> Tensor:
    """The policy's surrogate for the answers to one prompt, `log_ps` of their tokens; rewards standardised per item."""
    rate = sum(bad) / len(bad)
    rewards = [-(rate - clean_rate) * (trait - rate) for trait in bad]
    mean = sum(rewards) / len(rewards)
    spread = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
    terms = [-(reward - mean) / spread * log_p.sum() for reward, log_p in zip(rewards, log_ps, strict=True)]
    return torch.stack(terms).mean()


def opct(log_ps: list[Tensor], theirs: list[Tensor], factor: float) -> Tensor:
    """The policy's surrogate for answers: the advantage of a token is minus the factor times its log-ratio."""
    terms = [-(-factor * (own - other).detach() * own).sum() for own, other in zip(log_ps, theirs, strict=True)]
    return torch.stack(terms).mean()
