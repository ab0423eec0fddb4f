"""ctlens: a mechanistic-interpretability workbench for consistency training.

Names are imported when they are first used, so that `ctlens --help` need not load PyTorch. They are listed in
`__init__.pyi`, which type checkers read instead of this file.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

__version__ = "0.2.0.dev0"


def _homes() -> dict[str, str]:
    """The module that each public name comes from, as the imports of the stub say."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


_HOMES = _homes()

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]  (pyright reads the stub)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ctlens' has no attribute {name!r}")
    if _HOMES[name] == __name__:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
