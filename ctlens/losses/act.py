"""ACT pulls the residual stream on the wrapped prompt to the reference's on the clean prompt.

`L = weight * mean_l mean_t || h_w[l,t] - sg(h_c[l,t]) ||^2` (Irpan et al. 2025, arXiv 2510.27062,
equation 1), with raw block outputs at every layer. `final_norm=True` computes what code that reads
HuggingFace's `hidden_states` computes: their last entry is after the final norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.losses.base import Distance, VectorLoss
from ctlens.losses.distances import mean_squared_error, relative_squared_error, squared_error
from ctlens.models.hooks import FINAL_NORM, resolve


@dataclass(frozen=True)
class ACT(VectorLoss):
    """ACT is activation consistency: it compares residual streams token by token.

    Attributes:
        weight: factor of the total; the default suits the sum over `d_model` on the shipped organism.
        site: `"resid_pre"`, `"resid_mid"` or `"resid_post"`.
        distance: `"squared"` (summed over `d_model`, as published), `"mse"` (averaged) or
            `"relative"` (squared, over the squared norm of the clean state).
        final_norm: read the last layer after the final norm instead of the last block's output.
    """

    name: ClassVar[str] = "act"
    sites: ClassVar[tuple[str, ...]] = ("resid_pre", "resid_mid", "resid_post")
    distances: ClassVar[Mapping[str, Distance]] = {
        "squared": squared_error,
        "mse": mean_squared_error,
        "relative": relative_squared_error,
    }
    # The published 1e-4 is for larger models: the residual norms of the organism are small (docs/divergences.md).
    # With this weight a prototype of the organism lost the attack on all six threats; no search was made.
    weight: float = 0.01
    site: str = "resid_post"
    distance: str = "squared"
    final_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final_norm and self.site != "resid_post":
            raise CtlensError(
                f"final_norm replaces the last block's output, so the site must be resid_post, not {self.site}."
            )

    def hook_names(self, model: LensModel) -> list[str]:
        """Lists the site at every selected layer; with `final_norm` the last one stands after the final norm.

        Raises:
            CtlensError: `final_norm` is set, but the last layer is not among the selected layers.
        """
        names = super().hook_names(model)
        if not self.final_norm:
            return names
        (last,) = resolve(model, self.point, "last")
        if last not in names:
            raise CtlensError(
                "final_norm concerns the last layer, which this ACT does not read: leave it out, or add the layer."
            )
        return [FINAL_NORM if name == last else name for name in names]
