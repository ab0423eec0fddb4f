"""ACT: the residual stream on the wrapped prompt is pulled to the reference's on the clean prompt.

`L = weight * mean_l mean_t || h_w[l,t] - sg(h_c[l,t]) ||^2` (Irpan et al. 2025, arXiv 2510.27062,
equation 1), with raw block outputs at every layer; `final_norm=True` is for codes that take
HuggingFace's `hidden_states`, whose last entry is after the final norm.
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
        weight: the default suits the sum over `d_model` on the shipped organism.
        site: `"resid_pre"`, `"resid_mid"` or `"resid_post"`.
        distance: `"squared"` (summed over `d_model`, as published), `"mse"` (averaged) or
            `"relative"` (squared, over the squared norm of the clean state).
        final_norm: read the last layer after the final norm, in place of the last block's output.
    """

    name: ClassVar[str] = "act"
    sites: ClassVar[tuple[str, ...]] = ("resid_pre", "resid_mid", "resid_post")
    distances: ClassVar[Mapping[str, Distance]] = {
        "squared": squared_error,
        "mse": mean_squared_error,
        "relative": relative_squared_error,
    }
    # The published 1e-4 is for larger models: the residual norms of the organism are small.
    weight: float = 0.01
    site: str = "resid_post"
    distance: str = "squared"
    final_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final_norm and self.site != "resid_post":
            raise CtlensError(
                f"final_norm stands for the last block's output: it goes with resid_post, not {self.site}."
            )

    def hook_names(self, model: LensModel) -> list[str]:
        """Lists the site at every selected layer; with `final_norm` the last one stands after the final norm.

        Raises:
            CtlensError: `final_norm` without the last layer among the selected ones.
        """
        names = super().hook_names(model)
        if not self.final_norm:
            return names
        (last,) = resolve(model, self.point, "last")
        if last not in names:
            raise CtlensError("final_norm concerns the last layer, which is not among the layers of this ACT.")
        return [FINAL_NORM if name == last else name for name in names]
