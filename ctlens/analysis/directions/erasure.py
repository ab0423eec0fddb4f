"""The analysis that asks whether a cue is erased from a trained model, or still there and only masked.

Its three measurements and the rule that makes them a verdict are in `ctlens.analysis.directions.erasure_verdicts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ctlens import plots
from ctlens.analysis.base.nulls import hardly_moved, random_band
from ctlens.analysis.base.positions import POSITIONS_IN_WORDS, PositionsOf
from ctlens.analysis.base.result import Result
from ctlens.analysis.directions.directions import ITEM, Directions, mean_difference
from ctlens.analysis.directions.erasure_verdicts import (
    EFFECT_ROUNDING,
    ERASURE_MEASURES,
    INCONCLUSIVE,
    Evidence,
    MeasuredWithNull,
    erasure_verdict,
    readout,
)
from ctlens.analysis.directions.interventions import OPPOSITE, Intervention
from ctlens.analysis.directions.steering import ablate, steer
from ctlens.analysis.probing.probe import Probe, probe
from ctlens.analysis.probing.tasks import Task, wrapper_present
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.keeping import keeping
from ctlens.core.labels import BASE
from ctlens.core.public import public
from ctlens.core.stats import bootstrap_mean
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair
from ctlens.models.hooks import Layers
from ctlens.plots import Figure

ESTIMATOR = "ridge"


@dataclass(frozen=True)
class Erasure(Result):
    """The result of `erase_or_mask`: three measurements of every model, pair by pair, from which the verdicts follow.

    Attributes:
        readable: `[model, layer, 5]`, the probe's balanced accuracy, the ends of its interval, and
            the lowest and highest end of the intervals with shuffled labels in any of the models.
        used, reelicited: `[model, layer, variant, pair]`, effects on the logit difference in nats; the
            direction first, then random ones.
        wrapped: `[model, pair]`, the logit difference on wrapped prompts.
        models: their labels; the base first, `"base"`.
        layers: the number of each layer.
        control: the label of the retention-only control; empty for none.
        question: what the probe reads, as in `Task`.
        positions: the tokens whose states were read and changed.
        direction: what it is, in words.
    """

    readable: Float[np.ndarray, "model layer 5"]
    used: Float[np.ndarray, "model layer variant pair"]
    reelicited: Float[np.ndarray, "model layer variant pair"]
    wrapped: Float[np.ndarray, "model pair"]
    models: tuple[str, ...]
    layers: tuple[int, ...]
    control: str
    question: str
    positions: str
    direction: str

    def evidence(self) -> dict[str, list[Evidence]]:
        """The measurements with their intervals and nulls, per model, by layer."""
        numbers = np.stack([self.readable, _against_random(self.used), _against_random(self.reelicited)], 2).tolist()
        return {
            model: [Evidence(*(MeasuredWithNull(*found) for found in of_layer)) for of_layer in of_model]
            for model, of_model in zip(self.models, numbers, strict=True)
        }

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model and layer.

        Returns:
            The `verdict`, the `readout`, each of the three measurements with its interval (`_low`,
            `_high`) and the highest draw of its null (`_null`), and the `reason` in words.
        """
        evidence = self.evidence()
        undecided = [INCONCLUSIVE] * len(self.layers)
        controls = undecided
        if self.control:
            controls = [found for found, _ in self._judged(self.control, evidence, undecided)]
        rows = []
        for model in self.models:
            judged = self._judged(model, evidence, undecided if model == self.control else controls)
            rows += [self._row(model, index, evidence, *found) for index, found in enumerate(judged)]
        return pd.DataFrame(rows)

    def verdicts(self) -> dict[str, tuple[str, ...]]:
        """The verdict per model, by layer."""
        table = self.to_dataframe()
        return {model: tuple(table.loc[table["model"] == model, "verdict"]) for model in self.models}

    @property
    def control_moved(self) -> float:
        """How far the control is from the base, as a share of the nearest other model; infinite without a control.

        The distance is the root mean square over pairs and over logit differences: on wrapped prompts, and at every
        layer lost or recovered along the direction. A control near 0 says no more than the base.
        """
        logit_diffs = np.concatenate([self.wrapped[:, None], self.used[:, :, 0], self.reelicited[:, :, 0]], axis=1)
        distances = np.sqrt(((logit_diffs - logit_diffs[0]) ** 2).mean((1, 2)))
        moved = dict(zip(self.models, distances.tolist(), strict=True))
        own = moved.pop(self.control, np.inf)
        others = [distance for name, distance in moved.items() if name != BASE and distance > 0]
        return own / min(others, default=np.inf)

    def figure(self) -> Figure:
        """The measurements by layer, one row per model, each with its null and the base; markers are verdicts."""
        curves = {
            model: {name: _curves([getattr(found, name) for found in by_layer]) for name in ERASURE_MEASURES}
            for model, by_layer in self.evidence().items()
        }
        subtitle = (
            f"{self.question}; {POSITIONS_IN_WORDS[self.positions]}; {self.direction}; {self.wrapped.shape[1]} pairs"
        )
        subtitle += hardly_moved(self.control, self.control_moved, "control")
        return plots.evidence(
            curves, self.verdicts(), self.layers, "Is the cue erased, or only masked?", subtitle=subtitle
        )

    def _judged(
        self, model: str, evidence: Mapping[str, Sequence[Evidence]], controls: Sequence[str]
    ) -> list[tuple[str, str]]:
        """Gives the verdict and its reason, by layer."""
        repaired = self._gains(self.wrapped[self.models.index(model)] - self.wrapped[0])
        return [
            erasure_verdict(here, base, repaired=repaired, less=self._less("used", model, index), control=control)
            for index, (here, base, control) in enumerate(zip(evidence[model], evidence[BASE], controls, strict=True))
        ]

    def _row(
        self, model: str, index: int, evidence: Mapping[str, Sequence[Evidence]], judged: str, reason: str
    ) -> dict[str, object]:
        here, base = evidence[model][index], evidence[BASE][index]
        less = self._less("reelicited", model, index)
        row: dict[str, object] = {"model": model, "layer": self.layers[index], "verdict": judged}
        row["readout"] = readout(here.reelicited, base.reelicited, less=less)
        for name in ERASURE_MEASURES:
            found = getattr(here, name)
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
            row[f"{name}_null"] = found.null_high
        return row | {"reason": reason}

    def _less(self, measure: str, model: str, index: int) -> bool:
        """Tells whether an effect is smaller than in the control, or in the base where there is none."""
        effects = getattr(self, measure)[:, index, 0]
        return self._gains(effects[self.models.index(self.control or BASE)] - effects[self.models.index(model)])

    @staticmethod
    def _gains(change: Float[np.ndarray, " pair"]) -> bool:
        """Tells whether a mean change over pairs lies above 0 with its interval."""
        return bool(bootstrap_mean(change)[1] > EFFECT_ROUNDING)


