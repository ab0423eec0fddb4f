"""The views of an exploration: what each asks, the figure that answers, and the call that makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ctlens import plots
from ctlens.analysis.attention.maps import READABLE
from ctlens.analysis.patching.hooked import WITH_HEADS
from ctlens.core.errors import CtlensError, unknown
from ctlens.exploring.readings import Readings, Selection
from ctlens.plots import AnswerRow, Figure, LensLine, TokenRow

_COMMENT = "  # over all pairs"


class ExplorationViews(Readings):
    """ExplorationViews draws what is chosen; its figures compute nothing that was computed before."""

    def figure(self, view: str) -> Figure:
        """Draws a view of what is chosen.

        Args:
            view: one of `ctlens.exploring.VIEWS`.

        Raises:
            CtlensError: there is no such view, or it has nothing to show here and says why.
        """
        return _view(view).draw(self)

    def code(self, view: str) -> str:
        """Writes the call that makes the figure of a view, for `models` and `pairs` as they were given to `explore`.

        Where an analysis answers the question over all pairs, its call is the last line.

        Args:
            view: one of `ctlens.exploring.VIEWS`.

        Raises:
            CtlensError: there is no such view.
        """
        known = _view(view)
        lines = [f"explored = ct.explore(models, pairs){self._selecting(known.needs)}", f"explored.figure({view!r})"]
        if known.over_all_pairs:
            lines.append(known.over_all_pairs(self) + _COMMENT)
        return "\n".join(lines)

    def _selecting(self, needs: tuple[str, ...]) -> str:
        """The call that chooses what a view needs; empty where that is what an exploration begins with."""
        plain = Selection(models=tuple(self.models), position=len(self.tokens["wrapped"]) - 1)
        differing = {
            name: getattr(self.selection, name)
            for name in needs
            if getattr(self.selection, name) != getattr(plain, name)
        }
        options = ", ".join(
            f"{name}={list(value) if name == 'models' else value!r}" for name, value in differing.items()
        )
        return f".select({options})" if options else ""

    @property
    def _token(self) -> str:
        """The chosen token in words."""
        at = self.selection.position
        return f"token {at}, {self.tokens['wrapped'][at]!r}"

    @property
    def _whose(self) -> str:
        """Which prompts are shown, in words."""
        side = "edited" if self.selection.text else self.selection.prompt_side
        return f"pair {self.selection.pair}" + ("" if side == "wrapped" else f", {side}")


def _draw_tokens(explored: ExplorationViews) -> Figure:
    at = explored.selection.position
    tokens = explored.tokens
    kinds = explored.kinds
    rows = {
        "clean": TokenRow(tokens["clean"], kinds["clean"], explored.twins.get(at)),
        explored.selection.prompt_side: TokenRow(tokens["wrapped"], kinds["wrapped"], at),
    }
    return plots.token_grid(rows, "What is each token?", subtitle=f"{explored._whose}; {explored._token} is chosen")


def _draw_heads(explored: ExplorationViews) -> Figure:
    chosen = explored.selection
    title = "Which heads look at the wrapper?"
    subtitle = f"from {explored._token}, {explored._whose}"
    unit = "attention mass"
    return plots.head_grids(explored.heads(), title, unit=unit, chosen=(chosen.layer, chosen.head), subtitle=subtitle)


def _draw_attention(explored: ExplorationViews) -> Figure:
    length = len(explored.tokens["wrapped"])
    at = explored.selection.position
    # Of a long prompt the last queries are drawn; those around a chosen token that is not among them instead.
    start = max(0, at - READABLE // 2)
    queries = (start, min(length, start + READABLE)) if at < length - READABLE else None
    return explored.maps().figure(queries=queries)


def _draw_gap(explored: ExplorationViews) -> Figure:
    aligned = list(explored.twins)
    texts = explored.tokens["wrapped"]
    at = explored.selection.position
    moves = "training" if explored.selection.prompt_side == "clean" else "the wrapper"
    title = f"Where does {moves} move the residual stream?"
    subtitle = f"aligned tokens of {explored._whose}; against the clean prompt of {explored.selection.models[0]}"
    return plots.layer_tokens(
        explored.gap(),
        [f"{position} {texts[position]}" for position in aligned],
        title,
        unit="distance / length",
        kinds=[explored.kinds["wrapped"][position] for position in aligned],
        chosen=aligned.index(at) if at in aligned else None,
        subtitle=subtitle,
    )


def _draw_lens(explored: ExplorationViews) -> Figure:
    clean = explored.clean_lens()
    lines = {name: LensLine(*lens) for name, lens in explored.lens().items()}
    title = "At which layer does the good answer win?"
    subtitle = f"read at {explored._token}, {explored._whose}"
    return plots.lens_lines(lines, LensLine(*clean) if clean else None, title, subtitle=subtitle)


def _draw_answers(explored: ExplorationViews) -> Figure:
    rows = [
        AnswerRow(row["model"], row["prompt"], row["logit_diff"], f"{row['verdict']}: {row['answer']}")
        for row in explored.answers().to_dict("records")
    ]
    wrapped = explored.pair.wrapped
    named = f"good: {wrapped.good!r}, bad: {wrapped.bad!r}"
    return plots.answer_margins(rows, "Which answer does each model give?", subtitle=f"{explored._whose}; {named}")


def _draw_patch(explored: ExplorationViews) -> Figure:
    chosen = explored.selection
    head = f" head {chosen.head}," if chosen.site in WITH_HEADS else ""
    rows = {name: (one.target, one.patched, one.source) for name, one in explored.patched().items()}
    ends = ("wrapped", "clean") if chosen.direction == "denoising" else ("clean", "wrapped")
    restored = "restore" if chosen.direction == "denoising" else "break"
    title = f"What does one {ends[1]} activation {restored}?"
    subtitle = f"{chosen.site} of layer {chosen.layer},{head} {explored._token}, {explored._whose}"
    return plots.patched_margins(rows, ends, title, subtitle=subtitle)


def _first_and_last(explored: ExplorationViews) -> str:
    names = explored.selection.models
    return f"explored.models[{names[0]!r}], explored.models[{names[-1]!r}], explored.pairs"


def _patching_all(explored: ExplorationViews) -> str:
    chosen = explored.selection
    options = f"site={chosen.site!r}, direction={chosen.direction!r}"
    model = f"explored.models[{chosen.models[-1]!r}]"
    return f"ct.analysis.patch({model}, explored.pairs, {options}).figure()"


@dataclass(frozen=True)
class View:
    """View is one figure of an exploration.

    Attributes:
        draw: makes the figure.
        needs: what of the selection it depends on.
        over_all_pairs: writes the call of the analysis that asks the same of all pairs; None where there is none.
    """

    draw: Callable[[ExplorationViews], Figure]
    needs: tuple[str, ...]
    over_all_pairs: Callable[[ExplorationViews], str] | None = None


_PAIR = ("pair", "text", "prompt_side")
VIEWS: dict[str, View] = {
    "tokens": View(_draw_tokens, (*_PAIR, "position")),
    "heads": View(
        _draw_heads,
        (*_PAIR, "models", "layer", "head", "position"),
        lambda explored: f"ct.analysis.attention_diff({_first_and_last(explored)}).figure()",
    ),
    "answers": View(
        _draw_answers,
        (*_PAIR, "models"),
        lambda explored: "{n: ct.evaluate(m, pairs=explored.pairs).to_dataframe() for n, m in explored.models.items()}",
    ),
    "attention": View(_draw_attention, (*_PAIR, "models", "layer", "head", "position")),
    "gap": View(
        _draw_gap,
        (*_PAIR, "models", "position"),
        lambda explored: f"ct.analysis.residual_shift({_first_and_last(explored)}).figure()",
    ),
    "lens": View(
        _draw_lens,
        (*_PAIR, "models", "position"),
        lambda explored: "ct.analysis.logit_lens(explored.models, explored.pairs).figure()",
    ),
    "patch": View(
        _draw_patch,
        (*_PAIR, "models", "layer", "head", "position", "site", "direction"),
        _patching_all,
    ),
}
"""The views, in the order in which they stand on a page."""


def _view(name: str) -> View:
    if name not in VIEWS:
        raise unknown("view", name, VIEWS)
    return VIEWS[name]


def drawn_or_refused(explored: ExplorationViews, view: str) -> Figure | str:
    """The figure of a view, or the sentence that says why it has nothing to show here."""
    try:
        return explored.figure(view)
    except CtlensError as error:
        return str(error)
