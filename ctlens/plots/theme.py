"""The look of every figure: colour, marker and name of each method and split, and the layout around the data."""

from __future__ import annotations

import html
import textwrap
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from ctlens.core.labels import BASE, CLEAN_BORN

INK = "#1f2933"
MUTED = "#6b7280"
_GRID = "rgba(128, 128, 128, 0.22)"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"
_TITLE_WIDTH = 64  # characters on 700 pixels, plotly's own width for pictures
_SUBTITLE_WIDTH = 90  # the same in the smaller letters of a subtitle
LEGEND_ROW = 44
"""Pixels over the panels in which the legend stands, chosen by eye; a figure without a legend takes them back."""


@dataclass(frozen=True)
class Style:
    """The look of a method or split in every figure: its name in text, hex colour, marker symbol and line dash."""

    label: str
    colour: str
    symbol: str
    dash: str

    def shade(self, alpha: float) -> str:
        """The colour as `rgba(...)` with opacity `alpha` (0 to 1)."""
        channels = [str(int(self.colour[start : start + 2], 16)) for start in (1, 3, 5)]
        return f"rgba({', '.join(channels)}, {alpha})"


# Greys, then five of the Okabe-Ito colours, AttCT's in light and dark for its relatives, brown and olive; the crossed
# conditions of a loss are dashed, in hues near it. Marker and dash repeat the distinction for print and for
# colour-blind readers.
METHOD_STYLES = {
    BASE: Style("base", "#666666", "x", "solid"),
    CLEAN_BORN: Style("clean-born twin", "#b5b5b5", "cross-thin-open", "longdash"),
    "retention": Style("retention only", "#a3a3a3", "cross", "dash"),
    "sft": Style("SFT on other prompts", "#808080", "star", "dashdot"),
    "harmless_act": Style("ACT, harmless wrapper", "#7b868f", "diamond-tall", "longdash"),
    "harmless_bct": Style("BCT, harmless wrapper", "#8f857b", "diamond-wide", "longdashdot"),
    "perturbed": Style("noise on the weights", "#949494", "hexagram", "dot"),
    "sham": Style("sham SFT", "#8a8a8a", "hexagram-open", "longdashdot"),
    "act": Style("ACT", "#0072b2", "circle", "solid"),
    "mlpct": Style("MLPCT", "#e69f00", "square", "solid"),
    "attct": Style("AttCT", "#009e73", "diamond", "solid"),
    "bct": Style("BCT", "#d55e00", "triangle-up", "solid"),
    "klct": Style("KLCT", "#56b4e9", "triangle-down", "solid"),
    "act_last": Style("ACT, last token", "#004a75", "octagon", "dash"),
    "klct_last": Style("KLCT, last token", "#4f8a9e", "triangle-left", "dash"),
    "attout": Style("AttOut", "#66c5ab", "bowtie", "dash"),
    "attmass": Style("AttMass", "#00523c", "hourglass", "dot"),
    "subact": Style("SubACT", "#5e9ed6", "star-square", "dash"),
    "dpo": Style("DPO", "#b2593f", "hourglass-open", "longdash"),
    "opct": Style("OPCT", "#cc79a7", "star-diamond", "solid"),
    "rmct": Style("RMCT", "#8c564b", "pentagon", "solid"),
    "opct_full": Style("OPCT, full sum", "#a45485", "triangle-right", "dash"),
    "subact_random": Style("SubACT, random", "#3f7fb8", "triangle-ne", "dot"),
    "subact_rest": Style("SubACT, the rest", "#2d618f", "triangle-se", "dashdot"),
    "rmct_agreement": Style("RMCT, agreement", "#b08075", "star-triangle-up", "dash"),
    "act_ema": Style("ACT, moving target", "#0090e0", "star-triangle-down", "dashdot"),
    "klct_sharp": Style("KLCT, sharpened", "#8ccdf2", "diamond-open", "dot"),
    "f2c": Style("F2C", "#8a9a00", "hexagon", "solid"),
}
# For stages and other things in an order, which are no methods: dark to light, in hues that no method has.
RAMP = ("#3d2c8d", "#8e2f9e", "#cf4a86", "#e38d78")
_RAMP_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star")
_RAMP_DASHES = ("solid", "dash", "dashdot", "dot")
_OTHER_GREYS = ("#5f6670", "#8b929c", "#b0a8a0")
_OTHER_DASHES = ("dash", "dot", "dashdot", "longdash")


def ordered(names: Sequence[str]) -> dict[str, Style]:
    """Styles, from dark to light, for things that are no methods and have an order, such as stages.

    >>> [look.symbol for look in ordered(["before", "after"]).values()]
    ['circle', 'square']
    """
    sampled = sample_colorscale(list(RAMP), np.linspace(0, 1, len(names)).tolist(), colortype="tuple")
    colours = 255 * np.array(sampled, dtype=float)
    return {
        name: Style(
            name,
            "#" + "".join(f"{round(part):02x}" for part in colour),
            _RAMP_SYMBOLS[number % len(_RAMP_SYMBOLS)],
            _RAMP_DASHES[number % len(_RAMP_DASHES)],
        )
        for number, (name, colour) in enumerate(zip(names, colours, strict=True))
    }


# The splits of an evaluation: first the prompts of the training, last the prompts that differ most from them.
SPLIT_STYLES = ordered(("train", "entities", "heldout", "structure"))
_STYLES = METHOD_STYLES | SPLIT_STYLES
_NAME_OF_LABEL = {look.label: name for name, look in _STYLES.items()}