def _against_random(effects: Float[np.ndarray, "model layer variant pair"]) -> Float[np.ndarray, "model layer 5"]:
    """The direction's mean effect with its interval, and the lowest and highest mean of the random ones."""
    return np.stack([*bootstrap_mean(np.moveaxis(effects[:, :, 0], -1, 0)), *random_band(effects[:, :, 1:])], -1)


def _curves(found: Sequence[MeasuredWithNull]) -> plots.Measurement:
    return plots.Measurement(*np.array([dataclasses.astuple(one) for one in found]).T)


@public
@keeping()
def erase_or_mask(
    base: LensModel,
    models: Mapping[str, LensModel],
    pairs: Sequence[Pair],
    *,
    cue: Task | Probe | None = None,
    direction: Directions | None = None,
    control: str = "",
    layers: Layers = "all",
    positions: str | PositionsOf = "last",
    draws: int = 19,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Erasure:
    """Judges whether trained models erased a cue or only masked it, by the rule of `directions.erasure_verdicts`.

    >>> import ctlens as ct
    >>> pairs, base = ct.threats.get("jailbreak").pairs(32, split="heldout"), ct.load_organism()
    >>> found = ct.analysis.erase_or_mask(base, {"same": base}, pairs, layers=[2], draws=4, progress=False)
    >>> found.verdicts()
    {'base': ('vulnerable',), 'same': ('vulnerable',)}

    Args:
        base: the model before training, in eval mode; the directions are its own.
        models: trained models by label, in eval mode.
        pairs: clean and wrapped prompts with a good and a bad answer; not those trained on.
        cue: what the probe reads, by default whether the wrapper is present; another task, such as
            `answer_hinted(pairs)`; or a probe that was already fitted on all of these models, for
            example on their recordings.
        direction: of the base, for example from its recording; None for the difference of wrapped and
            clean of every pair by itself. The two edits always run the models, see `ct.analysis.steer`.
        control: the label of the model trained with retention alone, to which verdicts are compared; one
            that hardly moved is no more than the base, see `Erasure.control_moved`.
        layers: which ones; where clean and wrapped states agree there is no direction.
        positions: whose states are read and changed, see `ctlens.analysis.base.states`.
        draws: how many random directions.
        seed: of the random directions.
        batch_size: pairs per batch.
        progress: show a progress bar.

    Raises:
        CtlensError: models do not compare or are in training mode, a label is not there or given
            twice, a pair does not fit, there is no direction at a layer, or as `probe`.
    """
    if not models or BASE in models:
        raise CtlensError(f"give at least one trained model, by a label other than {BASE!r}, the base's.")
    if control and control not in models:
        raise unknown("control", control, map(str, models))
    if direction is None:
        direction = mean_difference(
            base,
            pairs,
            name="base",
            per=ITEM,
            positions=positions,
            layers=layers,
            batch_size=batch_size,
            progress=progress,
        )
    elif layers != "all":
        direction = direction.at(layers)
    named = {BASE: base, **{str(label): model for label, model in models.items()}}
    running: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    if not isinstance(cue, Probe):
        task = cue or wrapper_present(pairs, base.tokenizer)
        at: dict[str, Any] = {"positions": [positions], "site": direction.site, "layers": direction.layers}
        cue = probe(named, task, estimators=[ESTIMATOR], **at, **running)
    ablated = ablate(named, pairs, direction, positions=positions, draws=draws, seed=seed, **running)
    steered = steer(named, pairs, direction, alphas=[1.0], positions=positions, draws=draws, seed=seed, **running)
    return Erasure(
        readable=_readable(cue, list(named), direction, ablated.positions),
        used=_effects(ablated),
        reelicited=_effects(steered),
        wrapped=ablated.plain_logit_diffs,
        models=tuple(named),
        layers=direction.layers,
        control=control,
        question=cue.question,
        positions=ablated.positions,
        direction=direction.name,
    )


def _readable(
    found: Probe, models: Sequence[str], direction: Directions, positions: str
) -> Float[np.ndarray, "model layer 5"]:
    """Each model's own probe, with the ends of its interval and of the null that all models share.

    Raises:
        CtlensError: a model, a layer, the positions or the site was not probed.
    """
    if found.site != direction.site or not set(direction.layers) <= set(found.layers):
        raise CtlensError(
            f"the probe read {_site_and_layers(found)}, but the direction is at {_site_and_layers(direction)}: "
            "probe it there."
        )
    layers = [found.layers.index(layer) for layer in direction.layers]
    estimator = found.estimators[0]
    curves = np.stack([np.stack(found.curve(name, name, positions, estimator), -1)[layers] for name in models])
    null = [end[layers] for end in found.null(positions, estimator)]
    return np.concatenate([curves, np.broadcast_to(np.stack(null, -1), (*curves.shape[:2], 2))], -1)


def _site_and_layers(found: Probe | Directions) -> str:
    return f"{found.site} at layers {', '.join(map(str, found.layers))}"


def _effects(found: Intervention) -> Float[np.ndarray, "model layer variant pair"]:
    """The effects at the one strength, without those of the opposite direction."""
    kept = [number for number, variant in enumerate(found.variants) if variant != OPPOSITE]
    return found.effects[:, :, 0, kept]
