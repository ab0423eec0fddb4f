"""Through which layers' attention and MLPs an effect runs: of the wrapper, or of a training.

Causal mediation (Vig et al. 2020, arXiv 2004.12265) with the outputs of attention and MLP as mediators. The
total effect is what a metric changes between two runs: the clean and the wrapped prompt of one model, or the
base and a trained model on one prompt. Through a mediator, relative to the total effect, runs

- `"sufficient"`, the natural indirect effect: everything is as without the cause, and only the mediator
  has the value that it has with it;
- `"lost"`, the total effect less the natural direct effect: everything is as with the cause, and
  only the mediator is set back.

Both are what `patch` and `transplant` measure at `attn_out` and `mlp_out`; here they stand side by side. They need
not be equal nor add up to 1 over mediators: mediators act on each other, and what a layer passes on shows again in
those behind it. What is missing to 1 is reported as the remainder, and is negative where they overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ctlens import plots
from ctlens.analysis.base.metrics import UserMetric
from ctlens.analysis.base.shares import floor_of, shares
from ctlens.analysis.exchange.exchange import QUANTITIES, Exchange, curve, where, with_effect
from ctlens.analysis.exchange.transplant import IN_WORDS, transplant
from ctlens.analysis.patching.patch import patch
from ctlens.core.errors import unknown
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair
from ctlens.models.hooks import Layers
from ctlens.plots import Figure

MEDIATORS = {"attn_out": "attention", "mlp_out": "MLP"}
REMAINDER = "remainder"
ROLES = {"sufficient": "brought by {} alone", "lost": "lost without {}"}


@dataclass(frozen=True)
class Mediation(Exchange):
    """The effects through every layer's attention and MLP.

    Attributes:
        values, unpatched, source, metrics: see `Exchange`, with the run without the cause as recipient and the one
            with it as donor; a cell is `[mediator, layer]`, mediators as in `MEDIATORS`.
        layers: the number of each layer.
        cause: `"wrapper"` or `"training"`.
        positions: which tokens' mediators were exchanged.
    """

    layers: tuple[int, ...]
    cause: str
    positions: str

    def cells(self) -> pd.DataFrame:
        """Mediator and layer of every cell."""
        mediators, layers = np.repeat(list(MEDIATORS.values()), len(self.layers)), np.tile(self.layers, len(MEDIATORS))
        return pd.DataFrame({"mediator": mediators, "layer": layers})

    def totals(self, metric: str | None = None, *, smallest_gap: float | None = None) -> pd.DataFrame:
        """Per quantity, the shares of all measured layers' attention and MLPs added up, and the remainder.

        Raises:
            CtlensError: as `normalised`.
        """
        self.normalised(metric, smallest_gap=smallest_gap)  # refuses what has no effect
        metric = self.metrics[0] if metric is None else metric
        row, tables = self.metrics.index(metric), []
        for number, quantity in enumerate(QUANTITIES):
            gap = self.source[number, row] - self.unpatched[number, row]
            added = (self.values[number, row] - self.unpatched[number, row]).sum(1)
            numbers = shares(np.stack([*added, gap - added.sum(0)]), gap, floor_of(metric, smallest_gap))
            labels = {"quantity": quantity, "metric": metric, "part": [*MEDIATORS.values(), REMAINDER]}
            named = dict(zip(("value", "ci_low", "ci_high"), numbers, strict=True))
            tables.append(pd.DataFrame({**labels, **named, "n": self.n_pairs}))
        return pd.concat(tables, ignore_index=True)

    def figure(self, quantity: str = "sufficient", metric: str | None = None) -> Figure:
        """The shares through attention and MLPs by layer; raises as `figure` of this module."""
        return figure({self.cause: self}, quantity, metric)


def figure(
    results: Mapping[str, Mediation],
    quantity: str = "sufficient",
    metric: str | None = None,
    *,
    smallest_gap: float | None = None,
    subtitle: str | None = None,
) -> Figure:
    """Several effects in one figure, a panel for attention and one for MLPs, with the remainders under the title.

    Args:
        results: by name; one whose effect is too small for a share is left out, with a note.
        quantity: `"sufficient"` or `"lost"`.
        metric: by default the first.
        smallest_gap: see `Exchange.normalised`.
        subtitle: before the notes.

    Raises:
        CtlensError: the quantity is unknown, the metric was not measured, or nothing has an effect.
    """
    if quantity not in QUANTITIES:
        raise unknown("quantity", quantity, QUANTITIES)
    first = next(iter(results.values()))
    tables, note = with_effect(results, metric, smallest_gap)
    panels = {
        ROLES[quantity].format(mediator): {
            name: curve(where(table, mediator=mediator, quantity=quantity)) for name, table in tables.items()
        }
        for mediator in MEDIATORS.values()
    }
    left = []
    for name in tables:
        added = results[name].totals(metric, smallest_gap=smallest_gap)
        left.append(f"{plots.label(name)} {where(added, quantity=quantity, part=REMAINDER)['value'].item():.2f}")
    what = f"{first.n_pairs} pairs, {metric or first.metrics[0]}, {IN_WORDS[first.positions]}"
    words = "; ".join(filter(None, (subtitle or what, f"remainder of the sum: {', '.join(left)}", note)))
    causes = " and ".join(dict.fromkeys(results[name].cause for name in tables))
    title = f"Does the effect of the {causes} run through attention or MLPs?"
    return plots.exchange_curves(first.layers, panels, title, y_title="share of the effect", subtitle=words)


def mediation(
    model: LensModel,
    pairs: Sequence[Pair],
    *,
    trained: LensModel | None = None,
    positions: str = "last",
    layers: Layers = "all",
    metrics: Sequence[str | UserMetric] = ("logit_diff",),
    max_batch: int | None = None,
    progress: bool = True,
) -> Mediation:
    """The share of an effect that runs through the attention and the MLP of every layer.

    >>> import ctlens as ct
    >>> pairs = ct.threats.get("sycophancy").pairs(16, split="heldout")
    >>> found = ct.analysis.mediation(ct.load_organism(), pairs, progress=False)
    >>> found.values.shape  # quantities, metrics, mediators, layers, pairs
    (2, 1, 2, 4, 16)
    >>> found.totals().query("quantity == 'sufficient'").groupby("quantity")["value"].sum().round(3).item()
    1.0

    Args:
        model: in eval mode.
        pairs: with good and bad answers.
        trained: without it, the effect is that of the wrapper, from the clean to the wrapped prompt; with it, that
            of the training, from `model` to `trained` on the wrapped prompt.
        positions: `"last"`, `"content"` or `"all"` tokens; of the wrapper's effect, all aligned ones. For
            the training's effect also `"wrapper"`.
        layers: which ones, see `ctlens.models.hooks.select_layers`.
        metrics: see `patch`.
        max_batch: see `patch`.
        progress: show a progress bar.

    Raises:
        CtlensError: as `patch` and `transplant`.
    """
    options: dict[str, Any] = {"positions": positions, "layers": layers, "metrics": metrics, "max_batch": max_batch}
    options["progress"] = progress
    if trained is None:
        found = [
            [patch(model, pairs, site=site, direction=direction, **options) for direction in ("noising", "denoising")]
            for site in MEDIATORS
        ]
        values = np.stack([np.stack([one.values[:, :, 0] for one in both]) for both in found], 2)
        unpatched, source = (np.stack([getattr(one, name) for one in found[0]]) for name in ("target", "source"))
        return Mediation(values, unpatched, source, found[0][0].metrics, found[0][0].layers, "wrapper", positions)
    exchanged = [transplant(trained, model, pairs, site=site, **options) for site in MEDIATORS]
    values = np.stack([one.values[:, :, :, 0] for one in exchanged], 2)
    first = exchanged[0]
    return Mediation(values, first.unpatched, first.source, first.metrics, first.layers, "training", positions)
