"""Probes: how well they read a model's states, on entities and wrappers that they were not fitted on.

The score is balanced accuracy: the mean over classes of the share told right, among prompts that are
alike in what is known anyway. Every prompt is tried in every one of several deals of the groups into
folds, one per seed. The interval resamples the groups of every factor at once (the pigeonhole bootstrap
of Owen, 2007), so it speaks of new entities under new wrappers; `seed_low` and `seed_high`, the range
over deals, say how much the score owes to which groups were fitted on.

Beside the score stand a probe fitted on shuffled labels, a probe of random vectors and chance; and
beside a probe carried from one model to another the one fitted anew, because a base-fitted probe
that fails shows that the states moved, not that anything was erased.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float

from ctlens import plots
from ctlens.analysis.base.forward import require_comparable
from ctlens.analysis.base.positions import POSITIONS_IN_WORDS, PositionsOf
from ctlens.analysis.base.recording import Readable, model_of
from ctlens.analysis.base.result import Result
from ctlens.analysis.base.states import States
from ctlens.analysis.probing.classifiers import NONLINEAR, group_splits, hits, hits_of_models, make_probe
from ctlens.analysis.probing.scores import balanced, curves, deals_apart, surely_above
from ctlens.analysis.probing.tasks import Task
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.keeping import keeping
from ctlens.core.labels import BASE
from ctlens.core.progress import progress_bar
from ctlens.core.public import public
from ctlens.models.hooks import Layers
from ctlens.plots import Curve, Figure

CEILING_SCORE = 0.98  # from here on a task tells no model from another; chosen by eye

Probed: TypeAlias = Readable | States | Sequence[States]
"""A model, its recording, or its states on the task's prompts, one per choice of positions."""


