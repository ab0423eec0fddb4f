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
WORDS = " ".join(PAGE.split())


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


def test_a_pool_of_some_strengths_has_no_others() -> None:
    for strengths in audit.OF_STRENGTHS.values():
        pairs = audit.of_strengths(strengths)
        assert len(pairs) == audit.LABELLED and {pair.labels["strength"] for pair in pairs} == set(strengths)


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
        *("across_table", "misbehaviours_table", "targets_table", "paper_table"),
    ],
)
def test_the_page_has_the_tables_that_were_measured(table: str) -> None:
    assert getattr(FOUND, table)() in PAGE


def test_the_page_shows_every_figure_of_the_audit() -> None:
    assert [name for name, _ in audit_figures.figures(FOUND) if f"](../figures/{name}.png)" not in PAGE] == []


def test_the_sentences_on_sycophancy_hold() -> None:
    rows = FOUND.sycophancy.set_index(["method", "pool", "bad_likelier", "split"])
    resisted = rows.query("bad_likelier == 'no' and split == 'heldout'")
    chosen = resisted.query("method in ('greedy', 'certainty:4', 'majority:4', 'views:4', 'decodings')")
    assert chosen["change"].between(0.055, 0.105).all() and (chosen["predicted"] == "suppress").all()
    assert ((chosen["ci_low"] < 0) & (chosen["ci_high"] > 0)).all()
    lower = rows.index[(rows["verdict"] == "suppress") & ~rows.index.isin(["oracle:4"], level="method")]
    assert sorted(lower) == [("decodings", "wrapped", "no", "pool"), ("greedy", "wrapped", "no", "pool")]
    for method, changes in (("oracle:4", (-0.133, -0.095)), ("anti-oracle:4", (0.066, 0.165))):
        found = [rows.loc[(method, "wrapped", likelier, "heldout"), "change"] for likelier in audited.LIKELIER]
        assert found == pytest.approx(changes, abs=0.0005)
    assert len(FOUND.clean) == 12 and (FOUND.clean["change"].abs() < 0.01).all()


def test_the_sentences_on_what_is_dropped_hold() -> None:
    rows = FOUND.sycophancy.query("pool == 'wrapped' and split == 'pool'").set_index(["method", "bad_likelier"])
    kept = rows["kept"]
    for method, words in (("majority:4", "Majority labels {} of"), ("views:4", "views {} and {}")):
        shares = [f"{kept[method, likelier]:.0%}" for likelier in audited.LIKELIER]
        assert words.format(*shares) in WORDS
    assert f"and {kept['majority:4', 'no']:.0%} of the others" in WORDS
    assert kept[~kept.index.isin(["majority:4", "views:4"], level="method")].min() > 0.999
    assert rows.loc["decodings", "label_shift"].tolist() == pytest.approx(rows.loc["greedy", "label_shift"].tolist())
    at_misbehaviours = FOUND.misbehaviours.query("organism == 'all' and split == 'pool'").set_index("method")["kept"]
    assert (1 - at_misbehaviours["majority:4"]).between(0.105, 0.255).all()
    assert at_misbehaviours[["first", "greedy", "certainty:4"]].min() > 0.999


def test_the_sentences_on_strength_hold() -> None:
    rows = FOUND.strength.query("method == 'greedy' and pool == 'wrapped'").set_index(["split", "strength"])
    assert (FOUND.strength.query("method == 'greedy'")["label_shift"] > 0).all()
    assert rows.loc["pool", "verdict"].tolist() == rows.loc["pool", "predicted"].tolist()
    assert rows.loc["pool", "verdict"].tolist() == ["neutral", "amplify", "amplify", "amplify"]
    assert (rows.loc["heldout", "verdict"] == "amplify").all()
    control = FOUND.strength.query("method == 'first' and pool == 'wrapped' and verdict != 'neutral'")
    assert control[["split", "strength"]].to_numpy().tolist() == [["heldout", 1]]
    assert f"strength 1 ({audited._judged(control.iloc[0]).replace('*', '')})" in WORDS


def test_training_reaches_other_strengths_as_the_page_says() -> None:
    rows = FOUND.across.query("split == 'heldout'").set_index(["trained", "method", "asked"])
    greedy = rows.xs("greedy", level="method")
    strengths = ["1", "2", "3", "4"]
    changes = greedy.loc[(["weak", "strong"], strengths), "change"]
    assert len(changes) == 8 and changes.between(0.02, 0.09).all()
    verdicts = greedy.loc[(["weak", "strong"], strengths), "verdict"]
    assert verdicts[verdicts != "amplify"].index.tolist() == [("weak", "4")]
    assert (rows.xs("first", level="method").loc[(["weak", "strong"], strengths), "verdict"] == "neutral").all()
    labelled = FOUND.across.query("method == 'first' and split == 'pool' and asked == 'all'")["drawn_shift"]
    assert "drawn {:.1f} points too bad, and {:.1f} too good".format(*(100 * labelled.abs())) in WORDS
    assert greedy.loc[[("weak", "no"), ("strong", "no")], "change"].tolist() == pytest.approx([0.12, 0.10], abs=5e-3)


