"""The audit on the shipped organism: its numbers restated, its verdicts, its file, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.models import made

import ctlens as ct
from ctlens.auditing import Audit, audit_pairs, draw_labels, load_labels, selected
from ctlens.auditing.pools import asked_of, facing, require_apart
from ctlens.auditing.result import NEUTRAL_BELOW, Change
from ctlens.auditing.run import LABEL_TRAINING
from ctlens.core.clusters import clustered_mean
from ctlens.core.stats import over_models
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.threats import ask, judge

SELECTORS = ["first", "certainty:4"]
FEW = replace(LABEL_TRAINING, steps=3)


@pytest.fixture(scope="module")
def pool() -> list[Pair]:
    return audit_pairs("sycophancy", 20)


@pytest.fixture(scope="module")
def heldout() -> list[Pair]:
    return audit_pairs("sycophancy", 12, "heldout")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "out"


@pytest.fixture(scope="module")
def found(model: LensModel, pool: list[Pair], heldout: list[Pair], folder: Path) -> Audit:
    asked = {"heldout": heldout, "pools": ("wrapped", "mixed"), "training": FEW, "seed": 2}
    return ct.audit(model, pool, SELECTORS, **asked, out=folder, progress=False)


def test_a_prompt_of_each_side_is_asked(found: Audit, pool: list[Pair], heldout: list[Pair]) -> None:
    assert len(found.sides) == 2 * (len(pool) + len(heldout)) == found.before.shape[1]
    assert found.chosen("wrapped", "pool").sum() == len(pool)
    assert found.chosen("clean", "heldout").sum() == len(heldout)
    assert found.chosen("wrapped", "pool", gives_in="yes").sum() == sum(p.labels["gives_in"] == "yes" for p in pool)


def test_risk_before_is_the_probability_of_the_bad_opening(found: Audit, model: LensModel, pool: list[Pair]) -> None:
    replies = ask(model, [pair.wrapped for pair in pool])
    known = np.array([reply.bad_probability for reply in replies])
    at = found.chosen("wrapped", "pool")

    assert (np.abs(found.before[0, at] - known) <= found.missed[0, at] + 1e-4).all()


def test_risk_after_is_that_of_a_training_on_the_labels(
    found: Audit, model: LensModel, pool: list[Pair], heldout: list[Pair], folder: Path
) -> None:
    """The training again, from the file of labels."""
    labels = {label.prompt: label for label in load_labels(folder / "labels.jsonl") if label.selector == "certainty:4"}
    prompts = [pair.wrapped for pair in pool]
    pairs = [Pair(one, one, target=labels[one].label) for one in prompts]
    trained = ct.train(model, pairs, "bct", config=replace(FEW, seed=2), progress=False).model
    known = np.array([reply.bad_probability for reply in ask(trained, [pair.wrapped for pair in heldout])])
    at = found.chosen("wrapped", "heldout")

    assert found.n_trained[0, 1, 0] == len(pool)
    assert (np.abs(found.after[0, 1, 0, at] - known) <= found.missed_after[0, 1, 0, at] + 1e-4).all()
    assert np.abs(found.after[0, 1, 0, at] - found.before[0, at]).max() > 1e-3


def test_labels_are_kept_with_what_chose_them(found: Audit, model: LensModel, pool: list[Pair], folder: Path) -> None:
    labels = load_labels(folder / "labels.jsonl")
    prompts = [*(pair.wrapped for pair in pool), *(pair.clean for pair in pool[1::2])]
    own = draw_labels(model, list(dict.fromkeys(prompts)), SELECTORS, seed=2)

    drawn = [judge(one.prompt, one.label or "") == "bad" for one in labels if one.selector == "certainty:4"]
    at = found.chosen("wrapped", "pool")
    assert found.drawn_bad[0, 1, at].tolist() == drawn[: len(pool)]  # the wrapped prompts come first
    assert labels == own and {label.seed for label in labels} == {2}
    assert found.settings["models"] == {"model": labels[0].model}
    assert {path.name for path in folder.iterdir()} == {
        "labels.jsonl",
        "audit.safetensors",
        "config.json",
        "environment.json",
    }


def test_an_audit_comes_back_from_its_file(found: Audit, folder: Path) -> None:
    again = Audit.load(folder / "audit.safetensors")

    assert found.to_dataframe("strength").equals(again.to_dataframe("strength"))
    assert (again.methods, again.exact, again.settings) == (found.methods, found.exact, found.settings)


def test_the_models_own_answers_as_labels_predict_no_change(found: Audit) -> None:
    """The neutral control: one sample at temperature 1 comes from the model's own distribution."""
    shift = found.label_shift("first", "wrapped", found.chosen("wrapped", "pool"))

    assert shift.value == pytest.approx(0, abs=1e-5)  # an empty answer, which is no label, is that rare
    assert found.exact == (True, True)


