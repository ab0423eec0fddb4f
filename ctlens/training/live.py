"""A training that draws itself in a notebook while it runs.

This module sends the figure to the front end as plotly's own MIME type under one display id, and sends it again
when it changes. That needs no widget, the notebook keeps the last state as an ordinary figure, and the front
end never has to talk back to the kernel while it trains. Plotly's renderer in JupyterLab draws an output once
and ignores later ones, so an empty box of the same height is sent in between, which makes it draw again.
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
"""A Watch is a function that measures a rate of the model, 0 to 1."""


class Live:
    """Live shows a trainer at work: end a notebook's cell with it, then iterate over it instead of the trainer.

    An interrupt (the stop button) takes effect after the step; iterate again to go on. Outside a notebook it
    measures the rates all the same, and `figure` draws them.

    >>> import ctlens as ct
    >>> pairs, config = ct.threats.get("sycophancy").pairs(8), ct.TrainConfig(steps=2, batch_size=4)
    >>> live = ct.Live(ct.Trainer(ct.load_organism(), pairs, ct.ACT(), config), {"always": lambda model: 1.0})
    >>> [step.index for step in live], live.trainer.history.steps_of("always")
    ([1, 2], [0, 2])

    Args:
        trainer: the trainer that takes the steps; the rates go into its history, and so into its run and checkpoints.
        watch: the rates to measure, by name; each is a function of the trained model in eval mode.
        every: steps between two measurements; the first is before the first step, the last after the last step.
            The default was chosen by eye.
        seconds: shortest time between two drawings, so that drawing does not slow training down; chosen by eye.

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
            raise CtlensError(f"{min(used)!r} is a number of the training itself: give the rate another name.")
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
        except BaseException:  # the end or an interrupt: the figure has to show all steps taken
            self.draw()
            raise
        if time.monotonic() - self._drawn >= self.seconds:
            self.draw()
        return step

    def _look(self) -> None:
        """Measures the rates that are due and adds them to the history; a resumed training may have them already."""
        if self.trainer.taken % self.every and self.trainer.taken < len(self):
            return
        history = self.trainer.history
        for name, rate in self.watch.items():
            if not history.has(len(history), name):
                history.add(len(history), {name: rate(self.trainer.model)})

    def figure(self) -> Figure:
        """Draws the losses so far and the watched rates."""
        history = self.trainer.history
        rates = {name: (history.steps_of(name), history.series(name)) for name in self.watch}
        title = f"How does the training with {plots.label(method_name(self.trainer.losses))} go?"
        subtitle = f"step {len(history)} of {len(self)}"
        losses = history.losses([loss.name for loss in self.trainer.losses])
        return plots.progress(losses, rates, len(self), title, subtitle=subtitle)

    def draw(self) -> None:
        """Draws the figure again where the notebook displays it; does nothing without a display."""
        self._drawn = time.monotonic()
        if self._handle is not None:
            bundle = self._bundle()
            height = bundle[FIGURE_TYPE]["layout"]["height"]
            self._handle.update({"text/html": f'<div style="height: {height}px"></div>'}, raw=True)
            self._handle.update(bundle, raw=True)

    def _ipython_display_(self) -> None:
        """Displays the figure and keeps its display id; a notebook calls this."""
        try:
            from IPython.display import display  # type: ignore  (an extra)
        except ImportError:
            raise CtlensError("a live view needs IPython: install ctlens[notebook] and open a notebook.") from None
        self._handle = display(self._bundle(), raw=True, display_id=True)

    def _bundle(self) -> dict[str, Any]:
        shown = f"step {len(self.trainer.history)} of {len(self)}"
        return {FIGURE_TYPE: json.loads(str(self.figure().to_json())), "text/plain": shown}
