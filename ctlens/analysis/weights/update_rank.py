"""The rank of an update: in how many dimensions a training changed each matrix of a model.

With `sigma` the singular values of an update `after - before` as one matrix of outputs by inputs and
`p = sigma / sum(sigma)`:

- `effective_rank = exp(-sum_i p_i log p_i)` (Roy and Vetterli 2007): the number of singular values where
  they are equal;
- `stable_rank = |update|_F^2 / |update|_2^2 = sum_i sigma_i^2 / sigma_1^2`: the same, led by the largest of them;
- `rank`: the number of singular values above what rounding the weights leaves behind.

A matrix that did not change has rank 0 in all three. ReLoRA (Lialin et al. 2023, arXiv 2307.05695) looks
at the spectrum of updates to show that merged low-rank updates add up to one of high rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from ctlens import plots
from ctlens.analysis.base.forward import require_comparable
from ctlens.analysis.base.result import Result, beside
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.models.finite import require_finite_weights
from ctlens.models.matrices import MATRICES, Slot, slots
from ctlens.models.parameters import require_whole
from ctlens.plots import Figure

_TITLES = {
    "effective_rank": "Of how many dimensions is the update of each matrix?",
    "stable_rank": "How many dimensions hold the size of each update?",
    "rank": "What rank has the update of each matrix?",
    "norm": "How large is the update of each matrix?",
}
_Y_TITLES = {"effective_rank": "effective rank", "stable_rank": "stable rank", "rank": "rank", "norm": "Frobenius norm"}


@dataclass(frozen=True)
class UpdateRank(Result):
    """The result of `update_rank`: the singular values of every matrix's update, and the ranks that follow from them.

    >>> values = np.array([[[3.0, 3.0, 0.0], [2.0, 0.0, 0.0]]])  # one layer; two equal values, then one alone
    >>> spectrum = UpdateRank(values, np.zeros((1, 2)), ("q", "v"))
    >>> spectrum.effective_rank.round(6).tolist(), spectrum.stable_rank.tolist(), spectrum.rank.tolist()
    ([[2.0, 1.0]], [[2.0, 1.0]], [[2.0, 1.0]])

    Attributes:
        singular_values: `[layer, matrix, value]`, falling; NaN beyond the smaller side of a matrix, and
            where a layer lacks the matrix.
        rounding: `[layer, matrix]`, the largest singular value that rounding may leave: the precision of
            the weights times their Frobenius norm.
        matrices: their names, see `ctlens.models.matrices.MATRICES`.
    """

    singular_values: Float[np.ndarray, "layer matrix value"]
    rounding: Float[np.ndarray, "layer matrix"]
    matrices: tuple[str, ...]

    @property
    def effective_rank(self) -> Float[np.ndarray, "layer matrix"]:
        """The exponential of the entropy of the singular values, as shares of their sum."""
        total = np.nansum(self.singular_values, -1, keepdims=True)
        share = np.divide(self.singular_values, total, out=np.zeros_like(self.singular_values), where=total > 0)
        surprise = -np.log(share, out=np.zeros_like(share), where=share > 0)
        return self._known(np.where(total[..., 0] > 0, np.exp(np.nansum(share * surprise, -1)), 0))

    @property
    def stable_rank(self) -> Float[np.ndarray, "layer matrix"]:
        """The squared Frobenius norm over the squared largest singular value."""
        largest = self.singular_values[..., 0]
        squares = np.nansum(np.square(self.singular_values), -1)
        return self._known(np.divide(squares, largest**2, out=np.zeros_like(squares), where=largest > 0))

    @property
    def rank(self) -> Float[np.ndarray, "layer matrix"]:
        """The number of singular values above `rounding`."""
        return self._known((self.singular_values > self.rounding[..., None]).sum(-1).astype(float))

    @property
    def norm(self) -> Float[np.ndarray, "layer matrix"]:
        """The Frobenius norm."""
        return self._known(np.sqrt(np.nansum(np.square(self.singular_values), -1)))

    def _known(self, values: Float[np.ndarray, "layer matrix"]) -> Float[np.ndarray, "layer matrix"]:
        """The values, NaN where a layer lacks the matrix."""
        return np.where(np.isnan(self.singular_values[..., 0]), np.nan, values)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and matrix: the ranks, the `norm`, and `largest`, the highest rank possible."""
        layers, numbers = np.nonzero(~np.isnan(self.singular_values[..., 0]))
        table = pd.DataFrame({"layer": layers, "matrix": np.array(self.matrices)[numbers]})
        for name in _TITLES:
            table[name] = getattr(self, name)[layers, numbers]
        return table.assign(largest=(~np.isnan(self.singular_values)).sum(-1)[layers, numbers])

    def figure(self, quantity: str = "effective_rank") -> Figure:
        """A quantity by layer, a panel per matrix.

        Args:
            quantity: `"effective_rank"`, `"stable_rank"`, `"rank"` or `"norm"`.

        Raises:
            CtlensError: the quantity is unknown.
        """
        return _drawn({"update": self}, quantity)

    def compare(
        self,
        others: Mapping[str, UpdateRank],
        *,
        label: str,
        quantity: str = "effective_rank",
        subtitle: str | None = None,
    ) -> Figure:
        """A quantity of several trainings by layer, one line per training, this one first, and one panel per matrix.

        Args:
            others: updates by other trainings of one shape of model, by label; they may hold this one too, under its
                label.
            label: of this training.
            quantity: `"effective_rank"`, `"stable_rank"`, `"rank"` or `"norm"`.
            subtitle: one line under the title.

        Raises:
            CtlensError: another training has this one's label, or the quantity is unknown.
        """
        return _drawn(beside(self, others, label), quantity, subtitle)


