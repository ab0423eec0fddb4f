"""What the package exports, read from its files without an import of it.

Every `__init__` names what is public as `from module import name as name`, or defines it itself. So the pages of the
site are those of the public names, and a new one has its page unasked.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Exported:
    """A public name and the module that defines it."""

    name: str
    module: str

    @property
    def path(self) -> str:
        """The dotted path of the object."""
        return f"{self.module}.{self.name}"

    @property
    def room(self) -> str:
        """The package of the first level that it belongs to, such as `ctlens.losses`."""
        return ".".join(self.module.split(".")[:2])


@cache
def tree(module: str) -> ast.Module:
    """Parses a module; of a package its `__init__`, and of `ctlens` the stub, which lists its names."""
    path = ROOT.joinpath(*module.split("."))
    known = (path.with_suffix(".py"), path / "__init__.pyi", path / "__init__.py")
    return ast.parse(next(file for file in known if file.is_file()).read_text(encoding="utf-8"))


def docstring(module: str) -> str:
    """The docstring of a module."""
    return ast.get_docstring(tree(module)) or ""


def imported(module: str) -> Iterator[tuple[Exported, bool]]:
    """Yields what a module imports from modules of ctlens, and whether it exports it."""
    for node in tree(module).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "ctlens":
            for alias in node.names:
                yield Exported(alias.name, str(node.module)), alias.asname == alias.name


def exported(module: str) -> list[Exported]:
    """Lists what a module exports: what it imports under the same name, then what it defines."""
    listed = [name for name, public in imported(module) if public]
    defined = [node.name for node in tree(module).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [*listed, *(Exported(name, module) for name in defined if not name.startswith("_"))]


def definition(one: Exported) -> ast.stmt:
    """Where a name is defined or assigned in its module."""
    return next(node for node in tree(one.module).body if one.name in _names(node))


def _names(node: ast.stmt) -> set[str]:
    targets = [*getattr(node, "targets", ()), getattr(node, "target", None)]
    return {str(getattr(node, "name", "")), *(target.id for target in targets if isinstance(target, ast.Name))}


def returned(function: Exported) -> str:
    """What a function returns, as it says; empty for anything else."""
    found = getattr(definition(function), "returns", None)
    return ast.unparse(found) if found else ""


def arguments(function: Exported) -> list[ast.arg]:
    """The arguments of a function; none of anything else."""
    found = definition(function)
    return [*found.args.args, *found.args.kwonlyargs] if isinstance(found, ast.FunctionDef) else []
