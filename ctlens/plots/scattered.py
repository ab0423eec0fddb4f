"""Two numbers of many things: a point for each, and the corner in which they mean something."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.theme import MUTED, finish, ordered

_SIZE = 6  # pixels, chosen by eye: hundreds of points must not cover each other
_WIDTH = 760  # pixels, chosen by eye


def scattered(
    points_of: Mapping[str, tuple[ArrayLike, ArrayLike]],
    title: str,
    *,
    x_title: str,
    y_title: str,
    caption: str,
    corner: tuple[float, float] | None = None,
    subtitle: str | None = None,
) -> go.Figure:
    """Where do many things lie by two numbers?

    Args:
        points_of: per group of things, their numbers along x and along y.
        title: the question or the answer.
        x_title, y_title: what the numbers are.
        caption: how to read the figure.
        corner: the numbers along x and along y below which both mean something, as dotted lines.
        subtitle: one line under the title.

    Raises:
        CtlensError: there is no group, or one has no point, or not as many numbers along x as along y.
    """
    require_some("groups", points_of)
    figure = go.Figure()
    looks = ordered(list(points_of))
    for name, (x, y) in points_of.items():
        length = np.size(x)
        figure.add_scatter(
            x=checked(f"x of {name!r}", x, length).tolist(),
            y=checked(f"y of {name!r}", y, length).tolist(),
            mode="markers",
            name=looks[name].label,
            marker={"color": looks[name].colour, "symbol": looks[name].symbol, "size": _SIZE, "opacity": 0.7},
        )
    if corner is not None:
        dotted = {"color": MUTED, "dash": "dot", "width": 1.2}
        figure.add_vline(x=corner[0], line=dotted)
        figure.add_hline(y=corner[1], line=dotted)
    finish(figure, title, subtitle, x_title=x_title, y_title=y_title, kind="scattered", caption=caption)
    return figure.update_layout(width=_WIDTH)