def _drawn(results: Mapping[str, UpdateRank], quantity: str, subtitle: str | None = None) -> Figure:
    """A panel per matrix, one line per result."""
    if quantity not in _TITLES:
        raise unknown("quantity", quantity, tuple(_TITLES))
    first = next(iter(results.values()))
    panels = {
        matrix: {label: getattr(result, quantity)[:, index] for label, result in results.items()}
        for index, matrix in enumerate(first.matrices)
    }
    return plots.update_ranks(panels, _TITLES[quantity], y_title=_Y_TITLES[quantity], subtitle=subtitle)


@public
@torch.no_grad()
def update_rank(before: LensModel, after: LensModel) -> UpdateRank:
    """Measures the singular values of what a training did to the matrices of each block.

    Args:
        before: the reference, in eval mode.
        after: the trained model, in eval mode; adapters count, whether they are merged or not.

    Raises:
        CtlensError: the models do not compare or are in training mode, keep no such matrices, or hold a weight that is
            not finite.
    """
    require_comparable(before, after)
    for model in (before, after):
        require_whole(model)
        require_finite_weights(model)
    slots_before = slots(before, MATRICES)
    slots_after = slots(after, MATRICES)
    names = slots_before.keys() | slots_after.keys()
    odd = {name for name in names if _shape(slots_before, name) != _shape(slots_after, name)}
    if odd or not slots_before:
        raise CtlensError(
            f"the models do not compare: {min(odd, default='no block')} is not the same matrix in both; "
            "load both in the same way."
        )
    matrices = tuple(matrix for matrix in MATRICES if any(name.endswith(f".{matrix}") for name in slots_before))
    n_values = max(min(slot.matrix_shape) for slot in slots_before.values())
    spectra = np.full((before.cfg.n_layers, len(matrices), n_values), np.nan)
    rounding = np.full(spectra.shape[:2], np.nan)
    for name, slot in slots_before.items():
        _, layer, matrix = name.split(".")  # as blocks.0.q
        cell = (int(layer), matrices.index(matrix))
        trained = slots_after[name].matrix.double()
        values = torch.linalg.svdvals(trained - slot.matrix.double()).cpu().numpy()
        spectra[cell][: len(values)] = values
        rounding[cell] = torch.finfo(slots_after[name].matrix.dtype).eps * float(trained.norm())
    return UpdateRank(spectra, rounding, matrices)


def _shape(found: Mapping[str, Slot], name: str) -> tuple[int, int] | None:
    return found[name].matrix_shape if name in found else None
