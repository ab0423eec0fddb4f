"""Of how many dimensions is what a training did to each matrix of a model?

With `sigma` the singular values of an update `after - before` as one matrix of outputs by inputs and
`p = sigma / sum(sigma)`:

- `effective_rank = exp(-sum_i p_i log p_i)` (Roy and Vetterli 2007): the number of singular values where
  they are equal;
- `stable_rank = |update|_F^2 / |update|_2^2 = sum_i sigma_i^2 / sigma_1^2`, led by the largest;
- `rank`: how many are above what rounding the weights leaves behind.

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
from ctlens.analysis.base.result import Result
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.types import LensModel
from ctlens.models.matrices import MATRICES, Slot, slots
from ctlens.plots import Figure

TITLES = {
    "effective_rank": "Of how many dimensions is the update of each matrix?",
    "stable_rank": "How many dimensions hold the size of each update?",
    "rank": "What rank has the update of each matrix?",
    "norm": "How large is the update of each matrix?",
}
Y_TITLES = {"effective_rank": "effective rank", "stable_rank": "stable rank", "rank": "rank", "norm": "Frobenius norm"}


@dataclass(frozen=True)
class UpdateRank(Result):
    """The spectrum of every update.

    >>> values = np.array([[[3.0, 3.0, 0.0], [2.0, 0.0, 0.0]]])  # one layer; two equal values, then one alone
    >>> spectrum = UpdateRank(values, np.zeros((1, 2)), ("q", "v"))
    >>> spectrum.effective_rank.round(6).tolist(), spectrum.stable_rank.tolist(), spectrum.rank.tolist()
    ([[2.0, 1.0]], [[2.0, 1.0]], [[2.0, 1.0]])

    Attributes:
        singular_values: `[layer, site, value]`, falling; NaN beyond the smaller side of a matrix, and
            where a layer lacks the site.
        rounding: `[layer, site]`, the largest singular value that rounding may leave: the precision of
            the weights times their Frobenius norm.
        sites: names of the matrices, see `ctlens.models.matrices.MATRICES`.
    """

    singular_values: Float[np.ndarray, "layer site value"]
    rounding: Float[np.ndarray, "layer site"]
    sites: tuple[str, ...]

    @property
    def effective_rank(self) -> Float[np.ndarray, "layer site"]:
        """The exponential of the entropy of the singular values, as shares of their sum."""
        total = np.nansum(self.singular_values, -1, keepdims=True)
        share = np.divide(self.singular_values, total, out=np.zeros_like(self.singular_values), where=total > 0)
        surprise = -np.log(share, out=np.zeros_like(share), where=share > 0)
        return self._known(np.where(total[..., 0] > 0, np.exp(np.nansum(share * surprise, -1)), 0))

    @property
    def stable_rank(self) -> Float[np.ndarray, "layer site"]:
        """The squared Frobenius norm over the squared largest singular value."""
        largest = self.singular_values[..., 0]
        squares = np.nansum(np.square(self.singular_values), -1)
        return self._known(np.divide(squares, largest**2, out=np.zeros_like(squares), where=largest > 0))

    @property
    def rank(self) -> Float[np.ndarray, "layer site"]:
        """How many singular values are above `rounding`."""
        return self._known((self.singular_values > self.rounding[..., None]).sum(-1).astype(float))

    @property
    def norm(self) -> Float[np.ndarray, "layer site"]:
        """The Frobenius norm."""
        return self._known(np.sqrt(np.nansum(np.square(self.singular_values), -1)))

    def _known(self, values: Float[np.ndarray, "layer site"]) -> Float[np.ndarray, "layer site"]:
        """NaN where a layer lacks the site."""
        return np.where(np.isnan(self.singular_values[..., 0]), np.nan, values)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and site: the ranks, the `norm`, and `largest`, the highest rank possible."""
        layers, numbers = np.nonzero(~np.isnan(self.singular_values[..., 0]))
        table = pd.DataFrame({"layer": layers, "site": np.array(self.sites)[numbers]})
        for name in TITLES:
            table[name] = getattr(self, name)[layers, numbers]
        return table.assign(largest=(~np.isnan(self.singular_values)).sum(-1)[layers, numbers])

    def figure(self, quantity: str = "effective_rank") -> Figure:
        """The quantity by layer, a panel a site."""
        return figure({"update": self}, quantity)


def figure(
    results: Mapping[str, UpdateRank], quantity: str = "effective_rank", *, subtitle: str | None = None
) -> Figure:
    """Several trainings in one figure, one line a training and one panel a site.

    Args:
        results: by method or another label; of one shape of model.
        quantity: `"effective_rank"`, `"stable_rank"`, `"rank"` or `"norm"`.
        subtitle: one line under the title.

    Raises:
        CtlensError: the quantity is unknown.
    """
    if quantity not in TITLES:
        raise unknown("quantity", quantity, tuple(TITLES))
    first = next(iter(results.values()))
    panels = {
        site: {label: getattr(result, quantity)[:, number] for label, result in results.items()}
        for number, site in enumerate(first.sites)
    }
    return plots.update_ranks(panels, TITLES[quantity], y_title=Y_TITLES[quantity], subtitle=subtitle)


@torch.no_grad()
def update_rank(before: LensModel, after: LensModel) -> UpdateRank:
    """The singular values of what a training did to the matrices of each block.

    Args:
        before: the reference, in eval mode.
        after: the trained model, in eval mode; adapters count, whether they are merged or not.

    Raises:
        CtlensError: the models do not compare or are in training mode, or keep no such matrices.
    """
    require_comparable(before, after)
    here, there = slots(before, MATRICES), slots(after, MATRICES)
    odd = {place for place in here.keys() | there.keys() if _shape(here, place) != _shape(there, place)}
    if odd or not here:
        raise CtlensError(f"the models do not compare: {min(odd, default='no block')} is not the same matrix in both.")
    sites = tuple(site for site in MATRICES if any(place.endswith(f".{site}") for place in here))
    spectra = np.full((before.cfg.n_layers, len(sites), max(min(slot.matrix_shape) for slot in here.values())), np.nan)
    rounding = np.full(spectra.shape[:2], np.nan)
    for place, slot in here.items():
        _, layer, site = place.split(".")
        cell, trained = (int(layer), sites.index(site)), there[place].matrix
        values = torch.linalg.svdvals(trained.double() - slot.matrix.double()).cpu().numpy()
        spectra[cell][: len(values)] = values
        rounding[cell] = torch.finfo(trained.dtype).eps * float(trained.double().norm())
    return UpdateRank(spectra, rounding, sites)


def _shape(found: Mapping[str, Slot], place: str) -> tuple[int, int] | None:
    return found[place].matrix_shape if place in found else None
