"""Checked arrays: a figure draws an array only if it has the shape of its labels."""

from __future__ import annotations

from collections.abc import Sized

import numpy as np
from numpy.typing import ArrayLike

from ctlens.core.errors import CtlensError


def checked(name: str, values: ArrayLike, *shape: int) -> np.ndarray:
    """`values` as a float array of exactly `shape`.

    Raises:
        CtlensError: the shape differs, or there is nothing to draw.
    """
    array = np.asarray(values, dtype=float)
    if array.shape != shape:
        raise CtlensError(f"{name} has shape {array.shape}, but {shape} is expected from the labels.")
    if array.size == 0:
        raise CtlensError(f"{name} is empty: there is nothing to draw.")
    return array


def require_some(name: str, items: Sized) -> None:
    """Raises a `CtlensError` when `items` has no entry."""
    if not len(items):
        raise CtlensError(f"{name} is empty: there is nothing to draw.")
