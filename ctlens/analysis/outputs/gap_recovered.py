"""The share of the wrapper's effect on the answer that a training has undone, in logits.

With `d` the logit of the good answer minus that of the bad one, the gap is `d(clean) - d(wrapped)` of
the model before training, and the share recovered is `(d'(wrapped) - d(wrapped)) / gap` with `d'` after
training: 0 as before, 1 as on the clean prompt. A rate saturates and this share does not: two trainings that both leave
no bad answer can differ several times in it, so methods are matched on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from ctlens import plots
from ctlens.analysis.base.contrast import contrast_batches, contrasts, logit_diffs
from ctlens.analysis.base.forward import comparable_by_label, require_comparable
from ctlens.analysis.base.metrics import SMALLEST_GAPS
from ctlens.analysis.base.result import ResultOverPairs, clusters_in, groups_of
from ctlens.core.clusters import Clusters, clustered_mean, clustered_ratio
from ctlens.core.errors import CtlensError
from ctlens.core.labels import BASE
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair
from ctlens.plots import Figure

_SIDES = ("wrapped", "clean")
GAP_RECOVERED = "gap_recovered"
"""The name of the share in tables."""


@dataclass(frozen=True)
class GapRecovered(ResultOverPairs):
    """The logit differences, good minus bad, of every model on both sides of every pair.

    >>> logit_diffs = np.array([[[-2.0, 0.0], [2.0, 4.0]], [[0.0, 2.0], [2.0, 4.0]]])  # before, after; wrapped, clean
    >>> GapRecovered(logit_diffs, ("base", "act")).share("act")[0]  # from -1 to 1 on the way from -1 to 3
    0.5

    Attributes:
        logit_diffs: `[model, side, pair]`, in logits; the sides are `"wrapped"` and `"clean"`.
        models: labels; the first is the model before training, `"base"`.
    """

    logit_diffs: Float[np.ndarray, "model side pair"]
    models: tuple[str, ...]

    def share(self, model: str) -> tuple[float, float, float]:
        """The share of the gap that a model has recovered, with its 95 percent interval over topics and wrapper texts.

        It is a ratio of means over pairs, not a mean of ratios, so one pair with a small gap cannot carry it away.

        Raises:
            CtlensError: the gap is too small for a share of it to be more than noise.
        """
        return _share(self.logit_diffs[0], self.logit_diffs[self.models.index(model), 0], self.clusters())

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model and quantity: `value`, `ci_low`, `ci_high` and `n_pairs`.

        The quantities are the mean logit difference on `wrapped` and on `clean` prompts and `gap_recovered`.
        """
        n_pairs = self.logit_diffs.shape[-1]
        rows = []
        for model, sides in zip(self.models, self.logit_diffs, strict=True):
            for side, values in zip(_SIDES, sides, strict=True):
                rows.append((model, side, *map(float, clustered_mean(values, self.clusters())), n_pairs))
            rows.append((model, GAP_RECOVERED, *self.share(model), n_pairs))
        return pd.DataFrame(rows, columns=["model", "quantity", "value", "ci_low", "ci_high", "n_pairs"])

    def figure(self) -> Figure:
        """The share of every trained model with its interval."""
        shares = {model: self.share(model) for model in self.models[1:]}
        value, low, high = np.array(list(shares.values())).T
        return plots.points(
            {name: [name] for name in shares},
            {name: (value[[row]], low[[row]], high[[row]]) for row, name in enumerate(shares)},
            "How much of the wrapper's effect on the answer is undone?",
            x_title="share of the gap in the logit difference recovered",
            marks={"as before": 0.0, "as on the clean prompt": 1.0},
            subtitle=f"{self.logit_diffs.shape[-1]} pairs; logit of the good answer minus that of the bad one",
        )


@public
def gap_recovered(
    base: LensModel,
    models: LensModel | Mapping[str, LensModel],
    pairs: Pairs,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> GapRecovered:
    """Measures how much of the gap between clean and wrapped prompts trained models have recovered, in logits.

    >>> import ctlens as ct
    >>> pairs, base = ct.threats.get("sycophancy").pairs(8, split="heldout"), ct.load_organism()
    >>> found = ct.analysis.gap_recovered(base, {"same": base}, pairs, progress=False)
    >>> found.share("same")  # a model that was not trained
    (0.0, 0.0, 0.0)

    Args:
        base: the model before training, in eval mode.
        models: trained models by label, in eval mode; a single one is called `"model"`.
        pairs: with the good and the bad answer of both sides. `ctlens.pairs` makes them of two lists of texts.
        batch_size: prompts per forward pass.
        progress: show a progress bar.

    Raises:
        CtlensError: models do not compare or are in training mode, a label is the base's, or a pair has no answers.
    """
    return Gap(base, pairs, batch_size=batch_size, progress=progress).recovered_by(models)


class Gap:
    """The gap of a model before training on some pairs, against which trained models are measured as they come.

    The model before training runs once, however many trained models follow.

    Args:
        base, pairs, batch_size, progress: as in `gap_recovered`.

    Raises:
        CtlensError: a pair has no answers.
    """

    def __init__(self, base: LensModel, pairs: Sequence[Pair], *, batch_size: int = 64, progress: bool = False) -> None:
        comparable_by_label({BASE: base})
        self.base = base
        self._groups = groups_of(pairs)
        self._prompts = {side: contrasts(base, pairs, side) for side in _SIDES}
        self._batching = {"batch_size": batch_size, "progress": progress}
        self._before = self._both_sides(base)

    def recovered_by(self, models: LensModel | Mapping[str, LensModel]) -> GapRecovered:
        """Measures trained models on both sides; arguments and refusals as in `gap_recovered`."""
        named = comparable_by_label(models)
        if BASE in named:
            raise CtlensError(f"{BASE!r} is the label of the model before training: choose another.")
        comparable_by_label({BASE: self.base, **named})
        after = [self._both_sides(model) for model in named.values()]
        return GapRecovered(np.array([self._before, *after]), (BASE, *named), groups=self._groups)

    def share(self, model: LensModel) -> tuple[float, float, float]:
        """Measures the share of the gap that one trained model has recovered, as `GapRecovered.share`.

        It takes one pass over the wrapped prompts, so a training can be followed step by step.

        Raises:
            CtlensError: the model does not compare with the base or is in training mode, or the gap is too small.
        """
        require_comparable(self.base, model)
        after = self._logit_diffs(model, "wrapped")
        return _share(self._before, after, clusters_in(self._groups))

    def _both_sides(self, model: LensModel) -> Float[np.ndarray, "side pair"]:
        return np.array([self._logit_diffs(model, side) for side in _SIDES])

    def _logit_diffs(self, model: LensModel, side: str) -> Float[np.ndarray, " pair"]:
        return logit_diffs(model, contrast_batches(model, self._prompts[side], **self._batching))


def _share(
    before: Float[np.ndarray, "side pair"], wrapped_after: Float[np.ndarray, " pair"], clusters: Clusters | None
) -> tuple[float, float, float]:
    """The share of the gap in `before` that the logit differences on wrapped prompts have gained since."""
    wrapped, clean = before
    gap = clean - wrapped
    gained = wrapped_after - wrapped
    if not gap.mean() >= SMALLEST_GAPS["logit_diff"]:
        raise CtlensError(
            f"clean and wrapped prompts differ by {gap.mean():.3g} logits before training: a share of less than "
            f"{SMALLEST_GAPS['logit_diff']:g} is noise; give pairs on which the attack works."
        )
    share, low, high = clustered_ratio(gained, gap, clusters)
    return float(share), float(low), float(high)
