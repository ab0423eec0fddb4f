"""What a command installs: what it needs and no more, in one pass, from one lock."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

OF_INSPECT = {f"ctlens/interop/{name}.py" for name in ("entry", "provider", "tasks")}
"""The files that Inspect imports, by the entry point; the rest of ctlens imports them late."""


def requirements(lines: Iterable[str]) -> list[Requirement]:
    """Reads requirements, without the project's own extras."""
    found = [Requirement(line) for line in lines]
    return [requirement for requirement in found if requirement.name != PROJECT["name"]]


def pins(lock: str) -> dict[str, str]:
    """Reads a version by package; a line that is no exact pin is an error."""
    lines = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lock.splitlines()]
    return {canonicalize_name(line[1]): line[2] for line in lines if line}


def not_pinned(wanted: Iterable[Requirement], locked: dict[str, str]) -> list[str]:
    """Lists the requirements whose package the lock lacks, or has in a version that they refuse."""
    versions = [(requirement, locked.get(canonicalize_name(requirement.name))) for requirement in wanted]
    return [str(wish) for wish, version in versions if version is None or not wish.specifier.contains(version)]


def imports(tree: ast.AST, *, at_once: bool) -> set[str]:
    """Finds the packages that a file imports: as soon as it is imported itself, or at any time."""
    nodes = tree.body if at_once and isinstance(tree, ast.Module) else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"ctlens"}


def recipe(target: str, uv: str) -> list[str]:
    """Lists the commands that a target runs in a fresh clone."""
    make = ["make", "--dry-run", "--always-make", "--no-print-directory", "VENV=nowhere", f"UV={uv}", target]
    return subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_lock_pins_all_that_the_project_names() -> None:
    lock = (ROOT / "constraints.txt").read_text()
    wanted = requirements([*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)])

    assert len(pins(lock)) == len(lock.splitlines())
    assert len(wanted) > 30 and not_pinned(wanted, pins(lock)) == []


def test_a_package_that_the_lock_lacks_or_has_too_old_is_found() -> None:
    wanted = requirements(["a>=2", "B_c>=1", "d", "ctlens[export]"])

    assert not_pinned(wanted, pins("a==1.9\nb-c==1.0\nd>=1")) == ["a>=2", "d"]


def test_what_ctlens_imports_is_a_dependency_or_where_it_is_imported_late_of_an_extra() -> None:
    trees = {path: ast.parse(path.read_text()) for path in (ROOT / "ctlens").rglob("*.py")}
    first = [tree for path, tree in trees.items() if str(path.relative_to(ROOT)) not in OF_INSPECT]
    homes = packages_distributions()

    def missing(names: set[str], lines: Iterable[str]) -> list[str]:
        declared = {canonicalize_name(requirement.name) for requirement in requirements(lines)}
        return [name for name in names if not {canonicalize_name(home) for home in homes.get(name, [name])} & declared]

    assert missing({"torch", "sklearn", "pytest"}, PROJECT["dependencies"]) == ["pytest"]
    assert missing(set().union(*(imports(tree, at_once=True) for tree in first)), PROJECT["dependencies"]) == []
    extras = [line for name in ("cluster", "export", "inspect", "logging", "notebook") for line in EXTRAS[name]]
    late = set().union(*(imports(tree, at_once=False) for tree in trees.values())) - {"IPython"}  # part of ipykernel
    assert missing(late, [*PROJECT["dependencies"], *extras]) == []


@pytest.mark.processes
@pytest.mark.parametrize("uv", ["", "uv"])
def test_a_study_is_one_pass_without_the_packages_of_tests_and_notebooks(uv: str) -> None:
    passes = [line for line in recipe("compare", uv) if " install " in line]

    assert len(passes) == 1 and passes[0].startswith("uv pip" if uv else "nowhere/bin/pip")
    assert passes[0].endswith("--constraint constraints.txt --editable .")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("target", "on_top"),
    [
        ("test", ["dev"]),
        ("check", ["dev"]),
        ("drawings", ["dev"]),
        ("docs", ["dev"]),
        ("lab", ["notebook"]),
        ("notebooks", ["dev", "notebook"]),
    ],
)
def test_what_else_a_target_needs_is_installed_on_top(target: str, on_top: list[str]) -> None:
    passes = [line for line in recipe(target, "") if " install " in line]

    assert [line.split(" --editable ")[1] for line in passes] == [".", *(f"'.[{extra}]'" for extra in on_top)]


@pytest.mark.processes
def test_the_other_line_of_transformer_lens_has_its_own_lock() -> None:
    commands = [line for line in recipe("install-4x", "") if " install " in line]

    assert len(commands) == 2 and all("--constraint .venv-4x.txt" in line for line in commands)
