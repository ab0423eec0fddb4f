"""Figures become files that open without a network, and images whose renderer can never hang the caller."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TypeVar

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from ctlens.core.files import atomic_file, write_json, write_text, writing
from ctlens.plots.data import csv_text
from ctlens.plots.renderer import IMAGES

Stem = TypeVar("Stem", bound=str | Path)

# A browser starts in seconds, and a figure takes a fraction of one; the limits are generous, not tuned.
FIGURE_SECONDS = 20.0
ATTEMPTS = 3
WAIT = 0.02  # seconds between two looks at a renderer's log
PAGE = {"responsive": True, "displaylogo": False}
# -P keeps the folder of the file off the path, for a file in it could have the name of one of the standard library.
RENDERER = (sys.executable, "-P", str(Path(__file__).with_name("renderer.py")))


def plotly_source() -> str:
    """The text of plotly.js, to be written once into a page or beside several."""
    return get_plotlyjs()


def save_figure(figure: go.Figure, path_stem: str | Path) -> list[Path]:
    """Writes `<stem>.html`, `.json` and `.data.csv`, and `.png` and `.svg` with the `export` extra and a browser.

    See `write_figures`, which does the same for several figures at once.

    Returns:
        The figure's files that were written.
    """
    return write_figures({path_stem: figure})


def write_figures(figures: Mapping[Stem, go.Figure]) -> list[Path]:
    """Writes `<stem>.html`, `.json` and `.data.csv` of each figure, and `.png` and `.svg` with the `export` extra.

    The pages of one folder share a `plotly.min.js` beside them, so that they stay small and open
    offline. The CSV holds the numbers that are drawn (see `ctlens.plots.data`). Another process draws the
    images of all figures with kaleido, in the Chrome or Chromium of this machine and with a time limit for each
    figure. A warning names the images that it could not draw, and no image of an earlier figure stays behind.

    Args:
        figures: by their path without an ending.

    Returns:
        The files that were written, figure by figure.
    """
    stems = [Path(stem) for stem in figures]
    for stem, figure in zip(stems, figures.values(), strict=True):
        _write_library(stem.parent / "plotly.min.js")
        page = figure.to_html(include_plotlyjs="directory", div_id=stem.name, config=PAGE)
        write_text(_file(stem, "html"), page)
        write_text(_file(stem, "json"), f"{figure.to_json()}\n")
        write_text(_file(stem, "data.csv"), csv_text(figure))
        with writing(stem):
            for kind in IMAGES:
                _file(stem, kind).unlink(missing_ok=True)
    if find_spec("kaleido") is not None:
        _draw(stems)
    files = (_file(stem, kind) for stem in stems for kind in ("html", "json", "data.csv", *IMAGES))
    return [path for path in files if path.is_file()]


def _file(stem: Path, kind: str) -> Path:
    """The path with an ending, also where the stem itself has a dot."""
    return stem.with_name(f"{stem.name}.{kind}")


def _write_library(path: Path) -> None:
    """Writes plotly.js unless it is there; another version of it has another size."""
    source = plotly_source()
    if not path.is_file() or path.stat().st_size != len(source.encode()):
        write_text(path, source)


def _draw(stems: list[Path]) -> None:
    """Draws figures from their JSON; a figure on which a process gets stuck comes last in the next process."""
    missing = stems
    for _ in range(ATTEMPTS):
        answered = _render(missing)
        missing = [*missing[answered + 1 :], *missing[answered : answered + 1]]
        if not missing:
            break
    absent = [path.name for path in (_file(stem, kind) for stem in stems for kind in IMAGES) if not path.is_file()]
    if absent:
        left_out = "images that could not be drawn were left out (they take Chrome or Chromium)"
        warnings.warn(f"{left_out}: {', '.join(absent)}", stacklevel=3)


def _render(stems: Sequence[Path]) -> int:
    """Starts a renderer, waits until it ends or gets stuck, and returns how many figures it got through."""
    with writing(gettempdir()), TemporaryDirectory() as name:
        work = Path(name)
        quiet = subprocess.DEVNULL
        write_json(work / "figures.json", [str(_file(stem, "json").absolute()) for stem in stems])
        process = subprocess.Popen([*RENDERER, name], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
        try:
            answered = _watch(process, work / "answered", len(stems))
        finally:
            _end(process)
        for number, stem in enumerate(stems[:answered]):
            for drawn in work.glob(f"{number}.*"):
                with atomic_file(_file(stem, drawn.suffix.removeprefix("."))) as temporary:
                    shutil.copyfile(drawn, temporary)
        return answered


def _watch(process: subprocess.Popen[bytes], log: Path, expected: int) -> int:
    """Counts the figures that a renderer got through until it was done, ended, or said nothing for `FIGURE_SECONDS`.

    The renderer writes one byte to its log per figure.
    """
    length = 0
    deadline = time.monotonic() + FIGURE_SECONDS
    while length < expected and time.monotonic() < deadline:
        ended = process.poll() is not None  # asked before the log, which does not grow after it
        grown = log.stat().st_size if log.is_file() else 0
        if grown > length:
            length = grown
            deadline = time.monotonic() + FIGURE_SECONDS
        elif ended:
            break
        time.sleep(WAIT)
    return length


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process, and with it its browser, which ends where nobody is at the other end of its pipe."""
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
