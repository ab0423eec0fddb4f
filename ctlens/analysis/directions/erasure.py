"""The analysis that asks whether a cue is erased from a trained model, or still there and only masked.

Its measurements and the rule that makes them a verdict are in `ctlens.analysis.directions.erasure_verdicts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from ctlens import plots
from ctlens.analysis.base.nulls import hardly_moved, random_band
from ctlens.analysis.base.positions import CHOSEN, POSITIONS_IN_WORDS, PositionsOf
from ctlens.analysis.base.result import ResultOverPairs, groups_of
from ctlens.analysis.base.states import States, states
from ctlens.analysis.directions.directions import ITEM, Directions, mean_difference
from ctlens.analysis.directions.erasure_verdicts import (
    EFFECT_ROUNDING,
    INCONCLUSIVE,
    USED_ALONG,
    Evidence,
    MeasuredWithNull,
    erasure_verdict,
    readout,
)
from ctlens.analysis.directions.interventions import ISOTROPIC, OPPOSITE, Intervention
from ctlens.analysis.directions.own_use import OwnUse, held_out_of_search, own_use
from ctlens.analysis.directions.steering import ablate, steer
from ctlens.analysis.probing.classifiers import NONLINEAR
from ctlens.analysis.probing.probe import Probe, probe
from ctlens.analysis.probing.tasks import Task, wrapper_present
from ctlens.core.clusters import clustered_mean
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.keeping import keeping
from ctlens.core.labels import BASE
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair
from ctlens.models.hooks import Layers
from ctlens.plots import Figure

_LINEAR = "ridge"
ERASURE_PROBES = {_LINEAR: 3, NONLINEAR: 1}
"""The estimators of the probes, and in how many deals of groups into folds; `rbf` is several times as slow."""


@dataclass(frozen=True)
class Erasure(ResultOverPairs):
    """The result of `erase_or_mask`: measurements of every model, pair by pair, from which the verdicts follow.

    Attributes:
        readable: `[positions, probe, model, layer, 5]`, balanced accuracy, the ends of its interval, and the lowest and
            highest end of the intervals with shuffled labels in any of the models; the probes are `ERASURE_PROBES`.
        used: `[direction, model, layer, variant, pair]`, effects on the logit difference in nats along each of
            `USED_ALONG`; the direction first, then its null.
        reelicited: `[model, layer, variant, pair]`, effects of the base's direction, then of random ones.
        patched: `[model, layer, pair]`, the logit difference on wrapped prompts whose states at the changed tokens
            lack all that the wrapper adds.
        wrapped, clean: `[model, pair]`, the logit difference on wrapped and on clean prompts.
        held_out: `[pair]`, false for the pairs that a direction was searched on; `used` along it is not a number there.
        models: their labels; the base first, `"base"`.
        layers: the number of each layer.
        control: the label of the retention-only control; empty for none.
        question: what the probe reads, as in `Task`.
        read_positions: the tokens that probes read: those whose states were changed, and second ones.
        direction: what the base's direction is, in words.
    """

    readable: Float[np.ndarray, "positions probe model layer 5"]
    used: Float[np.ndarray, "direction model layer variant pair"]
    reelicited: Float[np.ndarray, "model layer variant pair"]
    patched: Float[np.ndarray, "model layer pair"]
    wrapped: Float[np.ndarray, "model pair"]
    clean: Float[np.ndarray, "model pair"]
    held_out: Bool[np.ndarray, " pair"]
    models: tuple[str, ...]
    layers: tuple[int, ...]
    control: str
    question: str
    read_positions: tuple[str, ...]
    direction: str

    def measured(self) -> dict[str, Float[np.ndarray, "model layer 5"]]:
        """Every measurement by its name: the mean, its interval, and the lowest and highest end of its null."""
        found = {
            f"readable_{chosen}_{name}": self.readable[row, column]
            for row, chosen in enumerate(self.read_positions)
            for column, name in enumerate(ERASURE_PROBES)
        }
        for name, effects in zip(USED_ALONG, self.used, strict=True):
            found[f"used_{name}"] = self._against_null(effects, self.held_out if name == "searched" else self._every)
        left = np.stack(clustered_mean(np.moveaxis(self.clean[:, None] - self.patched, -1, 0), self.clusters()), -1)
        found["left"] = np.concatenate([left, found["used_own"][..., 3:]], -1)
        return found | {"reelicited": self._against_null(self.reelicited, self._every)}

    @property
    def _every(self) -> Bool[np.ndarray, " pair"]:
        return np.ones_like(self.held_out)

    def _against_null(
        self, effects: Float[np.ndarray, "model layer variant pair"], pairs: Bool[np.ndarray, " pair"]
    ) -> Float[np.ndarray, "model layer 5"]:
        """The first variant's mean effect on some pairs with its interval, and the lowest and highest of the others."""
        chosen = effects[..., pairs]
        first = clustered_mean(np.moveaxis(chosen[:, :, 0], -1, 0), self.clusters(pairs))
        return np.stack([*first, *random_band(chosen[:, :, 1:])], -1)

    def evidence(self) -> dict[str, list[Evidence]]:
        """The measurements as the rule takes them, per model, by layer."""
        found = self.measured()

        def at(name: str, model: int, layer: int) -> MeasuredWithNull:
            return MeasuredWithNull(*found[name][model, layer].tolist())

        def evidence(*cell: int) -> Evidence:
            readable = [
                {name: at(f"readable_{chosen}_{name}", *cell) for name in ERASURE_PROBES}
                for chosen in self.read_positions
            ]
            used = {name: at(f"used_{name}", *cell) for name in USED_ALONG}
            return Evidence(readable[0], readable[1], used, at("left", *cell), at("reelicited", *cell))

        layers = range(len(self.layers))
        return {label: [evidence(model, layer) for layer in layers] for model, label in enumerate(self.models)}

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model and layer.

        Returns:
            The `verdict` on the changed tokens, the `readout`, each measurement (such as `readable_last_ridge`,
            `used_own`, `left`) with its interval (`_low`, `_high`) and the highest end of its null (`_null`), and the
            `reason` in words.
        """
        evidence = self.evidence()
        measured = self.measured()
        undecided = [INCONCLUSIVE] * len(self.layers)
        controls = undecided
        if self.control:
            controls = [found for found, _ in self._judged(self.control, evidence, undecided)]
        rows = []
        for model in self.models:
            judged = self._judged(model, evidence, undecided if model == self.control else controls)
            rows += [self._row(model, index, evidence, measured, *found) for index, found in enumerate(judged)]
        return pd.DataFrame(rows)

    def verdicts(self) -> dict[str, tuple[str, ...]]:
        """The verdict per model, by layer."""
        table = self.to_dataframe()
        return {model: tuple(table.loc[table["model"] == model, "verdict"]) for model in self.models}

    @property
    def control_moved(self) -> float:
        """How far the control is from the base, as a share of the nearest other model; infinite without a control.

        The distance is the root mean square over pairs and over logit differences: on wrapped prompts, and at every
        layer lost or recovered along the base's direction. A control near 0 says no more than the base.
        """
        logit_diffs = np.concatenate([self.wrapped[:, None], self.used[0, :, :, 0], self.reelicited[:, :, 0]], axis=1)
        distances = np.sqrt(((logit_diffs - logit_diffs[0]) ** 2).mean((1, 2)))
        moved = dict(zip(self.models, distances.tolist(), strict=True))
        own = moved.pop(self.control, np.inf)
        others = [distance for name, distance in moved.items() if name != BASE and distance > 0]
        return own / min(others, default=np.inf)

    def figure(self) -> Figure:
        """The measurements by layer, one row per model, each with its null and the base; markers are verdicts.

        Readable is drawn for the linear probe at the changed tokens and used for the model's own direction, with the
        other probes and directions as thin lines.
        """
        found = self.measured()
        first = {
            "readable": f"readable_{self.read_positions[0]}_{_LINEAR}",
            "used": "used_own",
            "reelicited": "reelicited",
        }
        curves = {
            model: {question: plots.Measurement(*found[name][row].T) for question, name in first.items()}
            for row, model in enumerate(self.models)
        }
        others = {
            model: {question: self._others(found, question, name, row) for question, name in first.items()}
            for row, model in enumerate(self.models)
        }
        where = POSITIONS_IN_WORDS[self.read_positions[0]]
        subtitle = f"{self.question}; {where}; {self.direction}; {self.wrapped.shape[1]} pairs"
        subtitle += hardly_moved(self.control, self.control_moved, "control")
        title = f"Is the cue erased {where}, or only masked?"
        return plots.evidence(curves, self.verdicts(), self.layers, title, others=others, subtitle=subtitle)

    @staticmethod
    def _others(
        found: Mapping[str, Float[np.ndarray, "model layer 5"]], question: str, first: str, model: int
    ) -> dict[str, Float[np.ndarray, " layer"]]:
        """The measurements that answer a question beside the first, by the rest of their names."""
        names = [name for name in found if name.startswith(f"{question}_") and name != first]
        return {name.replace("_", " "): found[name][model, :, 0] for name in names}

    def _judged(
        self, model: str, evidence: Mapping[str, Sequence[Evidence]], controls: Sequence[str]
    ) -> list[tuple[str, str]]:
        """Gives the verdict and its reason, by layer."""
        repaired = self._gains(self.wrapped[self.models.index(model)] - self.wrapped[0])
        own = self.used[USED_ALONG.index("own")]
        return [
            erasure_verdict(here, base, repaired=repaired, less=self._less(own, model, index), control=control)
            for index, (here, base, control) in enumerate(zip(evidence[model], evidence[BASE], controls, strict=True))
        ]

    def _row(
        self,
        model: str,
        index: int,
        evidence: Mapping[str, Sequence[Evidence]],
        measured: Mapping[str, Float[np.ndarray, "model layer 5"]],
        judged: str,
        reason: str,
    ) -> dict[str, object]:
        here, base = evidence[model][index].reelicited, evidence[BASE][index].reelicited
        row: dict[str, object] = {"model": model, "layer": self.layers[index], "verdict": judged}
        row["readout"] = readout(here, base, less=self._less(self.reelicited, model, index))
        for name, of_all in measured.items():
            value, low, high, _, null = of_all[self.models.index(model), index].tolist()
            row |= {name: value, f"{name}_low": low, f"{name}_high": high, f"{name}_null": null}
        return row | {"reason": reason}

    def _less(self, measured: Float[np.ndarray, "model layer variant pair"], model: str, index: int) -> bool:
        """Tells whether an effect is smaller than in the control, or in the base where there is none."""
        effects = measured[:, index, 0]
        return self._gains(effects[self.models.index(self.control or BASE)] - effects[self.models.index(model)])

    def _gains(self, change: Float[np.ndarray, " pair"]) -> bool:
        """Tells whether a mean change over pairs lies above 0 with its interval."""
        return bool(clustered_mean(change, self.clusters())[1] > EFFECT_ROUNDING)


@public
@keeping()
def erase_or_mask(
    base: LensModel,
    models: Mapping[str, LensModel],
    pairs: Pairs,
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
        pairs: clean and wrapped prompts with a good and a bad answer; not those trained on. `ctlens.pairs` makes them
            of two lists of texts.
        cue: what the probes read, by default whether the wrapper is present; another task, such as
            `answer_hinted(pairs)`; or probes that were already fitted on all of these models, for
            example on their recordings, by both of `ERASURE_PROBES` and at both positions.
        direction: of the base, for example from its recording; None for the difference of wrapped and
            clean of every pair by itself. The two edits always run the models, see `ct.analysis.steer`.
        control: the label of the model trained with retention alone, to which verdicts are compared; one
            that hardly moved is no more than the base, see `Erasure.control_moved`.
        layers: which ones; where clean and wrapped states agree there is no direction.
        positions: whose states are read and changed, see `ctlens.analysis.base.states`. Probes read at second
            ones too: the content tokens, or the last one where the content tokens are changed.
        draws: how many random directions, and how many null searches.
        seed: of both, and of the pairs that a direction is searched on.
        batch_size: pairs per batch.
        progress: show a progress bar.

    Raises:
        CtlensError: models do not compare or are in training mode, a label is not there or given
            twice, a pair does not fit, all pairs have one clean prompt, there is no direction at a layer, a
            given probe lacks what a verdict needs, or as `probe`.
    """
    if not models or BASE in models:
        raise CtlensError(f"give at least one trained model, by a label other than {BASE!r}, the base's.")
    if control and control not in models:
        raise unknown("control", control, map(str, models))
    running: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    reading = {"positions": positions, **running}
    sides: dict[str, tuple[States, States]] = {}
    if direction is None:
        sides[BASE] = _both_sides(base, pairs, layers=layers, **reading)
        direction = mean_difference(sides[BASE], pairs, name="base", per=ITEM)
    elif layers != "all":
        direction = direction.at(layers)
    named = {BASE: base, **{str(label): model for label, model in models.items()}}
    at: dict[str, Any] = {"site": direction.site, "layers": direction.layers}
    read_positions = (positions, "last" if positions == "content" else "content")
    called = tuple(chosen if isinstance(chosen, str) else CHOSEN for chosen in read_positions)
    if isinstance(cue, Probe):
        probes = [dict.fromkeys(named, cue)] * len(ERASURE_PROBES)
    else:
        probes = _probes(named, cue or wrapper_present(pairs, base.tokenizer), read_positions, at | running)
    readable = _readable(probes, direction, called)
    drawing = {"positions": positions, "draws": draws, "seed": seed, **running}
    ablated = ablate(named, pairs, direction, nulls=(ISOTROPIC,), **drawing)
    steered = steer(named, pairs, direction, nulls=(ISOTROPIC,), alphas=[1.0], **drawing)
    held_out = held_out_of_search(pairs, seed)
    own = [
        own_use(
            model, pairs, sides.get(name) or _both_sides(model, pairs, **at, **reading), direction, held_out, **drawing
        )
        for name, model in named.items()
    ]
    return Erasure(
        readable=readable,
        used=_used(ablated, own),
        reelicited=_effects(steered),
        patched=np.stack([found.whole for found in own]),
        wrapped=ablated.plain_logit_diffs,
        clean=steered.plain_logit_diffs,
        held_out=held_out,
        models=tuple(named),
        layers=direction.layers,
        control=control,
        question=probes[0][BASE].question,
        read_positions=called,
        direction=direction.name,
        groups=groups_of(pairs),
    )


