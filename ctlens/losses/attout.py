"""AttOut turns the output of attention on the wrapped prompt to that of the reference on the clean prompt.

`L = weight * mean_l mean_{t,h} d( z_w[l,t,h], sg(z_c[l,t,h]) )`, with `z` the values mixed by the
attention weights of head `h`. Unlike AttCT it includes the values: attention may move between tokens
with equal values, and mass on a token whose value is near zero (the sink) does not count. The loss is not
published. The stack paper's code (arXiv 2606.05817) has an `AttentionOutputConsistencyLoss`, which compares
the outputs of whole blocks, as ACT does; AttOut compares the output of attention itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from einops import reduce
from torch import Tensor

from ctlens.losses.base import Distance, VectorLoss
from ctlens.losses.distances import cosine_distance, mean_squared_error, relative_squared_error, squared_error


def over_heads(distance: Distance) -> Distance:
    """Makes a distance that compares each head's vectors and averages over the heads where there are any.

    >>> import torch
    >>> z = torch.tensor([[[[3.0, 0.0], [0.0, 1.0]]]])  # one pair, one token, two heads
    >>> over_heads(squared_error)(z, torch.zeros_like(z))  # (9 + 1) / 2
    tensor([[5.]])
    """

    def averaged(x: Tensor, y: Tensor) -> Tensor:
        return reduce(distance(x, y), "batch width ... -> batch width", "mean")

    return averaged


@dataclass(frozen=True)
class AttOut(VectorLoss):
    """AttOut is consistency of attention's output: it compares it head by head or as a sum.

    Attributes:
        weight: factor of the total; the default suits the shipped organism.
        site: `"z"` (per head, before the output matrix) or `"attn_out"` (their sum in the residual stream).
        distance: `"cosine"`, `"mse"`, `"squared"` (summed over the vector) or `"relative"` (squared,
            over the squared norm of the clean vector); at `"z"` of each head, then the mean over heads.
    """

    name: ClassVar[str] = "attout"
    sites: ClassVar[tuple[str, ...]] = ("z", "attn_out")
    distances: ClassVar[Mapping[str, Distance]] = {
        "cosine": over_heads(cosine_distance),
        "mse": over_heads(mean_squared_error),
        "squared": over_heads(squared_error),
        "relative": over_heads(relative_squared_error),
    }
    weight: float = 10.0  # chosen by eye, as for MLPCT, which has the same distance; no search was made
    site: str = "z"
    distance: str = "cosine"
