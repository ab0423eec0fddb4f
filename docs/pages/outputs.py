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
from typing import Any

import nbformat
from executed import EXECUTED, FIGURE, NOTEBOOKS, PNG, kept, same_cells
from nbformat import NotebookNode

from ctlens.plots.renderer import browser

# Pixels, of figures that do not say how wide and high they are: what a code host shows without shrinking it.
_WIDTH = 800
_HEIGHT = 450


def shown(executed: NotebookNode, source: NotebookNode) -> NotebookNode:
    """A notebook with the outputs of its executed copy: figures as they are, for `pictured`, without progress bars."""
    if not same_cells(source, executed):
        raise SystemExit("a notebook has changed since it was executed: run `make outputs`.")
    cells = [
        _with_outputs(cell, done) if cell.cell_type == "code" else cell
        for cell, done in zip(source.cells, executed.cells, strict=True)
    ]
    return NotebookNode({**source, "cells": cells, "metadata": {**source.metadata, "executed": digest(source)}})


def digest(notebook: Mapping[str, Any]) -> str:
    """What tells whether a notebook's code is the one whose outputs it has."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def _with_outputs(cell: NotebookNode, executed: NotebookNode) -> NotebookNode:
    outputs = kept(executed.outputs)
    for output in outputs:
        if "data" in output:
            output.metadata = {}
        if FIGURE in output.get("data", {}):
            output.data = {FIGURE: output.data[FIGURE]}
    return NotebookNode({**cell, "outputs": outputs, "execution_count": executed.execution_count})


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
