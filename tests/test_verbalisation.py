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
    """A table of two organisms in one condition; one of them has no share of admissions at the last step."""
    rows = [
        ("act" if step else "base", organism, step, metric, value)
        for organism, bad in (("one", (0.8, 0.6, 0.45)), ("two", (0.6, 0.35, 0.1)))
        for step, share in zip((0, 10, 20), bad, strict=True)
        for metric, value in (("bad", share), ("admitted_given_bad", 1 - share if share > 0.1 else np.nan))
    ]
    table = pd.DataFrame(rows, columns=["condition", "organism", "step", "metric", "value"])
    table.assign(ci_low=table["value"], ci_high=table["value"]).to_csv(folder / verbalisation.TABLE, index=False)
    return verbalisation.Verbalised(folder)


def test_numbers_are_pooled_over_the_organisms_that_have_them(tmp_path: Path) -> None:
    found = made(tmp_path)

    assert found.organisms == 2 and found.pooled("bad", "act", 0)[0] == pytest.approx(0.7)
    value, low, high = found.pooled("bad", "act", 10)
    ends = student(np.array([0.6, 0.35]))
    assert (value, low, high) == pytest.approx((0.475, max(ends[0], 0), min(ends[1], 1)))
    assert found.told("bad", "act", 10) == f"48% [{100 * low:.0f}–{100 * high:.0f}]"
    assert found.told("admitted_given_bad", "act", 20) == "55% [none] (1 of 2)"
    assert found.told("admitted_given_bad", "act", 30) == "too few"


def test_what_holds_the_reasons_is_the_wrapped_prompt_with_its_bad_answer() -> None:
    (pair,) = get("sycophancy").pairs(1)
    *turns, last = verbalisation.begun(pair).turns

    assert tuple(turns) == pair.wrapped.turns and (last.role, last.content) == ("assistant", pair.wrapped.bad)
    assert SAID not in last.content
