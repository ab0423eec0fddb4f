"""Figures in a page: those of notebooks, and those of the results that `figures/analyses.py` has computed."""

from __future__ import annotations

import ast
import json
import posixpath
from collections.abc import Mapping
from textwrap import dedent
from typing import Any

from listing import ROOT, Exported, returned

from ctlens import analysis

LIBRARY = "figures/plotly.min.js"
"""What draws the figures, from the pictures' folder: the site asks no other host for anything."""
_PROGRAM = ROOT / "figures" / "analyses.py"
_HELD = ROOT / "figures" / "data" / "analyses"


def library(folder: str) -> str:
    """What a page in that folder of the site loads to draw figures."""
    return f'<script src="{posixpath.relpath(LIBRARY, folder)}"></script>'


def drawn(figure: Mapping[str, Any]) -> str:
    """A figure as HTML, from its JSON."""
    held = json.dumps({name: figure[name] for name in ("data", "layout")}).replace("<", "\\u003c")
    return f'<div class="figure"><script type="application/json">{held}</script></div>'


def computed(function: Exported) -> str:
    """The call of an analysis and the figure of its result, for its page; empty where there is none."""
    path = _HELD / f"{function.name}.safetensors"
    if not path.is_file():
        return ""
    result = getattr(analysis, returned(function)).load(path)
    figure = drawn(json.loads(result.figure().to_json()))
    return f"```python\n{_call(function.name)}.figure()\n```\n\n{library('docs/analyses')}\n\n{figure}"


def _call(name: str) -> str:
    """The body of a function of the program, as a reader would type it."""
    source = _PROGRAM.read_text(encoding="utf-8")
    (body,) = [node.body for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name]
    lines = source.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
    return dedent("\n".join(lines)).replace("return ", "").replace("of.", "")