def _both_sides(model: LensModel, pairs: Sequence[Pair], **reading: Any) -> tuple[States, States]:
    """The wrapped and the clean states of a model."""
    return states(model, pairs, side="wrapped", **reading), states(model, pairs, side="clean", **reading)


def _probes(
    models: Mapping[str, LensModel], task: Task, read_positions: Sequence[str | PositionsOf], options: dict[str, Any]
) -> list[dict[str, Probe]]:
    """For each of `ERASURE_PROBES`, the probe of every model at both positions, from one reading of its states.

    No probe is carried from one model to another, so each is fitted by itself.
    """
    found = {name: task.states_at(model, read_positions, **options) for name, model in models.items()}
    shown = options["progress"]
    return [
        {
            model: probe({model: of_model}, task, estimators=[name], seeds=seeds, progress=shown)
            for model, of_model in found.items()
        }
        for name, seeds in ERASURE_PROBES.items()
    ]


def _readable(
    probes: Sequence[Mapping[str, Probe]], direction: Directions, read_positions: Sequence[str]
) -> Float[np.ndarray, "positions probe model layer 5"]:
    """Each model's own probes, with the ends of their intervals and of the null that all models share.

    Raises:
        CtlensError: a model, a layer, the positions, the site or an estimator was not probed.
    """
    for name, of_models in zip(ERASURE_PROBES, probes, strict=True):
        _require_probed(next(iter(of_models.values())), name, direction, read_positions)
    named = list(zip(ERASURE_PROBES, probes, strict=True))
    return np.stack(
        [np.stack([_read(found, name, direction, chosen) for name, found in named]) for chosen in read_positions]
    )


