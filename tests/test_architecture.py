"""The house: imports go down only, and one place owns each fact."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "ctlens"
FILES = sorted(ROOT.rglob("*.py"))

# From the bottom up. A package may import what stands on a lower floor; those that share a floor are strangers.
FLOORS = (
    ("core",),
    ("plots", "data", "world"),
    ("models",),
    ("losses", "threats"),
    ("organism", "evaluation"),
    ("training",),
    ("analysis",),
    ("study", "compatibility"),
    ("cli",),
    ("__main__",),
)
OWNERS = {
    "transformer_lens": ("models/loading.py",),
    "plotly": ("plots/",),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "jinja2": ("data/chat.py", "study/report/"),
    "scipy": ("core/stats.py",),
    "sklearn": ("analysis/probing/classifiers.py",),
    "joblib": ("study/workers.py",),
    "IPython": ("training/live.py",),
}
PLOTS_MAY_USE = {"numpy", "plotly", "jaxtyping", "ctlens"}


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    """The dotted name of a file: `ctlens.losses` for its package's own."""
    return ".".join(("ctlens", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


@cache
def imports(path: Path) -> frozenset[str]:
    """Absolute names of what a file imports, inside functions too: modules, and what comes out of them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def modules_used(path: Path) -> set[str]:
    """The files of the package that a file imports; a name out of a module counts as that module.

    The public names of `ctlens` come from every floor, so a file inside imports them from their own modules.
    """
    used = {name if name in MODULES else name.rpartition(".")[0] for name in imports(path) - {"ctlens.__version__"}}
    assert "ctlens" not in used, f"{path} imports a public name of ctlens: import it from its own module"
    return {name for name in used if name in MODULES} - {name_of(path)}


INSIDE = [path for path in FILES if path.name != "__init__.py" or path.parent != ROOT]


def test_every_file_has_a_room() -> None:
    known = {name for rooms in FLOORS for name in rooms}

    assert {room(path) for path in INSIDE} <= known


@pytest.mark.parametrize("path", INSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_import_downwards_only(path: Path) -> None:
    here = room(path)

    for used in modules_used(path):
        there = used.split(".")[1]
        assert there == here or floor(there) < floor(here), f"{here} must not import {used}, which is not below it"


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The names from which a way along the arrows leads back."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph[name]
        return seen

    return [name for name in graph if name in reachable(name)]


def test_a_circle_would_be_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]


def test_the_files_import_each_other_in_no_circle() -> None:
    graph = {name: modules_used(path) for name, path in MODULES.items() if path in INSIDE}
    graph = {name: used & set(graph) for name, used in graph.items()}

    assert circles(graph) == []


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


# Words that were two things, or had a better one: what replaced each, and the files that still speak of the old one.
WITHDRAWN = {
    "arm": ("prompt_side or condition", ("evaluation/result.py",)),
    "arms": ("prompt_sides or conditions", ()),
    "answer_tokens": ("max_new_tokens", ("training/config.py",)),
    "tokens_a_pass": ("max_batch_tokens", ()),
}


@pytest.mark.parametrize("word", WITHDRAWN)
def test_a_withdrawn_word_does_not_come_back(word: str) -> None:
    instead, allowed = WITHDRAWN[word]
    sources = [path for pattern in ("*.py", "*.jinja") for path in ROOT.rglob(pattern)]
    found = {str(path.relative_to(ROOT)) for path in sources if re.search(rf"\b{word}\b", path.read_text())}

    assert found == set(allowed), f"say {instead}"


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
        "figure.show()",
        "pio.show(figure)",
        "make(1).show(renderer='png')",
        "print(1)",
        "import pickle",
        "from cloudpickle import dumps",
        "torch.load(path)",
        "torch.save(state, path)",
        "from torch import save",
        "joblib.dump(x, path)",
        "table.to_pickle(path)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_what_the_library_never_does_would_be_seen(source: str) -> None:
    assert banned(source)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_never_shows_a_figure_prints_or_pickles(path: Path) -> None:
    assert banned(path.read_text()) == set()


def public(body: list[ast.stmt]) -> list[ast.FunctionDef | ast.ClassDef]:
    """Public classes, their public methods, and public functions; not functions inside functions, nor overloads."""
    found: list[ast.FunctionDef | ast.ClassDef] = []
    for node in body:
        if any(ast.unparse(decorator) == "overload" for decorator in getattr(node, "decorator_list", ())):
            continue  # a signature of the function below, which says what it does
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
