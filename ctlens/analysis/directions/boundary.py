"""One direction at the assistant boundary: does it carry what a training changed?

The boundary is the last token of the prompt, behind which the assistant answers. There a trained model's states differ
from the base's, and the mean of that difference over prompts is one direction per layer. Added to the base on *other*
wrapped prompts it gives some of the repair; taken out of the trained model, whose component is set to the base's mean,
it takes some. Shah, Brinkmann and Angell (arXiv 2605.28467) found so that one direction controls the refusals of models
trained with ACT.

Both shares are of the whole change between the models, `(base with it - base) / (trained - base)` and
`(trained - trained without it) / (trained - base)`, a ratio of means over pairs: of the logit difference, which does
not saturate, and of the probability of the bad answer, which is the bad rate of answers drawn at temperature 1.

Random directions get the same edits at equal norm: *isotropic* ones, evenly over the sphere, and ones drawn from the
*covariance* of the states of both models, each about its own mean, which point where states vary anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ctlens import plots
from ctlens.analysis.base.forward import comparable_by_label
from ctlens.analysis.base.heldout import require_heldout
from ctlens.analysis.base.metrics import SMALLEST_GAPS
from ctlens.analysis.base.nulls import random_from_covariance
from ctlens.analysis.base.result import ResultOverPairs, groups_of
from ctlens.analysis.base.shares import shares
from ctlens.analysis.base.states import States, centred, states
from ctlens.analysis.directions.directions import Directions, difference_of
from ctlens.analysis.directions.interventions import ABLATE, ALONG, COVARIANCE, ISOTROPIC, STEER, Intervention
from ctlens.analysis.directions.steering import intervene, random_units
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.keeping import keeping
from ctlens.core.labels import BASE
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair
from ctlens.models.hooks import Layers
from ctlens.plots import Figure

GIVES = "gives"
TAKES = "takes"
BOUNDARY_EDITS = (GIVES, TAKES)
# The metrics of a share, with the smallest gap of which one is more than noise.
_FLOORS = {"logit_diff": SMALLEST_GAPS["logit_diff"], "p_bad": SMALLEST_GAPS["probability"]}
_TITLES = {
    GIVES: "Does adding one direction give the base the repair?",
    TAKES: "Does taking one direction out take the repair away?",
}


@dataclass(frozen=True)
class BoundaryDirection(ResultOverPairs):
    """The result of `boundary_direction`: the answers to held-out wrapped prompts with and without the edits.

    Attributes:
        logit_diffs: `[model, edit, layer, variant, pair]`, `log P(good) - log P(bad)` in nats: of the base to which a
            trained model's direction was added (`"gives"`), and of the trained model without it (`"takes"`).
        p_bad: of the same shape, the probability of the bad answer.
        plain_logit_diffs, plain_p_bad: `[model, pair]`, without an edit; the base first.
        norms: `[model, layer]`, the length of the direction.
        state_norms: `[layer]`, the mean length of the base's states there.
        models: the labels of the trained models.
        layers: where the edits were made, one at a time.
        variants: `"direction"`, and each of the random draws, `"isotropic"` or `"covariance"`.
        site: the hook point.
    """

    logit_diffs: Float[np.ndarray, "model edit layer variant pair"]
    p_bad: Float[np.ndarray, "model edit layer variant pair"]
    plain_logit_diffs: Float[np.ndarray, "any_model pair"]
    plain_p_bad: Float[np.ndarray, "any_model pair"]
    norms: Float[np.ndarray, "model layer"]
    state_norms: Float[np.ndarray, " layer"]
    models: tuple[str, ...]
    layers: tuple[int, ...]
    variants: tuple[str, ...]
    site: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model, edit, metric and layer.

        Returns:
            The `share` of the repair, with `ci_low` and `ci_high`; NaN where the models hardly differ in the metric.
            The lowest and highest share of the draws of either null; `beyond_random`, whether the interval lies above
            both and above 0. The `gap`, trained less base; the `norm` of the direction, also as a share of the base's
            states (`relative_norm`); and `n_pairs`.
        """
        rows = []
        for number, model in enumerate(self.models):
            for edit in BOUNDARY_EDITS:
                for metric in _FLOORS:
                    rows += self._rows(number, model, edit, metric)
        return pd.DataFrame(rows).assign(n_pairs=self.plain_p_bad.shape[1], site=self.site)

    def _rows(self, number: int, model: str, edit: str, metric: str) -> list[dict[str, object]]:
        share, low, high = self._shares(number, edit, metric)
        drawn = {null: share[:, self._of(null)] for null in (ISOTROPIC, COVARIANCE)}
        along = self._of(ALONG)[0]
        plain = self._plain(metric)
        rows: list[dict[str, object]] = []
        for index, layer in enumerate(self.layers):
            row: dict[str, object] = {"model": model, "edit": edit, "metric": metric, "layer": layer}
            row |= {"share": share[index, along], "ci_low": low[index, along], "ci_high": high[index, along]}
            for null, of_null in drawn.items():
                row |= {f"{null}_low": of_null[index].min(), f"{null}_high": of_null[index].max()}
            highest = max(0.0, *(of_null[index].max() for of_null in drawn.values()))
            norm = self.norms[number, index]
            row |= {"beyond_random": bool(low[index, along] > highest), "gap": (plain[1 + number] - plain[0]).mean()}
            rows.append(row | {"norm": norm, "relative_norm": norm / self.state_norms[index]})
        return rows

    def figure(self, edit: str = GIVES, metric: str = "logit_diff") -> Figure:
        """Draws the share of the repair that the direction gives or takes, by layer, a panel per model.

        Args:
            edit: `"gives"` or `"takes"`.
            metric: `"logit_diff"` or `"p_bad"`.

        Raises:
            CtlensError: the edit or the metric is unknown, or the models hardly differ in the metric.
        """
        for what, name, known in (("edit", edit, BOUNDARY_EDITS), ("metric", metric, _FLOORS)):
            if name not in known:
                raise unknown(what, name, known)
        panels = {}
        for number, model in enumerate(self.models):
            share, low, high = self._shares(number, edit, metric)
            along, *drawn = [*self._of(ALONG), *self._of(ISOTROPIC), *self._of(COVARIANCE)]
            if np.isnan(share).all():
                raise CtlensError(f"{model} hardly differs from the base in {metric}: there is no share to draw.")
            band = share[:, drawn].min(1), share[:, drawn].max(1)
            panels[model] = {ALONG: (share[:, along], low[:, along], high[:, along])}, band
        subtitle = f"trained minus base at the prompt's last token; {self.site}; {self.plain_p_bad.shape[1]} pairs"
        y_title = {"logit_diff": "share of the logit difference", "p_bad": "share of the bad answer's probability"}
        return plots.against_random(
            panels, self.layers, _TITLES[edit], x_title="layer", y_title=y_title[metric], subtitle=subtitle
        )

    def _of(self, variant: str) -> list[int]:
        return [number for number, name in enumerate(self.variants) if name == variant]

    def _plain(self, metric: str) -> Float[np.ndarray, "any_model pair"]:
        return self.plain_logit_diffs if metric == "logit_diff" else self.plain_p_bad

    def _shares(self, number: int, edit: str, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The share of every layer and variant with its interval, `[layer, variant]` each."""
        base, trained = self._plain(metric)[[0, 1 + number]]
        values = self.logit_diffs if metric == "logit_diff" else self.p_bad
        edited = values[number, BOUNDARY_EDITS.index(edit)]
        moved = edited - base if edit == GIVES else trained - edited
        value, low, high = shares(moved.reshape(-1, moved.shape[-1]), trained - base, _FLOORS[metric], self.clusters)
        shape = moved.shape[:2]
        return value.reshape(shape), low.reshape(shape), high.reshape(shape)


@public
@keeping()
def boundary_direction(
    base: LensModel,
    models: Mapping[str, LensModel],
    pairs: Pairs,
    heldout: Pairs,
    *,
    site: str = "resid_post",
    layers: Layers = "all",
    draws: int = 19,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> BoundaryDirection:
    """Adds the trained-minus-base direction at the prompt's last token to the base, and takes it out of trained models.

    >>> import ctlens as ct
    >>> jailbreak, base = ct.threats.get("jailbreak"), ct.load_organism()
    >>> pairs, heldout = jailbreak.pairs(16), jailbreak.pairs(8, split="heldout")
    >>> trained = ct.train(base, pairs, "bct", steps=2, progress=False).model
    >>> found = ct.analysis.boundary_direction(base, {"BCT": trained}, pairs, heldout, draws=2, progress=False)
    >>> found.norms.shape
    (1, 4)

    Args:
        base: the model before training, in eval mode.
        models: trained models by label, in eval mode.
        pairs: the direction is the mean over their wrapped prompts. `ctlens.pairs` makes them of two lists of texts.
        heldout: other pairs with a good and a bad answer; the edits are made on their wrapped prompts.
        site: the hook point, one of `ctlens.analysis.directions.directions.DIRECTION_SITES`.
        layers: which ones; where a trained model's states are the base's there is no direction.
        draws: how many random directions of each kind.
        seed: of the random directions.
        batch_size: pairs per batch.
        progress: show a progress bar.

    Raises:
        CtlensError: models do not compare or are in training mode, a label is the base's, a held-out prompt is among
            those fitted on, a pair does not fit or has no two answers, or a model has no direction at a layer.
    """
    if not models or BASE in models:
        raise CtlensError(f"give at least one trained model, by a label other than {BASE!r}, the base's.")
    named = comparable_by_label({BASE: base, **{str(label): model for label, model in models.items()}})
    require_heldout([pair.wrapped for pair in heldout], [pair.wrapped for pair in pairs], "fitted on")
    options: dict[str, Any] = {"site": site, "layers": layers, "batch_size": batch_size, "progress": progress}
    found = {label: states(model, pairs, side="wrapped", **options) for label, model in named.items()}
    editing: dict[str, Any] = {"draws": draws, "seed": seed, "batch_size": batch_size, "progress": progress}
    labels = tuple(list(named)[1:])
    directions = {label: _direction(found[label], found[BASE], label) for label in labels}
    edited = [
        _edited(named, label, heldout, directions[label], centred(found[BASE], found[label]), **editing)
        for label in labels
    ]
    plain = [edited[0][0], *(taken for _, taken in edited)]  # the base, then every trained model
    return BoundaryDirection(
        logit_diffs=np.stack([[one.logit_diffs[0, :, 0] for one in of_model] for of_model in edited]),
        p_bad=np.stack([[one.p_bad[0, :, 0] for one in of_model] for of_model in edited]),
        plain_logit_diffs=np.concatenate([one.plain_logit_diffs for one in plain]),
        plain_p_bad=np.concatenate([one.plain_p_bad for one in plain]),
        norms=np.stack([directions[label].norm[:, 0] for label in labels]),
        state_norms=np.linalg.norm(found[BASE].values, axis=-1).mean(1),
        models=labels,
        layers=found[BASE].layers,
        variants=plain[0].variants,
        site=found[BASE].site,
        groups=groups_of(heldout),
    )


def _direction(trained: States, base: States, label: str) -> Directions:
    """The mean difference of the trained and the base's states of the same prompts."""
    everyone = [range(base.values.shape[1])]
    return difference_of(trained, base, everyone, source="trained minus base at the last token", model=label)


def _edited(
    named: Mapping[str, LensModel],
    label: str,
    heldout: Sequence[Pair],
    direction: Directions,
    about_means: Float[np.ndarray, "layer state d"],
    *,
    draws: int,
    seed: int,
    **running: Any,
) -> tuple[Intervention, Intervention]:
    """The base with the direction added, and the trained model without it, each beside both nulls."""
    drawn = random_from_covariance(about_means, draws, seed)[:, :, None]
    units = np.concatenate([direction.unit[None], random_units(direction, draws, seed), drawn])[None]
    variants = (ALONG, *(ISOTROPIC,) * draws, *(COVARIANCE,) * draws)
    written = units * direction.norm[..., None]
    running["side"] = "wrapped"
    given = intervene(STEER, {BASE: named[BASE]}, heldout, direction, written, variants, **running)
    taken = intervene(ABLATE, {label: named[label]}, heldout, direction, units, variants, **running)
    return given, taken
