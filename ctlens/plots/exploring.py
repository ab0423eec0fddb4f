"""One pair of prompts from near: its tokens by kind, numbers by head, by layer and token, and the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.curves import draw_line, layer_ticks
from ctlens.plots.kinds import add_kind_legend, kind_colour, kind_ticks
from ctlens.plots.panels import (
    PANELS_PER_ROW,
    PanelLayout,
    fit_panels,
    fit_stacked,
    panel_grid,
    stacked_panels,
    subplots,
)
from ctlens.plots.theme import INK, LEGEND_ROW, MUTED, drawn_for, finish, label, literal, style

TOKENS_PER_ROW = 12
"""Tokens in a row of `token_grid`; chosen by eye, so that most words can be read."""
_CLEAN = "the clean prompt"
_SHOWN = 9  # characters of a token in its cell; the pointer shows all
_ANSWER = 26  # characters of an answer beside its number
_LEAST_LABELLED = 60  # tokens along an axis up to which each has a label

# Sizes in pixels, chosen by eye.
_TOKEN_HEIGHT = 30
_LAYER_HEIGHT = 15
_LEAST_PANEL = 70
_MOST_PANEL = 240
_BELOW_TOKENS = 100  # under the lowest panel, for slanted labels of tokens
_ROW = 30
_ANSWER_ROOM = 0.5  # right of the largest number, of the span of all, for the text of an answer
_CELLS = PanelLayout(height=190, gap=54, below=54, side=0.05)


class TokenRow(NamedTuple):
    """A prompt for `token_grid`: the text and the kind of every token, and the index of the one that is chosen."""

    tokens: Sequence[str]
    kinds: Sequence[str]
    chosen: int | None = None


class LensLine(NamedTuple):
    """A line of `lens_lines`: the logit difference by layer, and what the stream makes likeliest behind each layer."""

    values: ArrayLike
    likeliest: Sequence[str]


class AnswerRow(NamedTuple):
    """A row of `answer_margins`: who answered which prompt, the logit difference (NaN if unknown), and the answer."""

    model: str
    prompt: str
    logit_diff: float
    answer: str


def token_grid(prompts: Mapping[str, TokenRow], title: str, *, subtitle: str | None = None) -> go.Figure:
    """What is each token of some prompts? A panel per prompt, its tokens in rows, coloured by their kind.

    Args:
        prompts: by name.
        title: the question or the answer.
        subtitle: one line under the title.

    Raises:
        CtlensError: there is no prompt.
    """
    require_some("prompts", prompts)
    kinds = list(dict.fromkeys(kind for row in prompts.values() for kind in row.kinds))
    rows = [-(-len(row.tokens) // TOKENS_PER_ROW) for row in prompts.values()]
    names = [f"{name}, {len(row.tokens)} tokens" for name, row in prompts.items()]
    figure = stacked_panels(names, [_TOKEN_HEIGHT * n for n in rows])
    for number, row in enumerate(prompts.values(), start=1):
        figure.add_trace(_token_cells(row, kinds), row=number, col=1)
        if row.chosen is not None:
            down, across = divmod(row.chosen, TOKENS_PER_ROW)
            _outline(figure, down, across, row=number, col=1)
    add_kind_legend(figure, kinds)
    caption = "Cells are tokens, in reading order; the outlined one is chosen."
    finish(figure, title, subtitle, kind="token_grid", caption=caption)
    plain = {"showgrid": False, "showline": False, "ticks": "", "showticklabels": False}
    figure.update_xaxes(**plain, range=[-0.5, TOKENS_PER_ROW - 0.5])
    figure.update_yaxes(**plain, autorange="reversed")
    return fit_stacked(figure, sum(rows) * _TOKEN_HEIGHT, len(prompts), below=16, margin_l=12)


def _token_cells(row: TokenRow, kinds: Sequence[str]) -> go.Heatmap:
    """The tokens of one prompt as cells, `TOKENS_PER_ROW` to a row; the last row is filled up with empty ones."""
    missing = -len(row.tokens) % TOKENS_PER_ROW
    numbers: list[float | None] = [float(kinds.index(kind)) for kind in row.kinds]
    texts = [literal(_short(text, _SHOWN)) for text in row.tokens]
    hover = [f"{at} {literal(text)}: {kind}" for at, (text, kind) in enumerate(zip(row.tokens, row.kinds, strict=True))]
    steps = [(edge, kind_colour(kind)) for kind, edge in _steps(kinds)]
    return go.Heatmap(
        z=_in_rows([*numbers, *[None] * missing]),
        text=_in_rows([*texts, *[""] * missing]),
        customdata=_in_rows([*hover, *[""] * missing]),
        texttemplate="%{text}",
        textfont={"size": 12, "color": INK},
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        colorscale=steps,
        zmin=-0.5,
        zmax=len(kinds) - 0.5,
        showscale=False,
        xgap=2,
        ygap=4,
    )


def _short(text: str, most: int) -> str:
    """A text in at most so many characters.

    >>> _short("purple", 6), _short("<assistant>", 9)
    ('purple', '<assista…')
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _steps(kinds: Sequence[str]) -> list[tuple[str, float]]:
    """Each kind at the two ends of its part of a colour scale, so that the scale has steps."""
    return [(kind, (number + end) / len(kinds)) for number, kind in enumerate(kinds) for end in (0, 1)]