@dataclass(frozen=True)
class Probe(Result):
    """The result of `probe`: scores by reading, that is, by the model a probe was fitted on and the model it read.

    Attributes:
        score, ci_low, ci_high: balanced accuracy and its 95 percent interval over groups.
        seed_low, seed_high: its lowest and highest value in one deal of the groups into folds.
        shuffled, shuffled_low, shuffled_high: the same with labels shuffled in training.
        selectivity_low: the lower end of the score above that of shuffled labels, at all layers at once.
        random_features: per estimator, the score on random vectors in place of states.
        fitted_on, read_on: per reading, the model's name.
        positions, estimators, layers: the other axes.
        site: the hook point.
        question: what was asked.
        chance: the score of guessing.
        n_train: prompts per fit, on average.
        n_test: prompts that the score counts.
        balance: prompts by label.
    """

    score: Float[np.ndarray, "reading positions estimator layer"]
    ci_low: Float[np.ndarray, "reading positions estimator layer"]
    ci_high: Float[np.ndarray, "reading positions estimator layer"]
    seed_low: Float[np.ndarray, "reading positions estimator layer"]
    seed_high: Float[np.ndarray, "reading positions estimator layer"]
    shuffled: Float[np.ndarray, "reading positions estimator layer"]
    shuffled_low: Float[np.ndarray, "reading positions estimator layer"]
    shuffled_high: Float[np.ndarray, "reading positions estimator layer"]
    selectivity_low: Float[np.ndarray, "reading positions estimator layer"]
    random_features: Float[np.ndarray, " estimator"]
    fitted_on: tuple[str, ...]
    read_on: tuple[str, ...]
    positions: tuple[str, ...]
    estimators: tuple[str, ...]
    layers: tuple[int, ...]
    site: str
    question: str
    chance: float
    n_train: int
    n_test: int
    balance: Mapping[str, int]

    def at_ceiling(self, positions: str, estimator: str) -> bool:
        """True if the probes of all models are nearly always right, so that the task does not tell models apart."""
        return bool((self.score[self._refitted(), *self._at(positions, estimator)] >= CEILING_SCORE).all())

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model fitted on, model read on, positions, estimator and layer.

        `selectivity` is the score above that of shuffled labels, and `selectivity_low` its lower end at all layers at
        once; `uninformative` marks a task that is at ceiling in every model and layer.
        """
        axes = product(range(len(self.fitted_on)), self.positions, self.estimators, self.layers)
        names = [(self.fitted_on[row], self.read_on[row], *rest) for row, *rest in axes]
        table = pd.DataFrame(names, columns=["fitted_on", "read_on", "positions", "estimator", "layer"])
        for column in ("score", "ci_low", "ci_high", "seed_low", "seed_high", "shuffled"):
            table[column] = getattr(self, column).ravel()
        table["selectivity"] = table["score"] - table["shuffled"]
        table["selectivity_low"] = self.selectivity_low.ravel()
        random = dict(zip(self.estimators, self.random_features.tolist(), strict=True))
        rows = zip(table["positions"], table["estimator"], strict=True)
        return table.assign(
            random_features=[random[name] for name in table["estimator"]],
            chance=self.chance,
            n_train=self.n_train,
            n_test=self.n_test,
            uninformative=[self.at_ceiling(positions, estimator) for positions, estimator in rows],
        )

    def peak(self) -> pd.DataFrame:
        """Lists for each reading, positions and estimator the layer that is most above shuffled labels.

        Returns:
            Rows as in `to_dataframe`, with `layers_compared`, and whether the peak `stands_out`: the best of many
            layers is good by chance too, so `selectivity_low`, which holds at all layers at once, has to lie above 0.
        """
        table = self.to_dataframe()
        best = table.groupby(["fitted_on", "read_on", "positions", "estimator"], sort=False)["selectivity"].idxmax()
        found = table.loc[best.to_numpy()].reset_index(drop=True)
        return found.assign(layers_compared=len(self.layers), stands_out=found["selectivity_low"] > 0)

    def curve(self, fitted_on: str, read_on: str, positions: str, estimator: str) -> Curve:
        """Score and its interval by layer.

        Raises:
            CtlensError: there is no such reading, positions or estimator.
        """
        readings = list(zip(self.fitted_on, self.read_on, strict=True))
        if (fitted_on, read_on) not in readings:
            raise unknown("reading", f"{fitted_on} on {read_on}", [f"{fit} on {read}" for fit, read in readings])
        at = (readings.index((fitted_on, read_on)), *self._at(positions, estimator))
        return self.score[at], self.ci_low[at], self.ci_high[at]

    def null(self, positions: str, estimator: str) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and highest end, over the models, of the intervals with shuffled labels, by layer."""
        at = (self._refitted(), *self._at(positions, estimator))
        return self.shuffled_low[at].min(0), self.shuffled_high[at].max(0)

    def figure(self, positions: str | None = None, estimator: str | None = None) -> Figure:
        """Score by layer, one colour per model: fitted anew solid, fitted on the base dashed.

        Args:
            positions: the first one if not given.
            estimator: the first one if not given.

        Raises:
            CtlensError: the positions or the estimator were not probed.
        """
        positions = positions or self.positions[0]
        estimator = estimator or self.estimators[0]
        readings = list(zip(self.fitted_on, self.read_on, strict=True))
        note = f"{estimator.replace('_', '-')} probes, {self.n_test} prompts of unseen groups"
        apart = (self.seed_high - self.seed_low)[:, *self._at(positions, estimator)].max()
        if apart > 0:
            note += f"; seeds differ by up to {apart:.2f}"
        if self.at_ceiling(positions, estimator):
            note += f"; uninformative: {CEILING_SCORE:.0%} or more in every model and layer"
        kind = "probe" if estimator == NONLINEAR else "linear probe"
        return plots.probe_curves(
            self.layers,
            {read: self.curve(fit, read, positions, estimator) for fit, read in readings if fit == read},
            {read: self.curve(fit, read, positions, estimator) for fit, read in readings if fit == BASE != read},
            f"Can a {kind} read {self.question}, {POSITIONS_IN_WORDS[positions]}?",
            chance=self.chance,
            shuffled=self.null(positions, estimator),
            subtitle=note,
        )

    def _refitted(self) -> list[int]:
        return [row for row, names in enumerate(zip(self.fitted_on, self.read_on, strict=True)) if len(set(names)) == 1]

    def _at(self, positions: str, estimator: str) -> tuple[int, int]:
        if positions not in self.positions:
            raise unknown("positions", positions, self.positions)
        if estimator not in self.estimators:
            raise unknown("estimator", estimator, self.estimators)
        return self.positions.index(positions), self.estimators.index(estimator)


