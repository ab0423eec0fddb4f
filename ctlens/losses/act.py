"""ACT: the residual stream on the wrapped prompt is pulled to the reference's on the clean prompt.

`L = weight * mean_l mean_t || h_w[l,t] - sg(h_c[l,t]) ||^2` (Irpan et al. 2025, arXiv 2510.27062,
equation 1), with raw block outputs at every layer; the published codes take HuggingFace's
`hidden_states`, whose last entry is after the final norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ctlens.losses.base import Distance, VectorLoss
from ctlens.losses.distances import mean_squared_error, relative_squared_error, squared_error


@dataclass(frozen=True)
class ACT(VectorLoss):
    """Activation consistency.

    Attributes:
        weight: the default suits the sum over `d_model` on the shipped organism.
        site: `"resid_pre"`, `"resid_mid"` or `"resid_post"`.
        distance: `"squared"` (summed over `d_model`, as published), `"mse"` (averaged) or
            `"relative"` (squared, over the squared norm of the clean state).
    """

    name: ClassVar[str] = "act"
    sites: ClassVar[tuple[str, ...]] = ("resid_pre", "resid_mid", "resid_post")
    distances: ClassVar[Mapping[str, Distance]] = {
        "squared": squared_error,
        "mse": mean_squared_error,
        "relative": relative_squared_error,
    }
    weight: float = 0.01
    site: str = "resid_post"
    distance: str = "squared"
