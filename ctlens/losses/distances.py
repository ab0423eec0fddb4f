"""Distances between activations: pure functions, the same for training and for plots."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ctlens.core.types import widened

# A mass of 0 has no logarithm. Smaller masses count as this inside the logarithm; times the mass the term is still 0.
LOG_FLOOR = 1e-9
# A vector of norm 0 has no direction and no scale: divisors are at least this.
NORM_FLOOR = 1e-8


def squared_error(x: Float[Tensor, "... d"], y: Float[Tensor, "... d"]) -> Float[Tensor, ...]:
    """Measures the squared L2 distance, summed over the last axis (ACT, Irpan et al. 2025, equation 1).

    >>> squared_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))  # 0 + 4
    tensor(4.)
    """
    return (x - y).square().sum(-1)


def mean_squared_error(x: Float[Tensor, "... d"], y: Float[Tensor, "... d"]) -> Float[Tensor, ...]:
    """Measures the squared L2 distance, averaged over the last axis: `squared_error / d`.

    >>> mean_squared_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))  # (0 + 4) / 2
    tensor(2.)
    """
    return (x - y).square().mean(-1)


def relative_squared_error(x: Float[Tensor, "... d"], clean: Float[Tensor, "... d"]) -> Float[Tensor, ...]:
    """Measures the squared L2 distance as a share of the clean side's squared norm: no layer's scale dominates.

    >>> relative_squared_error(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0]))  # (1 + 0) / (0 + 4)
    tensor(0.2500)
    """
    return squared_error(x, clean) / clean.square().sum(-1).clamp(min=NORM_FLOOR)


def smooth_l1(x: Float[Tensor, "... d"], y: Float[Tensor, "... d"]) -> Float[Tensor, ...]:
    """Takes Huber's distance averaged over the last axis: `z^2 / 2` where `|z| < 1`, else `|z| - 1/2` (MLPCT's code).

    >>> smooth_l1(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))  # (0.5 + 2.5) / 2
    tensor(1.5000)
    """
    return torch.nn.functional.smooth_l1_loss(x, y, reduction="none").mean(-1)


def normalised_mse(x: Float[Tensor, "... d"], y: Float[Tensor, "... d"]) -> Float[Tensor, ...]:
    """Measures the mean squared error of the unit vectors, which is `2/d * cosine_distance` (MLPCT's code).

    >>> normalised_mse(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0]))  # (1 + 1) / 2
    tensor(1.)
    """
    unit_x = torch.nn.functional.normalize(x, dim=-1, eps=NORM_FLOOR)
    unit_y = torch.nn.functional.normalize(y, dim=-1, eps=NORM_FLOOR)
    return mean_squared_error(unit_x, unit_y)


def cosine_distance(x: Float[Tensor, "... d"], y: Float[Tensor, "... d"]) -> Float[Tensor, ...]:
    """Measures one minus the cosine similarity: 0 for the same direction, 1 for orthogonal, 2 for opposite (MLPCT).

    >>> cosine_distance(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([5.0, 0.0]))
    tensor([0., 1.])
    """
    dot, norm = _DotAndNorm.apply(x, y)
    return 1 - dot / (norm * torch.linalg.vector_norm(y, dim=-1)).clamp(min=NORM_FLOOR)


class _DotAndNorm(torch.autograd.Function):
    """_DotAndNorm is the dot product `x . y` and the norm of `x`, with `dot' y + norm' x/|x|` as the gradient of `x`.

    torch's own backward passes give the same bits, but make the two terms apart and go over the vectors more often.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        dot = torch.linalg.vecdot(x, y)  # cheaper than cosine_similarity, and than a batch of 1 x 1 products
        norm = torch.linalg.vector_norm(x, dim=-1)
        ctx.save_for_backward(x, y, norm)
        return dot, norm

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        x, y, norm = ctx.saved_tensors
        along_dot, along_norm = grad_outputs
        norm = norm.masked_fill(norm == 0, torch.inf)  # a vector of norm 0 has no direction: it gets no gradient
        of_x = (x / norm[..., None]).mul_(along_norm[..., None]).add_(y * along_dot[..., None])
        return of_x, x * along_dot[..., None] if ctx.needs_input_grad[1] else None


def jensen_shannon(p: Float[Tensor, "... k"], q: Float[Tensor, "... k"]) -> Float[Tensor, ...]:
    """Measures the Jensen-Shannon divergence in nats: `KL(p||m)/2 + KL(q||m)/2` with `m = (p+q)/2` (AttCT).

    It is between 0 and log 2 for distributions. Rows may sum to less than one, as in the published AttCT;
    the value is still at least 0.

    >>> jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))  # disjoint: log 2
    tensor(0.6931)
    >>> jensen_shannon(torch.tensor([0.3, 0.7]), torch.tensor([0.3, 0.7]))
    tensor(0.)
    """
    log_mean = ((p + q) / 2).clamp(min=LOG_FLOOR).log()
    to_mean_of_p = (p * (p.clamp(min=LOG_FLOOR).log() - log_mean)).sum(-1)
    to_mean_of_q = (q * (q.clamp(min=LOG_FLOOR).log() - log_mean)).sum(-1)
    return (to_mean_of_p + to_mean_of_q) / 2


def kl_of_masses(p: Float[Tensor, "... k"], q: Float[Tensor, "... k"]) -> Float[Tensor, ...]:
    """Measures `KL(p || q)` in nats for masses: `sum_k [ p log(p/q) - p + q ]`, the usual KL if both rows sum to one.

    The last two terms matter for rows that sum to less than one. With them the value is at least 0 and
    smallest at `q = p`; without them it would fall with any further mass in `q`.

    >>> kl_of_masses(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))  # log 2
    tensor(0.6931)
    >>> kl_of_masses(torch.tensor([0.2, 0.0]), torch.tensor([0.2, 0.3]))  # 0 + 0.3
    tensor(0.3000)
    """
    log_ratio = p.clamp(min=LOG_FLOOR).log() - q.clamp(min=LOG_FLOOR).log()
    return (p * log_ratio - p + q).sum(-1)


def kl_divergence(target: Float[Tensor, "... k"], logits: Float[Tensor, "... k"]) -> Float[Tensor, ...]:
    """Measures `KL(softmax(target) || softmax(logits))` in nats; the first argument is the reference.

    >>> kl_divergence(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0]))
    tensor(0.)
    """
    reference, log_p = widened(target).log_softmax(-1), widened(logits).log_softmax(-1)
    return (reference.exp() * (reference - log_p)).sum(-1)
