"""The house: imports go down only, and one place owns each fact."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
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
    ("study", "auditing", "exploring", "interop", "compatibility"),
    ("cli",),
    ("__main__",),
)
OWNERS = {
    "transformer_lens": ("models/classes.py", "models/loading.py", "models/outline.py"),
    "plotly": ("plots/",),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "jinja2": ("data/chat.py", "study/report/", "exploring/page.py"),
    # intervals; and the solver that scikit-learn calls
    "scipy": ("core/stats.py", "core/clusters.py", "analysis/probing/classifiers.py"),
    "sklearn": ("analysis/probing/classifiers.py",),
    "joblib": ("study/workers.py",),
    "IPython": ("training/live.py",),
    "ipywidgets": ("exploring/panel.py",),
    "anywidget": ("exploring/panel.py",),
    "inspect_ai": ("interop/",),
}
PLOTS_MAY_USE = {"numpy", "plotly", "jaxtyping", "ctlens", "kaleido"}


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


def defined(module: ast.Module) -> set[str]:
    """The public names that a module defines at its top: functions, classes, constants and aliases of types."""
    names: set[str] = set()
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


# What every registry has: `ct.losses.get` and `ct.threats.get`, by the same words because they do the same.
OF_REGISTRIES = {"get", "names"}


def test_what_a_module_defines_would_be_seen() -> None:
    source = "A, B = 1, 2\nC: int = 3\n_D = 4\ndef f(): ...\nclass G:\n    def h(self): ...\nfrom x import y\n"

    assert defined(ast.parse(source)) == {"A", "B", "C", "f", "G"}


def test_no_public_name_is_defined_in_two_modules() -> None:
    homes: dict[str, list[str]] = {}
    for path in INSIDE:
        for name in defined(ast.parse(path.read_text())):
            homes.setdefault(name, []).append(str(path.relative_to(ROOT)))
    twice = {name: files for name, files in homes.items() if len(files) > 1}

    assert {
        name for name, files in twice.items() if files == ["losses/__init__.py", "threats/__init__.py"]
    } == OF_REGISTRIES
    assert set(twice) == OF_REGISTRIES, twice


# Words that were two things, or had a better one: what replaced each, and the files that still speak of the old one.
WITHDRAWN = {
    "arm": ("prompt_side or condition", ("evaluation/result.py",)),
    "arms": ("prompt_sides or conditions", ()),
    "answer_tokens": ("max_new_tokens", ("training/config.py",)),
    "tokens_a_pass": ("max_batch_tokens", ()),
    "looked_into": ("analysed", ()),
    "patch_sites": ("patch with several sites", ()),
    "hook_point": ("site or hook_name", ()),
    "lora_sites": ("lora_target_modules", ()),
    "donor": ("source", ()),
    "recipient": ("target", ()),
}
# Words that prose needs and names do not: identifiers, parameters, columns and options are called otherwise. What is
# said instead, and the files that may use the word: the threat prefill calls a forced answer by its word, "place".
WITHDRAWN_NAMES = {
    "place": ("positions, or an index, a folder, a subplot", {"threats/prefill.py"}),
    "places": ("positions", set()),
    "n_items": ("n_prompts or n_pairs", set()),
    "span_masks": ("segment_masks", set()),
}


@pytest.mark.parametrize("word", WITHDRAWN)
def test_a_withdrawn_word_does_not_come_back(word: str) -> None:
    instead, allowed = WITHDRAWN[word]
    sources = [path for pattern in ("*.py", "*.jinja") for path in ROOT.rglob(pattern)]
    found = {str(path.relative_to(ROOT)) for path in sources if re.search(rf"\b{word}\b", path.read_text())}

    assert found == set(allowed), f"say {instead}"


def names_in(source: str) -> set[str]:
    """Every identifier of a source, and every string that is one word, as columns and options are."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        found |= {getattr(node, field) for field in ("id", "attr", "arg", "name") if hasattr(node, field)}
    return found


def test_a_name_would_be_seen() -> None:
    assert {"a", "b", "c", "d", "f"} <= names_in("def f(a): b.c = 'd'")
    assert "place" not in names_in("f('in place of the model')")


@pytest.mark.parametrize("word", WITHDRAWN_NAMES)
def test_a_withdrawn_name_does_not_come_back(word: str) -> None:
    instead, allowed = WITHDRAWN_NAMES[word]
    found = {str(path.relative_to(ROOT)) for path in FILES if word in names_in(path.read_text())}

    assert found == allowed, f"say {instead}"


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


TEXTS = (ast.JoinedStr, ast.List, ast.Tuple)
FLAGS = (ast.Compare, ast.BoolOp)


def is_flag(node: ast.expr, flags: set[str]) -> bool:
    """Whether a factor is True or False: a comparison, `not`, a call that says yes or no, or a name out of `flags`."""
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("bool", "any", "all", "isinstance")
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    return isinstance(node, FLAGS) or (isinstance(node, ast.Name) and node.id in flags)