def _in_rows(cells: Sequence[Any]) -> list[list[Any]]:
    return [list(cells[start : start + TOKENS_PER_ROW]) for start in range(0, len(cells), TOKENS_PER_ROW)]


def head_grids(
    grids: Mapping[str, ArrayLike],
    title: str,
    *,
    unit: str,
    chosen: tuple[int, int] | None = None,
    subtitle: str | None = None,
) -> go.Figure:
    """How large is a quantity of each head? A panel per model, layers by heads, all on one scale from 0.

    Args:
        grids: per model, the quantity `[layer, head]`, not negative.
        title: the question or the answer.
        unit: what a number counts.
        chosen: layer and head of the outlined cell.
        subtitle: one line under the title.

    Raises:
        CtlensError: no model, or a grid of another shape.
    """
    require_some("grids", grids)
    layers, heads = (*np.shape(next(iter(grids.values()))), 0, 0)[:2]
    values = {name: checked(f"grid {name!r}", grid, layers, heads) for name, grid in grids.items()}
    layout = _CELLS._replace(height=min(_MOST_PANEL, max(140, 34 * layers)))
    figure = panel_grid([label(name) for name in grids], layout)
    for (model, grid), subplot in zip(values.items(), subplots(len(grids)), strict=True):
        hover = f"{literal(label(model))}, L%{{y}}H%{{x}}: %{{z:.3f}}<extra></extra>"
        cells = go.Heatmap(z=grid.tolist(), hovertemplate=hover, coloraxis="coloraxis", xgap=1, ygap=1)
        figure.add_trace(cells.update(meta=drawn_for(model)), **subplot.at)
        if chosen is not None:
            _outline(figure, *chosen, **subplot.at)
    caption = "Rows are layers, columns their heads; the outlined one is chosen."
    finish(figure, title, subtitle, kind="head_grids", caption=caption)
    top = max(float(grid.max()) for grid in values.values())
    plain = {"showgrid": False, "showline": False, "ticks": ""}
    figure.update_xaxes(**plain, **layer_ticks(heads), title_text="head")
    figure.update_yaxes(**plain, **layer_ticks(layers), autorange="reversed")
    figure.update_yaxes(title_text="layer", col=1)
    figure.update_layout(margin_t=figure.layout.margin.t - LEGEND_ROW)  # there is no legend
    fit_panels(figure, len(grids), layout)
    panels = 170 * min(PANELS_PER_ROW, len(grids))
    return figure.update_layout(coloraxis=_purples(top, unit), margin_r=96, width=max(420, 164 + panels))


