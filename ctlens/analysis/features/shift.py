"""Which features a training moved: their activations on wrapped prompts before and after it, beside the clean ones.

A dictionary that was made for the base may not read the trained model, so each kind of states has its reconstruction
beside the features: the share of variance that the dictionary explains, and how many features are active. Where the
trained model's is much worse, a feature that seems to have moved may be one that no longer fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctlens import plots
from ctlens.analysis.base.forward import pair_batches, require_comparable
from ctlens.analysis.base.positions import CHOSEN, POSITIONS_IN_WORDS, PositionsOf, positions_mask
from ctlens.analysis.base.recording import Readable, model_of, read
from ctlens.analysis.base.result import ResultOverPairs, groups_of
from ctlens.analysis.features.readout import Features
from ctlens.core.clusters import WithInterval, simultaneous_mean
from ctlens.core.errors import CtlensError
from ctlens.core.public import public
from ctlens.core.types import Mask
from ctlens.data.inputs import Pairs
from ctlens.plots import Figure

STATE_KINDS = ("wrapped", "trained", "clean")
"""The base on wrapped prompts, the trained model on wrapped prompts, and the base on clean ones."""

_ROUNDING = 1e-5  # share of the largest mean activation, several times what float32 leaves of a state; chosen by eye


@dataclass(frozen=True)
class FeatureShift(ResultOverPairs):
    """The result of `feature_shift`: the features that are active in some of the states.

    Attributes:
        activations: `[kind, pair, feature]`, kinds as in `STATE_KINDS`: the mean over the pair's chosen tokens.
        features: the number of each feature.
        explained: `[kind]`, the share of the variance of the states that the dictionary explains.
        active: `[kind]`, how many features are active at a token, on average.
        n_features: of the dictionary.
        positions: which tokens were read.
        hook_name: the hook point that the dictionary reads.
    """

    activations: Float[np.ndarray, "kind pair feature"]
    features: Int[np.ndarray, " feature"]
    explained: Float[np.ndarray, " kind"]
    active: Float[np.ndarray, " kind"]
    n_features: int
    positions: str
    hook_name: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per active feature, the most moved one first.

        Returns:
            The mean activation of the base on wrapped prompts (`wrapped`), of the trained model on them (`trained`) and
            of the base on clean ones (`clean`); the `change`, trained less base, with `ci_low` and `ci_high`, which
            hold for all features at once; and `moved`, whether they exclude 0 by more than rounding.
        """
        means = dict(zip(STATE_KINDS, self.activations.mean(1), strict=True))
        change, low, high = self._change()
        columns = {"feature": self.features, **means, "change": change, "ci_low": low, "ci_high": high}
        seen = np.abs(change) > _ROUNDING * np.abs(self.activations.mean(1)).max()
        moved = seen & ((low > 0) | (high < 0))
        table = pd.DataFrame(columns).assign(moved=moved, n_pairs=self.activations.shape[1])
        order = np.argsort(-np.abs(change), kind="stable")
        return table.iloc[order].reset_index(drop=True)

    def reconstruction(self) -> pd.DataFrame:
        """One row per kind of states: the share of variance `explained`, and the mean number of `active` features."""
        return pd.DataFrame({"states": STATE_KINDS, "explained": self.explained, "active": self.active})

    def most_moved(self, n: int = 10) -> tuple[int, ...]:
        """The numbers of the features whose mean changed most, whether or not the change stands out.

        Where wrapper texts are few, intervals that hold for all features at once are wide: then ask `feature_patch`.
        """
        return tuple(int(number) for number in self.to_dataframe()["feature"][:n])

    def figure(self, n: int = 20) -> Figure:
        """Draws the change of the features that moved most, with the reconstruction in the subtitle.

        Args:
            n: how many features.
        """
        table = self.to_dataframe().head(n)
        names = [f"feature {number}" for number in table["feature"]]
        explained = ", ".join(f"{kind} {share:.0%}" for kind, share in zip(STATE_KINDS, self.explained, strict=True))
        return plots.points(
            {"features": names},
            {"features": (table["change"], table["ci_low"], table["ci_high"])},
            "Which features did training move?",
            x_title="change of the mean activation on wrapped prompts",
            marks={"as before": 0.0},
            subtitle=f"{self.hook_name}, {POSITIONS_IN_WORDS[self.positions]}; variance explained: {explained}; "
            f"{self.activations.shape[1]} pairs",
            caption=f"Whiskers are 95% intervals that hold for all {len(self.features)} active features at once.",
        )

    def _change(self) -> WithInterval:
        before, after = self.activations[[STATE_KINDS.index("wrapped"), STATE_KINDS.index("trained")]]
        return simultaneous_mean((after - before).astype(float), self.clusters())