def is_text(node: ast.expr) -> bool:
    return isinstance(node, TEXTS) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def shape(value: ast.expr) -> str:
    """A value without its names and constants: what is called with what. `f(x, 1)` is `f(_, _)`."""
    return re.sub(r"\w+(?![\w(])", "_", re.sub(r"f?('[^']*'|\"[^\"]*\")", "_", ast.unparse(value)))


def packed(targets: list[ast.expr], values: list[ast.expr]) -> bool:
    """Whether unlike things are assigned in one line: neither a swap nor two or three values made the same way."""
    names, given = [ast.unparse(target) for target in targets], [ast.unparse(value) for value in values]
    if set(names) == set(given) or any(isinstance(node, ast.Starred) for node in (*targets, *values)):
        return False
    return len({shape(value) for value in values}) > 1 or shape(values[0]) in ("_", "[]", "{}", "()") or len(values) > 3


def assigned(node: ast.Assign) -> set[str]:
    """What is wrong with an assignment."""
    target = node.targets[0]
    if len(node.targets) > 1:
        return {"chained assignment: one line each"}
    if not isinstance(target, ast.Tuple) or len(target.elts) < 2:
        return set()
    if isinstance(node.value, ast.GeneratorExp):
        return {"unpacked generator: write the values out"}
    if isinstance(node.value, ast.ListComp) and not any(isinstance(name, ast.Starred) for name in target.elts):
        return {"unpacked comprehension: write the values out"}
    if isinstance(node.value, ast.Tuple) and packed(target.elts, node.value.elts):
        return {"unlike things in one assignment: one line each"}
    return set()


def idioms(source: str) -> set[str]:
    """Tricks that are short to write and slow to read, of which no rule of ruff knows."""
    tree = ast.parse(source)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            found |= assigned(node)
        if isinstance(node, ast.IfExp) and sum(isinstance(part, ast.IfExp) for part in ast.walk(node)) > 1:
            found.add("nested conditional expression: write an if")
    if any(multiplied(node, flags) for flags, part in functions(tree) for node in ast.walk(part)):
        found.add("text or list times a flag: write `x if flag else y`")
    comments = (
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    )
    if any(re.match(r"#\s*fmt:", comment) for comment in comments):
        found.add("fmt: the formatter has its way")
    return found


def functions(tree: ast.Module) -> Iterator[tuple[set[str], ast.AST]]:
    """The module, and every function with its arguments that are flags."""
    yield set(), tree
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            yield {a.arg for a in arguments if a.annotation and ast.unparse(a.annotation) == "bool"}, node


def multiplied(node: ast.AST, flags: set[str]) -> bool:
    """Whether a text or list, or a constant that may be one, is multiplied by a flag."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return False
    sides = ((node.left, node.right), (node.right, node.left))
    return any((is_text(a) or ast.unparse(a).isupper()) and is_flag(b, flags) for a, b in sides)


@pytest.mark.parametrize(
    "source",
    [
        "a, b = (f(x) for x in (1, 2))",
        "first, *rest = (f(x) for x in found)",
        "a, b = [f(x) for x in (1, 2)]",
        "a = b = 0",
        "A, B = C = ('x', 'y')",
        "a, b = 1, {}",
        "self.model, self.names = model, names",
        "before, name = weights(model), fingerprint(model)",
        "low, high = [], []",
        "A, B, C, D = f(1), f(2), f(3), f(4)",
        "x = 1 if a else 2 if b else 3",
        "x = f(1 if a else 2) if b else 3",
        "text = 'words' * (kind == 'gap')",
        "text = f'{x}' * (not kind)",
        "words = shared + ['explicit'] * any(pairs)",
        "def f(*, raw: bool): return QUANTITIES + RAW * raw",
        "def f(flag: bool): return ', relative to the gap' * flag",
        "x = [1,2]  # fmt: skip",
    ],
)
def test_a_trick_would_be_seen(source: str) -> None:
    assert idioms(source)


@pytest.mark.parametrize(
    "source",
    [
        "a, b = b, a",
        "clean, wrapped = tokens(pair.clean), tokens(pair.wrapped)",
        "first, *rest = [f(x) for x in found]",
        "(found,) = (x for x in rows if x)",
        "a, b = pair",
        "rule = '---|' * len(columns)",
        "def f(read: bool, planted: float): return planted * read",
        "x = 1 if a else 2",
        "x = '# fmt: skip'",
    ],
)
def test_plain_code_is_no_trick(source: str) -> None:
    assert idioms(source) == set()


def test_the_code_has_no_tricks() -> None:
    places = [ROOT.parent / name for name in ("ctlens", "tests", "docs", "figures", "benchmarks")]
    found = {path: idioms(path.read_text()) for place in places for path in sorted(place.rglob("*.py"))}

    assert {str(path.relative_to(ROOT.parent)): tricks for path, tricks in found.items() if tricks} == {}
