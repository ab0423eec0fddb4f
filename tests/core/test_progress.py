"""Progress bars are for those who watch: none is written into a file or a pipe."""

from __future__ import annotations

import ast
import io
import sys
from pathlib import Path

import pytest

import ctlens
from ctlens.core import progress
from ctlens.core.progress import progress_bar


class Stream(io.StringIO):
    """A stream that is a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_bar_is_written_on_a_terminal_if_it_is_wanted(terminal, shown, monkeypatch) -> None:
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)

    assert list(progress_bar(range(3), shown=shown, desc="steps")) == [0, 1, 2]
    with progress_bar(total=2, shown=shown) as bar:
        bar.update(2)

    assert ("steps" in stream.getvalue()) == (terminal and shown)
    assert terminal and shown or not stream.getvalue()


def test_a_bar_is_shown_in_a_notebook_though_its_stream_is_no_terminal(monkeypatch) -> None:
    class Notebook(progress.on_terminals):
        """Stands for the bar that tqdm chooses in a notebook."""

    monkeypatch.setattr(progress, "tqdm", Notebook)
    monkeypatch.setattr(sys, "stderr", Stream(terminal=False))

    assert isinstance(bar := progress_bar(total=1, shown=True), Notebook)
    assert not bar.disable and progress_bar(total=1, shown=False).disable


def test_every_bar_is_made_in_one_place() -> None:
    package = Path(ctlens.__file__).parent
    calls = [
        str(path.relative_to(package))
        for path in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tqdm"
    ]

    assert calls == ["core/progress.py"]
