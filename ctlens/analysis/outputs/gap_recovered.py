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
import torch
from jaxtyping import Float

from ctlens import plots
from ctlens.analysis.base.contrast import Contrast, contrast_batches, contrasts
from ctlens.analysis.base.forward import comparable_by_label
from ctlens.analysis.base.metrics import SMALLEST_GAPS
from ctlens.analysis.base.result import Result
from ctlens.core.errors import CtlensError
from ctlens.core.labels import BASE
from ctlens.core.public import public
from ctlens.core.stats import bootstrap, bootstrap_mean
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair
from ctlens.models.hooks import run
from ctlens.plots import Figure

_SIDES = ("wrapped", "clean")
GAP_RECOVERED = "gap_recovered"
"""The name of the share in tables."""


@dataclass(frozen=True)
class GapRecovered(Result):
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
        """The share of the gap that a model has recovered, with its 95 percent bootstrap interval over pairs.

        It is a ratio of means over pairs, not a mean of ratios, so one pair with a small gap cannot carry it away.

        Raises:
            CtlensError: the gap is too small for a share of it to be more than noise.
        """
        wrapped, clean = self.logit_diffs[0]
        gap = clean - wrapped
        gained = self.logit_diffs[self.models.index(model), 0] - wrapped
        if not gap.mean() >= SMALLEST_GAPS["logit_diff"]:
            raise CtlensError(
                f"clean and wrapped prompts differ by {gap.mean():.3g} logits before training: a share of less than "
                f"{SMALLEST_GAPS['logit_diff']:g} is noise; give pairs on which the attack works."
            )
        ((low, high),) = bootstrap(lambda items: [gained[items].sum() / gap[items].sum()], len(gap))
        return float(gained.sum() / gap.sum()), low, high

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model and quantity: `value`, `ci_low`, `ci_high` and `n_pairs`.

        The quantities are the mean logit difference on `wrapped` and on `clean` prompts and `gap_recovered`.
        """
        n_pairs = self.logit_diffs.shape[-1]
        rows = []
        for model, sides in zip(self.models, self.logit_diffs, strict=True):
            for side, values in zip(_SIDES, sides, strict=True):
                rows.append((model, side, *map(float, bootstrap_mean(values)), n_pairs))
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
    pairs: Sequence[Pair],
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
        pairs: with the good and the bad answer of both sides.
        batch_size: prompts per forward pass.
        progress: show a progress bar.

    Raises:
        CtlensError: models do not compare or are in training mode, a label is the base's, or a pair has no answers.
    """
    named = comparable_by_label(models)
    if BASE in named:
        raise CtlensError(f"{BASE!r} is the label of the model before training: choose another.")
    named = comparable_by_label({BASE: base, **named})
    by_side = [contrasts(base, pairs, side) for side in _SIDES]
    logit_diffs = [
        [_logit_diffs(model, of_side, batch_size, progress) for of_side in by_side] for model in named.values()
    ]
    return GapRecovered(np.array(logit_diffs), tuple(named))


@torch.no_grad()
def _logit_diffs(
    model: LensModel, prompts: Sequence[Contrast], batch_size: int, progress: bool
) -> Float[np.ndarray, " pair"]:
    found = []
    for batch in contrast_batches(model, prompts, batch_size, progress):
        logits = batch.at_last(run(model, batch.side.tokens))
        found.append(batch.logit_diff(logits).float().cpu().numpy())
    return np.concatenate(found)
