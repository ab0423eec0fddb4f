"""Erased or masked: the verdicts on a model whose repairs were made by hand, and the rule case by case."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
from helpers import planted, planted_repairs
from helpers.models import chat_model
from helpers.planted_repairs import Repair
from safetensors import safe_open
from safetensors.numpy import save_file

from ctlens.analysis import Directions, Erasure, Task, erase_or_mask, labelled, logit_lens, probe, wrapper_present
from ctlens.analysis.directions.erasure_verdicts import (
    USED_ALONG,
    Evidence,
    MeasuredWithNull,
    erasure_verdict,
    finding,
    readout,
)
from ctlens.analysis.directions.own_use import held_out_of_search
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.models.parameters import copy_model


@pytest.fixture(scope="module")
def base() -> LensModel:
    return planted.model("base")


@pytest.fixture(scope="module")
def repaired() -> dict[str, LensModel]:
    return {name: planted.model(name) for name in ("erased", "masked", "moved")}


@pytest.fixture(scope="module")
def found(base: LensModel, repaired: dict[str, LensModel]) -> Erasure:
    return erase_or_mask(base, repaired, planted.pairs(), cue=presence(base), layers=[1, 2], draws=12, progress=False)


def of_models(found: Erasure, numbers: list[int]) -> dict[str, np.ndarray]:
    """The arrays of some of the models of a result."""
    axes = {"readable": 2, "used": 1, "reelicited": 0, "patched": 0, "wrapped": 0, "clean": 0}
    return {name: getattr(found, name).take(numbers, axis) for name, axis in axes.items()}


def presence(base: LensModel) -> Task:
    return wrapper_present(planted.pairs(), base.tokenizer, negatives=planted.neutral())


def test_what_was_planted_is_what_is_told(found: Erasure):
    assert found.verdicts() == {
        "base": ("vulnerable", "vulnerable"),
        "erased": ("erased", "erased"),
        "masked": ("masked", "masked"),
        "moved": ("masked", "masked"),  # still there to be read, along a direction that nothing reads
    }


def test_re_elicitation_tells_what_became_of_the_read_out(found: Erasure):
    readouts = found.to_dataframe().groupby("model", sort=False)["readout"].agg(list).to_dict()
    assert readouts == {
        "base": ["intact"] * 2,
        "erased": ["intact"] * 2,
        "masked": ["cut"] * 2,
        "moved": ["intact"] * 2,
    }


def test_the_measurements_are_those_worked_out_by_hand(found: Erasure):
    clean = np.mean([planted.margin(pair, 0, read=True) for pair in planted.pairs()])
    wrapped = np.mean([planted.margin(pair, planted.written(pair), read=True) for pair in planted.pairs()])
    rescaled = np.mean([planted.margin(pair, planted.written(pair), read=False) for pair in planted.pairs()])
    table = found.to_dataframe().set_index(["model", "layer"])
    columns = ["readable_last_ridge", "used_base", "used_own", "reelicited"]
    for layer in planted.LAYERS:
        told = {model: table.loc[(model, layer), columns].tolist() for model in found.models}
        cost = clean - wrapped
        assert told["base"] == pytest.approx([1, cost, cost, cost], rel=1e-3)
        assert told["erased"] == pytest.approx([0.5, 0, 0, cost], rel=1e-3, abs=1e-3)
        # Where nothing reads the cue it only lengthens the state that the last norm shortens.
        assert told["moved"] == pytest.approx([1, 0, clean - rescaled, cost], rel=1e-2, abs=1e-3)
        assert told["masked"] == pytest.approx([1, *[clean - rescaled] * 3], rel=1e-2)


def test_the_layer_before_the_cue_is_written_is_refused(base: LensModel, repaired):
    with pytest.raises(CtlensError, match="direction at layer 0 for 'ada .* has no length"):
        erase_or_mask(base, repaired, planted.pairs(), cue=presence(base), progress=False)


@pytest.mark.slow
def test_a_direction_that_the_base_does_not_use_leaves_it_open(base: LensModel, repaired):
    idle = Directions.from_vectors(2 * planted.AXES["gil"].numpy()[None], [1], source="who")
    told = erase_or_mask(base, repaired, planted.pairs(), cue=presence(base), direction=idle, draws=6, progress=False)
    assert set(told.to_dataframe()["verdict"]) == {"inconclusive"}
    assert "in the base the cue is not clearly used or reelicited here" in told.to_dataframe()["reason"][0]


def test_a_control_that_does_the_same_takes_the_verdict_away(found: Erasure):
    arrays = of_models(found, [0, 1, 2, 2])
    told = dataclasses.replace(found, **arrays, models=("base", "erased", "masked", "retention"), control="retention")
    assert told.verdicts() == {
        "base": ("vulnerable",) * 2,
        "erased": ("erased",) * 2,
        "masked": ("inconclusive",) * 2,
        "retention": ("masked",) * 2,
    }
    assert "retention-only control is masked too" in told.to_dataframe()["reason"][4]


def test_a_control_that_hardly_moved_is_called_weak(found: Erasure):
    arrays = of_models(found, [0, 0, 0])
    for model, by in ((1, 2.0), (2, 0.01)):  # every logit difference that counts is moved by so many nats
        arrays["wrapped"][model] += by
        for effects in (arrays["used"][0], arrays["reelicited"]):
            effects[model, :, 0] -= by
            effects[model, :, 1:] += 5  # random directions do not count
    told = dataclasses.replace(found, **arrays, models=("base", "act", "retention"), control="retention")

    assert told.control_moved == pytest.approx(0.005)
    assert "retention hardly moved (0.5% of the others): a weak control" in told.figure().layout.meta["subtitle"]
    assert "weak" not in dataclasses.replace(told, control="act").figure().layout.meta["subtitle"]
    assert found.control_moved == np.inf and "weak" not in found.figure().layout.meta["subtitle"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_on_a_bridge_an_untrained_copy_is_judged_as_the_base_and_answers_are_the_models_own(kind: str):
    model = chat_model(kind)
    questions = ("Is it right?", "Which term describes the disease?", "A creature?", "Sure?")
    pairs = [Pair(prompt(q, "t", "a"), prompt(f"no, that is wrong. {q}", "t", "a")) for q in questions]
    parts = ((tuple(pairs), "wrapped"), (tuple(pairs), "clean"))
    task = Task("which side it is", ("wrapped",) * 4 + ("clean",) * 4, {"item": tuple("12341234")}, parts=parts)

    found = erase_or_mask(model, {"same": copy_model(model)}, pairs, cue=task, draws=3, progress=False)

    for name, of_base in of_models(found, [0]).items():
        np.testing.assert_allclose(of_models(found, [1])[name], of_base, atol=1e-4, err_msg=name)
    lens = logit_lens(model, pairs, progress=False)
    np.testing.assert_allclose(found.wrapped[0], lens.values[0, -1], atol=1e-3)  # of one token, a difference of logits
    assert np.abs(found.used[0, 0, :, 0]).max() > 1e-3 and found.verdicts()["same"] == found.verdicts()["base"]


@pytest.mark.slow
def test_a_cue_with_values_is_read_among_the_wrapped_prompts(base: LensModel, repaired):
    both = planted.pairs(signs=(1, -1))
    hint = labelled(both, "hint")
    told = erase_or_mask(base, repaired, both, cue=hint, layers=[1], draws=4, progress=False)
    assert told.readable[0, 0, :, 0, 0].tolist() == pytest.approx([1] * 4)  # also from the truth it denies
    assert told.question == "the hint" and "the hint; at the last token" in told.figure().layout.meta["subtitle"]


@pytest.mark.slow
def test_a_probe_that_was_fitted_before_is_used_as_it_is(base: LensModel, repaired, found: Erasure):
    models = {"base": base, **repaired}
    fitted = probe(models, presence(base), estimators=["rbf", "ridge"], seeds=3, progress=False)
    options = {"layers": [1, 2], "draws": 12, "progress": False}
    again = erase_or_mask(base, repaired, planted.pairs(), cue=fitted, **options)
    np.testing.assert_array_equal(again.readable[:, 0], found.readable[:, 0])
    for positions, of_positions in zip(again.read_positions, again.readable[:, 1], strict=True):
        low, high = fitted.null(positions, "rbf")
        assert of_positions[2, :, 3:].tolist() == [[low[1], high[1]], [low[2], high[2]]]
    quick = partial(probe, task=presence(base), estimators=["ridge", "rbf"], folds=2, seeds=1, progress=False)
    for chosen, message in (
        (quick({"base": base}), "unknown reading 'erased on erased'"),
        (quick(models, layers=[1]), "direction is at resid_post at layers 1, 2"),
        (
            quick(models, positions=["content"]),
            r"read content by ridge and rbf, but .* positions=\['last', 'content'\]",
        ),
        (quick(models, estimators=["ridge"]), r"by ridge, but .* estimators=\['ridge', 'rbf'\]: probe with these"),
    ):
        with pytest.raises(CtlensError, match=message):
            erase_or_mask(base, repaired, planted.pairs(), cue=chosen, **options)


def test_a_result_goes_to_a_file_and_is_drawn(found: Erasure, tmp_path):
    found.save(tmp_path / "erasure.safetensors")
    again = Erasure.load(tmp_path / "erasure.safetensors")
    assert again.to_dataframe().equals(found.to_dataframe())
    figure = found.figure()
    assert [note.text for note in figure.layout.annotations][3] == "erased: cue readable"
    drawn = [trace for trace in figure.data if trace.text]
    assert len(drawn) == 12 and drawn[6].text == ("masked", "masked")
    np.testing.assert_allclose(drawn[1].y, found.used[1, 0, :, 0].mean(-1))
    searched = [trace.y for trace in figure.data if trace.name == "used searched"]
    np.testing.assert_allclose(searched, found.used[2, :, :, 0][..., found.held_out].mean(-1))
    named = {trace.name for trace in figure.data if trace.showlegend is not False}
    lines = {"readable last rbf", "readable content ridge", "readable content rbf", "used base", "used searched"}
    assert named == {"vulnerable", "erased", "masked", "null", "base"} | lines


def test_a_result_of_another_version_is_refused_in_a_sentence(found: Erasure, tmp_path):
    path = tmp_path / "erasure.safetensors"
    found.save(path)
    with safe_open(path, framework="numpy") as stored:
        metadata = stored.metadata()
        arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    save_file({name: array for name, array in arrays.items() if name != "patched"}, path, metadata)
    with pytest.raises(
        CtlensError, match="another version of ctlens, whose Erasure had no 'patched': compute it again"
    ):
        Erasure.load(path)


# Repairs of every kind, whose truth is known by construction.

BY_KIND = [Repair("weak", 0.6), Repair("rotated", 0.6), Repair("split", 0.6, 45), Repair("late", 0.6)]
BY_KIND += [Repair(kind) for kind in ("moved", "cut", "parity", "content", "erased")]


def judged(repairs: list[Repair]) -> Erasure:
    base = planted_repairs.model(Repair("base"))
    models = {f"{repair.kind} {number}": planted_repairs.model(repair) for number, repair in enumerate(repairs)}
    pairs = planted_repairs.pairs()
    task = wrapper_present(pairs, base.tokenizer, negatives=planted_repairs.neutral())
    return erase_or_mask(base, models, pairs, cue=task, layers=[1, 2], progress=False)


@pytest.fixture(scope="module")
def by_kind() -> Erasure:
    return judged(BY_KIND)


def test_every_kind_of_repair_is_told(by_kind: Erasure):
    assert sorted(repair.kind for repair in BY_KIND) == sorted(planted_repairs.KINDS)
    truth = {f"{repair.kind} {number}": repair.verdicts for number, repair in enumerate(BY_KIND)}
    assert by_kind.verdicts() == {"base": ("vulnerable", "vulnerable")} | truth


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_repairs_drawn_at_random_are_told(seed: int):
    repairs = planted_repairs.drawn(12, seed)
    truth = {f"{repair.kind} {number}": repair.verdicts for number, repair in enumerate(repairs)}
    assert judged(repairs).verdicts() == {"base": ("vulnerable", "vulnerable")} | truth


def test_what_the_answer_rests_on_is_worked_out_by_hand(by_kind: Erasure):
    table = by_kind.to_dataframe().set_index(["model", "layer"])
    for number, repair in enumerate(BY_KIND):
        cost = np.mean([planted_repairs.cost(repair, pair) for pair in planted_repairs.pairs()])
        row = table.loc[(f"{repair.kind} {number}", 2)]
        assert row["used_own"] == pytest.approx(cost, rel=0.05, abs=1e-3), repair
        assert row["left"] == pytest.approx(0, abs=1e-3)
    late = table.loc[(f"late {3}", 1)]
    assert late["left"] == pytest.approx(table.loc[("late 3", 2), "used_own"], rel=1e-3) and late["used_own"] == 0


def test_only_the_probe_that_is_not_linear_reads_a_parity(by_kind: Erasure):
    row = by_kind.to_dataframe().set_index(["model", "layer"]).loc[("parity 6", 2)]
    assert row["readable_last_rbf"] > 0.95 and row["readable_last_ridge"] < 0.6


def test_the_search_finds_more_than_the_mean_and_no_more_than_there_is(by_kind: Erasure):
    base = by_kind.to_dataframe().set_index(["model", "layer"]).loc[("base", 2)]
    assert base["used_searched"] > base["used_own"]
    # The gain of a unit vector is at most that of one along the difference and one along what is read, together.
    gains = by_kind.used[USED_ALONG.index("searched"), :, :, 0]
    assert np.isnan(gains[..., ~by_kind.held_out]).all() and np.isfinite(gains[..., by_kind.held_out]).all()


def test_pairs_with_one_clean_prompt_are_on_one_side_of_the_search():
    pairs = planted.pairs()
    held_out = held_out_of_search(pairs, seed=0)
    sides = {pair.clean.turns[0].content: set() for pair in pairs}
    for pair, out in zip(pairs, held_out, strict=True):
        sides[pair.clean.turns[0].content].add(bool(out))
    assert all(len(found) == 1 for found in sides.values()) and held_out.mean() == 0.5
    with pytest.raises(CtlensError, match="all pairs have the same one: give pairs with several"):
        held_out_of_search(pairs[:1] * 3, seed=0)


# The rule, case by case. Nulls reach to 1 (readable: 0.6).


def measured(value: float, null: float = 1.0, width: float = 0.05) -> MeasuredWithNull:
    return MeasuredWithNull(float(value), value - width, value + width, -1.0, null)


LEVELS = {"yes": (0.7, 5.0), "no": (0.5, 0.0), "unclear": (0.6, 1.0)}


def evidence(
    readable: str, used: str, *, beside: str = "no", left: str = "no", rbf: str = "no", own: str = "no"
) -> Evidence:
    return Evidence(
        {"ridge": measured(LEVELS[readable][0], 0.6), "rbf": measured(LEVELS[rbf][0], 0.6)},
        {"ridge": measured(LEVELS[beside][0], 0.6)},
        {"base": measured(LEVELS[used][1]), "own": measured(LEVELS[own][1])},
        measured(LEVELS[left][1]),
        measured(5),
    )


BASE = Evidence(
    {"ridge": measured(0.9, 0.6), "rbf": measured(0.9, 0.6)},
    {"ridge": measured(0.9, 0.6)},
    {"base": measured(8), "own": measured(8)},
    measured(0),
    measured(9),
)


@pytest.mark.parametrize(
    ("readable", "used", "expected"),
    [
        ("yes", "yes", "vulnerable"),
        ("yes", "no", "masked"),
        ("no", "no", "erased"),
        ("no", "yes", "inconclusive"),
        ("yes", "unclear", "inconclusive"),
        ("unclear", "no", "inconclusive"),
        ("no", "unclear", "inconclusive"),
    ],
)
def test_two_findings_make_a_verdict(readable: str, used: str, expected: str):
    told, reason = erasure_verdict(evidence(readable, used), BASE, repaired=True, less=False)
    assert told == expected
    words = {"yes": "", "no": "not ", "unclear": "not clearly "}
    assert reason.startswith(f"{words[readable]}readable (") and f"; {words[used]}used (" in reason


@pytest.mark.parametrize(("repaired", "expected"), [(True, "reduced"), (False, "vulnerable")])
def test_a_repaired_model_that_uses_the_direction_less_has_reduced_it(repaired: bool, expected: str):
    assert erasure_verdict(evidence("yes", "yes"), BASE, repaired=repaired, less=True)[0] == expected


@pytest.mark.parametrize(("readable", "used"), [("yes", "no"), ("no", "no")])
def test_without_a_repair_nothing_was_erased_or_masked(readable: str, used: str):
    told, reason = erasure_verdict(evidence(readable, used), BASE, repaired=False, less=True)
    assert told == "inconclusive" and "no better than by the base" in reason


@pytest.mark.parametrize("measure", ["readable", "used", "reelicited"])
def test_what_the_base_does_not_show_cannot_be_lost(measure: str):
    none = MeasuredWithNull(0.5, 0.4, 0.7, 0.3, 0.6)
    found = {"readable": {"ridge": none, "rbf": none}, "used": BASE.used | {"base": none}, "reelicited": none}
    weak = dataclasses.replace(BASE, **{measure: found[measure]})
    told, reason = erasure_verdict(evidence("no", "no"), weak, repaired=True, less=False)
    assert (told, reason) == ("inconclusive", f"in the base the cue is not clearly {measure} here")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rbf": "yes"}, "masked"),
        ({"rbf": "unclear"}, "inconclusive"),
        ({"own": "yes"}, "inconclusive"),
        ({"own": "yes", "rbf": "yes"}, "vulnerable"),
        ({"own": "unclear", "rbf": "yes"}, "inconclusive"),
        ({"beside": "yes"}, "elsewhere"),
        ({"beside": "unclear"}, "inconclusive"),
        ({"beside": "yes", "rbf": "yes"}, "masked"),
        ({"left": "yes"}, "elsewhere"),
        ({"left": "yes", "rbf": "yes"}, "elsewhere"),
        ({"left": "unclear", "rbf": "yes"}, "inconclusive"),
    ],
)
def test_one_finding_of_several_is_enough(changes: dict[str, str], expected: str):
    assert erasure_verdict(evidence("no", "no", **changes), BASE, repaired=True, less=False)[0] == expected


def test_what_finds_nothing_in_the_base_cannot_deny():
    blind = dataclasses.replace(BASE, readable={"ridge": measured(0.9, 0.6), "rbf": measured(0.5, 0.6)})
    assert erasure_verdict(evidence("no", "no"), blind, repaired=True, less=False)[0] == "erased"
    dark = dataclasses.replace(BASE, beside={"ridge": measured(0.5, 0.6)})
    assert erasure_verdict(evidence("no", "no", beside="unclear"), dark, repaired=True, less=False)[0] == "erased"


def test_an_effect_above_harmful_random_ones_but_not_above_zero_is_none():
    assert finding(MeasuredWithNull(0.04, -0.05, 0.12, -0.36, -0.07), BASE.used["base"]) == "unclear"
    assert finding(MeasuredWithNull(-0.04, -0.1, -0.01, -0.36, -0.07), BASE.used["base"]) == "no"


def test_within_the_null_is_no_only_where_it_is_less_than_in_the_base():
    wide = MeasuredWithNull(3.0, 2.0, 4.0, -5.0, 5.0)
    assert finding(wide, MeasuredWithNull(9.0, 8.0, 10.0, -5.0, 5.0)) == "no"
    assert finding(wide, MeasuredWithNull(6.0, 3.5, 9.0, -1.0, 1.0)) == "unclear"


@pytest.mark.parametrize(
    ("value", "less", "expected"),
    [(5.0, False, "intact"), (5.0, True, "weakened"), (0.0, True, "cut"), (1.0, True, "unclear")],
)
def test_the_read_out(value: float, less: bool, expected: str):
    assert readout(measured(value), BASE.reelicited, less=less) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, "at least one trained model"),
        ({"models": {"base": planted.model()}}, "label other than 'base'"),
        ({"control": "retain"}, "unknown control 'retain'"),
        ({"cue": None}, "does not know 'good' in 'good ada [?]'"),
        ({"layers": []}, "at least one layer"),
        ({"layers": [3]}, "layer 3 does not exist"),
        ({"pairs": [Pair(prompt("ada ?"), prompt("never ada ?"))]}, "no good and bad answer that differ"),
    ],
)
def test_bad_input_is_told_in_a_sentence(base: LensModel, repaired, change: dict, message: str):
    options = {"models": repaired, "pairs": planted.pairs(), "layers": [1], "draws": 2, "progress": False}
    options |= {"cue": presence(base)} | change
    with pytest.raises(CtlensError, match=message):
        erase_or_mask(base, options.pop("models"), options.pop("pairs"), **options)
