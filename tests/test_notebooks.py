"""The notebooks stay short, stripped and free of this machine; CI runs them with `make notebooks`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CELLS = 30
LINES = 15
DEFS = 2
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def faults(notebook: dict[str, Any]) -> set[str]:
    """What a notebook breaks of the rules."""
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    texts = {cell["id"]: "".join(cell["source"]) for cell in cells}
    sources = [texts[cell["id"]] for cell in code]
    ids = [cell["id"] for cell in cells]
    found = {
        f"more than {CELLS} cells": len(cells) > CELLS,
        "a long cell": any(len(source.splitlines()) > LINES for source in sources),
        "an empty cell": not all(texts.values()),
        "many functions": sum(len(re.findall(r"\bdef ", source)) for source in sources) > DEFS,
        "outputs": any(cell["outputs"] or cell["execution_count"] is not None for cell in code),
        "metadata": notebook["metadata"] != METADATA or any(cell["metadata"] for cell in cells),
        "ids that change": not all(re.fullmatch(r"[a-z][a-z-]*", name) for name in ids) or len({*ids}) < len(ids),
        "an absolute path": bool(re.search(r"[\"'(\s](/|~/|[A-Z]:\\)\w", "\n".join(texts.values()))),
        "a figure shown": any(re.search(r"\.show\(|renderers", source) for source in sources),
        "a section without a figure": _bare_sections(cells, texts),
    }
    return {fault for fault, broken in found.items() if broken}


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
        code = {"outputs": [], "execution_count": None} if kind == "code" else {}
        return {"cell_type": kind, "id": name, "metadata": {}, "source": [source], **code}

    cells = [cell("markdown", "title", "## Does it?"), cell("code", "answer", "figure = make()\nfigure")]
    return {"cells": cells, "metadata": json.loads(json.dumps(METADATA)), "nbformat": 4, "nbformat_minor": 5}


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
        ("outputs", lambda cells: cells[1].update(outputs=[{}])),
        ("outputs", lambda cells: cells[1].update(execution_count=3)),
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
