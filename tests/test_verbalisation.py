"""The part of the audit's page on reasons: its table and sentences are those of the committed data."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ctlens.core.stats import student
from ctlens.organism.reasons import SAID
from ctlens.threats import get

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "figures"))
verbalisation = importlib.import_module("verbalisation")


def made(folder: Path) -> Any:
    """A table of two organisms in one condition: the bad answer's probability halves at different steps."""
    rows = [
        ("act" if step else "base", organism, step, metric, value)
        for organism, bad in (("one", (0.8, 0.6, 0.45, 0.1)), ("two", (0.6, 0.35, 0.1, 0.0)))
        for step, value_of_bad in zip((0, 5, 10, 20), bad, strict=True)
        for metric, value in (("bad", value_of_bad), ("admitted_given_bad", 1 - value_of_bad))
    ]
    table = pd.DataFrame(rows, columns=["condition", "organism", "step", "metric", "value"])
    table.assign(ci_low=table["value"], ci_high=table["value"]).to_csv(folder / verbalisation.TABLE, index=False)
    return verbalisation.Verbalised(folder)


def test_organisms_are_matched_each_at_a_step_of_its_own_and_pooled(tmp_path: Path) -> None:
    found = made(tmp_path)

    assert found.matched("act") == {"one": 10, "two": 5} and found.organisms == 2
    pooled = found.pooled("bad", "act", found.matched("act"))
    assert pooled[0] == pytest.approx(0.4)
    low, high = student(np.array([0.45, 0.35]))
    assert pooled[1:] == pytest.approx((max(low, 0), min(high, 1)))
    assert found.pooled("admitted_given_bad", "act", 10)[0] == pytest.approx((0.55 + 0.9) / 2)
    assert np.isnan(found.pooled("admitted_given_bad", "act", 7)).all()


def test_what_holds_the_reasons_is_the_wrapped_prompt_with_its_bad_answer() -> None:
    (pair,) = get("sycophancy").pairs(1)
    *turns, last = verbalisation.begun(pair).turns

    assert tuple(turns) == pair.wrapped.turns and (last.role, last.content) == ("assistant", pair.wrapped.bad)
    assert SAID not in last.content
