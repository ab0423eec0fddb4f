"""The kinds of tokens in figures: a colour each, squares before the labels of an axis, and a legend of them."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from ctlens.plots.theme import literal

# Light enough for dark text on it, dark enough for a small square on white; hues of their own, for kinds of tokens are
# no methods. Both ways to divide a prompt are here: `ctlens.data.token_kinds` and the segments of attention.
_COLOURS = {
    "content": "#8fc1e8",
    "wrapper": "#f2a76b",
    "assistant header": "#bfa6e0",
    "answer": "#e3a0d8",
    "template": "#c3c9d1",
    "system": "#93cfa9",
    "user": "#e3d36f",
    "assistant": "#e8a3bc",
    "answers": "#e8a3bc",
    "bos": "#9aa3ae",
    "rest": "#c3c9d1",
}
_OTHER = "#ffffff"
_SIDE = 12  # of a square in the legend, in pixels, chosen by eye


def kind_colour(kind: str) -> str:
    """The colour of a kind of token; white for a kind that has none."""
    return _COLOURS.get(kind, _OTHER)


def kind_ticks(labels: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """Labels of an axis of tokens, each behind a square in the colour of its kind.

    Args:
        labels: of the tokens; drawn letter by letter.
        kinds: of each; `""` where it has none. Empty where no token has.

    >>> kind_ticks(["no", "<br>"], ["wrapper", ""])
    ['no <span style="color: #f2a76b">■</span>', '&lt;br&gt;']
    """
    drawn = [literal(label) for label in labels]
    squares = [f' <span style="color: {kind_colour(kind)}">■</span>' if kind else "" for kind in kinds]
    return [label + square for label, square in zip(drawn, squares or [""] * len(drawn), strict=True)]


def without_kind(tick: str) -> str:
    """The label of `kind_ticks` without its square.

    >>> [without_kind(tick) for tick in kind_ticks(["no", "a ■"], ["wrapper", ""])]
    ['no', 'a ■']
    """
    return tick.partition(" <span")[0] if tick.endswith("■</span>") else tick


def add_kind_legend(figure: go.Figure, kinds: Sequence[str]) -> None:
    """Names the colours of the kinds that occur, in the order in which they do, each once."""
    for kind in dict.fromkeys(kind for kind in kinds if kind):
        square = {"color": kind_colour(kind), "symbol": "square", "size": _SIDE}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=kind, marker=square)