def layer_tokens(
    maps: Mapping[str, ArrayLike],
    tokens: Sequence[str],
    title: str,
    *,
    unit: str,
    kinds: Sequence[str] = (),
    chosen: int | None = None,
    subtitle: str | None = None,
) -> go.Figure:
    """At which layer and token is a quantity large? A panel per model, all on one scale from 0.

    Args:
        maps: per model, the quantity `[layer, token]`, not negative.
        tokens: the label of each token; labels may repeat.
        title: the question or the answer.
        unit: what a number counts.
        kinds: of each token, see `ctlens.data.token_kinds`; empty where they are not told apart.
        chosen: the index of the outlined token.
        subtitle: one line under the title.

    Raises:
        CtlensError: no model, or a map that does not fit the tokens.
    """
    require_some("maps", maps)
    layers = len(np.asarray(next(iter(maps.values()))))
    values = {name: checked(f"map {name!r}", found, layers, len(tokens)) for name, found in maps.items()}
    height = min(_MOST_PANEL, max(_LEAST_PANEL, _LAYER_HEIGHT * layers))
    figure = stacked_panels([label(name) for name in maps], [height] * len(maps))
    names = [literal(token) for token in tokens]
    for number, (model, found) in enumerate(values.items(), start=1):
        cells = go.Heatmap(
            z=found.tolist(),
            customdata=[names] * layers,
            hovertemplate=f"{literal(label(model))}, layer %{{y}}, %{{customdata}}: %{{z:.3f}}<extra></extra>",
            coloraxis="coloraxis",
            meta=drawn_for(model),
            xgap=1,
            ygap=1,
        )
        figure.add_trace(cells, row=number, col=1)
        if chosen is not None:
            _outline(figure, 0, chosen, layers, row=number, col=1)
    caption = "Rows are layers, columns tokens with their positions; the outlined one is chosen."
    finish(figure, title, subtitle, kind="layer_tokens", caption=caption)
    plain = {"showgrid": False, "showline": False, "ticks": ""}
    step = 1 + len(names) // _LEAST_LABELLED
    texts = kind_ticks(tokens, kinds)[::step]
    ticks = {"tickvals": list(range(0, len(names), step)), "ticktext": texts, "tickfont": {"size": 10}}
    figure.update_xaxes(**plain, **ticks, tickangle=-60, showticklabels=False)
    figure.update_xaxes(showticklabels=True, row=len(maps), col=1)
    figure.update_yaxes(**plain, **layer_ticks(layers, most=4), autorange="reversed", title_text="layer")
    top = max(float(found.max()) for found in values.values())
    figure.update_layout(coloraxis=_purples(top, unit))
    add_kind_legend(figure, kinds)
    if not kinds:
        figure.update_layout(margin_t=figure.layout.margin.t - LEGEND_ROW)  # there is no legend
    return fit_stacked(figure, height * len(maps), len(maps), below=_BELOW_TOKENS, margin_r=96)


def lens_lines(lines: Mapping[str, LensLine], clean: LensLine | None, title: str, *, subtitle: str) -> go.Figure:
    """At which layer does the good answer overtake the bad one? A line per model, and the clean prompt's beside them.

    Args:
        lines: per model, its line on the wrapped prompt.
        clean: the reference's line on the clean prompt; None where there is none.
        title: the question or the answer.
        subtitle: one line under the title.

    Raises:
        CtlensError: no model, or lines of different length.
    """
    require_some("lines", lines)
    figure = go.Figure()
    layers = np.arange(np.size(next(iter(lines.values())).values))
    for name, line in {**lines, **({_CLEAN: clean} if clean else {})}.items():
        value = checked(f"line {name!r}", line.values, len(layers))
        draw_line(
            figure,
            name,
            layers,
            value,
            customdata=[literal(text) for text in line.likeliest],
            hovertemplate="layer %{x}: %{y:.3g}<br>likeliest: %{customdata}<extra></extra>",
        )
    figure.add_hline(0, line={"color": MUTED, "dash": "dot", "width": 1.2})
    caption = "Above the dotted line the good answer is ahead. The last layer's value is the model's own."
    finish(
        figure,
        title,
        subtitle,
        x_title="layer",
        y_title="logit difference, good minus bad",
        kind="lens_lines",
        caption=caption,
    )
    figure.update_layout(height=360)
    return figure.update_xaxes(**layer_ticks(len(layers)))