def _require_probed(found: Probe, estimator: str, direction: Directions, read_positions: Sequence[str]) -> None:
    if found.site != direction.site or not set(direction.layers) <= set(found.layers):
        raise CtlensError(
            f"the probe read {_site_and_layers(found)}, but the direction is at {_site_and_layers(direction)}: "
            "probe it there."
        )
    if estimator not in found.estimators or not set(read_positions) <= set(found.positions):
        raise CtlensError(
            f"the probe read {' and '.join(found.positions)} by {' and '.join(found.estimators)}, but a verdict "
            f"needs positions={list(read_positions)} and estimators={list(ERASURE_PROBES)}: probe with these."
        )


def _read(
    probes: Mapping[str, Probe], estimator: str, direction: Directions, chosen: str
) -> Float[np.ndarray, "model layer 5"]:
    """What one estimator reads at some positions, with the lowest and highest end of its null in any model."""
    curves = [np.stack(found.curve(model, model, chosen, estimator), -1) for model, found in probes.items()]
    low, high = zip(*(found.null(chosen, estimator) for found in probes.values()), strict=True)
    null = np.stack([np.min(low, 0), np.max(high, 0)], -1)
    every = np.concatenate([curves, np.broadcast_to(null, (len(curves), *null.shape))], -1)
    probed = next(iter(probes.values())).layers
    return every[:, [probed.index(layer) for layer in direction.layers]]


def _site_and_layers(found: Probe | Directions) -> str:
    return f"{found.site} at layers {', '.join(map(str, found.layers))}"


def _used(ablated: Intervention, own: Sequence[OwnUse]) -> Float[np.ndarray, "direction model layer variant pair"]:
    """How far the logit difference recovers along each of `USED_ALONG`."""
    plain = ablated.plain_logit_diffs[:, None, None]
    along = [np.stack([getattr(found, name) for found in own]) - plain for name in USED_ALONG[1:]]
    return np.stack([_effects(ablated), *along])


def _effects(found: Intervention) -> Float[np.ndarray, "model layer variant pair"]:
    """The effects at the one strength, without those of the opposite direction."""
    kept = [number for number, variant in enumerate(found.variants) if variant != OPPOSITE]
    return found.effects[:, :, 0, kept]
