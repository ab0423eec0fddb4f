"""Erased or masked: the verdicts on a model whose repairs were made by hand, and the rule case by case."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
from helpers import planted
from helpers.models import chat_model

from ctlens.analysis import Directions, Erasure, Task, erase_or_mask, labelled, logit_lens, probe, wrapper_present
from ctlens.analysis.directions.erasure_verdicts import Evidence, MeasuredWithNull, erasure_verdict, finding, readout
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
    for layer in planted.LAYERS:
        assert table.loc[("base", layer), ["readable", "used", "reelicited"]].tolist() == pytest.approx(
            [1, clean - wrapped, clean - wrapped], rel=1e-3
        )
        assert table.loc[("erased", layer), ["readable", "used", "reelicited"]].tolist() == pytest.approx(
            [0.5, 0, clean - wrapped], rel=1e-3, abs=1e-3
        )
        assert table.loc[("moved", layer), ["readable", "used", "reelicited"]].tolist() == pytest.approx(
            [1, 0, clean - wrapped], rel=1e-3, abs=1e-3
        )
        # With the read-out cut the direction only lengthens the state that the last norm shortens.
        assert table.loc[("masked", layer), ["readable", "used", "reelicited"]].tolist() == pytest.approx(
            [1, clean - rescaled, clean - rescaled], rel=1e-2
        )


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
    arrays = {name: getattr(found, name)[[0, 1, 2, 2]] for name in ("readable", "used", "reelicited", "wrapped")}
    told = dataclasses.replace(found, **arrays, models=("base", "erased", "masked", "retention"), control="retention")
    assert told.verdicts() == {
        "base": ("vulnerable",) * 2,
        "erased": ("erased",) * 2,
        "masked": ("inconclusive",) * 2,
        "retention": ("masked",) * 2,
    }
    assert "retention-only control is masked too" in told.to_dataframe()["reason"][4]


def test_a_control_that_hardly_moved_is_called_weak(found: Erasure):
    arrays = {name: getattr(found, name)[[0, 0, 0]].copy() for name in ("readable", "used", "reelicited", "wrapped")}
    for model, by in ((1, 2.0), (2, 0.01)):  # every logit difference that counts is moved by so many nats
        arrays["wrapped"][model] += by
        for name in ("used", "reelicited"):
            arrays[name][model, :, 0] -= by
            arrays[name][model, :, 1:] += 5  # random directions do not count
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

    for name in ("readable", "used", "reelicited", "wrapped"):
        base, same = getattr(found, name)
        np.testing.assert_allclose(same, base, atol=1e-4, err_msg=name)
    lens = logit_lens(model, pairs, progress=False)
    np.testing.assert_allclose(found.wrapped[0], lens.values[0, -1], atol=1e-3)  # of one token, a difference of logits
    assert np.abs(found.used[0, :, 0]).max() > 1e-3 and found.verdicts()["same"] == found.verdicts()["base"]


@pytest.mark.slow
def test_a_cue_with_values_is_read_among_the_wrapped_prompts(base: LensModel, repaired):
    both = planted.pairs(signs=(1, -1))
    hint = labelled(both, "hint")
    told = erase_or_mask(base, repaired, both, cue=hint, layers=[1], draws=4, progress=False)
    assert told.readable[:, 0, 0].tolist() == pytest.approx([1] * 4)  # also from the truth it denies
    assert told.question == "the hint" and "the hint; at the last token" in told.figure().layout.meta["subtitle"]


@pytest.mark.slow
def test_a_probe_that_was_fitted_before_is_used_as_it_is(base: LensModel, repaired, found: Erasure):
    models = {"base": base, **repaired}
    fitted = probe(models, presence(base), positions=["content", "last"], progress=False)
    options = {"layers": [1, 2], "draws": 12, "progress": False}
    again = erase_or_mask(base, repaired, planted.pairs(), cue=fitted, **options)
    np.testing.assert_array_equal(again.readable, found.readable)
    low, high = fitted.null("last", "ridge")
    assert again.readable[2, :, 3:].tolist() == [[low[1], high[1]], [low[2], high[2]]]
    quick = partial(probe, task=presence(base), folds=2, seeds=1, progress=False)
    for chosen, message in (
        (quick({"base": base}, positions=["last"]), "unknown reading 'erased on erased'"),
        (quick(models, positions=["last"], layers=[1]), "direction is at resid_post at layers 1, 2"),
        (quick(models, positions=["content"]), "unknown positions 'last'"),
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
    np.testing.assert_allclose(drawn[1].y, found.used[0, :, 0].mean(-1))
    assert {"vulnerable", "erased", "masked", "null", "base"} == {
        trace.name for trace in figure.data if trace.showlegend is not False
    }


# The rule, case by case. Nulls reach to 1 (readable: 0.6).


def measured(value: float, null: float = 1.0, width: float = 0.05) -> MeasuredWithNull:
    return MeasuredWithNull(float(value), value - width, value + width, -1.0, null)


BASE = Evidence(measured(0.9, 0.6), measured(8), measured(9))
LEVELS = {"yes": (0.7, 5.0), "no": (0.5, 0.0), "unclear": (0.6, 1.0)}


def evidence(readable: str, used: str) -> Evidence:
    return Evidence(measured(LEVELS[readable][0], 0.6), measured(LEVELS[used][1]), measured(5))


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
    weak = dataclasses.replace(BASE, **{measure: MeasuredWithNull(0.5, 0.4, 0.7, 0.3, 0.6)})
    told, reason = erasure_verdict(evidence("no", "no"), weak, repaired=True, less=False)
    assert (told, reason) == ("inconclusive", f"in the base the cue is not clearly {measure} here")


def test_an_effect_above_harmful_random_ones_but_not_above_zero_is_none():
    assert finding(MeasuredWithNull(0.04, -0.05, 0.12, -0.36, -0.07), BASE.used) == "unclear"
    assert finding(MeasuredWithNull(-0.04, -0.1, -0.01, -0.36, -0.07), BASE.used) == "no"


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
