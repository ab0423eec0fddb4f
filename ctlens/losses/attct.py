"""AttCT: each head's attention on the wrapped prompt is turned to the reference's on the clean prompt.

`L = weight * mean_l mean_{head,q} JSD(a_c[h,q,:], a_w[h,q,:])` over aligned queries and keys
(*Consistency Training Along the Transformer Stack*, arXiv 2606.05817). Attention to keys outside
the window (the wrapper, the BOS) is cut off; the `keys` option says what becomes of that mass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ctlens.losses.base import Forwards, InternalLoss, check_option
from ctlens.losses.distances import LOG_FLOOR, jensen_shannon
from ctlens.types import Pattern, PerRow, Positions

KEYS = ("raw", "renormalised", "rest")
DISTANCES = ("jsd",)


@dataclass(frozen=True)
class AttCT(InternalLoss):
    """Attention consistency.

    Attributes:
        weight: the default suits the shipped organism.
        distance: `"jsd"`, per head, in nats.
        keys: `"raw"` keeps rows that sum to less than one (as published); `"renormalised"` divides
            by that sum; `"rest"` adds one bucket that holds the mass outside the window, so that
            attention leaving the window is seen.
    """

    name: ClassVar[str] = "attct"
    weight: float = 200.0
    distance: str = "jsd"
    keys: str = "raw"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("distance of AttCT", self.distance, DISTANCES)
        check_option("keys of AttCT", self.keys, KEYS)

    @property
    def point(self) -> str:
        """The attention weights after the softmax."""
        return "pattern"

    def row_values(self, forwards: Forwards, hook_names: Sequence[str]) -> dict[str, PerRow]:
        """The divergence per hook point and pair, averaged over heads and aligned queries."""
        matched = forwards.batch.matched[self.window]
        values: dict[str, PerRow] = {}
        for name in hook_names:
            clean = self._rows(forwards.clean[name].detach(), matched.clean, matched.valid)
            wrapped = self._rows(forwards.wrapped[name], matched.wrapped, matched.valid)
            values[name] = matched.row_mean(jensen_shannon(clean, wrapped).mean(-1))
        return values

    def _rows(
        self, pattern: Pattern, positions: Positions, valid: Bool[Tensor, "batch width"]
    ) -> Float[Tensor, "batch width head key"]:
        block = aligned_block(pattern, positions, valid)
        if self.keys == "renormalised":
            return block / block.sum(-1, keepdim=True).clamp(min=LOG_FLOOR)
        if self.keys == "rest":
            return torch.cat([block, (1 - block.sum(-1, keepdim=True)).clamp(min=0)], dim=-1)
        return block


def aligned_block(
    pattern: Pattern, positions: Positions, valid: Bool[Tensor, "batch width"]
) -> Float[Tensor, "batch width head width"]:
    """Attention from aligned queries to aligned keys, `[batch, query, head, key]`, zero at keys that are not valid.

    Args:
        pattern: attention weights after the softmax, `[batch, head, q, k]`.
        positions: aligned positions of each row.
        valid: which of them are real.
    """
    rows = torch.arange(len(pattern), device=pattern.device)[:, None]
    queries = pattern.transpose(1, 2)[rows, positions]
    keys = positions[:, None, None, :].expand(*queries.shape[:3], -1)
    return queries.gather(-1, keys) * valid[:, None, None, :]