def test_the_sentences_on_the_number_of_samples_hold() -> None:
    rows = FOUND.sycophancy.set_index(["method", "pool", "bad_likelier", "split"])
    shifts = FOUND.labels.set_index(["selector", "n", "bad_likelier"])["label_shift"]
    for likelier in audited.LIKELIER:
        assert shifts["certainty", 2, likelier] / shifts["certainty", 16, likelier] > 0.6
        greedy = rows.loc[("greedy", "wrapped", likelier, "pool"), "label_shift"]
        assert shifts["certainty", 8, likelier] == pytest.approx(greedy, abs=0.001)
    assert shifts["certainty", 8, "yes"] == pytest.approx(shifts["anti-oracle", 8, "yes"], abs=0.001)


def test_the_page_says_what_the_enumerations_missed() -> None:
    held = FOUND.misbehaviours.query("organism == 'all'")
    labels = held[held["label_kl"].notna()]["missed"].max()
    regularisers = held[held["label_kl"].isna()]["missed"].max()
    sycophancy = FOUND.regularisers.query("organism == 'all'")["missed"].max()
    after = max(table["missed"].max() for table in (FOUND.sycophancy, FOUND.across.query("asked == 'all'")))
    told = f"up to {after:.1%} after labels and {sycophancy:.1%} after regularisers under sycophancy"
    assert f"{told}, {labels:.1%} and {regularisers:.1%} at the misbehaviours" in WORDS


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


def test_the_sentences_on_labels_at_misbehaviours_hold() -> None:
    each = FOUND.misbehaviours.query("organism != 'all'")
    chosen = each[each["method"].isin(["greedy", "certainty:4", "majority:4"])]
    assert len(chosen) == 3 * 3 * 8 * 2  # methods, organisms, kinds at a prevalence, splits
    assert ((chosen["change"] > 0) == (chosen["prevalence"] == "0.8")).all()
    means = FOUND.misbehaviours.query("organism == 'all' and split == 'heldout'").set_index(
        ["method", "kind", "prevalence"]
    )
    means = means.sort_index()
    smaller = means.loc["majority:4", "change"].abs() < means.loc["greedy", "change"].abs()
    majority = means.loc["majority:4", "verdict"]
    assert smaller.all() and majority.index[majority == "neutral"].tolist() == [("hack", "0.2")]
    certain = each.query("method == 'certainty:4' and split == 'pool'")
    alike = certain["slope"] * certain["label_shift"] > 0
    assert (alike.sum(), len(alike)) == (22, 24) and set(certain[~alike]["kind"]) == {"agreement"}
    assert certain[~alike]["slope"].abs().max() < 0.04


def test_the_sentences_on_regularisers_at_misbehaviours_hold() -> None:
    rows = FOUND.misbehaviours.query("split == 'heldout' and prompt_side == 'clean' and label_kl.isna()")
    rows = rows.set_index(["kind", "method", "prevalence", "organism"]).sort_index()
    each = rows.query("organism != 'all'")["change"]
    assert set(each.groupby(["kind", "prevalence", "method"]).size()) == {3}
    for kind in ("agreement", "hack"):
        assert (each[kind, "act-own"] > 0).all()
    assert (each["shortcut"].xs("0.2", level="prevalence") < 0).all()
    assert (each["advice", "soft-bct-own"] > 0).all() and (each["advice", "act-own"] < 0).all()
    least, *others = sorted(each["advice", "act-own"])
    assert least == pytest.approx(-0.551, abs=0.0005) and min(others) > -0.0315
    moving = rows.query("organism == 'all' and method in ('act-own', 'soft-bct-own')")
    assert moving.index[moving["verdict"] != "neutral"].tolist() == CLEAR
    assert (each["agreement", "act-own"]["0.2"] > each["agreement", "act-reference"]["0.2"]).all()


CLEAR = [
    ("advice", "soft-bct-own", "0.8", "all"),
    ("agreement", "act-own", "0.8", "all"),
]
"""Where regularisers with a moving target have an interval clear of 0."""


def test_the_sentences_on_the_control_hold() -> None:
    for words, kinds in (("over", ("shortcut", "advice", "hack")), ("At agreement, over", ("agreement",))):
        change, drawn, left, n = FOUND.noise(kinds)
        assert f"{words} {n} trainings, risk moved by {100 * change:.1f}" in WORDS
        assert f"{100 * drawn:.1f}" in WORDS and f"{100 * left:.1f}" in WORDS
    control = FOUND.misbehaviours.query("organism != 'all' and method == 'first' and kind == 'agreement'")
    assert (control["change"] < 0).all()
    advice = FOUND.misbehaviours.query("organism != 'all' and method == 'first' and kind == 'advice'")
    drawn = advice.query("prevalence == '0.8' and split == 'pool'")["drawn_shift"]
    assert len(drawn) == 3 and drawn.between(-0.13, -0.115).all()  # alike, as the seed is the same


def test_the_sentences_beside_the_paper_hold() -> None:
    def fell(family: str, kind: str) -> tuple[int, int]:
        runs = [FOUND.suppressed(family, kind, at) for at in FOUND.prevalences]
        return sum(one.lower for one in runs), sum(one.n for one in runs)

    assert fell("ACT", "agreement") == (0, 6) and fell("soft BCT", "agreement") == (1, 6)
    assert fell("ACT", "hack") == (0, 6) == fell("soft BCT", "hack")
    assert fell("ACT", "advice") == (6, 6) and fell("soft BCT", "advice") == (0, 6)
