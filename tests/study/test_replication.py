"""Several studies pooled: intervals over models, how many of them a claim holds on, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ctlens import plots, replicate
from ctlens.cli import app
from ctlens.core.errors import CtlensError
from ctlens.core.stats import student
from ctlens.study.claims.claim import Claim, claim_verdict, write_claims
from ctlens.study.replication import Replication, pooled_over_models

NAN = float("nan")
VALUES = {"together": (0.1, 0.2, 0.3), "afterwards": (0.5, 0.3, -0.2)}
REACH = 0.16
FLOOR = 0.05
T2 = 4.302652729911275  # Student's with two degrees of freedom


def claim(key: str, value: float, threat: str = "sycophancy", floor: float = FLOOR) -> Claim:
    low = value - REACH
    high = value + REACH
    numbers = ("statistic", "share", value, low - 0.5, high + 0.5, low, high, NAN, floor, 96, "prompts and seeds")
    verdict = claim_verdict(value, low, high, floor)
    return Claim(key, f"the {key} is there", threat, "equal steps", *numbers, verdict, "as measured")


def row(condition: str, seed: float, value: float, evaluated: str = "sycophancy", **other: object) -> dict:
    named = {"trained_threat": "" if condition == "base" else "sycophancy", "condition": condition, "seed": seed}
    numbers = {"value": value, "n_prompts": 96, "n_effective": 90.0, "ci_low": value - 0.1, "ci_high": value + 0.1}
    place = {"step": 100, "evaluated_threat": evaluated, "split": "heldout", "prompt_side": "wrapped"}
    return {**named, **place, "metric": "bad_rate", **numbers, **other}


def write(folder: Path, number: int, value: float, **settings: object) -> Path:
    """A finished study: the claim has this number, BCT takes half off frustration and adds the number to prefill."""
    folder.mkdir(parents=True)
    config = {"threats": ["sycophancy"], "methods": ["bct"], "training": {"steps": 100}, "weights": f"w{number}"}
    (folder / "config.json").write_text(json.dumps({**config, "model": str(folder), **settings}))
    write_claims([claim("gap", value), claim("transfer", 0.9, "all")], folder / "claims.csv")
    moved = {"metric": "bad_rate_vs_retention"}
    lines = [row("base", NAN, 0.8, step=0), row("bct", 0, 0.6, step=5)]  # the latter on the way, which is no result
    for seed in (0, 1):
        lines.append(row("bct", seed, 0.2 + 0.1 * seed + 0.01 * number))
        lines.append(row("bct", seed, -0.5 + 0.01 * number, "frustration", **moved))
        lines.append(row("bct", seed, value, "prefill", **moved))
    pd.DataFrame(lines).to_csv(folder / "results.csv", index=False)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [
        write(tmp_path / group / str(number), 3 * at + number, value)
        for at, (group, values) in enumerate(VALUES.items())
        for number, value in enumerate(values)
    ]


@pytest.fixture
def found(folders: list[Path]) -> Replication:
    return replicate(folders)


def test_models_and_prompts_vary_each_in_their_own_way() -> None:
    values = np.array([1.0, 2.0, 3.0])
    pooled = pooled_over_models(values, values - 3, values + 4)

    over_models = T2 / 3**0.5
    assert pooled.value == 2.0 and pooled.n == 3
    assert pooled.low == pytest.approx(2 - (over_models**2 + 3**2) ** 0.5)
    assert pooled.high == pytest.approx(2 + (over_models**2 + 4**2) ** 0.5)


def test_where_models_are_equal_the_interval_is_that_of_their_prompts() -> None:
    pooled = pooled_over_models(np.full(5, 0.3), np.full(5, 0.1), np.full(5, 0.4))

    assert (pooled.value, pooled.low, pooled.high) == pytest.approx((0.3, 0.1, 0.4))


def test_fewer_than_three_models_have_no_interval_and_one_without_a_number_does_not_count() -> None:
    two = pooled_over_models(np.array([1.0, 3.0, NAN]), np.array([0.0, 2.0, NAN]), np.array([2.0, 4.0, NAN]))

    assert (two.value, two.n) == (2.0, 2) and np.isnan([two.low, two.high]).all()
    nothing = pooled_over_models(np.full(3, NAN), np.full(3, NAN), np.full(3, NAN))
    assert nothing.n == 0 and np.isnan(nothing.value)


def test_a_model_with_too_few_topics_leaves_the_pooled_number_without_an_interval() -> None:
    pooled = pooled_over_models(np.arange(3.0), np.array([NAN, 0.0, 1.0]), np.array([NAN, 2.0, 3.0]))

    assert pooled.value == 1.0 and np.isnan([pooled.low, pooled.high]).all()


def test_a_higher_level_is_wider_in_both_parts() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0])
    pooled = pooled_over_models(values, values - 1, values + 1, level=0.99)

    low, _ = student(values, 0.99)
    assert pooled.low == pytest.approx(2.5 - np.hypot(2.5 - low, 2.5758293035489004 / 1.959963984540054))


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=8), st.floats(0, 2), st.randoms(use_true_random=False))
def test_the_order_of_models_says_nothing_and_the_interval_is_never_narrower_than_either_part(
    values: list[float], reach: float, order: object
) -> None:
    numbers = np.array(values)
    pooled = pooled_over_models(numbers, numbers - reach, numbers + reach)
    order.shuffle(values)  # type: ignore[attr-defined]
    again = pooled_over_models(np.array(values), np.array(values) - reach, np.array(values) + reach)

    assert (again.value, again.low, again.high) == pytest.approx((pooled.value, pooled.low, pooled.high), abs=1e-9)
    low, high = student(numbers)
    assert pooled.low <= min(low, pooled.value - reach) + 1e-9 and pooled.high >= max(high, pooled.value + reach) - 1e-9


def test_a_claim_is_pooled_over_all_models_and_by_group(found: Replication) -> None:
    table = found.to_dataframe().set_index("group")

    assert list(table.index) == ["all", "together", "afterwards"] and set(table["key"]) == {"gap"}  # no transfer
    assert table["n"].tolist() == [6, 3, 3]
    assert table[["holds", "fails", "open"]].to_numpy().tolist() == [[3, 1, 2], [1, 0, 2], [2, 1, 0]]
    for group, values in VALUES.items():
        reach = np.hypot(student(np.array(values))[1] - np.mean(values), REACH)
        line = table.loc[group]
        assert line["value"] == pytest.approx(np.mean(values)) and line["floor"] == pytest.approx(FLOOR)
        assert (line["ci_low"], line["ci_high"]) == pytest.approx((np.mean(values) - reach, np.mean(values) + reach))
        assert line["verdict"] == claim_verdict(line["value"], line["ci_low"], line["ci_high"], FLOOR)


def test_what_lies_above_each_models_own_floor_is_pooled(tmp_path: Path) -> None:
    folders = [write(tmp_path / "one" / str(number), number, 0.0) for number in range(3)]
    for folder, floor in zip(folders, (0.1, 0.2, 0.3), strict=True):
        write_claims([claim("gap", floor + 0.4, floor=floor)], folder / "claims.csv")

    (line,) = replicate(folders).to_dataframe().to_dict("records")
    assert (line["value"], line["floor"], line["group"]) == (pytest.approx(0.6), pytest.approx(0.2), "all")
    assert (line["ci_low"], line["ci_high"]) == pytest.approx((0.6 - REACH, 0.6 + REACH))  # alike above their floors


def test_rates_are_those_of_the_last_step_seeds_first(found: Replication) -> None:
    rates = found.rates().set_index(["condition", "group"])

    assert rates.loc[("base", "all"), "value"] == pytest.approx(0.8)
    assert rates.loc[("bct", "together"), "value"] == pytest.approx(0.25 + 0.01)
    assert rates.loc[("bct", "all"), "n"] == 6
    assert rates.loc[("bct", "all"), "value"] == pytest.approx(0.25 + 0.025)
    assert rates["ci_low"].between(0, 1).all() and rates["ci_high"].between(0, 1).all()
    assert rates.loc[("base", "all"), "ci_high"] == pytest.approx(0.9)
    with pytest.raises(CtlensError, match="no good_rate of wrapped prompts"):
        found.rates("good_rate")


def test_changes_of_other_threats_are_clear_after_bonferroni_alone(found: Replication) -> None:
    table = found.transfers().set_index("evaluated_threat")

    assert list(table.index) == ["frustration", "prefill"] and table["n"].tolist() == [6, 6]
    assert table["clear"].tolist() == [True, False]
    values = -0.5 + 0.01 * np.arange(6)
    reach = np.hypot(student(values, 0.975)[1] - values.mean(), 0.1 * 2.241402727604947 / 1.959963984540054)
    assert table.loc["frustration", "ci_high"] == pytest.approx(values.mean() + reach)


def test_studies_may_come_in_any_order(folders: list[Path], found: Replication) -> None:
    mixed = replicate(folders[::-1]).to_dataframe().sort_values("group", ignore_index=True)

    expected = found.to_dataframe().sort_values("group", ignore_index=True)
    pd.testing.assert_frame_equal(mixed, expected)


def drawn(figure: plots.Figure) -> list[Any]:
    return list(figure.data)


def test_the_figure_shows_every_model_beside_the_pooled_number(found: Replication) -> None:
    figure = found.figure("sycophancy", "equal steps")

    models, pooled, other, _ = drawn(figure)
    assert models.x == pytest.approx(np.array(VALUES["together"]) - FLOOR)
    assert other.x == pytest.approx(np.array(VALUES["afterwards"]) - FLOOR)
    assert pooled.x == pytest.approx([0.2 - FLOOR]) and pooled.name == "together"
    assert figure.layout.yaxis.ticktext == ("the gap is there",)
    with pytest.raises(CtlensError, match="no claim was measured on 'sycophancy' at 'matched effect'"):
        found.figure("sycophancy", "matched effect")


def test_one_group_alone_is_all(folders: list[Path]) -> None:
    found = replicate(folders[:3])

    assert found.to_dataframe()["group"].tolist() == ["all"] and repr(found) == "Replication(together: 3 studies)"
    assert [trace.name for trace in drawn(found.figure("sycophancy", "equal steps"))][1] == "all"


def test_what_is_no_replication_is_refused(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CtlensError, match="at least two studies"):
        replicate(folders[:1])
    again = write(tmp_path / "other" / "twice", 0, 0.4)
    with pytest.raises(CtlensError, match="studies of one model, which count once"):
        replicate([*folders, again])
    longer = write(tmp_path / "other" / "longer", 9, 0.4, training={"steps": 400})
    with pytest.raises(CtlensError, match=r"different studies \(training.steps is 100 there and 400 here\)"):
        replicate([*folders, longer])
    namesake = write(tmp_path / "elsewhere" / "together" / "0", 10, 0.4)
    with pytest.raises(CtlensError, match="one name in one group"):
        replicate([*folders, namesake])
    (folders[0] / "claims.csv").unlink()
    with pytest.raises(CtlensError, match="claims.csv does not exist"):
        replicate(folders)


def test_models_asked_about_nothing_else_have_no_transfers(found: Replication) -> None:
    own = found.results.query("evaluated_threat == 'sycophancy' and condition == 'bct'")
    alone = replace(found, results=own.assign(metric="bad_rate_vs_retention"))

    with pytest.raises(CtlensError, match="asked about no other threat"):
        alone.transfers()


def test_the_command_writes_claims_and_figures(folders: list[Path], tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["replicate", *map(str, folders), "--out", str(tmp_path / "out")])

    assert told.exit_code == 0, told.output
    assert "3 of 6" in told.output and "0.200" in told.output
    written = pd.read_csv(tmp_path / "out" / "claims.csv")
    assert written["group"].tolist() == ["all", "together", "afterwards"]
    assert (tmp_path / "out" / "figures" / "sycophancy-equal-steps.html").is_file()
    again = CliRunner().invoke(app, ["replicate", *map(str, folders), "--out", str(folders[0])])
    assert isinstance(again.exception, CtlensError) and "exists already" in str(
        again.exception
    )  # a study is not overwritten


def test_numbers_of_one_kind_go_with_those_of_another_by_rank(tmp_path: Path) -> None:
    folders = []
    for number in range(6):
        folders.append(write(tmp_path / "one" / str(number), number, 0.1))
        cues = [claim(f"cue_{method}", number + more) for method, more in (("act", 0.0), ("bct", 0.5))]
        later = [claim(f"relearnt_{method}", -((number + more) ** 3)) for method, more in (("act", 0.0), ("bct", 0.5))]
        alone = [claim("cue_attct", 9.0), claim("cue_act", float(number), "jailbreak")]  # without the other kind
        write_claims([*cues, *later, *alone], folders[-1] / "claims.csv")

    (line,) = replicate(folders).related("cue", "relearnt").to_dict("records")
    assert (line["threat"], line["n"], line["n_pairs"]) == ("sycophancy", 6, 12)
    assert line["value"] == pytest.approx(-1) and line["ci_low"] == line["ci_high"] == pytest.approx(-1)
    (itself,) = replicate(folders).related("cue", "cue").query("threat == 'jailbreak'").to_dict("records")
    assert itself["value"] == pytest.approx(1) and itself["n_pairs"] == 6
    with pytest.raises(CtlensError, match="no model has claims of both kinds, 'cue' and 'returns'"):
        replicate(folders).related("cue", "returns")
