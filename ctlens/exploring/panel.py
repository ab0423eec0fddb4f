"""The panel: the controls of a notebook, wired to an exploration. It computes nothing itself."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ctlens.analysis.patching.jobs import PATCH_DIRECTIONS
from ctlens.core.errors import CtlensError
from ctlens.data.pairs import PROMPT_SIDES
from ctlens.exploring.page import stage_file, stage_module, view_of, write_page
from ctlens.exploring.views import VIEWS, ExplorationViews
from ctlens.models.hooks import SHORTHANDS
from ctlens.plots.exploring import TOKENS_PER_ROW

_PATCH = "patch"
_NOT_PATCHED = "Press Patch to put one activation of the other prompt into this run."
_SHOWN = 60  # characters of a prompt in the list of pairs; chosen by eye


class Panel:
    """Panel holds the controls and the figures of an exploration, and keeps them as the exploration is.

    Attributes:
        explored: the exploration.
        controls: the widgets by what they choose.
        buttons: the buttons by what they do.
        stage: the widget that draws the figures; its traits are the views.
        status: what went wrong last, or what was done, in words.
        widget: all of it, to be displayed.

    Raises:
        CtlensError: ipywidgets or anywidget is missing.
    """

    def __init__(self, explored: ExplorationViews) -> None:
        try:
            import anywidget  # type: ignore  (an extra)
            import ipywidgets as widgets  # type: ignore  (an extra)
            import traitlets  # type: ignore  (an extra)
        except ImportError:
            raise CtlensError(
                "a panel needs ipywidgets and anywidget: install ctlens[notebook] and open a notebook."
            ) from None
        self.explored = explored
        self._following = False
        self._shown: tuple[int, str] | None = None
        self.controls: dict[str, Any] = _controls(widgets, explored)
        self.text = widgets.Textarea(layout={"width": "38rem"}, rows=2)
        self.path = widgets.Text("exploration.html", layout={"width": "14rem"})
        self.buttons = {
            name: widgets.Button(description=name, layout={"width": "auto"}) for name in ("Ask", "Take back", "Save")
        }
        self.patching = widgets.ToggleButton(description="Patch", layout={"width": "auto"})
        self.status = widgets.HTML()
        traits = {name: traitlets.Dict().tag(sync=True) for name in (*VIEWS, "clicked")}
        traits |= {name: traitlets.List(list(VIEWS)).tag(sync=True) for name in ("views", "visible")}
        files = {"_esm": f"{stage_module()}\nexport default {{render}};", "_css": stage_file("stage.css")}
        # Drawn before it is opened: what is sent while a front end still loads it may be lost.
        drawn = {view: self._drawn(view) for view in VIEWS}
        self.stage: Any = type("Stage", (anywidget.AnyWidget,), {**files, **traits})(**drawn)
        self.widget = widgets.VBox([*self._rows(widgets), self.status, self.stage])
        self._wire()
        self._follow()

    def _rows(self, widgets: Any) -> list[Any]:
        """The controls in rows: what is looked at, where, one patch, and what if."""
        controls = self.controls
        named = [("pair", "models"), ("prompt_side", "layer", "head", "position")]
        rows = [widgets.HBox([controls[name] for name in names]) for names in named]
        rows.append(widgets.HBox([controls["site"], controls["direction"], self.patching]))
        asked = [widgets.HTML("What if?"), self.text, self.buttons["Ask"], self.buttons["Take back"]]
        saved = [widgets.HTML("Page"), self.path, self.buttons["Save"]]
        return [*rows, widgets.HBox(asked), widgets.HBox(saved)]

    def _wire(self) -> None:
        for name, control in self.controls.items():
            control.observe(lambda change, name=name: self._choose(**{name: change["new"]}), "value")
        self.patching.observe(lambda change: self._draw(), "value")
        self.stage.observe(lambda change: self._draw(), "visible")
        self.stage.observe(lambda change: self._clicked(change["new"]), "clicked")
        self.buttons["Ask"].on_click(lambda button: self._try(lambda: self._ask(self.text.value)))
        self.buttons["Take back"].on_click(lambda button: self._try(lambda: self._ask("")))
        self.buttons["Save"].on_click(lambda button: self._try(self._save))

    def _choose(self, **changes: Any) -> None:
        """Passes a change of a control on, unless the control only follows the exploration."""
        if not self._following:
            self._try(lambda: self.explored.select(**changes))

    def _clicked(self, click: Mapping[str, Any]) -> None:
        self._try(lambda: choose_by_click(self.explored, click["view"], click["curve"], click["x"], click["y"]))

    def _ask(self, text: str) -> None:
        if text:
            self.explored.what_if(text)
        else:
            self.explored.select(text="")

    def _save(self) -> str:
        return f"Saved as {write_page(self.explored, Path(self.path.value))}."

    def _try(self, act: Callable[[], object]) -> None:
        """Does something, says in one sentence what went wrong, and shows what is chosen now."""
        try:
            said = act()
            self._say(said if isinstance(said, str) else "")
        except CtlensError as error:
            self._say(str(error))
        self._follow()

    def _say(self, sentence: str) -> None:
        self.status.value = f'<p role="status">{html.escape(sentence)}</p>' if sentence else ""

    def _follow(self) -> None:
        """Sets the controls to what is chosen, and draws it."""
        chosen = self.explored.selection
        self._following = True
        try:
            self.controls["position"].options = _tokens(self.explored)
            for name, control in self.controls.items():
                control.value = getattr(chosen, name)
        finally:
            self._following = False
        if (chosen.pair, chosen.text) != self._shown:  # a text that was refused stays, to be mended
            self._shown = (chosen.pair, chosen.text)
            self.text.value = chosen.text or self.explored.template
        self._draw()

    def _draw(self) -> None:
        """Draws the views whose call has changed, if they are on the screen; the others wait until they are."""
        for view in VIEWS:
            shown = getattr(self.stage, view)
            changed = any(shown[name] != value for name, value in self._wanted(view).items())
            if changed and view in self.stage.visible:
                setattr(self.stage, view, self._drawn(view))

    def _wanted(self, view: str) -> dict[str, Any]:
        """What a view follows from: its call, and for the patch whether it is asked for."""
        return {"code": self.explored.code(view), "idle": view == _PATCH and not self.patching.value}

    def _drawn(self, view: str) -> dict[str, Any]:
        wanted = self._wanted(view)
        found = {"figure": None, "message": _NOT_PATCHED} if wanted["idle"] else view_of(self.explored, view)
        return {**found, **wanted}


def show_panel(explored: ExplorationViews) -> Any:
    """Makes the widget that a notebook displays for an exploration; raises as `Panel`."""
    return Panel(explored).widget


def choose_by_click(explored: ExplorationViews, view: str, curve: int, x: float, y: float) -> None:
    """Chooses what was clicked: a token, a head, or a layer; a click that means nothing changes nothing.

    Args:
        explored: the exploration.
        view: the figure.
        curve: the number of the clicked trace.
        x, y: in the coordinates of its axes.

    Raises:
        CtlensError: a clean token was clicked that has no twin in the wrapped prompt.
    """
    column = round(x)
    row = round(y)
    if view == "tokens":
        at = row * TOKENS_PER_ROW + column
        explored.select(position=at if curve else _wrapped_twin(explored, at))
    elif view == "heads":
        explored.select(layer=row, head=column)
    elif view == "gap":
        explored.select(layer=row, position=list(explored.twins)[column])
    elif view == "lens":
        explored.select(layer=column)


def _wrapped_twin(explored: ExplorationViews, clean: int) -> int:
    found = [wrapped for wrapped, twin in explored.twins.items() if twin == clean]
    if not found:
        raise CtlensError("this token of the clean prompt has no twin in the wrapped one: choose another.")
    return found[0]


def _controls(widgets: Any, explored: ExplorationViews) -> dict[str, Any]:
    """The widgets that choose, by what they choose."""
    chosen = explored.selection
    cfg = next(iter(explored.models.values())).cfg
    pairs = [
        (f"{number}: {pair.wrapped.turns[-1].content[:_SHOWN]}", number) for number, pair in enumerate(explored.pairs)
    ]
    slider = {"min": 0, "continuous_update": False}
    return {
        "pair": widgets.Dropdown(options=pairs, value=chosen.pair, description="pair", layout={"width": "38rem"}),
        "models": widgets.SelectMultiple(
            options=list(explored.models), value=chosen.models, description="models", rows=min(4, len(explored.models))
        ),
        "prompt_side": widgets.Dropdown(options=list(PROMPT_SIDES), value=chosen.prompt_side, description="prompt"),
        "layer": widgets.IntSlider(chosen.layer, max=cfg.n_layers - 1, description="layer", **slider),
        "head": widgets.IntSlider(chosen.head, max=cfg.n_heads - 1, description="head", **slider),
        "position": widgets.Dropdown(options=_tokens(explored), value=chosen.position, description="token"),
        "site": widgets.Dropdown(options=list(SHORTHANDS), value=chosen.site, description="site"),
        "direction": widgets.Dropdown(options=list(PATCH_DIRECTIONS), value=chosen.direction, description="direction"),
    }


def _tokens(explored: ExplorationViews) -> list[tuple[str, int]]:
    """The tokens of the wrapped prompt, as a list to choose from."""
    return [(f"{at} {text}", at) for at, text in enumerate(explored.tokens["wrapped"])]
