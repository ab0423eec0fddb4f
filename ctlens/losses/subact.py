"""SubACT is ACT within a subspace of the residual stream: that of the shifts which wrappers make before training.

`L = weight * mean_l mean_t || P_l (h_w[l,t] - sg(h_c[l,t])) ||^2 / (|| h_c[l,t] ||^2 + 1e-6)`. `P_l` projects on the
leading right singular vectors of the reference's mean shifts, wrapped less clean, one row per wrapper (TraSN, Cao,
arXiv 2608.11705, with one layer and a row per trait). Its controls are a random subspace of the same rank, and the rest
of the stream: what the leading vectors leave out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ctlens.core.errors import CtlensError
from ctlens.core.limits import AT_LEAST_1, require
from ctlens.core.types import PerRow
from ctlens.losses.base import Forwards, InternalLoss, at_positions, check_option

PARTS = ("leading", "random", "rest")
_FLOOR = 1e-6  # TraSN's


@dataclass(frozen=True)
class SubACT(InternalLoss):
    """SubACT is activation consistency in a part of the stream, which a trainer finds on its pairs before training.

    Attributes:
        weight: factor of the total; the default was chosen by `benchmarks/choose_rivals.py`.
        rank: how many singular vectors, or as many as there are wrappers; published are 4, which held 78% of the
            variance there.
        part: `"leading"`, the subspace of the leading vectors; `"random"`, one of equal rank drawn by the training's
            seed; or `"rest"`, all of the stream but the leading vectors.
    """

    name: ClassVar[str] = "subact"
    weight: float = 256.0
    rank: int = 4
    part: str = "leading"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(AT_LEAST_1, rank=self.rank)
        check_option("part of SubACT", self.part, PARTS)

    @property
    def point(self) -> str:
        """The loss reads the residual stream behind each block."""
        return "resid_post"

    @property
    def subspace_rank(self) -> int:
        """The rank of the subspaces that the loss is given by hook point."""
        return self.rank

    @property
    def subspace_is_random(self) -> bool:
        """True if the subspaces are drawn and not those of the shifts."""
        return self.part == "random"

    def row_values(self, forwards: Forwards, hook_names: Sequence[str]) -> dict[str, PerRow]:
        """Measures the part of the shift per hook point and pair, over the clean norm, averaged over aligned tokens.

        Raises:
            CtlensError: `forwards` has no subspaces, which only a training finds.
        """
        if not set(hook_names) <= set(forwards.subspaces):
            raise CtlensError("SubACT needs the subspaces that a training finds: use ct.train or a Trainer.")
        matched = forwards.batch.matched[self.window]
        values: dict[str, PerRow] = {}
        for name in hook_names:
            clean = at_positions(forwards.clean[name], matched.clean).detach()
            shift = at_positions(forwards.wrapped[name], matched.wrapped) - clean
            basis = forwards.subspaces[name].to(shift)
            inside = (shift @ basis.T).square().sum(-1)
            part = shift.square().sum(-1) - inside if self.part == "rest" else inside
            values[name] = matched.row_mean(part / (clean.square().sum(-1) + _FLOOR))
        return values
