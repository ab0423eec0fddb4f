"""The contract: the names that users, notebooks and the README rely on, and that they work together."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ctlens as ct

CONTRACT = {
    "ACT",
    "AttCT",
    "AttMass",
    "AttOut",
    "BCT",
    "KLCT",
    "MLPCT",
    "Trainer",
    "analysis",
    "audit",
    "compare",
    "evaluate",
    "explore",
    "load_model",
    "load_organism",
    "load_pairs",
    "load_run",
    "threats",
    "train",
}
LIGHT = """
import sys
import ctlens
assert ctlens.__version__ and set(ctlens.__all__) <= set(dir(ctlens))
sys.exit(" ".join({"torch", "transformer_lens", "transformers", "pandas", "plotly"} & set(sys.modules)) or 0)
"""
NAMED = """
import pkgutil
import sys
import ctlens
for name in sys.argv[1:]:
    getattr(ctlens, name.split(".")[1])  # as a reader types it, behind `import ctlens` alone
    pkgutil.resolve_name(name)
"""
ROOT = Path(__file__).parents[1]


def test_the_contract_is_public() -> None:
    assert set(ct.__all__) >= CONTRACT
    assert len(ct.__all__) == len(set(ct.__all__))


@pytest.mark.parametrize("path", ["__init__.pyi", "analysis/__init__.py"])
def test_type_checkers_take_every_listed_name_for_public(path: str) -> None:
    listed = ast.parse((Path(ct.__file__).parent / path).read_text())
    aliases = [alias for node in listed.body if isinstance(node, ast.ImportFrom) for alias in node.names]

    assert aliases and all(alias.asname == alias.name for alias in aliases)


@pytest.mark.parametrize("name", ct.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(ct, name)

    assert value is getattr(ct, name) and value.__doc__


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'ctlens' has no attribute 'attct'"):
        ct.attct  # noqa: B018


@pytest.mark.processes
def test_every_name_that_the_documents_give_is_there_after_the_import() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    changes = (ROOT / "CHANGELOG.md").read_text().split("\n## 0.1.0")[0].splitlines()
    text += "\n".join(line for line in changes if not line.startswith("|"))  # tables of what was renamed
    found = re.findall(r"\b(?:ctlens|ct)\.([a-zA-Z_]\w*(?:\.[a-zA-Z_]\w*)*)", text)

    names = sorted({"ctlens.plots.save_figure", *(f"ctlens.{name}" for name in found)})
    done = subprocess.run([sys.executable, "-c", NAMED, *names], capture_output=True, text=True)

    assert {"ctlens.core.limits", "ctlens.losses.preset"} <= {*names}
    assert done.returncode == 0, done.stderr


def test_only_public_names_are_listed() -> None:
    assert dir(ct) == sorted({*ct.__all__, "__version__"})


@pytest.mark.processes
def test_importing_loads_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


def test_threats_and_losses_are_listed_by_name() -> None:
    assert {"sycophancy", "jailbreak"} <= set(ct.threats.names())
    consistency = ["act", "mlpct", "attct", "bct", "rmct", "opct", "f2c", "klct", "attout", "attmass", "subact"]
    assert ct.losses.names() == [*consistency, "dpo"]
    assert all(ct.threats.get(name).name == name for name in ct.threats.names())


def test_the_organism_is_ready_to_use() -> None:
    model = ct.load_organism()

    assert not model.training and model.tokenizer is not None


@pytest.fixture(scope="module")
def run() -> ct.Run:
    pairs = ct.threats.get("sycophancy").pairs(n_pairs=16, split="train", seed=0)
    return ct.train(ct.load_organism(), pairs, ct.AttCT(), steps=3, seed=0, progress=False)


def test_a_training_yields_a_run_with_its_history_and_figure(run: ct.Run) -> None:
    table = run.history.to_dataframe()

    assert list(table.columns) == ["step", "name", "hook_name", "value"]
    assert sorted(set(table["step"])) == [1, 2, 3] and {"attct", "retention", "total"} <= set(table["name"])
    assert len(run.figure().data) >= 2


def test_a_run_comes_back_from_its_folder(run: ct.Run, tmp_path: Path) -> None:
    folder = run.save(tmp_path / "run")

    tokens = torch.arange(20)[None]
    assert torch.equal(ct.load_run(folder).model(tokens), run.model(tokens))
    assert torch.equal(ct.load_model(folder)(tokens), run.model(tokens))


def test_a_trained_model_is_evaluated_and_looked_into(run: ct.Run) -> None:
    before = ct.load_organism()
    pairs = ct.threats.get("sycophancy").pairs(n_pairs=8, split="heldout")

    rates = ct.evaluate(run.model, threats=["sycophancy", "jailbreak"], split="heldout", n_prompts=8).to_dataframe()
    shift = ct.analysis.residual_shift(before, run.model, pairs, progress=False)
    attention = ct.analysis.attention_diff(before, run.model, pairs, progress=False)

    assert set(rates["evaluated_threat"]) == {"sycophancy", "jailbreak"}
    assert len(shift.figure().data) >= 1 and len(attention.figure().data) >= 1
    assert set(attention.to_dataframe()["layer"]) == set(range(before.cfg.n_layers))


def test_the_visible_loop_shows_losses_by_hook_point() -> None:
    pairs = ct.threats.get("jailbreak").pairs(n_pairs=8)

    steps = list(ct.Trainer(ct.load_organism(), pairs, [ct.ACT(), ct.BCT()], ct.TrainConfig(steps=2)))

    assert [step.index for step in steps] == [1, 2]
    assert {"act", "bct", "retention", "total"} == set(steps[0].losses)
    assert len(steps[0].by_hook["act"]) == ct.load_organism().cfg.n_layers


def test_pairs_go_to_a_file_and_come_back(tmp_path: Path) -> None:
    pairs = ct.threats.get("jailbreak").pairs(n_pairs=4)

    ct.save_pairs(tmp_path / "pairs.jsonl", pairs)

    assert ct.load_pairs(tmp_path / "pairs.jsonl") == pairs


def test_every_mistake_is_one_kind_of_error() -> None:
    assert issubclass(ct.CtlensError, ValueError)
    for mistake in (lambda: ct.load_model("nowhere"), lambda: ct.load_pairs("nowhere"), lambda: ct.load_run("nowhere")):
        with pytest.raises(ct.CtlensError, match="nowhere"):
            mistake()