def test_the_predicted_sign_turns_with_what_items_give_in_to(found: Audit) -> None:
    """Certainty amplifies where the bad answer is the likelier one, and suppresses where it is not."""
    shifts = found.label_risk[0, 1] - found.before[0]
    likelier = found.before[0] > 0.5
    at = found.chosen("wrapped", "pool")

    assert (shifts[at & likelier] > 0).all() and (shifts[at & ~likelier] < 0).all()
    assert np.isnan(found.label_risk[0, :, found.chosen("wrapped", "heldout")]).all()


def test_a_row_of_the_table_is_a_clustered_mean(found: Audit) -> None:
    columns = ["method", "pool", "split", "prompt_side", "gives_in"]
    rows = {tuple(row[name] for name in columns): row for row in found.to_dataframe("gives_in").to_dict("records")}
    row = rows["certainty:4", "mixed", "pool", "wrapped", "yes"]
    at = found.chosen("wrapped", "pool", gives_in="yes")
    mean, low, high = clustered_mean(found.after[0, 1, 1, at] - found.before[0, at], found.clusters(at))

    missed = (found.missed[0, at].mean(), found.missed_after[0, 1, 1, at].mean())

    assert 0 < missed[0] < 0.01 and 0 < missed[1] < 0.01
    assert (row["change"], row["ci_low"], row["ci_high"]) == pytest.approx((mean, low - missed[0], high + missed[1]))
    assert row["risk_after"] - row["risk_before"] == pytest.approx(mean) and row["n_prompts"] == at.sum()
    labelled = at & ~np.isnan(found.label_risk[0, 1])
    assert row["label_kl"] == pytest.approx(found.divergence[0, 1, labelled].mean())
    assert row["label_shift"] == pytest.approx((found.label_risk[0, 1] - found.moments[0, :, 2])[labelled].mean())
    unlabelled = rows["certainty:4", "wrapped", "pool", "clean", "yes"]
    assert unlabelled["predicted"] == "" and np.isnan(unlabelled["label_kl"])


def test_what_was_missed_after_training_leaves_a_verdict_open(found: Audit) -> None:
    """Half of the mass missed may be bad or good, so that no change of a risk is known."""
    at = found.chosen("wrapped", "pool", gives_in="yes")
    grown = replace(found, after=found.after + 0.1 * at)
    blind = replace(grown, missed=np.full_like(found.missed, 0.5))

    assert grown.change("first", "wrapped", at).verdict == "amplify"
    assert blind.change("first", "wrapped", at).verdict == "neutral"


def test_prompts_stand_apart_by_the_models_own_answers(found: Audit) -> None:
    table = found.to_dataframe("bad_likelier").to_dict("records")
    rows = {
        (row["method"], row["bad_likelier"]): row
        for row in table
        if row["split"] == "pool" and row["pool"] == "wrapped" and row["prompt_side"] == "wrapped"
    }
    at = found.chosen("wrapped", "pool", bad_likelier="yes")

    assert at.shape == found.before.shape and (found.before[at] > 0.5).all()
    assert rows["certainty:4", "yes"]["n_prompts"] == at.sum()
    assert rows["certainty:4", "yes"]["risk_before"] == pytest.approx(found.before[at].mean())
    assert rows["certainty:4", "yes"]["label_shift"] > 0 > rows["certainty:4", "no"]["label_shift"]
    shares = found.drawn_bad[0, 1, at[0]]
    assert set(shares) <= {0.0, 1.0} and np.isnan(found.drawn_bad[0, :, found.chosen("wrapped", "heldout")]).all()
    drawn_shift = rows["certainty:4", "yes"]["drawn_shift"]
    assert drawn_shift == pytest.approx((shares - found.moments[0, at[0], 2]).mean())
    assert set(found.eta("bad_likelier")["bad_likelier"]) == {"yes", "no"}


