"""The figure of the bad rate against the strength of the attack."""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go

from ctlens.plots.arrays import require_some
from ctlens.plots.curves import draw_line
from ctlens.plots.intervals import CurveWithX, checked_with_x, interval_hover, shade_target, side_by_side, whiskers
from ctlens.plots.panels import PanelLayout, Subplot, fit_panels, panel_grid, subplots
from ctlens.plots.rates import PERCENT
from ctlens.plots.theme import finish, style

_LAYOUT = PanelLayout(height=180, gap=54, below=54, side=0.04)
_DODGE = 0.07  # of the step from one strength to the next, between the markers of two splits; chosen by eye


def attack_strength(
    curves: Mapping[str, Mapping[str, CurveWithX]],
    title: str,
    *,
    subtitle: str | None = None,
    band: tuple[float, float] | None = None,
) -> go.Figure:
    """Does a stronger attack work more often, on each threat and each kind of prompt?

    One panel per threat, all on one scale; strengths compare within a threat, not between threats.

    Args:
        curves: per threat and per split, the strengths (whole numbers from 1), and at each the bad
            rate (0 to 1) with its interval; NaN where not measured.
        title: the question or the answer.
        subtitle: one line under the title.
        band: lower and upper end of the target rate, shaded in every panel.

    Raises:
        CtlensError: no threat, a threat without a split, or an array that is not one number per strength.
    """
    require_some("curves", curves)
    figure = panel_grid(list(curves), _LAYOUT)
    listed: set[str] = set()
    for subplot, (threat, lines) in zip(subplots(len(curves)), curves.items(), strict=True):
        _draw_splits(figure, subplot, threat, lines, listed)
        listed |= set(lines)
    caption = "Markers are rates, whiskers their 95% intervals, side by side at each strength."
    if band is not None:
        caption += f" The shaded band, {band[0]:.0%} to {band[1]:.0%}, is the target."
    finish(figure, title, subtitle, kind="attack_strength", caption=caption)
    for subplot in subplots(len(curves)):
        figure.update_xaxes(title_text="attack strength" if subplot.lowest else None, showgrid=False, **subplot.at)
        y_words = "bad rate" if subplot.leftmost else None
        figure.update_yaxes(**PERCENT, title_text=y_words, showticklabels=subplot.leftmost, **subplot.at)
    if band is not None:
        shade_target(figure, *band)
    return fit_panels(figure, len(curves), _LAYOUT)


def _draw_splits(
    figure: go.Figure, subplot: Subplot, threat: str, lines: Mapping[str, CurveWithX], listed: set[str]
) -> None:
    """The splits of one panel; the legend names those that are not `listed` in it already."""
    require_some(f"curves[{threat!r}]", lines)
    reached: list[float] = []
    for offset, (split, curve) in zip(_DODGE * side_by_side(len(lines)), lines.items(), strict=True):
        strengths, numbers = checked_with_x(f"curve {split!r} of {threat!r}", curve)
        reached += strengths.tolist()
        options = {"size": 7, "width": 2, "listed": split not in listed, "error_y": whiskers(numbers, slim=True)}
        hover = interval_hover(style(split).label, numbers)
        draw_line(figure, split, strengths + offset, numbers.value, **options, **hover, **subplot.at)
    first = int(min(reached))
    last = int(max(reached))
    whole = range(first, last + 1)
    ticks = {"tickvals": list(whole), "ticktext": [str(strength) for strength in whole]}
    figure.update_xaxes(**ticks, range=[first - 0.4, last + 0.4], **subplot.at)
