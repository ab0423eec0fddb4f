"""Mediation: how much of an effect, of the wrapper or of a training, runs through each layer's attention and MLP.

Causal mediation (Vig et al. 2020, arXiv 2004.12265) with the outputs of attention and MLP as mediators. The
total effect is the change of a metric between two runs: from the clean to the wrapped prompt in one model, or from the
base to a trained model on one prompt. Two shares of it run through a mediator:

- `"sufficient"`, the natural indirect effect: everything is as without the cause, and only the mediator
  has the value that it has with it;
- `"lost"`, the total effect less the natural direct effect: everything is as with the cause, and
  only the mediator is set back.

Both are what `patch` and `transplant` measure at `attn_out` and `mlp_out`; here they stand side by side. They need
not be equal nor add up to 1 over mediators: mediators act on each other, and what a layer passes on shows again in
the layers behind it. The remainder is 1 less their sum; it is negative where they overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ctlens import plots
from ctlens.analysis.base.metrics import UserMetric
from ctlens.analysis.base.result import beside, groups_of
from ctlens.analysis.base.shares import floor_of, shares
from ctlens.analysis.exchange.exchange import EXCHANGE_QUANTITIES, Exchange, curve, rows_with, with_effect
from ctlens.analysis.exchange.transplant import TRANSPLANT_POSITIONS_IN_WORDS, transplant
from ctlens.analysis.patching.patch import patch
from ctlens.core.errors import unknown
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair
from ctlens.models.hooks import Layers
from ctlens.plots import Figure

MEDIATORS = {"attn_out": "attention", "mlp_out": "MLP"}
_REMAINDER = "remainder"
_PANEL_TITLES = {"sufficient": "brought by {} alone", "lost": "lost without {}"}


@dataclass(frozen=True)
class Mediation(Exchange):
    """The result of `mediation`: the effects that run through every layer's attention and MLP.

    Attributes:
        values, unpatched, source, metrics: see `Exchange`, with the run without the cause as target and the run
            with it as source; a cell is `[mediator, layer]`, mediators as in `MEDIATORS`.
        layers: the number of each layer.
        cause: `"wrapper"` or `"training"`.
        positions: the tokens at which mediators were patched.
    """

    layers: tuple[int, ...]
    cause: str
    positions: str

    def cells(self) -> pd.DataFrame:
        """Mediator and layer of every cell."""
        mediators = np.repeat(list(MEDIATORS.values()), len(self.layers))
        return pd.DataFrame({"mediator": mediators, "layer": np.tile(self.layers, len(MEDIATORS))})

    def totals(self, metric: str | None = None, *, smallest_gap: float | None = None) -> pd.DataFrame:
        """The shares of all measured layers added up, of attention and MLPs, and the remainder, per quantity.

        Raises:
            CtlensError: as `normalised`.
        """
        self.normalised(metric, smallest_gap=smallest_gap)  # refuses a result without an effect
        metric = self.metrics[0] if metric is None else metric
        row = self.metrics.index(metric)
        tables = []
        for index, quantity in enumerate(EXCHANGE_QUANTITIES):
            gap = self.source[index, row] - self.unpatched[index, row]
            added = (self.values[index, row] - self.unpatched[index, row]).sum(1)
            numbers = shares(np.stack([*added, gap - added.sum(0)]), gap, floor_of(metric, smallest_gap), self.clusters)
            labels = {"quantity": quantity, "metric": metric, "part": [*MEDIATORS.values(), _REMAINDER]}
            named = dict(zip(("value", "ci_low", "ci_high"), numbers, strict=True))
            tables.append(pd.DataFrame({**labels, **named, "n_pairs": self.n_pairs}))
        return pd.concat(tables, ignore_index=True)

    def figure(
        self, quantity: str = "sufficient", metric: str | None = None, *, smallest_gap: float | None = None
    ) -> Figure:
        """The shares through attention and through MLPs by layer.

        Args:
            quantity: `"sufficient"` or `"lost"`.
            metric: by default the first.
            smallest_gap: see `Exchange.normalised`.

        Raises:
            CtlensError: the quantity is unknown, the metric was not measured, or there is no effect.
        """
        return _drawn({self.cause: self}, quantity, metric, smallest_gap)

    def compare(
        self,
        others: Mapping[str, Mediation],
        *,
        label: str,
        quantity: str = "sufficient",
        metric: str | None = None,
        smallest_gap: float | None = None,
        subtitle: str | None = None,
    ) -> Figure:
        """Several effects in one figure, a line per effect and this one first; the remainders stand under the title.

        Args:
            others: other effects by label; they may hold this one too, under its label. An effect too small for a
                share is left out, with a note.
            label: of this effect.
            quantity: `"sufficient"` or `"lost"`.
            metric: by default the first.
            smallest_gap: see `Exchange.normalised`.
            subtitle: one line under the title, in front of the notes.

        Raises:
            CtlensError: another effect has this one's label, the quantity is unknown, the metric was not measured, or
                no effect is large enough.
        """
        return _drawn(beside(self, others, label), quantity, metric, smallest_gap, subtitle)


def _drawn(
    results: Mapping[str, Mediation],
    quantity: str,
    metric: str | None,
    smallest_gap: float | None,
    subtitle: str | None = None,
) -> Figure:
    """A panel for attention and one for MLPs, one line per result."""
    if quantity not in EXCHANGE_QUANTITIES:
        raise unknown("quantity", quantity, EXCHANGE_QUANTITIES)
    first = next(iter(results.values()))
    tables, note = with_effect(results, metric, smallest_gap)
    panels = {
        _PANEL_TITLES[quantity].format(mediator): {
            name: curve(rows_with(table, mediator=mediator, quantity=quantity)) for name, table in tables.items()
        }
        for mediator in MEDIATORS.values()
    }
    remainders = []
    for name in tables:
        totals = results[name].totals(metric, smallest_gap=smallest_gap)
        remainder = rows_with(totals, quantity=quantity, part=_REMAINDER)["value"].item()
        remainders.append(f"{plots.label(name)} {remainder:.2f}")
    positions = TRANSPLANT_POSITIONS_IN_WORDS[first.positions]
    prompts = f"{first.n_pairs} pairs, {metric or first.metrics[0]}, {positions}"
    notes = (subtitle or prompts, f"remainder of the sum: {', '.join(remainders)}", note)
    causes = " and ".join(dict.fromkeys(results[name].cause for name in tables))
    return plots.exchange_curves(
        first.layers,
        panels,
        f"Does the effect of the {causes} run through attention or MLPs?",
        y_title="share of the effect",
        subtitle="; ".join(filter(None, notes)),
    )


@public
def mediation(
    model: LensModel,
    pairs: Pairs,
    *,
    trained: LensModel | None = None,
    positions: str = "last",
    layers: Layers = "all",
    metrics: Sequence[str | UserMetric] = ("logit_diff",),
    max_batch: int | None = None,
    progress: bool = True,
) -> Mediation:
    """Mediation: the share of an effect that runs through the attention and the MLP of every layer.

    >>> import ctlens as ct
    >>> pairs = ct.threats.get("sycophancy").pairs(16, split="heldout")
    >>> found = ct.analysis.mediation(ct.load_organism(), pairs, progress=False)
    >>> found.values.shape  # quantities, metrics, mediators, layers, pairs
    (2, 1, 2, 4, 16)
    >>> found.totals().query("quantity == 'sufficient'").groupby("quantity")["value"].sum().round(3).item()
    1.0

    Args:
        model: in eval mode.
        pairs: with good and bad answers. `ctlens.pairs` makes them of two lists of texts.
        trained: if given, the effect is that of the training, from `model` to `trained` on the wrapped prompt;
            else it is that of the wrapper, from the clean to the wrapped prompt in `model`.
        positions: `"last"`, `"content"` or `"all"` tokens; for the wrapper's effect `"all"` means all aligned tokens.
            For the training's effect also `"wrapper"`.
        layers: which ones, see `ctlens.models.hooks.select_layers`.
        metrics: see `patch`.
        max_batch: see `patch`.
        progress: show a progress bar.

    Raises:
        CtlensError: as `patch` and `transplant`.
    """
    options: dict[str, Any] = {
        "positions": positions,
        "layers": layers,
        "metrics": metrics,
        "max_batch": max_batch,
        "progress": progress,
    }
    if trained is None:
        return _of_wrapper(model, pairs, positions, options)
    found = [transplant(trained, model, pairs, site=site, **options) for site in MEDIATORS]
    return Mediation(
        values=np.stack([result.values[:, :, :, 0] for result in found], 2),
        unpatched=found[0].unpatched,
        source=found[0].source,
        metrics=found[0].metrics,
        layers=found[0].layers,
        cause="training",
        positions=positions,
        groups=groups_of(pairs),
    )


def _of_wrapper(model: LensModel, pairs: Sequence[Pair], positions: str, options: dict[str, Any]) -> Mediation:
    """The mediation of the wrapper's effect: noising brings it into the clean run, denoising takes it from the wrapped.

    The two directions stand for `"sufficient"` and `"lost"`.
    """
    sites = tuple(MEDIATORS)
    both = [patch(model, pairs, site=sites, direction=direction, **options) for direction in ("noising", "denoising")]
    values = [np.stack([found[site].values[:, :, 0] for site in sites], 1) for found in both]
    first = both[0][sites[0]]
    return Mediation(
        values=np.stack(values),
        unpatched=np.stack([found[sites[0]].target for found in both]),
        source=np.stack([found[sites[0]].source for found in both]),
        metrics=first.metrics,
        layers=first.layers,
        cause="wrapper",
        positions=positions,
        groups=groups_of(pairs),
    )
