"""AttOut: what attention writes on the wrapped prompt is turned to what the reference's writes on the clean one.

`L = weight * mean_l mean_{t,h} d( z_w[l,t,h], sg(z_c[l,t,h]) )`, with `z` the values mixed by the
attention weights of head `h`: AttCT with the values in, so that attention may move between tokens
that say the same, and mass on a token whose value is near zero (the sink) does not count. Not published:
the stack paper's code (arXiv 2606.05817) has an `AttentionOutputConsistencyLoss`, which compares
the outputs of whole blocks, as ACT does; this is the attention's own output.
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
    """AttOut compares what attention writes, head by head or as a sum.

    Attributes:
        weight: the default suits the shipped organism.
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
    weight: float = 10.0
    site: str = "z"
    distance: str = "cosine"
