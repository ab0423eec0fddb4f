"""A training that draws itself in a notebook while it goes on.

The figure is sent to the front end as plotly's own MIME type under one display id, and sent again as it
changes. That needs no widget, the notebook keeps the last state as an ordinary figure, and nothing has to talk
back to the kernel while it trains. Plotly's renderer in JupyterLab draws an output once and ignores what
follows, so an empty box of the same height goes in between, which makes it begin anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from ctlens import plots
from ctlens.core.errors import CtlensError
from ctlens.core.limits import AT_LEAST_1, require
from ctlens.core.types import LensModel
from ctlens.plots import Figure
from ctlens.training.step import Step
from ctlens.training.trainer import Trainer, method_name

FIGURE_TYPE = "application/vnd.plotly.v1+json"

Watch: TypeAlias = Callable[[LensModel], float]
"""A Watch gives a rate of the model as it stands, 0 to 1."""


class Live:
    """Live is a trainer to look at: end a notebook's cell with it, then iterate over it in place of the trainer.

    An interrupt, the stop button, leaves the trainer whole after a step; iterating again goes on. Outside
    a notebook it is the trainer with its looks, and `figure` is there all the same.

    >>> import ctlens as ct
    >>> pairs, config = ct.threats.get("sycophancy").pairs(8), ct.TrainConfig(steps=2, batch_size=4)
    >>> live = ct.Live(ct.Trainer(ct.load_organism(), pairs, ct.ACT(), config), {"always": lambda model: 1.0})
    >>> [step.index for step in live], live.trainer.history.steps_of("always")
    ([1, 2], [0, 2])

    Args:
        trainer: its steps are taken; rates go into its history, and with it into its run and checkpoints.
        watch: rates by name, each a function of the trained model, in eval mode.
        every: steps between two looks at the rates; the first is before the first step, the last after the last.
        seconds: at least between two drawings, so that drawing does not slow training down.

    Raises:
        CtlensError: `every` is below 1, or a rate has the name of a loss or of another number of the history.
    """

    def __init__(
        self, trainer: Trainer, watch: Mapping[str, Watch] | None = None, *, every: int = 10, seconds: float = 1.0
    ) -> None:
        self.trainer = trainer
        self.watch = dict(watch or {})
        self.every = every
        self.seconds = seconds
        require(AT_LEAST_1, every=every)
        taken = {loss.name for loss in trainer.losses} | {"retention", "total", "lr", "grad_norm"}
        if used := taken & set(self.watch):
            raise CtlensError(f"{min(used)!r} is a number of the training itself: call the rate something else.")
        self._handle: Any = None
        self._drawn = -float("inf")

    def __len__(self) -> int:
        return len(self.trainer)

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        try:
            self._look()
            step = next(self.trainer)
            self._look()
        except BaseException:  # the end or an interrupt: all that happened is drawn
            self.draw()
            raise
        if time.monotonic() - self._drawn >= self.seconds:
            self.draw()
        return step

    def _look(self) -> None:
        """Measures the rates that are due and not yet there, into the history of the training."""
        history = self.trainer.history
        if len(history) % self.every and len(history) < len(self):
            return
        for name, rate in self.watch.items():
            if not history.has(len(history), name):
                history.add(len(history), {name: rate(self.trainer.model)})

    def figure(self) -> Figure:
        """Draws the losses so far, and the rates if any are watched."""
        history = self.trainer.history
        rates = {name: (history.steps_of(name), history.series(name)) for name in self.watch}
        title = f"How does the training with {plots.label(method_name(self.trainer.losses))} go?"
        subtitle = f"step {len(history)} of {len(self)}"
        losses = history.losses([loss.name for loss in self.trainer.losses])
        return plots.progress(losses, rates, len(self), title, subtitle=subtitle)

    def draw(self) -> None:
        """Draws the view anew where it is displayed; without a display nothing happens."""
        self._drawn = time.monotonic()
        if self._handle is not None:
            bundle = self._bundle()
            height = bundle[FIGURE_TYPE]["layout"]["height"]
            self._handle.update({"text/html": f'<div style="height: {height}px"></div>'}, raw=True)
            self._handle.update(bundle, raw=True)

    def _ipython_display_(self) -> None:
        """Displays the view, and keeps its place; a notebook calls this."""
        try:
            from IPython.display import display  # type: ignore  (an extra)
        except ImportError:
            raise CtlensError("a live view needs IPython: install ctlens[notebook] and open a notebook.") from None
        self._handle = display(self._bundle(), raw=True, display_id=True)

    def _bundle(self) -> dict[str, Any]:
        shown = f"step {len(self.trainer.history)} of {len(self)}"
        return {FIGURE_TYPE: json.loads(str(self.figure().to_json())), "text/plain": shown}
