"""The house: imports go down only, and one place owns each fact."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "ctlens"
FILES = sorted(ROOT.rglob("*.py"))

LEAVES = ("errors", "files", "config", "types", "intervals", "plots")
MODEL_BOUNDARY = (
    "chat", "pairs", "formats", "alignment", "kinds", "batch", "parameters", "weights", "sites", "adapters", "models",
    "huggingface", "architectures", "hooks", "sequences", "decoding", "scoring",
)  # fmt: skip
SCIENCE = ("losses", "world", "threats", "organism")
USED = ("training", "evaluation", "analysis")
JOB = (
    "tables", "workers", "arms", "plan", "subjects", "cells", "mechanism", "claims", "inside_figures", "gallery",
    "report", "study", "doses", "leaks", "support", "cli", "__main__",
)  # fmt: skip
FLOORS = (LEAVES, MODEL_BOUNDARY, SCIENCE, USED, JOB)

# Within floor 2 the organism stands on threats and threats on the world, never the other way.
SIDEWAYS = {"losses": (), "world": (), "threats": ("world",), "organism": ("threats", "world")}
OWNERS = {
    "transformer_lens": ("models.py",),
    "plotly": ("plots/",),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "jinja2": ("chat.py", "report/"),
    "scipy": ("intervals.py",),
    "sklearn": ("analysis/classifiers.py",),
    "joblib": ("workers.py",),
    "IPython": ("training/live.py",),
}
PLOTS_MAY_USE = {"numpy", "plotly", "jaxtyping", "ctlens"}


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Absolute names of the modules a file imports, those inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "ctlens" else {module}
    return found


def rooms_used(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("ctlens.")} - {room(path)}


INSIDE = [path for path in FILES if path.name != "__init__.py" or path.parent != ROOT]


def test_every_file_has_a_room() -> None:
    known = {name for rooms in FLOORS for name in rooms}

    assert {room(path) for path in INSIDE} <= known


@pytest.mark.parametrize("path", INSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    here = room(path)

    for used in rooms_used(path):
        assert floor(used) <= floor(here), f"{here} must not import {used}, which is above it"
        if here in SIDEWAYS and floor(used) == floor(here):
            assert used in SIDEWAYS[here], f"{here} must not import {used}"


def test_no_room_needs_itself_through_others() -> None:
    graph: dict[str, set[str]] = {}
    for path in INSIDE:
        graph.setdefault(room(path), set()).update(rooms_used(path))

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph.get(name, ())
        return seen

    assert [name for name in graph if name in reachable(name)] == []


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_has_one_owner(library: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in FILES
        if any(name == library or name.startswith(f"{library}.") for name in imports(path))
    }

    assert users and all(user.startswith(OWNERS[library]) for user in users), users


def test_plots_know_arrays_and_nothing_else() -> None:
    for path in (ROOT / "plots").rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - PLOTS_MAY_USE
        standard = {name for name in outside if name in __import__("sys").stdlib_module_names}
        assert outside == standard, f"{path} imports {outside - standard}"


def test_files_stay_small() -> None:
    assert {path.name: n for path in FILES if (n := len(path.read_text().splitlines())) > 300} == {}


PICKLERS = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
PICKLING_CALLS = {"torch.save", "torch.load", "joblib.dump", "joblib.load", "joblib.Memory"}
LOUD = {"show", "to_pickle", "read_pickle"}


def banned(source: str) -> set[str]:
    """What a source does that the library never does: shows a figure, prints, or reads and writes pickles."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    named = {f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}
    calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    options = {keyword.arg for node in nodes if isinstance(node, ast.Call) for keyword in node.keywords}
    found = {name for name in modules if name.split(".")[0] in PICKLERS} | ((calls | named) & PICKLING_CALLS)
    found |= {call for call in calls if "." in call and call.rsplit(".", 1)[1] in LOUD}
    return found | (calls & {"print"}) | (options & {"allow_pickle"})


@pytest.mark.parametrize(
    "source",
    [
        "figure.show()", "pio.show(figure)", "make(1).show(renderer='png')", "print(1)", "import pickle",
        "from cloudpickle import dumps", "torch.load(path)", "torch.save(state, path)", "from torch import save",
        "joblib.dump(x, path)", "table.to_pickle(path)", "np.load(path, allow_pickle=True)",
    ],
)  # fmt: skip
def test_what_the_library_never_does_would_be_seen(source: str) -> None:
    assert banned(source)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_never_shows_a_figure_prints_or_pickles(path: Path) -> None:
    assert banned(path.read_text()) == set()


def public(body: list[ast.stmt]) -> list[ast.FunctionDef | ast.ClassDef]:
    """Public classes, their public methods, and public functions; not functions inside functions."""
    found: list[ast.FunctionDef | ast.ClassDef] = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found += [node, *(public(node.body) if isinstance(node, ast.ClassDef) else ())]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_says_what_it_does_and_returns(path: Path) -> None:
    module = ast.parse(path.read_text())
    protocols = {node.name for node in module.body if isinstance(node, ast.ClassDef) and path.name == "types.py"}
    told = [node for node in public(module.body) if node.name in protocols or path.name != "types.py"]

    assert ast.get_docstring(module)
    assert [node.name for node in told if not ast.get_docstring(node)] == []
    assert [n.name for n in ast.walk(module) if isinstance(n, ast.FunctionDef) and n.returns is None] == []
