"""The notebooks stay short and free of this machine, and show what their code gives; CI runs them."""

from __future__ import annotations

import importlib
import json
import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CELLS = 30
LINES = 15
DEFS = 2
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "executed": ""}
WIDGET = "application/vnd.jupyter.widget-view+json"
DISPLAYED = {"image/png", "text/html", "text/plain"}
sys.path.insert(0, str(FOLDER.parent / "docs/pages"))
shown = importlib.import_module("outputs")


def faults(notebook: dict[str, Any]) -> set[str]:
    """What a notebook breaks of the rules."""
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    texts = {cell["id"]: "".join(cell["source"]) for cell in cells}
    sources = [texts[cell["id"]] for cell in code]
    ids = [cell["id"] for cell in cells]
    outputs = [output for cell in code for output in cell["outputs"]]
    found = {
        f"more than {CELLS} cells": len(cells) > CELLS,
        "a long cell": any(len(source.splitlines()) > LINES for source in sources),
        "an empty cell": not all(texts.values()),
        "many functions": sum(len(re.findall(r"\bdef ", source)) for source in sources) > DEFS,
        "not executed from top to bottom": [cell["execution_count"] for cell in code] != [*range(1, len(code) + 1)],
        "outputs of other code": notebook["metadata"].get("executed") != shown.digest(notebook),
        "outputs that no code host displays": not all(map(_is_displayed, outputs)),
        "no picture": not any("image/png" in output.get("data", ()) for output in outputs),
        "metadata": {**notebook["metadata"], "executed": ""} != METADATA or any(cell["metadata"] for cell in cells),
        "ids that change": not all(re.fullmatch(r"[a-z][a-z-]*", name) for name in ids) or len({*ids}) < len(ids),
        "an absolute path": bool(re.search(r"[\"'(\s](/|~/|[A-Z]:\\)\w", "\n".join(texts.values()))),
        "a figure shown": any(re.search(r"\.show\(|renderers", source) for source in sources),
        "a section without a figure": _bare_sections(cells, texts),
    }
    return {fault for fault, broken in found.items() if broken}


def _is_displayed(output: dict[str, Any]) -> bool:
    """Whether a code host shows an output: a picture, a table or text, and no progress bar or warning."""
    return output.get("name") == "stdout" or bool(output.get("data")) and {*output["data"]} <= DISPLAYED


def _bare_sections(cells: list[dict[str, Any]], texts: dict[str, str]) -> bool:
    """Whether a question, a heading of the second level, is answered by no code that ends with a value."""
    open_question = False
    for cell in cells:
        text = texts[cell["id"]]
        if cell["cell_type"] == "markdown" and re.search(r"^## ", text, flags=re.MULTILINE):
            if open_question:
                return True
            open_question = "## Where next" not in text
        elif cell["cell_type"] == "code" and re.match(r"[\w.]+[\w.\[\]\"]*(\(|$)", text.splitlines()[-1]):
            open_question = False
    return open_question


def example() -> dict[str, Any]:
    def cell(kind: str, name: str, source: str) -> dict[str, Any]:
        picture = {"data": {"image/png": "iVBORw0KGgo="}, "metadata": {}, "output_type": "display_data"}
        code = {"outputs": [picture], "execution_count": 1} if kind == "code" else {}
        return {"cell_type": kind, "id": name, "metadata": {}, "source": [source], **code}

    cells = [cell("markdown", "title", "## Does it?"), cell("code", "answer", "figure = make()\nfigure")]
    metadata = {**METADATA, "executed": shown.digest({"cells": cells})}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def test_the_eight_are_there() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == [f"0{number}" for number in range(1, 9)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_the_rules(path: Path) -> None:
    assert faults(json.loads(path.read_text())) == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_written_as_jupyter_writes_it(path: Path) -> None:
    text = path.read_text()

    assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_claim_is_held_by_the_cell_that_computes_it(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    prose = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]

    assert sum("assert " in source for source in code) >= 3
    assert not [text for text in prose if re.search(r"\d(\.\d+)?\s?%|\b\d+\.\d+\b", text.replace("95% interval", ""))]


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("a long cell", lambda cells: cells[1].update(source=["x = 1\n" * 15 + "x"])),
        ("many functions", lambda cells: cells[1].update(source=["def f(): ...\n" * 3 + "f"])),
        ("no picture", lambda cells: cells[1].update(outputs=[])),
        ("outputs that no code host displays", lambda cells: cells[1].update(outputs=[{"data": {WIDGET: {}}}])),
        ("outputs that no code host displays", lambda cells: cells[1].update(outputs=[{"name": "stderr"}])),
        ("outputs of other code", lambda cells: cells[1].update(source=["figure = make(2)\nfigure"])),
        ("not executed from top to bottom", lambda cells: cells[1].update(execution_count=3)),
        ("metadata", lambda cells: cells[1].update(metadata={"trusted": True})),
        ("ids that change", lambda cells: cells[1].update(id="3f2a9c1b")),
        ("ids that change", lambda cells: cells[1].update(id="title")),
        ("an absolute path", lambda cells: cells[1].update(source=['open("/home/me/x")\nx'])),
        ("a figure shown", lambda cells: cells[1].update(source=["figure.show()"])),
        ("a section without a figure", lambda cells: cells[1].update(source=["figure = make()"])),
        ("more than 30 cells", lambda cells: cells.extend({**cells[1], "id": "x" * n} for n in range(1, 31))),
        ("an empty cell", lambda cells: cells.append({**cells[0], "id": "last", "source": []})),
    ],
)
def test_what_breaks_a_rule_is_seen(fault: str, change: Any) -> None:
    notebook = example()
    assert faults(notebook) == set()

    change(notebook["cells"])

    assert fault in faults(notebook)


def test_what_an_executed_copy_shows_is_kept_but_for_bars_warnings_and_panels() -> None:
    code = nbformat.v4.new_code_cell("run()", id="run")
    source = nbformat.v4.new_notebook(cells=[code], metadata={"kernelspec": METADATA["kernelspec"]})
    executed = deepcopy(source)
    output = nbformat.v4.new_output
    executed.cells[0].update(execution_count=1)
    executed.cells[0].outputs = [
        output("display_data", {WIDGET: {"model_id": "1"}, "text/plain": "trained:   0%"}),
        output("stream", text="a warning", name="stderr"),
        output("stream", text="15 steps", name="stdout"),
        output("display_data", {shown.FIGURE: {"data": [], "layout": {}}, "text/plain": "Figure({})"}),
        output("execute_result", {WIDGET: {"model_id": "2"}, "text/plain": "VBox()"}, execution_count=1),
    ]

    kept = shown.shown(executed, source)

    assert [dict(one.get("data", {})) for one in kept.cells[0].outputs] == [
        {},
        {shown.FIGURE: {"data": [], "layout": {}}},
        {"text/plain": "a panel that answers to clicks: run the notebook to see it"},
    ]
    assert shown.differing(kept, kept) == [] and shown.differing(source, kept) == ["run"]
    source.cells[0].source = "run(2)"
    with pytest.raises(SystemExit, match="make outputs"):
        shown.shown(executed, source)
