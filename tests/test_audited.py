"""The page on the audit: its tables and sentences are those of the committed data, and its estimates are as stated."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import ctlens as ct
from ctlens.auditing import audit_pairs
from ctlens.auditing.answers import AnswerSet, Sample
from ctlens.auditing.run import LABEL_TRAINING
from ctlens.core.stats import student

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "figures"))
audit = importlib.import_module("audit")
audited = importlib.import_module("audited")
audit_figures = importlib.import_module("audit_figures")
FOUND = audited.Audited(audited.DATA)
PAGE = (ROOT / "docs/audit.md").read_text()


def test_the_kl_without_enumeration_is_that_of_counted_shares() -> None:
    answers = AnswerSet(
        ("red", "blue"), np.array([0.5, 0.25]), np.log([0.5, 0.25]), np.zeros(2), np.zeros(2, dtype=bool)
    )
    labels = [Sample(text, -9.0, -9.0) for text in ("red", "red", "blue")]
    unknown = [Sample("green", np.log(0.1), -1.0)]

    by_hand = 2 / 3 * np.log(2 / 3 / 0.5) + 1 / 3 * np.log(1 / 3 / 0.25)
    assert audit._plug_in(labels, answers) == pytest.approx(by_hand)
    assert audit._plug_in(unknown, answers) == pytest.approx(-np.log(0.1))


def test_audits_of_single_organisms_put_together_are_that_of_all() -> None:
    pool = audit_pairs("sycophancy", 6)
    shipped = ct.load_organism()
    models = {"shipped": shipped, "other": ct.train(shipped, pool, "bct", steps=3, progress=False).model}
    asked = {
        "pool": pool,
        "methods": ["greedy", "act-own"],
        "heldout": audit_pairs("sycophancy", 5, "heldout"),
        "training": replace(LABEL_TRAINING, steps=1),
        "progress": False,
    }
    both = ct.audit(models, **asked)
    joined = audit.joined([ct.audit({name: model}, **asked) for name, model in models.items()])

    assert (joined.organisms, joined.exact, joined.settings) == (both.organisms, both.exact, both.settings)
    for name in audit.OF_ORGANISMS:
        np.testing.assert_allclose(getattr(joined, name), getattr(both, name), atol=1e-6)
    pd.testing.assert_frame_equal(joined.to_dataframe(), both.to_dataframe(), atol=1e-5)


def test_an_audit_that_lies_in_the_folder_is_taken_up(tmp_path: Path) -> None:
    units = audit.Units(tmp_path, {"shipped": ct.load_organism()})
    pool = audit_pairs("sycophancy", 4)
    found = ct.audit(units.models, pool, ["first"], training=replace(LABEL_TRAINING, steps=1), progress=False)
    times = []

    def measured() -> ct.auditing.Audit:
        times.append(1)
        return found

    for method, part in (("first", "weak"), ("first", "weak"), ("greedy", "weak"), ("first", "given in to")):
        kept = units._kept("shipped", part, [method], measured)
        np.testing.assert_array_equal(kept.after, found.after)
    assert len(times) == 3 == len(list(tmp_path.iterdir()))  # once per part and methods


def test_groups_without_an_interval_get_one_over_organisms() -> None:
    changes = [0.1, 0.3, 0.5]
    rows = [
        {"organism": name, "method": method, "change": change, "ci_low": low, "ci_high": low, "missed": 0.01}
        | {"verdict": "", "label_shift": change, "label_low": np.nan, "label_high": np.nan, "predicted": ""}
        for method, low in (("greedy", np.nan), ("first", 0.2))
        for name, change in zip(("one", "two", "three", "all"), [*changes, 0.3], strict=True)
    ]
    found = audit.over_organisms(pd.DataFrame(rows), ["method"]).set_index(["method", "organism"])
    low, high = student(np.array(changes))
    columns = ["ci_low", "ci_high", "label_low", "label_high"]

    assert found.loc[("greedy", "all"), columns].tolist() == pytest.approx([low - 0.01, high + 0.01, low, high])
    assert found.loc[("first", "all"), ["ci_low", "ci_high"]].tolist() == [0.2, 0.2]  # it had one
    assert found.loc[("greedy", "all"), "predicted"] == "neutral" and low < 0  # 0.3 with 0 in its interval
    assert found.loc[("greedy", "one"), columns].isna().all()


def test_a_narrow_pool_has_pairs_of_its_label_alone() -> None:
    for label, values in audit.NARROW.values():
        pairs = audit.narrowed(label, values)
        assert len(pairs) == audit.LABELLED and {pair.labels[label] for pair in pairs} <= set(values)


def test_a_family_suppresses_as_often_as_its_trainings_end_lower() -> None:
    changes = {"certainty:4": (-0.1, 0.2), "greedy": (0.3, -0.2)}
    rows = [
        {"kind": "hack", "prevalence": "0.2", "organism": organism, "method": method, "split": "heldout"}
        | {"prompt_side": "clean", "change": change}
        for method, both in changes.items()
        for organism, change in zip(("one", "all"), both, strict=True)
    ]
    found = audited.Audited(audited.DATA)
    found.misbehaviours = pd.DataFrame(rows)

    assert found.suppressed("label methods", "hack", "0.2") == (1, 1)  # the row of all organisms is no training
    assert found.suppressed("greedy self-training", "hack", "0.2") == (0, 1)
    assert np.isnan(found.suppressed("ACT", "hack", "0.2").share)


def test_noise_is_what_chance_in_the_labels_does_to_the_control() -> None:
    rows = {"organism": ["one", "two", "all"], "method": "first", "split": "pool", "kind": "hack"}
    found = audited.Audited(audited.DATA)
    found.misbehaviours = pd.DataFrame({**rows, "change": [0.3, -0.4, 9], "drawn_shift": [0.3, 0.0, 9]})

    assert found.noise(["hack"]) == pytest.approx((np.sqrt(0.125), np.sqrt(0.045), np.sqrt(0.08), 2))


@pytest.mark.parametrize(
    "table",
    [
        *("sycophancy_table", "signs_table", "strength_table", "labels_table", "draws_table", "regularisers_table"),
        *("misbehaviours_table", "targets_table", "paper_table"),
    ],
)
def test_the_page_has_the_tables_that_were_measured(table: str) -> None:
    assert getattr(FOUND, table)() in PAGE


def test_the_page_shows_every_figure_of_the_audit() -> None:
    assert [name for name, _ in audit_figures.figures(FOUND) if f"](../figures/{name}.png)" not in PAGE] == []


def test_the_sentences_on_sycophancy_hold() -> None:
    rows = FOUND.sycophancy.set_index(["method", "pool", "bad_likelier", "split"])
    resisted = rows.query("bad_likelier == 'no' and split == 'heldout' and method != 'first'")
    assert resisted["change"].between(0.055, 0.105).all() and (resisted["predicted"] == "suppress").all()
    assert ((resisted["ci_low"] < 0) & (resisted["ci_high"] > 0)).all()
    assert rows.index[rows["verdict"] == "suppress"].tolist() == [("greedy", "wrapped", "no", "pool")]
    assert len(FOUND.clean) == 12 and (FOUND.clean["change"].abs() < 0.01).all()
    assert (FOUND.strength.query("method == 'greedy'")["label_shift"] > 0).all()
    shifts = FOUND.labels.set_index(["selector", "n", "bad_likelier"])["label_shift"]
    for likelier in audited.LIKELIER:
        assert shifts["certainty", 2, likelier] / shifts["certainty", 16, likelier] > 0.6
        greedy = rows.loc[("greedy", "wrapped", likelier, "pool"), "label_shift"]
        assert shifts["certainty", 8, likelier] == pytest.approx(greedy, abs=0.001)
    assert shifts["certainty", 8, "yes"] == pytest.approx(shifts["anti-oracle", 8, "yes"], abs=0.001)


def test_the_slope_of_eta_has_the_sign_of_the_labels_shift_in_every_organism() -> None:
    slopes = FOUND.eta.groupby(["bad_likelier", "organism"])["slope"].first()

    assert len(slopes) == 10 and (slopes["yes"] > 0.5).all() and (slopes["no"] < 0).all()


def test_estimates_come_near_the_exact_numbers_as_samples_grow() -> None:
    errors = FOUND.draws.set_index(["quantity", "n"])
    of_prompts = errors.loc["risk of a prompt"]

    assert (of_prompts["error"] / of_prompts["expected"]).between(0.9, 1.15).all()
    for quantity in errors.index.levels[0]:
        assert errors.loc[(quantity, 64), "error"] < 0.5 * errors.loc[(quantity, 4), "error"]


def test_the_sentences_on_the_direction_of_regularisers_hold() -> None:
    rows = FOUND.regularisers.query("organism == 'all' and split == 'heldout'").set_index(
        ["pool", "method", "prompt_side"]
    )
    repaired = rows.query("pool == 'wrapped' and prompt_side == 'wrapped'")
    entrenched = rows.query("pool == 'clean' and prompt_side == 'clean'").droplevel(["pool", "prompt_side"])

    assert repaired["change"].between(-0.14, -0.12).all() and (repaired["verdict"] == "suppress").all()
    assert (entrenched["change"] < 0.0105).all() and (rows.query("pool == 'clean'")["verdict"] == "neutral").all()
    for name in audited.TARGETS:
        more = entrenched.loc[f"{name}-own", "change"] - entrenched.loc[f"{name}-reference", "change"]
        assert 0 < more < 0.01


def test_the_sentences_on_misbehaviours_hold() -> None:
    each = FOUND.misbehaviours.query("organism != 'all'")
    greedy = each[each["method"] == "greedy"]
    assert ((greedy["change"] > 0) == (greedy["prevalence"] == "0.8")).all()
    heldout = each.query("split == 'heldout' and prompt_side == 'clean'").set_index(
        ["kind", "prevalence", "method", "organism"]
    )["change"]
    assert (heldout.loc["agreement", :, "act-own"] > 0).all()
    assert (heldout.loc["shortcut", "0.2", ["soft-bct-own", "act-own"]] < 0).all()
    moving = heldout.loc["agreement", "0.2", "act-own"]
    frozen = heldout.loc["agreement", "0.2", "act-reference"]
    assert len(moving) == 3 and (moving > frozen).all()


def test_the_sentences_on_the_control_and_the_slope_hold() -> None:
    others = FOUND.noise(["shortcut", "advice", "hack"])
    agreement = FOUND.noise(["agreement"])
    assert others == pytest.approx((0.053, 0.070, 0.022, 12), abs=0.0005)
    assert agreement == pytest.approx((0.110, 0.047, 0.069, 6), abs=0.0005)
    certain = FOUND.misbehaviours.query("organism != 'all' and method == 'certainty:4' and split == 'pool'")
    alike = certain["slope"] * certain["label_shift"] > 0
    assert (alike.sum(), len(alike)) == (16, 18) and (certain[~alike]["kind"] == "agreement").all()
    assert FOUND.misbehaviours["missed"].max() < 0.0575
