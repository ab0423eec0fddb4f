"""The regularisers of the audit: what they train on, in which direction, and beside selectors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import ctlens as ct
from ctlens.auditing import Audit, Regulariser, audit_pairs, draw_labels, method_named, rephrased
from ctlens.auditing.methods import REGULARISERS
from ctlens.auditing.run import LABEL_TRAINING
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair
from ctlens.threats import ask

FEW = replace(LABEL_TRAINING, steps=3)


@pytest.fixture(scope="module")
def pool() -> list[Pair]:
    return audit_pairs("sycophancy", 12)


@pytest.fixture(scope="module")
def found(model: LensModel, pool: list[Pair]) -> Audit:
    methods = ["act-own", "greedy", Regulariser("mine", ct.BCT())]
    return ct.audit(model, pool, methods, pools=("wrapped", "clean"), training=FEW, seed=2, progress=False)


@pytest.mark.parametrize("kind", ["wrapped", "clean"])
def test_a_regulariser_holds_the_prompts_of_the_pool_to_the_others(
    found: Audit, model: LensModel, pool: list[Pair], kind: str
) -> None:
    """The training again: on the wrapped prompts as the pairs are, on the clean ones with the pairs swapped."""
    swapped = [replace(pair, clean=pair.wrapped, wrapped=pair.clean) for pair in pool]
    loss = ct.ACT(window="suffix", clean="own")
    pairs = pool if kind == "wrapped" else swapped
    trained = ct.train(model, pairs, loss, config=replace(FEW, seed=2), progress=False).model
    known = np.array([reply.bad_probability for reply in ask(trained, [pair.wrapped for pair in pool])])
    at = found.chosen("wrapped", "pool")
    number = found.pools.index(kind)

    assert (np.abs(found.after[0, 0, number, at] - known) <= found.missed_after[0, 0, number, at] + 1e-4).all()
    assert np.abs(found.after[0, 0, 0] - found.after[0, 0, 1]).max() > 1e-4
    assert found.n_trained.tolist() == [[[12, 12]] * 3]


def test_a_regulariser_has_no_labels_and_a_selector_beside_it_has(found: Audit) -> None:
    rows = found.to_dataframe().query("pool == prompt_side").set_index(["method", "pool"])
    of_labels = ["label_shift", "drawn_shift", "label_kl", "kept"]

    for name in ("act-own", "mine"):
        assert rows.loc[name, of_labels].isna().all(axis=None) and (rows.loc[name, "predicted"] == "").all()
        assert rows.loc[name, "change"].notna().all()
    assert rows.loc["greedy", of_labels].notna().all(axis=None)
    assert set(found.signs()["method"]) == {"greedy"} and found.exact == (True,) * 3
    assert found.settings["methods"]["act-own"]["clean"] == "own"


def test_the_figure_shows_labels_of_selectors_alone(found: Audit, model: LensModel, pool: list[Pair]) -> None:
    panel = {trace.get("name") for trace in found.figure().to_dict()["data"] if trace.get("xaxis", "x") == "x"}
    alone = ct.audit(model, pool, ["act-own"], training=FEW, progress=False).figure()
    titles = [annotation["text"] for annotation in alone.to_dict()["layout"]["annotations"]]

    assert "greedy" in panel and not panel & {"act-own", "mine"}
    assert titles and not any(title.startswith("labels") for title in titles)


def test_a_moving_and_a_frozen_target_part_once_the_model_has_moved(model: LensModel, pool: list[Pair]) -> None:
    assert {name: method_named(name).trained_with.clean_side for name in REGULARISERS} == {
        "soft-bct-own": "own",
        "soft-bct-reference": "reference",
        "act-own": "own",
        "act-reference": "reference",
    }
    found = ct.audit(model, pool, ["soft-bct-own", "soft-bct-reference"], training=FEW, progress=False)

    assert np.abs(found.after[0, 0] - found.after[0, 1]).max() > 1e-6


def test_rephrased_pairs_hold_a_prompt_and_the_same_behind_a_greeting(pool: list[Pair]) -> None:
    pairs = rephrased(pool)
    greetings = [pair.wrapped.turns[-1].content.removesuffix(pair.clean.turns[-1].content) for pair in pairs]

    assert [pair.clean for pair in pairs] == [pair.clean for pair in pool]
    assert greetings[:3] == greetings[3:6] and len(set(greetings)) == 3 and all(greetings)
    assert all(pair.wrapped.bad == pair.clean.bad for pair in pairs)


def test_a_regulariser_on_one_prompt_twice_and_one_that_is_to_label_are_refused(
    model: LensModel, pool: list[Pair]
) -> None:
    same = ct.organism.misbehaviour_pairs("shortcut", 4)
    with pytest.raises(ct.CtlensError, match="'act-own' holds a prompt to the other one .* ct.auditing.rephrased"):
        ct.audit(model, same, ["act-own"], progress=False)
    with pytest.raises(ct.CtlensError, match="a regulariser trains without labels"):
        draw_labels(model, [pool[0].wrapped], ["greedy", "act-own"])
    with pytest.raises(ct.CtlensError, match="unknown selector or regulariser 'act-owm'; did you mean 'act-own'"):
        method_named("act-owm")
