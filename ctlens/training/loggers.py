"""Loggers send the numbers of a training's history to TensorBoard or Weights & Biases as they come."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ctlens.core.errors import CtlensError, unknown
from ctlens.core.files import writing

_TENSORBOARD_THREAD = "tensorboard.summary.writer.event_file_writer"
_INSTALL = "install it with the extra: pip install 'ctlens[logging]'."


class Logger(Protocol):
    """A Logger takes the numbers of a training; write your own with these three methods."""

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Starts the log, once, before the first numbers, with the settings of the training and its losses."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs every number of a step by its name; at a hook point the name is `loss/hook point`."""
        ...

    def end(self) -> None:
        """Closes the log when the training ends or is interrupted."""
        ...


class TensorBoard:
    """TensorBoard writes an event file for `tensorboard --logdir`.

    Args:
        folder: the folder of the event file.

    Raises:
        CtlensError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise CtlensError(f"TensorBoard is not installed: {_INSTALL}") from None
        self._folder = str(folder)
        self._make = SummaryWriter
        self._writer: Any = None

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Opens the event file and writes the settings as text."""
        self._show = threading.excepthook
        threading.excepthook = _unless_handed_on(self._show)
        try:
            self._open(settings)
        except BaseException:  # nobody ends what did not begin
            threading.excepthook = self._show
            raise

    def _open(self, settings: Mapping[str, Any]) -> None:
        with writing(self._folder):
            self._writer = self._make(self._folder)
            self._writer.add_text("settings", f"```json\n{json.dumps(dict(settings), indent=2)}\n```")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes each number as a scalar and flushes the file, so that an interrupt loses nothing."""
        with writing(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def end(self) -> None:
        """Closes the event file."""
        try:
            with writing(self._folder):
                self._writer.close()
        finally:
            threading.excepthook = self._show


def _unless_handed_on(show: Callable[[Any], object]) -> Callable[[Any], None]:
    """Shows the errors of threads as `show` does, but not those of TensorBoard's, which hands them to its caller."""

    def show_others(failed: Any) -> None:
        if type(failed.thread).__module__ != _TENSORBOARD_THREAD:
            show(failed)

    return show_others


class WeightsAndBiases:
    """WeightsAndBiases sends numbers to Weights & Biases, or keeps a run to be synchronised later.

    Args:
        project: the name of the project there.
        folder: the folder that keeps the run on this machine.
        mode: `"online"`, or `"offline"`, which uses no network.

    Raises:
        CtlensError: wandb is not installed, or the mode is unknown.
    """

    def __init__(self, project: str = "ctlens", *, folder: str | Path = ".", mode: str = "offline") -> None:
        if mode not in ("online", "offline"):
            raise unknown("mode of Weights & Biases", mode, ("online", "offline"))
        try:
            import wandb
        except ImportError:
            raise CtlensError(f"Weights & Biases is not installed: {_INSTALL}") from None
        self._wandb: Any = wandb
        self._options = {"project": project, "dir": str(folder), "mode": mode}
        self._run: Any = None

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Starts a run with these settings."""
        with writing(self._options["dir"]):
            Path(self._options["dir"]).mkdir(parents=True, exist_ok=True)
        quiet = self._wandb.Settings(silent=True, console="off")
        self._run = self._wandb.init(**self._options, config=dict(settings), settings=quiet)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the numbers of a step."""
        self._run.log(dict(values), step=step)

    def end(self) -> None:
        """Finishes the run."""
        self._run.finish()


class Loggers:
    """Loggers passes the new rows of a history on to several loggers.

    Args:
        loggers: any number of loggers.
        settings: the settings of the training.
        seen: number of rows of the history that an earlier part of the training has logged.
    """

    def __init__(self, loggers: tuple[Logger, ...], settings: Mapping[str, Any], seen: int = 0) -> None:
        self.loggers = loggers
        self.settings = settings
        self.seen = seen
        self._begun: list[Logger] = []

    def catch_up(self, rows: list[tuple[int, str, str, float]]) -> None:
        """Logs the new rows, step by step."""
        if len(rows) == self.seen:
            return
        for logger in self.loggers[len(self._begun) :]:
            logger.begin(self.settings)
            self._begun.append(logger)
        steps: dict[int, dict[str, float]] = {}
        for step, name, hook, value in rows[self.seen :]:
            steps.setdefault(step, {})[f"{name}/{hook}" if hook else name] = value
        self.seen = len(rows)
        for logger in self.loggers:
            for step, values in steps.items():
                logger.log(step, values)

    def end(self) -> None:
        """Ends the loggers that have begun; a second call does nothing."""
        while self._begun:
            self._begun.pop().end()
