"""The code that the README and CONTRIBUTING show is run as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pandas as pd
import torch
from conftest import hf_model

from ctlens import losses
from ctlens.losses import distances
from ctlens.losses.base import VectorLoss
from ctlens.models import load_model
from ctlens.report import summary_table

ROOT = Path(__file__).parents[1]


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)


def test_the_readme_example_runs_and_its_claim_holds() -> None:
    (example,) = blocks("README.md", "python")
    names: dict[str, object] = {}

    exec(example.replace("threat.neutral(128)", "threat.neutral(128), progress=False"), names)

    assert len(names["run"].history) == 100  # type: ignore[attr-defined]


def test_every_make_target_that_the_documents_name_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = [
        line
        for name in ("README.md", "CONTRIBUTING.md")
        for block in blocks(name, "bash")
        for line in block.splitlines()
    ]
    targets = {shlex.split(line, comments=True)[1] for line in commands if line.startswith("make ")}

    assert targets == {"compare", "test", "check"}
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_the_contributing_example_is_a_working_loss(tokenizer, monkeypatch) -> None:
    distance, loss, registration, _ = blocks("CONTRIBUTING.md", "python")
    names = {**vars(losses), **vars(distances), **vars(__import__("ctlens.losses.base", fromlist=["*"]))}

    exec(f"from dataclasses import dataclass\n{distance}\n{loss}\n{registration}", names)
    monkeypatch.setattr(losses, "LOSSES", names["LOSSES"])
    made = losses.get("l1act", layers="last")

    assert isinstance(made, VectorLoss)
    assert made.hook_names(load_model(hf_model("llama"), tokenizer=tokenizer)) == ["blocks.1.hook_resid_post"]
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
    assert made.distances["l1"](x, y) == 3


def test_the_readmes_table_is_the_one_of_the_committed_results() -> None:
    rates = summary_table(pd.read_csv(ROOT / "figures" / "results.csv", keep_default_na=False))
    readme = (ROOT / "README.md").read_text()

    for threat, rows in rates.groupby("threat"):
        assert f"| {threat} | {' | '.join(map(str, rows['bad wrapped']))} |" in readme
    drops = [1 - rate.value for arm in ("clean", "benign") for rate in rates[f"good {arm}"]]
    assert "within 2.1 points" in readme and max(drops) < 0.021


def test_every_method_of_the_committed_study_repairs_the_organism_and_keeps_the_rest() -> None:
    results = pd.read_csv(ROOT / "figures" / "results.csv", keep_default_na=False)
    rates = summary_table(results).set_index(["threat", "method"])

    for (threat, method), row in rates.iterrows():
        base = rates.loc[(threat, "none")]
        for arm in ("clean", "benign"):
            assert row[f"good {arm}"].value >= base[f"good {arm}"].value - 0.05
        if method not in ("none", "retention"):
            assert row["bad wrapped"].value <= 0.2 * base["bad wrapped"].value
    against_control = results.query("metric == 'bad_rate_vs_retention'")
    assert len(against_control) == 8 and (against_control.ci_high < 0).all()


def test_the_readmes_pictures_exist() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text())

    assert pictures and all((ROOT / picture).is_file() for picture in pictures)