def style(name: str) -> Style:
    """The style of a method or split; any other name gets a grey and a dash that depend on the name alone."""
    if name in _STYLES:
        return _STYLES[name]
    number = zlib.crc32(name.encode())
    grey = _OTHER_GREYS[number % len(_OTHER_GREYS)]
    dash = _OTHER_DASHES[number // 7 % len(_OTHER_DASHES)]  # 7 is prime to both lengths, so that all pairs occur
    return Style(name, grey, "circle-open", dash)


def looks_of(names: Iterable[str]) -> dict[str, Style]:
    """Styles for the things of one figure: those of methods where one of them is a method, and else in an order."""
    names = list(names)
    return {name: style(name) for name in names} if set(names) & set(METHOD_STYLES) else ordered(names)


def label(name: str) -> str:
    """The name of a method as it is written for readers.

    >>> label("attct"), label("base"), label("my_loss")
    ('AttCT', 'base', 'my_loss')
    """
    return style(name).label


def literal(text: str) -> str:
    """A text from outside, such as a token, as plotly draws it letter by letter: `<br>` in it breaks no line.

    >>> literal("<br>")
    '&lt;br&gt;'
    """
    return html.escape(text, quote=False)


def drawn_for(method: str | None) -> dict[str, str | None]:
    """The `meta` of a trace that belongs to a method; a page shows and hides the trace by it."""
    return {"method": method}


def cell_text(number: str, interval: str, colour: str) -> str:
    """The text in a cell of a matrix: a number and, smaller under it, its interval."""
    return f'<span style="color: {colour}">{number}<br><span style="font-size: 10px">{interval}</span></span>'


def finish(
    figure: go.Figure,
    title: str,
    subtitle: str | None = None,
    *,
    x_title: str | None = None,
    y_title: str | None = None,
    kind: str | None = None,
    caption: str | None = None,
) -> go.Figure:
    """Gives `figure` the common layout, in place, and returns it.

    A trace whose `meta` does not say for which method it is drawn gets that from its legend group or its name.

    Args:
        figure: the figure with its traces.
        title: the question the figure answers, or the answer; wrapped to the width of the page.
        subtitle: one line under the title, for example the threat and the number of prompts.
        x_title: label of every x axis, with its unit; None leaves the axes as they are.
        y_title: label of the first y axis, with its unit; None leaves it as it is.
        kind: which sort of figure this is; the report orders figures by it.
        caption: how to read the figure, printed under it in the report.
    """
    figure.for_each_trace(_name_method)
    lines = _lines(title, subtitle)
    figure.update_layout(
        overwrite=True,  # of each of these as a whole, which is three times as fast as to merge them
        template="none",
        title=_title(*lines),
        meta={"kind": kind, "title": title, "subtitle": subtitle, "caption": caption},
        font={"family": _FONT, "size": 13, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        height=440,
        margin={"l": 68, "r": 36, "t": 26 + _heading_height(*lines) + LEGEND_ROW, "b": 54},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        hovermode="closest",
        modebar={"orientation": "v", "bgcolor": "rgba(0, 0, 0, 0)", "remove": ["select", "lasso", "autoscale"]},
    )
    for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
        _style_axis(axis)
    if x_title is not None:
        figure.update_xaxes(title_text=x_title)
    if y_title is not None:
        figure.update_layout(yaxis_title_text=y_title)
    return figure


def placed(figure: go.Figure, subject: str) -> go.Figure:
    """Puts what a finished figure is of before its title, in the figure itself, and returns it.

    Args:
        figure: from one of the functions that draw.
        subject: for example a threat, so that no two figures of a page have one title.

    >>> placed(finish(go.Figure(), "Does it hold?"), "sycophancy").layout.meta["title"]
    'Sycophancy: does it hold?'
    """
    meta = figure.layout.meta
    title = f"{subject[:1].upper()}{subject[1:]}: {meta['title'][:1].lower()}{meta['title'][1:]}"
    before = _lines(meta["title"], meta["subtitle"])
    after = _lines(title, meta["subtitle"])
    longer = _heading_height(*after) - _heading_height(*before)
    return figure.update_layout(
        title=_title(*after),
        meta={**meta, "title": title},
        height=figure.layout.height + longer,
        margin={"t": figure.layout.margin.t + longer},
    )


def _lines(title: str, subtitle: str | None) -> tuple[list[str], list[str]]:
    """The lines of a title and of a subtitle."""
    heading = [literal(line) for line in textwrap.wrap(title, _TITLE_WIDTH)]
    return heading, [literal(line) for line in textwrap.wrap(subtitle or "", _SUBTITLE_WIDTH)]


def _heading_height(heading: list[str], under: list[str]) -> int:
    """The pixels that the lines of a title and of a subtitle take."""
    return 24 * len(heading) + 18 * len(under)


def _style_axis(axis: Any) -> None:
    """Gives an axis the common look; what it has besides stays. One by one this is twice as fast as to merge them."""
    axis.gridcolor = _GRID
    axis.zeroline = False
    axis.linecolor = MUTED
    axis.ticks = "outside"
    axis.tickcolor = _GRID
    axis.title.font.size = 13
    axis.title.standoff = 10


def _name_method(trace: Any) -> None:
    """Says in the `meta` of a trace which method it is drawn for, unless it says so already."""
    name = trace.legendgroup or trace.name
    trace.meta = trace.meta or drawn_for(_NAME_OF_LABEL.get(name, name))


def _title(heading: list[str], under: list[str]) -> dict[str, object]:
    """Plotly's title: the lines of the heading and, smaller, those of the subtitle, from the upper left corner down."""
    small = f'<span style="font-size: 13px; color: {MUTED}">'
    text = "<br>".join([*heading, *(f"{small}{line}</span>" for line in under)])
    corner = {"x": 0, "xref": "paper", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"}
    return {"text": text, "font": {"size": 18}, "pad": {"t": 24}, **corner}
