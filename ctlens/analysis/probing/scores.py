"""Balanced accuracy among prompts of one stratum, with an interval over groups."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from ctlens.analysis.probing.tasks import NO_GROUP, Task
from ctlens.core.clusters import pigeonhole
from ctlens.core.stats import ENDS

Right = Float[np.ndarray, "reading prompt"]


def balanced(
    right: Right, task: Task, weights: Float[np.ndarray, "resample prompt"] | None = None
) -> Float[np.ndarray, "resample reading"]:
    """The mean over classes of the share told right, within each stratum, and then the mean over strata.

    Args:
        right: the share of right answers for each prompt, 0 to 1.
        task: labels and strata.
        weights: how often each prompt counts; once in a single resample if not given. A class
            that does not occur in a resample does not count in it.
    """
    weights = np.ones((1, right.shape[1])) if weights is None else weights
    labels = np.array(task.labels)
    known = np.array(task.stratum)
    strata = []
    for value, classes in task.contested().items():
        shares = []
        for label in classes:
            rows = (known == value) & (labels == label)
            with np.errstate(invalid="ignore"):
                shares.append(weights[:, rows] @ right[:, rows].T / weights[:, rows].sum(1, keepdims=True))
        strata.append(_mean(np.stack(shares)))
    return _mean(np.stack(strata))


def interval(right: Right, task: Task, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The score of each reading and the ends of its interval.

    The groups of each factor are drawn with replacement, and a prompt counts as often as all of its
    groups were drawn together (the pigeonhole bootstrap): prompts that share an entity or a wrapper
    are no independent evidence. With few groups it is somewhat narrow: on simulated states of 15
    entities and 8 wrappers it held the mean score in 85 to 97 of 100 draws, least where wrappers differ most.
    """
    resampled = balanced(right, task, _counts(task, seed).astype(float))
    low, high = np.nanquantile(resampled, ENDS, axis=0)
    return balanced(right, task)[0], low, high


def curves(
    right: Float[np.ndarray, "positions estimator layer reading prompt"], task: Task
) -> list[Float[np.ndarray, "reading positions estimator layer"]]:
    """Score and the ends of its interval."""
    flat = interval(right.reshape(-1, right.shape[-1]), task)
    return [np.moveaxis(values.reshape(right.shape[:-1]), -1, 0) for values in flat]


def surely_above(
    real: Float[np.ndarray, "positions estimator layer reading prompt"],
    null: Float[np.ndarray, "positions estimator layer reading prompt"],
    task: Task,
) -> Float[np.ndarray, "reading positions estimator layer"]:
    """The lower end of the score above that of shuffled labels, which holds at all layers at once.

    The best of many layers is good by chance too. What is taken off is how far the layer that is furthest above its
    number lies above it, in 97.5 percent of the resamples of groups that `interval` draws: the max-statistic, over
    layers (Westfall and Young, 1993).
    """
    counts = _counts(task, 0).astype(float)
    rows = (-1, real.shape[-1])
    above = (balanced(real.reshape(rows), task) - balanced(null.reshape(rows), task)).reshape(real.shape[:-1])
    resampled = balanced(real.reshape(rows), task, counts) - balanced(null.reshape(rows), task, counts)
    off = np.nanmax(resampled.reshape(-1, *above.shape) - above, axis=3)
    return np.moveaxis(above - np.nanquantile(off, ENDS[1], axis=0)[:, :, None], -1, 0)


def deals_apart(
    right: Float[np.ndarray, "positions estimator layer deal reading prompt"], task: Task
) -> list[Float[np.ndarray, "reading positions estimator layer"]]:
    """The lowest and the highest score of one deal."""
    scores = balanced(right.reshape(-1, right.shape[-1]), task)[0].reshape(right.shape[:-1])
    return [np.moveaxis(end, -1, 0) for end in (scores.min(3), scores.max(3))]


def _counts(task: Task, seed: int) -> Int[np.ndarray, "resample prompt"]:
    """How often each prompt counts in each resample of the groups of all factors."""
    groups = [np.array(of_factor) for of_factor in task.groups.values()]
    numbers = [np.where(of == NO_GROUP, -1, np.searchsorted(np.unique(of[of != NO_GROUP]), of)) for of in groups]
    return pigeonhole(numbers, seed)


def _mean(values: Float[np.ndarray, "part resample reading"]) -> Float[np.ndarray, "resample reading"]:
    """The mean over the parts that are numbers, not a number where none is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(0) / known.sum(0)