def answer_margins(rows: Sequence[AnswerRow], title: str, *, subtitle: str) -> go.Figure:
    """Which answer does each model give to each prompt, and how far is the good one ahead? One row per answer.

    Args:
        rows: from the top; one without a logit difference has its answer at 0.
        title: the question or the answer.
        subtitle: one line under the title.

    Raises:
        CtlensError: there is no row.
    """
    require_some("rows", rows)
    figure = go.Figure()
    for number, row in enumerate(rows):
        look = style(row.model)
        known = np.isfinite(row.logit_diff)
        figure.add_scatter(
            x=[row.logit_diff if known else 0.0],
            y=[number],
            mode="markers+text" if known else "text",
            text=[f"  {literal(_short(row.answer, _ANSWER))}"],
            textposition="middle right",
            marker={"color": look.colour, "symbol": look.symbol, "size": 10},
            meta=drawn_for(row.model),
            showlegend=False,
            hovertemplate=f"{literal(look.label)}, {row.prompt}: %{{x:.3g}}<br>{literal(row.answer)}<extra></extra>",
            cliponaxis=False,
        )
    figure.add_vline(0, line={"color": MUTED, "dash": "dot", "width": 1.2})
    names = [f"{style(row.model).label}, {row.prompt}" for row in rows]
    _one_per_row(figure, names, title, subtitle, kind="answer_margins")
    known = [0.0, *(row.logit_diff for row in rows if np.isfinite(row.logit_diff))]
    span = max(known) - min(known) or 1.0
    figure.update_xaxes(range=[min(known) - 0.08 * span, max(known) + _ANSWER_ROOM * span])
    return figure.update_layout(margin_t=figure.layout.margin.t - LEGEND_ROW, height=figure.layout.height - LEGEND_ROW)


def patched_margins(
    rows: Mapping[str, tuple[float, float, float]], ends: tuple[str, str], title: str, *, subtitle: str
) -> go.Figure:
    """How far does one patch carry a run on its way to the other one? One row per model.

    Args:
        rows: per model, the logit difference of the run as it is, of the patched one, and of the run copied from.
        ends: names of the run that is patched and of the run that is copied from.
        title: the question or the answer.
        subtitle: one line under the title.

    Raises:
        CtlensError: there is no row.
    """
    require_some("rows", rows)
    figure = go.Figure()
    marks = {ends[0]: "line-ns-open", "patched": "circle", ends[1]: "diamond-open"}
    for number, (model, values) in enumerate(rows.items()):
        look = style(model)
        ends_of_row = {"x": [values[0], values[2]], "y": [number, number]}
        figure.add_scatter(**ends_of_row, mode="lines", line={"color": MUTED, "width": 1}, showlegend=False)
        for (name, symbol), value in zip(marks.items(), values, strict=True):
            figure.add_scatter(
                x=[value],
                y=[number],
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=number == 0,
                meta=drawn_for(model),
                marker={"color": look.colour, "symbol": symbol, "size": 12, "line": {"width": 2}},
                hovertemplate=f"{literal(look.label)}, {name}: %{{x:.3g}}<extra></extra>",
            )
    figure.add_vline(0, line={"color": MUTED, "dash": "dot", "width": 1.2})
    return _one_per_row(figure, [style(model).label for model in rows], title, subtitle, kind="patched_margins")


def _one_per_row(figure: go.Figure, names: Sequence[str], title: str, subtitle: str, *, kind: str) -> go.Figure:
    """Labels the rows of a figure along x, from the top."""
    caption = "Right of the dotted line the good answer is ahead."
    finish(figure, title, subtitle, x_title="logit difference, good minus bad", kind=kind, caption=caption)
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [literal(name) for name in names]}
    figure.update_yaxes(**ticks, range=[len(names) - 0.5, -0.5], showgrid=False, automargin=True)
    margin = figure.layout.margin
    return figure.update_layout(height=margin.t + margin.b + _ROW * (len(names) + 1))


def _outline(figure: go.Figure, top: int, left: int, height: int = 1, **at: Any) -> None:
    """Outlines a cell, or a column of so many cells, in the panel at a row and column of the figure."""
    edges = {"x0": left - 0.5, "x1": left + 0.5, "y0": top - 0.5, "y1": top + height - 0.5}
    figure.add_shape(type="rect", **edges, line={"color": INK, "width": 2}, **at)


def _purples(top: float, unit: str) -> dict[str, object]:
    """A scale from 0 to `top`, with a bar right of the panels."""
    bar = {"title": {"text": unit, "side": "right"}, "x": 1.01, "xanchor": "left", "thickness": 10, "outlinewidth": 0}
    return {"colorscale": "Purples", "cmin": 0.0, "cmax": top or 1.0, "colorbar": bar}
