"""Puts what the executed notebooks show into the notebooks, their figures as PNG, which a code host displays.

Run `make outputs`, which executes them first. `--check` writes nothing and fails if a cell of a notebook shows another
number of outputs than that of its executed copy, or others in kind. What they say and draw is held by the assertions of
the notebooks, for the last digits are another machine's.
"""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from ctlens.plots.renderer import browser

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXECUTED = ROOT / "build" / "notebooks"
FIGURE = "application/vnd.plotly.v1+json"
PNG = "image/png"
_WIDGET = "application/vnd.jupyter.widget-view+json"
_PANEL = "a panel that answers to clicks: run the notebook to see it"
_WIDTH = 800
_HEIGHT = 450


def shown(executed: NotebookNode, source: NotebookNode) -> NotebookNode:
    """A notebook with the outputs of its executed copy: figures as they are, for `pictured`, without progress bars."""
    cells = [
        cell if cell.cell_type != "code" else _with_outputs(cell, done) for cell, done in _paired(source, executed)
    ]
    return NotebookNode({**source, "cells": cells, "metadata": {**source.metadata, "executed": digest(source)}})


def digest(notebook: Mapping[str, Any]) -> str:
    """What tells whether a notebook's code is the one whose outputs it has."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def _paired(source: NotebookNode, executed: NotebookNode) -> list[tuple[NotebookNode, NotebookNode]]:
    same = [cell.source for cell in source.cells] == [cell.source for cell in executed.cells]
    if not same:
        raise SystemExit("a notebook has changed since it was executed: run `make outputs`.")
    return list(zip(source.cells, executed.cells, strict=True))


def _with_outputs(cell: NotebookNode, executed: NotebookNode) -> NotebookNode:
    kept = [output for output in executed.outputs if output.get("name") != "stderr" and not _is_bar(output)]
    for output in kept:
        data = output.get("data", {})
        if _WIDGET in data:
            output.data = {"text/plain": _PANEL}
        elif FIGURE in data:
            output.data = {FIGURE: data[FIGURE]}
        output.update({"metadata": {}} if data else {})
    return NotebookNode({**cell, "outputs": kept, "execution_count": executed.execution_count})


def _is_bar(output: NotebookNode) -> bool:
    """Whether an output is a progress bar, which has nothing to show when it is done."""
    return output.output_type == "display_data" and _WIDGET in output.data


def pictured(notebook: NotebookNode) -> NotebookNode:
    """Draws every figure of a notebook, in the browser that is open."""
    import kaleido

    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if FIGURE in output.get("data", {}):
                figure = output.data.pop(FIGURE)
                layout = figure["layout"]
                size = {"width": layout.get("width", _WIDTH), "height": layout.get("height", _HEIGHT)}
                image = kaleido.calc_fig_sync({"data": figure["data"], "layout": layout}, {"format": "png", **size})
                output.data[PNG] = base64.b64encode(image).decode()
    return notebook


def differing(held: NotebookNode, found: NotebookNode) -> list[str]:
    """The ids of the cells whose outputs differ in number or kind."""
    pairs = zip(held.cells, found.cells, strict=True)
    return [cell.id for cell, other in pairs if _compared(cell) != _compared(other)]


def _compared(cell: NotebookNode) -> list[list[str]]:
    """The kinds of the outputs of a cell."""
    return [
        sorted(PNG if kind == FIGURE else kind for kind in output.get("data", [output.output_type]))
        for output in cell.get("outputs", ())
    ]


def main(check: bool) -> None:
    """Writes the notebooks, or holds them to their executed copies."""
    pairs = [(path, nbformat.read(path, as_version=4)) for path in NOTEBOOKS]
    found = [shown(nbformat.read(EXECUTED / path.name, as_version=4), source) for path, source in pairs]
    if check:
        apart = {
            path.name: cells
            for (path, source), new in zip(pairs, found, strict=True)
            if (cells := differing(source, new))
        }
        raise SystemExit(f"cells that show something else now: {apart}: run `make outputs`." if apart else 0)
    with browser():
        for (path, _), notebook in zip(pairs, found, strict=True):
            nbformat.write(pictured(notebook), path)


if __name__ == "__main__":
    main("--check" in sys.argv)
