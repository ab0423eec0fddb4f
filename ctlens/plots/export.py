"""Figures to files that open without a network, and a PNG that can never hang the caller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from ctlens.files import atomic_file, write_text

PNG_SECONDS = 20
# The renderer's browser deadlocks now and then at start-up when it is split into several processes.
PNG_PROGRAM = """
import sys, plotly.io as pio
pio.kaleido.scope.chromium_args += ("--single-process",)
figure = pio.from_json(open(sys.argv[1], encoding="utf-8").read())
figure.write_image(sys.argv[2], format="png", width=figure.layout.width or 900, scale=2)
"""


def plotly_source() -> str:
    """The text of plotly.js, to be written once into a page or beside several."""
    return get_plotlyjs()


def save_figure(figure: go.Figure, path_stem: str | Path) -> list[Path]:
    """Writes `<stem>.html` and `<stem>.json`, and `<stem>.png` where the `export` extra is installed.

    The pages of one folder share a `plotly.min.js` beside them, so that they stay small and open
    offline. The PNG is made in another process with a time limit; when that fails or takes too
    long, the PNG is left out.

    Returns:
        The figure's files that were written.
    """
    stem = Path(path_stem)
    html, data, png = (stem.with_name(stem.name + suffix) for suffix in (".html", ".json", ".png"))
    _write_library(stem.parent / "plotly.min.js")
    write_text(html, figure.to_html(include_plotlyjs="directory", config={"responsive": True, "displaylogo": False}))
    write_text(data, f"{figure.to_json()}\n")
    return [html, data, *([png] if _write_png(data, png) else [])]


def _write_library(path: Path) -> None:
    source = plotly_source()
    if not path.is_file() or path.stat().st_size != len(source.encode()):
        write_text(path, source)


def _write_png(data: Path, png: Path) -> bool:
    if find_spec("kaleido") is None:
        return False
    try:
        with atomic_file(png) as temporary:
            _render(data, temporary)
    except (subprocess.SubprocessError, OSError):
        return False
    return True


def _render(data: Path, png: Path) -> None:
    command = [sys.executable, "-c", PNG_PROGRAM, str(data), str(png)]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        code = process.wait(PNG_SECONDS)
    except subprocess.TimeoutExpired:
        # The renderer starts a browser of its own, which outlives it unless the whole group is ended.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if code:
        raise subprocess.CalledProcessError(code, command)