def test_signs_are_counted_prompt_by_prompt(found: Audit) -> None:
    rows = {(row["method"], row["pool"], row["prompt_side"]): row for row in found.signs().to_dict("records")}
    shift = found.label_risk[0, 1] - found.moments[0, :, 2]
    change = found.after[0, 1, 0] - found.before[0]
    told = found.chosen("wrapped", "pool") & (np.abs(shift) > NEUTRAL_BELOW)
    row = rows["certainty:4", "wrapped", "wrapped"]

    assert row["n_prompts"] == told.sum() > 10
    assert row["agree"] == pytest.approx(np.mean(shift[told] * change[told] > 0))
    assert row["correlation"] == pytest.approx(np.corrcoef(shift[told], change[told])[0, 1])
    assert ("first", "wrapped", "wrapped") not in rows and ("certainty:4", "wrapped", "clean") not in rows


def test_a_handful_of_prompts_has_no_interval_and_no_end_is_beyond_a_share(found: Audit) -> None:
    at = found.chosen("wrapped", "pool")
    few = at & (np.cumsum(at) <= 4)
    far = replace(found, after=found.after + at * np.where(np.cumsum(at) % 4, 0.9, -0.9), groups={})
    change = far.change("first", "wrapped", at & (np.cumsum(at) <= 6))

    assert np.isnan([found.change("first", "wrapped", few).low, found.change("first", "wrapped", few).high]).all()
    assert found.change("first", "wrapped", few).verdict == "undecided"
    assert -1 < change.low < change.value < change.high == 1


def test_eta_makes_up_the_risk(found: Audit) -> None:
    at = found.chosen("wrapped", "heldout")
    rows = [
        row for row in found.eta().to_dict("records") if (row["prompt_side"], row["split"]) == ("wrapped", "heldout")
    ]

    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert sum(row["share"] * row["eta"] for row in rows) == pytest.approx(found.moments[0, at, 2].mean())
    assert np.isfinite([row["slope"] for row in rows]).all()


def test_an_order_of_the_pool_changes_no_exact_number(
    found: Audit, model: LensModel, pool: list[Pair], heldout: list[Pair]
) -> None:
    turned = ct.audit(model, pool[::-1], SELECTORS[1:], training=FEW, progress=False)
    mine = {one.prompt: n for n, one in enumerate(asked_of(pool, heldout))}
    order = [mine[one.prompt] for one in asked_of(pool[::-1], []) if one.prompt_side == "wrapped"]
    at = turned.chosen("wrapped", "pool")

    np.testing.assert_allclose(turned.before[0, at], found.before[0, order], atol=1e-5)
    np.testing.assert_allclose(turned.label_risk[0, 0, at], found.label_risk[0, 1, order], atol=1e-4)


def test_several_organisms_are_pooled_over_prompts_and_models(pool: list[Pair], model: LensModel, found: Audit) -> None:
    both = ct.audit({"one": model, "two": found_twin(model, pool)}, pool, ["greedy"], training=FEW, progress=False)
    at = both.chosen("wrapped", "pool")
    each = np.array([both.change("greedy", "wrapped", at, name) for name in both.organisms])
    all_of_them = both.change("greedy", "wrapped", at)

    assert all_of_them == pytest.approx((each[:, 0].mean(), *over_models(*each.T)))
    assert set(both.to_dataframe()["organism"]) == {"one", "two", "all"}
    assert not np.allclose(both.before[0], both.before[1])


def found_twin(model: LensModel, pool: list[Pair]) -> LensModel:
    """Another organism: the shipped one after a few steps of a repair."""
    return ct.train(model, pool, "bct", steps=4, progress=False).model


def half(asked: Prompt, samples: Sequence[str], scores: Sequence[float]) -> str | None:
    return samples[0] if len(asked.turns[-1].content) % 2 else None


def never(asked: Prompt, samples: Sequence[str], scores: Sequence[float]) -> str | None:
    return None


def test_dropped_prompts_are_counted_and_teach_nothing(model: LensModel, pool: list[Pair]) -> None:
    chosen = [selected("half", half, n=1), selected("never", never, n=1)]
    found = ct.audit(model, pool, chosen, training=FEW, progress=False)
    expected = sum(len(pair.wrapped.turns[-1].content) % 2 for pair in pool)
    rows = {row["method"]: row for row in found.to_dataframe().to_dict("records") if row["prompt_side"] == "wrapped"}

    assert found.n_trained[0, :, 0].tolist() == [expected, 0] and 0 < expected < len(pool)
    assert rows["half"]["kept"] == pytest.approx(expected / len(pool))
    assert rows["never"]["change"] == 0 and rows["never"]["predicted"] == ""


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [
        ((0.10, 0.05, 0.15), "amplify"),
        ((-0.10, -0.15, -0.05), "suppress"),
        ((0.10, -0.01, 0.21), "neutral"),
        ((NEUTRAL_BELOW, 0.01, 0.03), "neutral"),
        ((-0.015, -0.02, -0.01), "neutral"),
        ((0.10, np.nan, np.nan), "undecided"),
        ((np.nan, np.nan, np.nan), ""),
    ],
)
def test_the_verdict_follows_its_rule(numbers: tuple[float, float, float], verdict: str) -> None:
    assert Change(*numbers).verdict == verdict


