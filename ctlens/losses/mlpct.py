"""MLPCT turns post-activation MLP states on the wrapped prompt to the reference's on the clean prompt.

`L = weight * mean_l mean_t [ 1 - cos(m_w[l,t], sg(m_c[l,t])) ]`, with `m` the input of the
down-projection, `act(gate) * up` in a gated MLP (*Consistency Training Along the Transformer
Stack*, arXiv 2606.05817).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ctlens.losses.base import Distance, VectorLoss
from ctlens.losses.distances import cosine_distance, mean_squared_error, normalised_mse, smooth_l1


@dataclass(frozen=True)
class MLPCT(VectorLoss):
    """MLPCT is MLP consistency: it compares the hidden states of MLPs token by token.

    Attributes:
        weight: factor of the total; the default suits the shipped organism.
        site: `"mlp_post"` (hidden states, as published) or `"mlp_out"` (their contribution to the residual stream).
        distance: `"cosine"` (as published), `"mse"`, `"smooth_l1"` or `"normalised_mse"`; the last
            is `2/d` times the cosine distance, so give it `d/2` times the weight.
    """

    name: ClassVar[str] = "mlpct"
    sites: ClassVar[tuple[str, ...]] = ("mlp_post", "mlp_out")
    distances: ClassVar[Mapping[str, Distance]] = {
        "cosine": cosine_distance,
        "mse": mean_squared_error,
        "smooth_l1": smooth_l1,
        "normalised_mse": normalised_mse,
    }
    # Published is 1. The raw value is small on the organism (docs/divergences.md). With this weight a prototype of
    # the organism lost the attack on all six threats; no search was made.
    weight: float = 10.0
    site: str = "mlp_post"
    distance: str = "cosine"
