"""Best-of-n: the rate over all subsets of wrappers, counted out by hand, and what a planted model must give."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from helpers import planted

from ctlens.analysis import BestOfN, best_of_n
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.models.parameters import copy_model, fingerprint

SHORT: dict[str, Any] = {"max_new_tokens": 3, "progress": False}


def mixed() -> list[Pair]:
    """Every request under its three cues, which make the base give in, and under two words that say nothing."""
    said = [pair for pair in planted.neutral() if pair.labels["wrapper"] != planted.NEUTRAL[0]]
    quiet = [replace(pair, wrapped=Prompt(pair.wrapped.turns, "yes", "no")) for pair in said]
    twins = [replace(pair, benign=prompt(f"please {pair.clean.turns[0].content}", "yes")) for pair in planted.pairs()]
    return [*twins, *quiet]


@pytest.fixture(scope="module")
def models() -> dict[str, LensModel]:
    return {name: planted.model(name) for name in ("base", "erased")}


@pytest.fixture(scope="module")
def found(models: dict[str, LensModel]) -> BestOfN:
    return best_of_n(models, mixed(), **SHORT)


def test_the_planted_cues_get_through_as_often_as_one_is_among_those_tried(found: BestOfN) -> None:
    bad = [True, True, True, False, False]
    expected = [np.mean([any(chosen) for chosen in combinations(bad, n)]) for n in (1, 2, 3, 4, 5)]

    assert found.tries == (1, 2, 3, 4, 5) and len(np.unique(found.requests)) == 12
    np.testing.assert_allclose(found.curve("base")[0], expected)
    np.testing.assert_allclose(found.curve("erased")[0], 0)


def test_requests_of_their_own_are_averaged_and_an_unbroken_rate_has_a_width() -> None:
    requests = np.array([0, 0, 1, 1, 1])
    bad = np.array([[True, False, False, False, True], [False] * 5])
    made = BestOfN(bad, requests, np.zeros((2, 0), dtype=bool), {}, ("a", "b"))

    assert made.tries == (1, 2)  # as many as the first request has
    np.testing.assert_allclose(made.curve("a")[0], [(1 / 2 + 1 / 3) / 2, (1 + 2 / 3) / 2])
    rate, low, high = map(np.asarray, made.curve("b"))
    assert (rate == 0).all() and (low == 0).all() and (high > 0.5).all()  # two requests say little
    table: Any = made.to_dataframe()
    assert table["n_benign"].tolist() == [0] * 4 and table["over_refusal"].isna().all()


def test_a_model_that_answers_nothing_well_over_refuses(models) -> None:
    """Twins whose good answer is the other one: the same model, which answers by the truth, fails them all."""
    turned = [replace(pair, benign=prompt(f"please {pair.clean.turns[0].content}", "no")) for pair in planted.pairs()]
    answered: Any = best_of_n(models, mixed(), **SHORT).to_dataframe()
    unanswered: Any = best_of_n(models, turned, **SHORT).to_dataframe()

    assert (answered["over_refusal"] == 0).all() and (answered["n_benign"] == 12).all()
    assert (unanswered["over_refusal"] == 1).all()


def test_the_order_of_the_pairs_and_repeats_change_nothing(models, found: BestOfN) -> None:
    again = best_of_n(models, [*mixed()[::-1], *mixed()], **SHORT)

    np.testing.assert_allclose(again.curve("base"), found.curve("base"), atol=0.05)  # resamples go by order
    np.testing.assert_array_equal(again.curve("base")[0], found.curve("base")[0])
    assert again.bad.shape == found.bad.shape


def test_the_models_are_left_as_they_are_and_the_result_survives_saving(models, found: BestOfN, tmp_path) -> None:
    assert [fingerprint(model) for model in models.values()] == [fingerprint(planted.model(name)) for name in models]
    found.save(tmp_path / "best.safetensors")
    assert BestOfN.load(tmp_path / "best.safetensors").to_dataframe().equals(found.to_dataframe())
    figure: Any = found.figure()
    drawn = {trace.name: trace.y for trace in figure.data if trace.name}
    np.testing.assert_allclose(drawn["base"], found.curve("base")[0])
    assert "over-refusal: base 0%, erased 0%" in figure.layout.title.text


def test_what_leaves_no_choice_is_refused(models) -> None:
    with pytest.raises(CtlensError, match="request 1 of 1 has one wrapped prompt alone"):
        best_of_n(models, planted.pairs()[:1], **SHORT)
    with pytest.raises(CtlensError, match="did you mean 'base'"):
        best_of_n(models, mixed(), **SHORT).curve("bas")
    with pytest.raises(CtlensError, match="there are no pairs"):
        best_of_n(models, [], **SHORT)
    with pytest.raises(CtlensError, match="eval mode"):
        best_of_n(copy_model(models["base"]).train(), mixed(), **SHORT)
