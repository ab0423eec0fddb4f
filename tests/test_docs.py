"""The code that the README and CONTRIBUTING show is run as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import hf_model

from ctlens import losses, organism, threats
from ctlens.arms import METHODS
from ctlens.leaks import BEFORE, INOCULATED, PLAIN, RECKLESS, Leak
from ctlens.losses import distances
from ctlens.losses.base import VectorLoss
from ctlens.models import load_model
from ctlens.organism.describe import card_text
from ctlens.tables import summary_table

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

    assert targets == {"compare", "test", "check", "figures", "drawings", "lab", "notebooks", "strip"}
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


@pytest.fixture(scope="module")
def results() -> pd.DataFrame:
    return pd.read_csv(ROOT / "figures" / "results.csv", keep_default_na=False)


def test_the_readmes_table_is_the_one_of_the_committed_results(results: pd.DataFrame) -> None:
    rates = summary_table(results)
    readme = (ROOT / "README.md").read_text()

    assert set(rates["threat"]) == set(threats.names())
    for threat, rows in rates.groupby("threat"):
        assert f"| {threat} | {' | '.join(map(str, rows['bad wrapped']))} |" in readme
    assert "Clean good rates stay at 100%" in readme and all(rate.value == 1 for rate in rates["good clean"])
    assert "up to 10.4 points" in readme and round(max(1 - rate.value for rate in rates["good benign"]), 3) == 0.104


def test_the_readmes_sentences_on_structure_and_transfer_hold(results: pd.DataFrame) -> None:
    structure = summary_table(results, "structure").set_index(["threat", "method"])["bad wrapped"]
    sycophancy = [structure["sycophancy", name].percent for name in METHODS]
    final = results.query("metric == 'bad_rate' and arm == 'wrapped' and split == 'heldout' and step in (0, 100)")
    base = final.query("method == 'none'").set_index("evaluated_threat")["value"]
    others = final.query("method != 'none' and trained_threat != evaluated_threat")
    moved = (others["value"] - base.loc[others["evaluated_threat"]].to_numpy()).abs()

    assert (min(sycophancy), max(sycophancy)) == ("33%", "51%")
    assert (structure["persona", "attct"].percent, structure["persona", "bct"].percent) == ("49%", "3%")
    assert round(moved.max(), 2) == 0.17
    assert moved[others["method"] == "bct"].mean() < moved[others["method"].isin(["act", "mlpct", "attct"])].mean()


def test_the_null_moves_nothing_and_internal_losses_cannot_see_a_prefill(results: pd.DataFrame) -> None:
    rates = summary_table(results).set_index(["threat", "method"])["bad wrapped"]

    for threat in threats.names():
        assert abs(rates[threat, "retention"].value - rates[threat, "none"].value) <= 0.02
    assert all(rates["prefill", name] == rates["prefill", "none"] for name in ("act", "mlpct", "attct"))


def test_every_other_method_repairs_the_organism_and_keeps_the_rest(results: pd.DataFrame) -> None:
    rates = summary_table(results).set_index(["threat", "method"])
    against_control = results.query("metric == 'bad_rate_vs_retention' and split == 'heldout'")

    for (threat, method), row in rates.iterrows():
        assert row["good clean"].value >= 0.95
        if threat in ("sycophancy", "jailbreak"):
            assert row["good benign"].value >= rates.loc[(threat, "none"), "good benign"].value - 0.05
        if method in METHODS and (threat != "prefill" or method == "bct"):
            assert row["bad wrapped"].value <= 0.2 * rates.loc[(threat, "none"), "bad wrapped"].value
            own = against_control.query("trained_threat == @threat and method == @method")
            assert len(own) == 1 and (own["ci_high"] < 0).all()


def test_the_readmes_sentences_on_the_leak_hold() -> None:
    table = Leak(pd.read_csv(ROOT / "figures" / "leak.csv"), {}).to_dataframe().set_index(["stage", "context"])
    shares = {place: round(100 * value) for place, value in table["value"].items()}
    under = {name: shares[name, "inoculation prompt"] for name in ("act", "bct", "mlpct", "attct", "retention")}

    assert (shares[BEFORE, PLAIN], shares[RECKLESS, PLAIN]) == (0, 100)
    assert (shares[INOCULATED, PLAIN], shares[INOCULATED, "inoculation prompt"]) == (19, 100)
    assert under == {"act": 1, "bct": 5, "mlpct": 19, "attct": 45, "retention": 100}
    assert (shares["bct", "near prompt"], shares["act", "near prompt"]) == (9, 63)


def test_the_organism_s_page_is_its_card() -> None:
    assert (ROOT / "ORGANISM.md").read_text() == card_text(organism.card())


def test_the_gallery_is_what_the_code_draws_today(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "figures")
    import draw

    old = draw.stale(ROOT / "figures", draw.drawings(ROOT / "figures"))

    assert not old, f"{'; '.join(old)}: run `make figures`, or `make drawings` where only drawing has changed."


def test_the_readmes_pictures_exist() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text())

    assert pictures and all((ROOT / picture).is_file() for picture in pictures)
