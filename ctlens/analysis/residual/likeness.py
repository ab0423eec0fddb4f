"""Likeness of sets of vectors with one vector per prompt: pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

SMALLEST_CEILING = 0.3  # dividing by a smaller ceiling would blow up noise; chosen by eye
RANK = 1e-5  # singular values below this share of the largest are rounding

Matrix: TypeAlias = Float[np.ndarray, "... model model"]
MethodSeeds: TypeAlias = Sequence[tuple[str, int]]
"""The method and the seed of each model."""
Table: TypeAlias = Float[np.ndarray, "... method method"]


def cosines(gram: Matrix) -> Matrix:
    """The cosines of vectors from their inner products; NaN with a vector of length zero.

    >>> cosines(np.array([[4.0, 3.0], [3.0, 9.0]])).tolist()  # 3 / (2 * 3)
    [[1.0, 0.5], [0.5, 1.0]]
    """
    length = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    product = length[..., :, None] * length[..., None, :]
    return np.divide(gram, product, out=np.full_like(gram, np.nan), where=product > 0)


def debiased_cka(vectors: Float[np.ndarray, "model prompt d"]) -> Matrix:
    """Linear centred kernel alignment from the unbiased estimator of HSIC (Song et al. 2012).

    The plain estimator is near 1 for unrelated data of as many dimensions as prompts; this one is
    near 0, also below it. Nguyen et al. (2021, arXiv 2010.15327) use it for the same reason. It needs
    four prompts.
    """
    n = vectors.shape[1]
    kernels = vectors @ vectors.swapaxes(1, 2)
    kernels[:, range(n), range(n)] = 0
    rows = kernels.sum(-1, keepdims=True) / (n - 2)
    centred = kernels - rows - rows.swapaxes(1, 2) + rows.sum(1, keepdims=True) / (n - 1)
    centred[:, range(n), range(n)] = 0
    flat = centred.reshape(len(vectors), -1)
    return cosines(flat @ flat.T)


def top_directions(vectors: Float[np.ndarray, "... prompt d"], k: int) -> Float[np.ndarray, "... k d"]:
    """The `k` orthonormal directions that hold most of the vectors' squared length; the mean is not removed.

    A direction that the vectors do not have, because they span fewer, is zero.
    """
    _, length, directions = np.linalg.svd(vectors, full_matrices=False)
    there = length > RANK * np.maximum(length[..., :1], np.finfo(float).tiny)
    return (directions * there[..., None])[..., :k, :]


def principal_cosines(
    one: Float[np.ndarray, "... k d"], other: Float[np.ndarray, "... k d"]
) -> Float[np.ndarray, "... k"]:
    """The cosines of the principal angles between the spans of orthonormal directions, the largest first.

    >>> plane = np.eye(3)[:2]
    >>> principal_cosines(plane, np.eye(3)[1:]).tolist()  # they share one axis
    [1.0, 0.0]
    """
    return np.linalg.svd(one @ other.swapaxes(-1, -2), compute_uv=False)


def model_pairs(seeds: MethodSeeds, one: str, other: str) -> list[tuple[int, int]]:
    """The pairs of models over which a number between two methods is averaged: models of different seeds.

    Trainings of one seed see the same batches, which makes them alike. Only two methods that have
    no other models are compared at the same seed.

    >>> model_pairs([("act", 0), ("act", 1), ("bct", 0)], "act", "bct")
    [(1, 2)]
    """
    first = [number for number, (method, _) in enumerate(seeds) if method == one]
    second = [number for number, (method, _) in enumerate(seeds) if method == other]
    both = [(i, j) for i in first for j in second if i != j]
    apart = [(i, j) for i, j in both if seeds[i][1] != seeds[j][1]]
    return apart or both


def between(values: Matrix, seeds: MethodSeeds) -> Float[np.ndarray, "ends ... method method"]:
    """Averages numbers between models to numbers between methods: their mean, least and largest over pairs of seeds.

    The diagonal is the ceiling: one method with itself at another seed, NaN for a method of one seed.
    """
    methods = list(dict.fromkeys(method for method, _ in seeds))
    shape = (*values.shape[:-2], len(methods), len(methods))
    tables = np.full((3, *shape), np.nan)
    for row, one in enumerate(methods):
        for column, other in enumerate(methods):
            if chosen := model_pairs(seeds, one, other):
                found = values[..., *zip(*chosen, strict=True)]
                tables[..., row, column] = found.mean(-1), found.min(-1), found.max(-1)
    return tables


def without_each_seed(values: Matrix, seeds: MethodSeeds) -> Float[np.ndarray, "seed ... method method"]:
    """Averages numbers between models to numbers between methods, each time without the models of one seed.

    NaN for a method that has no other model.

    >>> seeds = [("act", 0), ("act", 1), ("bct", 0), ("bct", 1)]
    >>> alike = np.array([[1.0, 0.8, 0.1, 0.2], [0.8, 1.0, 0.3, 0.4], [0.1, 0.3, 1.0, 0.9], [0.2, 0.4, 0.9, 1.0]])
    >>> without_each_seed(alike, seeds)[:, 0, 1].tolist()  # ACT with BCT: what is left has one seed
    [0.4, 0.1]
    """
    methods = list(dict.fromkeys(method for method, _ in seeds))
    numbers = sorted({seed for _, seed in seeds})
    tables = np.full((len(numbers), *values.shape[:-2], len(methods), len(methods)), np.nan)
    for table, left_out in zip(tables, numbers, strict=True):
        others = [number for number, (_, seed) in enumerate(seeds) if seed != left_out]
        kept = sorted(others, key=lambda number: methods.index(seeds[number][0]))
        left = [seeds[number] for number in kept]
        there = np.array([name in dict(left) for name in methods])
        averaged = between(values[..., kept, :][..., kept], left)[0]
        table[..., np.outer(there, there)] = averaged.reshape(*averaged.shape[:-2], -1)
    return tables


def ceilings(table: Table) -> Table:
    """The largest number that noise between seeds leaves to two methods: `sqrt(ceiling_a ceiling_b)`.

    NaN when a ceiling is missing or below `SMALLEST_CEILING`.
    """
    own = np.diagonal(table, axis1=-2, axis2=-1)
    own = np.sqrt(np.where(own >= SMALLEST_CEILING, own, np.nan))
    return own[..., :, None] * own[..., None, :]