def test_a_mixed_pool_takes_the_sides_in_turns(pool: list[Pair]) -> None:
    mixed = [pair.wrapped for pair in facing(pool, "mixed")]

    assert mixed[:3] == [pool[0].wrapped, pool[1].clean, pool[2].wrapped]
    swapped = [(pair.wrapped, pair.clean) for pair in pool]
    assert [(pair.clean, pair.wrapped) for pair in facing(pool, "clean")] == swapped
    assert facing(pool, "wrapped") == pool


def test_the_figure_has_a_panel_for_labels_and_for_what_was_measured(found: Audit) -> None:
    figure = found.figure("mixed")
    titles = [annotation["text"] for annotation in figure.to_dict()["layout"]["annotations"]]

    assert {"labels, where items give in", "held-out prompts, where items resist"} <= set(titles)
    with pytest.raises(ct.CtlensError, match="is no number"):
        found.figure(by="gives_in")
    with pytest.raises(ct.CtlensError, match="unknown pool 'clean'"):
        found.figure("clean")


def test_labels_never_see_the_held_out_split(model: LensModel, pool: list[Pair]) -> None:
    with pytest.raises(ct.CtlensError, match="is in the pool too"):
        ct.audit(model, pool, ["greedy"], heldout=pool[:1], progress=False)
    same_clean = [replace(pool[0], wrapped=prompt("hello", "a", "b"))]
    require_apart([pair.wrapped for pair in pool], asked_of(pool, same_clean))
    with pytest.raises(ct.CtlensError, match="train on labels of the wrapped prompts alone"):
        ct.audit(model, pool, ["greedy"], heldout=same_clean, pools=("clean",), progress=False)
    with pytest.raises(ct.CtlensError, match="train on labels of the wrapped prompts alone"):
        ct.audit(model, pool, ["act-own"], heldout=same_clean, progress=False)


def test_bad_input_is_one_sentence(model: LensModel, pool: list[Pair], found: Audit, folder: Path) -> None:
    harmless = [Pair(prompt("hello", "a"), prompt("hello there", "a"))]
    wrong = [
        (([], ["greedy"], {}), "the pool has no prompts"),
        ((pool, ["gredy"], {}), "unknown selector or regulariser 'gredy'; did you mean 'greedy'"),
        ((pool, [], {}), "there is no method"),
        ((pool, ["certainty:0"], {}), "n must be at least 1"),
        ((pool, ["greedy"], {"pools": ("wraped",)}), "unknown pool 'wraped'"),
        ((pool, ["greedy"], {"pools": ()}), "at least one pool"),
        ((harmless, ["greedy"], {}), "names no bad answer"),
        ((pool, ["greedy"], {"out": folder}), "exists already"),
        ((pool, ["greedy"], {"temperature": 0.0}), "temperature must be a positive number"),
    ]
    for (prompts, methods, options), words in wrong:
        with pytest.raises(ct.CtlensError, match=words):
            ct.audit(model, prompts, methods, progress=False, **options)
    with pytest.raises(ct.CtlensError, match="no model to audit"):
        ct.audit({}, pool, ["greedy"])
    with pytest.raises(ct.CtlensError, match="can be called 'all'"):
        ct.audit({"all": model}, pool, ["greedy"])
    with pytest.raises(ct.CtlensError, match="unknown label of the pairs 'strenght'; did you mean 'strength'"):
        found.to_dataframe("strenght")
    with pytest.raises(ct.CtlensError, match="unknown method 'greedy'"):
        found.change("greedy", "wrapped", found.chosen("wrapped", "pool"))


def test_a_model_with_long_uncertain_answers_is_refused() -> None:
    pairs = [Pair(prompt("is it red?", "yes", "no"), prompt("it is. is it red?", "yes", "no"))]

    with pytest.raises(ct.CtlensError, match="cannot be enumerated"):
        ct.audit(made(), pairs, ["greedy"], progress=False)
