"""The statistics of a comparison of shifts at one hook point: between methods, with intervals and by chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Int

from ctlens.analysis.base.nulls import random_directions
from ctlens.analysis.base.positions import STATE_POSITIONS
from ctlens.analysis.base.result import clusters_in
from ctlens.analysis.residual.likeness import (
    Matrix,
    MethodSeeds,
    between,
    ceilings,
    cosines,
    debiased_cka,
    principal_cosines,
    top_directions,
    without_each_seed,
)
from ctlens.analysis.residual.shift_vectors import SHIFT_PARTS, Shifts
from ctlens.core.clusters import Clusters, half_width, influences
from ctlens.core.errors import CtlensError
from ctlens.core.stats import ENDS

STATISTICS = (
    "value",
    *("ci_low", "ci_high"),
    *("seed_low", "seed_high"),
    *("corrected", "corrected_low", "corrected_high"),
)
_TITLES = {
    "cosine": "cosine prompt by prompt",
    "mean_cosine": "cosine of the mean shifts",
    "cka": "debiased linear CKA",
}
_DRAWS = 200  # random directions; chosen by eye

Statistics: TypeAlias = Float[np.ndarray, "quantity statistic method method"]
_Band: TypeAlias = Float[np.ndarray, "quantity ends method"]
_Measured: TypeAlias = tuple[Statistics, _Band]


def names_of(quantities: Sequence[str], k: int) -> tuple[str, ...]:
    """The labels of quantities; `principal` has one an angle.

    >>> names_of(["cosine", "principal"], 2)
    ('cosine', 'principal_1', 'principal_2')
    """
    angles = [f"principal_{number}" for number in range(1, k + 1)]
    return tuple(label for name in quantities for label in (angles if name == "principal" else [name]))


def title_of(label: str) -> str:
    """A label in words."""
    return _TITLES.get(label, f"cosine of principal angle {label.removeprefix('principal_')}")


def arrays(
    found: Sequence[dict[tuple[str, str], Shifts]],
    seeds: MethodSeeds,
    quantities: Sequence[str],
    k: int,
    groups: Mapping[str, Int[np.ndarray, " prompt"]],
) -> dict[str, np.ndarray]:
    """The arrays of `ShiftSimilarity` by name, from the shifts of all layers; NaN at the wrapper for parts it lacks."""
    owners = [method for method, _ in seeds]
    methods = len(dict.fromkeys(owners))
    n_seeds = len({seed for _, seed in seeds})
    shape = (len(names_of(quantities, k)), len(SHIFT_PARTS), len(STATE_POSITIONS), len(found), methods)
    numbers = np.full((len(STATISTICS), *shape, methods), np.nan)
    random = np.full((2, *shape), np.nan)
    length = np.full(shape[1:], np.nan)
    n_prompts = np.zeros((*shape[1:], methods), dtype=np.int64)
    given = len(next(iter(found[0].values())).gram)
    by_prompt = np.full((*shape[1:4], given, methods, methods), np.nan, dtype=np.float32)
    without_seed = np.full((n_seeds, *by_prompt.shape), np.nan, dtype=np.float32)
    for layer, of_layer in enumerate(found):
        for (part, positions), shifts in of_layer.items():
            at = SHIFT_PARTS.index(part), STATE_POSITIONS.index(positions), layer
            table, band = measure_all(shifts, seeds, quantities, k, groups)
            numbers[:, :, *at] = table.swapaxes(0, 1)
            random[:, :, *at] = band.swapaxes(0, 1)
            squares = np.einsum("naa->a", shifts.gram) / len(shifts.gram)
            of_methods = [squares[[owner == name for owner in owners]] for name in dict.fromkeys(owners)]
            length[at] = [np.sqrt(of_method.mean()) for of_method in of_methods]
            alike = cosines(shifts.gram)
            by_prompt[at] = between(alike, seeds)[0]
            without_seed[:, *at] = without_each_seed(alike, seeds)
            n_prompts[at] = np.nan_to_num(between(shifts.moved.sum(0).astype(float), seeds)[1])
    bands = {"random_low": random[0], "random_high": random[1]}
    return (
        dict(zip(STATISTICS, numbers, strict=True))
        | bands
        | {"length": length, "n_prompts": n_prompts, "by_prompt": by_prompt, "without_seed": without_seed}
    )


def measure_all(
    shifts: Shifts,
    seeds: MethodSeeds,
    quantities: Sequence[str],
    k: int,
    groups: Mapping[str, Int[np.ndarray, " prompt"]],
) -> _Measured:
    """Measures the `STATISTICS` of each quantity between methods, and each method's band of random directions.

    Prompts without a token at the positions do not count; NaN where none is left.

    Raises:
        CtlensError: there are too few prompts for a quantity.
    """
    known = ~np.asarray(np.isnan(shifts.mean).any((1, 2)))
    if not known.any():
        labels = len(names_of(quantities, k))
        methods = len(dict.fromkeys(method for method, _ in seeds))
        nothing = np.full((labels, len(STATISTICS), methods, methods), np.nan)
        return nothing, np.full((labels, 2, methods), np.nan)
    shifts = Shifts(shifts.gram[known], shifts.mean[known], shifts.pull[known])
    clusters = clusters_in(groups, known)
    measured = [SIMILARITY_MEASURES[name](shifts, seeds, k, clusters) for name in quantities]
    return np.concatenate([table for table, _ in measured]), np.concatenate([band for _, band in measured])


def _cosine(shifts: Shifts, seeds: MethodSeeds, k: int, clusters: Clusters | None) -> _Measured:
    values = cosines(shifts.gram)
    known = ~np.isnan(values)
    filled = np.where(known, values, 0)
    pull = np.nan_to_num(shifts.pull)
    counts = known.sum(0)
    with np.errstate(invalid="ignore"):
        point = filled.sum(0) / counts
        without = (filled.sum(0) - filled) / (counts - known)
        pull = pull.sum(0) / np.diagonal(counts)[:, None]
    table = _corrected(point, without, seeds, clusters)
    return table, _band(pull @ random_directions(pull.shape[-1], _DRAWS).T, seeds)[None]


def _mean_cosine(shifts: Shifts, seeds: MethodSeeds, k: int, clusters: Clusters | None) -> _Measured:
    centre = shifts.mean.mean(0)
    n = len(shifts.mean)
    left = (n * centre - shifts.mean) / max(n - 1, 1)
    point = cosines(centre @ centre.T)
    without = cosines(left @ left.swapaxes(-1, -2))
    length = np.linalg.norm(centre, axis=-1, keepdims=True)
    unit = np.divide(centre, length, out=np.full_like(centre, np.nan), where=length > 0)
    table = _corrected(point, without, seeds, clusters)
    return table, _band(unit @ random_directions(unit.shape[-1], _DRAWS).T, seeds)[None]


def _cka(shifts: Shifts, seeds: MethodSeeds, k: int, clusters: Clusters | None) -> _Measured:
    n, _, d = shifts.mean.shape
    if n <= d:
        raise CtlensError(
            f"CKA needs more prompts than dimensions: {n} prompts do not suffice for {d} dimensions; give more pairs."
        )
    table = _uncorrected(lambda items: debiased_cka(shifts.mean[items].swapaxes(0, 1))[None], n, seeds, clusters)
    return table, np.full((1, 2, table.shape[-1]), np.nan)


def _principal(shifts: Shifts, seeds: MethodSeeds, k: int, clusters: Clusters | None) -> _Measured:
    n, _, d = shifts.mean.shape
    if not 1 <= k <= min(n // 2, d):
        raise CtlensError(
            f"{k} principal angles need {2 * k} prompts and {k} dimensions; there are {n} and {d}: "
            "choose a smaller k, of at least 1, or give more pairs."
        )

    def angles(items: np.ndarray) -> Matrix:
        top = top_directions(shifts.mean[items].swapaxes(0, 1), k)
        return np.moveaxis(principal_cosines(top[:, None], top[None]), -1, 0)

    top = top_directions(shifts.mean.swapaxes(0, 1), k)
    random = np.linalg.qr(random_directions(d, _DRAWS, k).swapaxes(1, 2))[0].swapaxes(1, 2)
    chance = principal_cosines(top[:, None], random[None])
    return _uncorrected(angles, n, seeds, clusters), np.stack([_band(chance[..., angle], seeds) for angle in range(k)])


SIMILARITY_MEASURES: Mapping[str, Callable[[Shifts, MethodSeeds, int, Clusters | None], _Measured]] = {
    "cosine": _cosine,
    "mean_cosine": _mean_cosine,
    "cka": _cka,
    "principal": _principal,
}


def _corrected(
    point: Matrix, without: Float[np.ndarray, "prompt model model"], seeds: MethodSeeds, clusters: Clusters | None
) -> Statistics:
    """The statistics of a cosine between methods, from its values between models, of all prompts and without each."""
    value, low, high = between(point, seeds)
    left = between(without, seeds)[0]
    with np.errstate(invalid="ignore"):
        corrected = _with_ends(value / ceilings(value), left / ceilings(left), clusters)
        own = _with_ends(value, left, clusters)
    corrected[:, np.isnan(corrected[0])] = np.nan
    corrected[:, range(len(value)), range(len(value))] = np.nan
    return np.stack([value, *own[1:].clip(-1, 1), low, high, *corrected])[None]


def _with_ends(
    value: Float[np.ndarray, ...], without: Float[np.ndarray, "prompt ..."], clusters: Clusters | None
) -> Float[np.ndarray, "3 ..."]:
    """A smooth statistic with the ends of its interval, from its values without each prompt (the jackknife)."""
    reach = half_width(influences(without), clusters)
    return np.stack([value, value - reach, value + reach])


def _uncorrected(
    values: Callable[[np.ndarray], Float[np.ndarray, "quantity model model"]],
    n: int,
    seeds: MethodSeeds,
    clusters: Clusters | None,
) -> Statistics:
    """The statistics of CKA and of principal angles, which have no correction for the ceiling.

    Correction for attenuation is of cosines, so those three statistics are NaN.
    """
    every = np.arange(n)
    value, low, high = between(values(every), seeds)
    without = np.stack([between(values(np.delete(every, prompt)), seeds)[0] for prompt in every])
    ends = _with_ends(value, without, clusters)[1:].clip(-1, 1)
    nothing = np.full((3, *value.shape), np.nan)
    return np.stack([value, *ends, low, high, *nothing], 1)


def _band(chance: Float[np.ndarray, "model draw"], seeds: MethodSeeds) -> Float[np.ndarray, "ends method"]:
    """The band of 95 percent of the numbers with random directions, over the models of each method."""
    methods = dict.fromkeys(method for method, _ in seeds)
    of_methods = [chance[[owner == method for owner, _ in seeds]] for method in methods]
    return np.stack([np.quantile(of_method, ENDS) for of_method in of_methods], -1)
