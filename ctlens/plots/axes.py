"""Checked arrays, and axes whose labels may repeat."""

from __future__ import annotations

from collections.abc import Sequence, Sized

import numpy as np
from numpy.typing import ArrayLike

from ctlens.errors import CtlensError


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


def token_axis(tokens: Sequence[str]) -> dict[str, object]:
    """Settings for a token axis: positions are numbers and tokens only their tick labels.

    Plotly merges the columns of equal category names, so a prompt with a repeated token would
    lose columns on a category axis. Draw against `range(len(tokens))` and pass this to
    `figure.update_xaxes(**token_axis(tokens))`. Spaces and line breaks are made visible.

    Raises:
        CtlensError: there is no token.
    """
    require_some("tokens", tokens)
    shown = [token.replace(" ", "·").replace("\n", "↵") for token in tokens]
    return {
        "tickmode": "array",
        "tickvals": list(range(len(shown))),
        "ticktext": shown,
        "range": [-0.5, len(shown) - 0.5],
    }
