"""ctlens: a mechanistic-interpretability workbench for consistency training.

Names are imported when they are first used, so that `ctlens --help` need not load PyTorch. They are listed in
`__init__.pyi`, which type checkers read instead of this file. Every package and module of this folder is an attribute
too, such as `ctlens.compatibility`, without an import of its own.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
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
    if _HOMES.get(name, __name__) != __name__:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if not name.startswith("_") and name in {module.name for module in pkgutil.iter_modules(__path__)}:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'ctlens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
