"""Tries an installed ctlens: it is the wheel's, whole, and what the documents quote holds in this environment.

Run it with `python -I` and the package's folder of the checkout, to which the files of the wheel are held.
"""

import importlib
import pkgutil
import re
import sys
from importlib.metadata import metadata, version
from importlib.util import find_spec
from pathlib import Path

import ctlens as ct
from ctlens.organism import PretrainConfig, card, make_card

home = Path(ct.__file__).resolve().parent
assert home.is_relative_to(Path(sys.prefix).resolve()), f"ctlens comes from {home}, not from the wheel"
assert ct.__version__ == version("ctlens"), f"{ct.__version__} in the package, {version('ctlens')} in its metadata"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


different = files(Path(sys.argv[1])) ^ files(home)
assert not different, f"in the checkout or in the wheel alone: {sorted(different)}"
assert (home / "py.typed").is_file()

about = metadata("ctlens")
addresses = dict(address.split(", ", 1) for address in about.get_all("Project-URL"))
readme = about.get_payload()
links = re.findall(r"\]\(([^)]*)\)", readme)
astray = [link for link in links if not link.startswith("https://")]
assert links and not astray, f"links of the README that lead nowhere on a package index: {astray}"
assert any(link.startswith(addresses["Source"]) for link in links)

apart = {"ctlens.__main__"}  # which runs the command line
if find_spec("inspect_ai") is None:
    apart |= {f"ctlens.interop.{name}" for name in ("entry", "provider", "tasks")}  # which Inspect alone imports
for module in pkgutil.walk_packages(ct.__path__, "ctlens."):
    if module.name not in apart:
        importlib.import_module(module.name)
loaded = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "ctlens"}
foreign = [name for name, module in loaded.items() if not Path(module.__file__).resolve().is_relative_to(home)]
assert not foreign, f"not from the wheel: {foreign}"

shipped = card()
made = make_card(ct.load_organism(), PretrainConfig(**shipped["pretraining"]))
for row, found in zip(shipped["behaviour"], made["behaviour"], strict=True):
    for name, value in row.items():
        same = abs(found[name] - value) < 1e-5 if isinstance(value, float) else found[name] == value
        assert same, f"{row['threat']}, {row['split']}, {row['prompt_side']}: {name} is {found[name]}, not {value}"

example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
exec(example[1], {})  # it asserts what it shows

where = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformer-lens", "transformers"))
print(f"Python {sys.version.split()[0]}, {where}: {len(loaded)} modules, all of the wheel; the README's example runs,")
print(f"and the organism behaves as its card says, in {len(shipped['behaviour'])} rows")
