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
FIGURE = "application/vnd.plotly.v1+json"
PNG = "image/png"
_WIDGET = "application/vnd.jupyter.widget-view+json"
_PANEL = "a panel that answers to clicks: run the notebook to see it"
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
    shown = [
        NotebookNode({**cell, "outputs": [*map(_inline, kept(cell.outputs))]}) if "outputs" in cell else cell
        for cell in cells
    ]
    notebook = nbformat.v4.new_notebook(cells=shown, metadata={"language_info": {"name": "python"}})
    text = MarkdownExporter().from_notebook_node(notebook)[0].replace(_TABLE, "")
    return f"{library(folder)}\n\n{text}" if any(cell.get("outputs") for cell in shown) else text


def _shown(cell: NotebookNode) -> list[NotebookNode]:
    return [_inline(output) for output in kept(cell.outputs)]


def kept(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """What readers see of the outputs of a cell: no progress bars and warnings, and words in the place of a panel."""
    seen = [output for output in outputs if output.get("name") != "stderr" and not _is_bar(output)]
    return [NotebookNode({**one, "data": {"text/plain": _PANEL}}) if _has_widget(one) else one for one in seen]


def _is_bar(output: NotebookNode) -> bool:
    """Whether an output is a progress bar, which has nothing to show when it is done."""
    return output.output_type == "display_data" and _has_widget(output)


def _has_widget(output: NotebookNode) -> bool:
    return _WIDGET in output.get("data", {})


def _inline(output: NotebookNode) -> NotebookNode:
    """An output with its figure, which the site's script draws, or its picture in the page."""
    data = output.get("data", {})
    if FIGURE in data:
        html = drawn(data[FIGURE])
    elif PNG in data:
        html = f'<img alt="" src="data:{PNG};base64,{data[PNG].strip()}">'
    else:
        return output
    return nbformat.v4.new_output("display_data", {"text/html": html})


def same_cells(one: NotebookNode, other: NotebookNode) -> bool:
    """Whether a copy is of the notebook as it is now."""
    return [cell.source for cell in one.cells] == [cell.source for cell in other.cells]


@cache
def _read(path: Path) -> NotebookNode:
    """The executed copy of a notebook, unless there is none or the notebook has changed since."""
    notebook = nbformat.read(path, as_version=4)
    if not (EXECUTED / path.name).is_file():
        return notebook
    executed = nbformat.read(EXECUTED / path.name, as_version=4)
    return executed if same_cells(executed, notebook) else notebook
