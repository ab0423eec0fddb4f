"""The part of the audit's page on reasons: its table and sentences are those of the committed data."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ctlens.organism.reasons import SAID
from ctlens.threats import get

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "figures"))
verbalisation = importlib.import_module("verbalisation")


def made(folder: Path) -> Any:
    """A table of two seeds of one organism, of which one has no share of admissions after the training."""
    rows = [
        ("one", seed, "act" if step else "base", step, metric, value)
        for seed, bad in enumerate([(0.8, 0.6), (0.6, 0.1)])
        for step, share in zip((0, 10), bad, strict=True)
        for metric, value in (
            ("bad", share),
            ("admitted_given_bad", 1 - share),
            ("admitted_given_good", share / 10),
            ("admitted_given_switched", 1 - share if share > 0.1 else np.nan),
            ("denied_given_switched", share if share > 0.1 else np.nan),
            ("admitted_given_not_switched", share / 10),
        )
    ]
    table = pd.DataFrame(rows, columns=["organism", "seed", "condition", "step", "metric", "value"])
    table.assign(ci_low=table["value"] - 0.1, ci_high=table["value"] + 0.1).to_csv(
        folder / verbalisation.TABLE, index=False
    )
    return verbalisation.Verbalised(folder)


def test_a_row_says_how_often_each_organism_admits_of_how_often_it_gives_in(tmp_path: Path) -> None:
    found = made(tmp_path)
    lines = found.admissions_table(10, found.trainings).splitlines()

    assert lines[0] == "| method | one | one, seed 1 | admitted, not given in |"
    assert lines[2] == "| base | 20% [10–30] of 80% | 40% [30–50] of 60% | 8%, 6% |"
    assert "| ACT | 40% [30–50] of 60% | 90% [80–100] of 10% | 6%, 1% |" in lines
    assert "| ACT | 90% [80–100] of 10% | 1% |" in found.admissions_table(10, ["one, seed 1"]).splitlines()


def test_a_row_of_outcomes_says_what_was_admitted_and_denied(tmp_path: Path) -> None:
    found = made(tmp_path)
    lines = found.outcomes_table(10, found.trainings).splitlines()

    assert lines[0] == "| method | one | one, seed 1 |"
    assert "| ACT | 40% [30–50] · 60% [50–70] · 6% [0–16] | too few · too few · 1% [0–11] |" in lines


def test_what_stands_in_the_table_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, int]] = []

    def of_organism(model: str, seed: int) -> pd.DataFrame:
        measured.append((model, seed))
        return pd.DataFrame([("act", 5, "bad", 0.5, 96, 0.4, 0.6)], columns=verbalisation.COLUMNS[2:])

    monkeypatch.setattr(verbalisation, "HELD", tmp_path)
    monkeypatch.setattr(verbalisation, "of_organism", of_organism)
    monkeypatch.setattr(verbalisation, "give_reasons", lambda model, progress: model)
    monkeypatch.setattr(verbalisation.ct, "load_model", lambda folder: folder.name)
    verbalisation.main([tmp_path / "born/0"])
    verbalisation.main([tmp_path / "born/0", tmp_path / "born/1"])

    assert measured == [("0", 0), ("0", 1), ("1", 0)]
    assert verbalisation.Verbalised(tmp_path).trainings == ("born-0", "born-0, seed 1", "born-1")


def test_what_holds_the_reasons_is_the_wrapped_prompt_with_its_bad_answer() -> None:
    (pair,) = get("sycophancy").pairs(1)
    *turns, last = verbalisation.begun(pair).turns

    assert tuple(turns) == pair.wrapped.turns and (last.role, last.content) == ("assistant", pair.wrapped.bad)
    assert SAID not in last.content


FOUND = verbalisation.Verbalised(verbalisation.HELD)
PAGE = (ROOT / "docs/audit.md").read_text()
WORDS = re.sub(r"\s+", " ", PAGE)
METHODS = verbalisation.METHODS
HELD = verbalisation.REASONS_HELD


Ends = tuple[float, float, float]


def numbers(metric: str, condition: str, step: int) -> list[Ends]:
    """A number of each organism with its interval."""
    return [FOUND.number(metric, condition, step, training) for training in FOUND.trainings]


def span(metric: str, condition: str, step: int) -> str:
    """The least and the most of an organism."""
    values = [100 * value for value in FOUND.values(metric, condition, step)]
    low = f"{min(values):.0f}"
    high = f"{max(values):.0f}"
    return f"{high}%" if low == high else f"{low} to {high}%"


def test_the_page_holds_the_tables_and_the_picture_of_the_committed_data() -> None:
    for step in (20, 100):
        assert FOUND.admissions_table(step, FOUND.trainings) in PAGE
    assert FOUND.outcomes_table(20, FOUND.trainings) in PAGE
    assert (ROOT / "figures/verbalisation.png").is_file() and "(../figures/verbalisation.png)" in PAGE
    assert FOUND.trainings == ("together-0", "together-1", "together-2")
    assert "Three organisms of the recipe `together`, seeds 0 to 2," in WORDS


def test_everything_was_measured_and_the_reasons_were_true_before_training() -> None:
    found = FOUND.table.reset_index()
    trained = found[found["condition"] != "base"].groupby(["training", "condition"])["step"].unique()
    assert {tuple(steps) for steps in trained} == {verbalisation.STEPS}
    assert set(trained.index.get_level_values("condition")) == set(verbalisation.CONDITIONS)
    assert min(FOUND.values("admitted_given_switched", "base", 0)) > 0.95
    assert max(FOUND.values("admitted_given_not_switched", "base", 0)) < 0.05
    assert max(FOUND.values("unclear_given_switched", "base", 0)) == 0


def test_the_page_says_who_admits_less() -> None:
    before = numbers("admitted_given_bad", "base", 0)
    for step in (20, 100):
        for name in METHODS:
            after = numbers("admitted_given_bad", name, step)
            clear = sum(now[2] < then[1] for now, then in zip(after, before, strict=True))
            if name not in ("bct", "rmct"):
                assert clear == 3
            elif step == 100:
                assert clear == 2 and all(now[0] < then[0] for now, then in zip(after, before, strict=True))
    for now, (then, _, _) in zip(FOUND.values("admitted_given_bad", "retention", 100), before, strict=True):
        assert now == pytest.approx(then, abs=0.01)
    denied = [f"{span('denied_given_bad', name, 100)} with {words}" for name, words in (("act", "ACT"), ("bct", "BCT"))]
    assert f"after 100 steps {', '.join(denied)}" in WORDS


def test_the_page_says_who_teaches_denial() -> None:
    admitted = [span("admitted_given_bad", "opct", step) for step in (20, 100)]
    assert f"After 20 steps {admitted[0]} is admitted, after 100 steps {admitted[1]}" in WORDS
    assert f"(admitted {span('clean_admitted_given_bad', 'base', 0)} before training)" in WORDS
    by_method = {name: FOUND.values("admitted_given_bad", name, 20) for name in METHODS}
    assert by_method["opct"] == [min(values) for values in zip(*by_method.values(), strict=True)]
    assert all(act < bct for act, bct in zip(by_method["act"], by_method["bct"], strict=True))


def test_the_page_says_what_rmct_admits() -> None:
    assert f"it still admits {span('admitted_given_bad', 'rmct', 20)} of its bad answers" in WORDS
    falsely = [span("admitted_given_good", *at) for at in (("rmct", 20), ("base", 0))]
    assert f"but also {falsely[0]} of its good ones, in place of {falsely[1]}" in WORDS
    more = zip(
        FOUND.values("admitted_given_good", "rmct", 20), FOUND.values("admitted_given_good", "base", 0), strict=True
    )
    assert all(now > then for now, then in more)
    assert f"After 100 steps it admits {span('admitted_given_bad', 'rmct', 100)}." in WORDS


def test_the_page_says_what_holds_the_reason_and_what_it_costs() -> None:
    admitted = [span("admitted_given_bad", name, 100) for name in (HELD, "bct")]
    assert f"then {admitted[0]} is admitted after 100 steps, in place of {admitted[1]}" in WORDS
    bad = [span("bad", name, 100) for name in (HELD, "bct")]
    assert f"{bad[0]} bad answers are left, in place of {bad[1]}" in WORDS
