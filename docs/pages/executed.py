"""The notebooks as Markdown, with their outputs: those of executed copies, where `make notebooks` has left any."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import nbformat
from listing import ROOT
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from plotted import drawn, library

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXECUTED = ROOT / "build" / "notebooks"
_FIGURE = "application/vnd.plotly.v1+json"
_WIDGET = "application/vnd.jupyter.widget-view+json"
_PNG = "image/png"
_TABLE = ' border="1" class="dataframe"'
"""What pandas gives its tables; the site has its own look for a table without a class."""


def title(path: Path) -> str:
    """The heading of a notebook."""
    return _read(path).cells[0].source.splitlines()[0].removeprefix("# ")


def page(path: Path) -> str:
    """A whole notebook."""
    return markdown(_read(path).cells, "notebooks")


def cells_with(call: str) -> list[tuple[Path, Sequence[NotebookNode]]]:
    """The notebooks that make a call, each with the code cells that do."""
    found = [
        (path, [cell for cell in _read(path).cells if cell.cell_type == "code" and call in cell.source])
        for path in NOTEBOOKS
    ]
    return [(path, cells) for path, cells in found if cells]


def markdown(cells: Sequence[NotebookNode], folder: str) -> str:
    """Cells as Markdown, for a page in that folder of the site."""
    shown = [NotebookNode({**cell, "outputs": _shown(cell)}) if "outputs" in cell else cell for cell in cells]
    notebook = nbformat.v4.new_notebook(cells=shown, metadata={"language_info": {"name": "python"}})
    text = MarkdownExporter().from_notebook_node(notebook)[0].replace(_TABLE, "")
    return f"{library(folder)}\n\n{text}" if any(cell.get("outputs") for cell in shown) else text


def _shown(cell: NotebookNode) -> list[NotebookNode]:
    """The outputs of a cell, its figures as what the site's script draws, without progress bars and warnings."""
    return [
        _inline(output)
        for output in cell.outputs
        if output.get("name") != "stderr" and _WIDGET not in output.get("data", {})
    ]


def _inline(output: NotebookNode) -> NotebookNode:
    """An output with its figure, which the site's script draws, or its picture in the page."""
    data = output.get("data", {})
    if _FIGURE in data:
        html = drawn(data[_FIGURE])
    elif _PNG in data:
        html = f'<img alt="" src="data:{_PNG};base64,{data[_PNG].strip()}">'
    else:
        return output
    return nbformat.v4.new_output("display_data", {"text/html": html})


@cache
def _read(path: Path) -> NotebookNode:
    """The executed copy of a notebook, unless there is none or the notebook has changed since."""
    notebook = nbformat.read(path, as_version=4)
    if not (EXECUTED / path.name).is_file():
        return notebook
    executed = nbformat.read(EXECUTED / path.name, as_version=4)
    same = [cell.source for cell in executed.cells] == [cell.source for cell in notebook.cells]
    return executed if same else notebook