@public
@keeping()
def probe(
    models: Mapping[str, Probed],
    task: Task,
    *,
    positions: Sequence[str | PositionsOf] = ("last", "content"),
    layers: Layers = "all",
    site: str = "resid_post",
    estimators: Sequence[str] = ("ridge",),
    folds: int = 3,
    seeds: int = 3,
    batch_size: int = 64,
    progress: bool = True,
) -> Probe:
    """Fits probes on every model and, where the base is among them, carries probes from the base and back to it.

    >>> import ctlens as ct
    >>> model, pairs = ct.load_organism(), ct.threats.get("sycophancy").pairs(96, split="heldout")
    >>> task = ct.analysis.wrapper_present(pairs, model.tokenizer)
    >>> found = ct.analysis.probe({"base": model}, task, positions=["last"], layers="last", progress=False)
    >>> bool(found.score.item() > 0.9), found.chance, found.balance
    (True, 0.5, {'none': 192, 'wrapper': 96})

    Args:
        models: by name, in eval mode; `"base"` is the base. In place of a model its recording of the
            task's prompts, or its states, from `Task.states`, one per choice of positions.
        task: what is asked, see `ctlens.analysis.probing.tasks`.
        positions: see `ctlens.analysis.base.states`; not read where states are given, nor are the layers and the site.
        layers: which ones, see `ctlens.models.hooks.select_layers`.
        site: a hook point with one vector per token.
        estimators: `"ridge"`, `"logistic"` and `"mass_mean"`, all on standardised inputs, and `"rbf"`, which is not
            linear and several times as slow.
        folds: into which the groups of every factor are dealt.
        seeds: how many deals of the groups into folds.
        batch_size: prompts per forward pass.
        progress: show progress bars.

    Raises:
        CtlensError: a name is unknown, the models or states do not compare, a model is in training
            mode, there are fewer groups than folds, or a training set lacks a class.
    """
    if folds < 2 or seeds < 1 or not estimators or len(set(estimators)) < len(estimators):
        raise CtlensError(
            "a probe needs at least 2 folds, 1 seed and 1 estimator, and each estimator once: there are "
            f"{folds} folds, {seeds} seeds and the estimators {tuple(estimators)}."
        )
    for name in estimators:
        make_probe(name)
    deals = [group_splits(task, folds, seed) for seed in range(seeds)]
    options = {"site": site, "layers": layers, "batch_size": batch_size, "progress": progress}
    found = _states(models, task, positions, options)
    first = next(iter(found.values()))
    readings = _readings(list(found))
    shape = (len(first), len(estimators), len(first[0].layers), seeds, len(readings))
    real = np.zeros((*shape, len(task.labels)))
    null = np.zeros_like(real)
    axes = list(product(range(len(first)), enumerate(estimators), range(len(first[0].layers))))
    for index, (number, name), layer in progress_bar(axes, desc="probes", shown=progress, leave=False):
        values = {model: of[index].values[layer] for model, of in found.items()}
        real[index, number, layer] = hits_of_models(name, values, readings, task, deals)
        null[index, number, layer] = hits_of_models(name, values, readings, task, deals, shuffled=True)
    noise = np.random.default_rng(0).standard_normal(first[0].values.shape[1:])
    random = np.concatenate([hits(name, noise, [noise], task, deals).mean(0) for name in estimators])
    return Probe(
        *curves(real.mean(3), task),
        *deals_apart(real, task),
        *curves(null.mean(3), task),
        selectivity_low=surely_above(real.mean(3), null.mean(3), task),
        random_features=balanced(random, task)[0],
        fitted_on=tuple(fitted for fitted, _ in readings),
        read_on=tuple(read for _, read in readings),
        positions=tuple(item.positions for item in first),
        estimators=tuple(estimators),
        layers=first[0].layers,
        site=first[0].site,
        question=task.question,
        chance=task.chance(),
        n_train=round(float(np.mean([len(train) for splits in deals for train, _ in splits]))),
        n_test=sum(map(task.stratum.count, task.contested())),
        balance=dict(sorted(Counter(task.labels).items())),
    )


def _states(
    models: Mapping[str, Probed], task: Task, positions: Sequence[str | PositionsOf], options: dict[str, Any]
) -> dict[str, tuple[States, ...]]:
    """The states of each model, one per choice of positions.

    Raises:
        CtlensError: models or states do not compare, or do not fit the task.
    """
    live = [model_of(item) for item in models.values() if not isinstance(item, States | Sequence)]
    for model in live[1:]:
        require_comparable(live[0], model)
    found = {name: _of(item, task, positions, options) for name, item in models.items()}
    kinds = {tuple((s.site, s.positions, s.layers, s.values.shape) for s in of) for of in found.values()}
    if len(kinds) != 1 or () in kinds:
        raise CtlensError("a probe needs states of one site, the same positions, layers and size in every model.")
    (kind,) = kinds
    if len({chosen for _, chosen, _, _ in kind}) < len(kind):
        raise CtlensError(
            "each choice of positions can be probed once: probe several of your own functions one after another."
        )
    if any(shape[1] != len(task.labels) for *_, shape in kind):
        raise CtlensError(f"the states are of {kind[0][-1][1]} prompts, but the task has {len(task.labels)} labels.")
    if not all(np.isfinite(item.values).all() for of in found.values() for item in of):
        raise CtlensError("the states hold numbers that are not finite: the model is broken at one of these layers.")
    return found


def _of(
    item: Probed, task: Task, positions: Sequence[str | PositionsOf], options: dict[str, Any]
) -> tuple[States, ...]:
    if isinstance(item, States):
        return (item,)
    if isinstance(item, Sequence):
        return tuple(item)
    return task.states_at(item, positions, **options)


def _readings(names: list[str]) -> list[tuple[str, str]]:
    """The readings: every model by its own probe, trained models by the base's probe, and the base by theirs."""
    own = [(name, name) for name in names]
    trained = [name for name in names if name != BASE]
    if BASE not in names:
        return own
    return own + [(BASE, name) for name in trained] + [(name, BASE) for name in trained]