@public
def feature_shift(
    before: Readable,
    after: Readable,
    pairs: Pairs,
    features: Features,
    *,
    positions: str | PositionsOf = "last",
    batch_size: int = 64,
    progress: bool = True,
) -> FeatureShift:
    """Measures how far training moved each feature of a dictionary on wrapped prompts.

    >>> import ctlens as ct
    >>> class Coordinates:  # a feature for either sign of every coordinate
    ...     def encode(self, x):
    ...         return torch.cat([x, -x], -1).relu()
    ...
    ...     def decode(self, x):
    ...         return x[:, :96] - x[:, 96:]
    >>> base, pairs = ct.load_organism(), ct.threats.get("sycophancy").pairs(8, split="heldout")
    >>> read = ct.analysis.Features(Coordinates(), "blocks.2.hook_resid_post")
    >>> found = ct.analysis.feature_shift(base, base, pairs, read, progress=False)
    >>> bool(found.to_dataframe()["moved"].any()), found.explained.round(3).tolist()  # the base beside itself
    (False, [1.0, 1.0, 1.0])

    Args:
        before: the model before training, in eval mode, or its recording.
        after: the trained model, in eval mode, or its recording.
        pairs: clean and wrapped prompts. `ctlens.pairs` makes them of two lists of texts.
        features: the dictionary, and what it reads.
        positions: the tokens that are read, see `ctlens.analysis.base.states`; ones that both sides have.
        batch_size: pairs per forward pass.
        progress: show a progress bar.

    Raises:
        CtlensError: the models do not compare or are in training mode, a pair does not align, the dictionary does not
            fit, or no feature is active.
    """
    base = model_of(before)
    require_comparable(base, model_of(after))
    names = features.hook_names(base)
    chunks: dict[str, list[_OfBatch]] = {kind: [] for kind in STATE_KINDS}
    for number, (rows, batch) in enumerate(pair_batches(base, pairs, "shared", batch_size, progress)):
        wrapped = positions_mask(positions, "wrapped", rows, batch)
        clean = positions_mask(positions, "clean", rows, batch)
        first = number * batch_size
        chunks["wrapped"].append(_read(features, read(before, batch.wrapped, names, first), wrapped))
        chunks["trained"].append(_read(features, read(after, batch.wrapped, names, first), wrapped))
        chunks["clean"].append(_read(features, read(before, batch.clean, names, first), clean))
    activations = np.stack([np.concatenate([one.activations for one in of_kind]) for of_kind in chunks.values()])
    somewhere = activations.any((0, 1))
    if not somewhere.any():
        raise CtlensError("no feature is active at these tokens: check that the dictionary is of this hook point.")
    return FeatureShift(
        activations=np.ascontiguousarray(activations[:, :, somewhere]),
        features=np.flatnonzero(somewhere),
        explained=np.array([_explained(of_kind) for of_kind in chunks.values()]),
        active=np.array([np.concatenate([one.active for one in of_kind]).mean() for of_kind in chunks.values()]),
        n_features=activations.shape[-1],
        positions=positions if isinstance(positions, str) else CHOSEN,
        hook_name=features.hook_name,
        groups=groups_of(pairs),
    )


class _OfBatch(NamedTuple):
    """What a dictionary reads in a batch.

    Attributes:
        activations: the mean over each prompt's chosen tokens.
        active: how many features each chosen token has.
        states: those of the chosen tokens that the dictionary decodes to.
        missed: what is left of them.
    """

    activations: Float[np.ndarray, "prompt feature"]
    active: Int[np.ndarray, " token"]
    states: Float[np.ndarray, "token d"]
    missed: Float[np.ndarray, "token d"]


def _read(features: Features, states: dict[str, Tensor], chosen: Mask) -> _OfBatch:
    found = features.encode(states[features.hook_name][chosen])
    written = states[features.written_at][chosen]
    means = torch.zeros(len(chosen), found.shape[-1], device=found.device)
    means.index_add_(0, chosen.nonzero()[:, 0], found)
    means /= chosen.sum(-1, keepdim=True)
    missed = written - features.decode(found)
    parts = (means, (found != 0).sum(-1), written, missed)
    return _OfBatch(*[part.cpu().numpy() for part in parts])


def _explained(chunks: Sequence[_OfBatch]) -> float:
    """The share of the variance about the mean state that is explained; NaN where there is none."""
    states = np.concatenate([one.states for one in chunks]).astype(float)
    missed = np.concatenate([one.missed for one in chunks]).astype(float)
    total = ((states - states.mean(0)) ** 2).sum()
    return float(1 - (missed**2).sum() / total) if total else float("nan")
