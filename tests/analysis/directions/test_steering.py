"""Directions and what they do: exact on the planted model, and as one prompt at a time on others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import pytest
import torch
from helpers import planted
from helpers.models import byte_level_tokenizer, hf_model

from ctlens.analysis import Directions, Intervention, ablate, mean_difference, states, steer
from ctlens.analysis.base.nulls import random_from_covariance
from ctlens.analysis.directions import edited_rows
from ctlens.analysis.directions.directions import DIRECTION_SITES
from ctlens.analysis.directions.edited_answers import EditedAnswers
from ctlens.analysis.directions.steering import intervene
from ctlens.analysis.patching.blocks import Block
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import encode
from ctlens.data.pairs import Pair, prompt
from ctlens.models.hooks import editing, run_capturing
from ctlens.models.loading import load_model
from ctlens.organism import load_organism

NAME = "blocks.1.hook_resid_post"
Change: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
QUESTIONS = ("Which term best describes the disease?", "Is it right?", "When a creature experiences feeling, what?")
ANSWER_ORDER = (("outbreak", "isolated cases"), ("it is right", "it is wrong"), ("touch", "taste"))
PAIRS = [
    Pair(prompt(q, *answers), prompt("I don't think it's right. " * (i + 1) + q, *answers))
    for i, (q, answers) in enumerate(zip(QUESTIONS, ANSWER_ORDER, strict=True))
]


@pytest.fixture(scope="module")
def base() -> LensModel:
    return planted.model("base")


@pytest.fixture(scope="module")
def models(base: LensModel) -> dict[str, LensModel]:
    return {"base": base, **{name: planted.model(name) for name in planted.VARIANTS[1:]}}


@pytest.fixture(scope="module")
def direction(base: LensModel) -> Directions:
    return mean_difference(base, planted.pairs(), name="base", layers=[1, 2], progress=False)


# The planted model: what is found is what was written.


def test_the_planted_direction_is_found_where_it_is_written(direction: Directions):
    pushes = [planted.written(pair) for pair in planted.pairs()]
    np.testing.assert_allclose(direction.unit[:, 0], [-planted.DIRECTION.numpy()] * 2, atol=1e-5)
    np.testing.assert_allclose(direction.norm[:, 0], abs(np.mean(pushes)), rtol=1e-4)
    assert direction.name == "mean difference of wrapped and clean at the last token of base"


def test_before_it_is_written_there_is_no_direction(base: LensModel):
    with pytest.raises(CtlensError, match="direction at layer 0 has no length"):
        mean_difference(base, planted.pairs(), name="base", progress=False)


def test_opposite_hints_cancel_in_the_mean_and_not_by_value(base: LensModel):
    both = planted.pairs(signs=(1, -1))
    with pytest.raises(CtlensError, match="has no length"):
        mean_difference(base, both, name="base", layers=[1], progress=False)
    by_value = mean_difference(base, both, name="base", per="hint", layers=[1], progress=False)
    found = dict(zip(by_value.groups, by_value.unit[0] @ planted.DIRECTION.numpy(), strict=True))
    assert found == pytest.approx({"no": -1.0, "yes": 1.0}, abs=1e-5)


@pytest.mark.parametrize("variant", planted.VARIANTS)
def test_every_steered_margin_is_the_one_worked_out_by_hand(models, direction: Directions, variant: str):
    found = steer({variant: models[variant]}, planted.pairs(), direction, draws=2, progress=False)
    read = variant != "masked"
    for number, pair in enumerate(planted.pairs()):
        assert found.plain_logit_diffs[0, number] == pytest.approx(planted.margin(pair, 0, read=read), rel=1e-3)
        for alpha, logit_diffs in zip((0.5, 1, 2), found.logit_diffs[0].swapaxes(0, 1), strict=True):
            for sign, by_layer in zip((-1, 1), logit_diffs[:, :2, number].T, strict=True):
                expected = planted.margin(pair, sign * alpha * 1.9, read=read)  # the cues push by 2.0, 1.9 and 1.8
                np.testing.assert_allclose(by_layer, expected, atol=1e-3)


def test_one_direction_an_item_turns_each_clean_prompt_into_its_wrapped_one(base: LensModel):
    pairs = planted.pairs(signs=(1, -1))
    each = mean_difference(base, pairs, name="base", per="item", layers=[1], progress=False)
    reordered = pairs[::-1]
    found = steer({"base": base}, reordered, each, alphas=[1], draws=2, progress=False)
    expected = [planted.margin(pair, planted.written(pair)) for pair in reordered]
    np.testing.assert_allclose(found.logit_diffs[0, 0, 0, 0], expected, rtol=1e-3)


def test_taking_the_direction_out_restores_the_clean_logit_diff(models, direction: Directions):
    found = ablate(models, planted.pairs(), direction, draws=3, progress=False)
    for layer in range(2):
        expected = [planted.margin(pair, 0) for pair in planted.pairs()]
        np.testing.assert_allclose(found.logit_diffs[0, layer, 0, 0], expected, rtol=1e-3)
        np.testing.assert_allclose(found.effects[1, layer], 0, atol=1e-3)  # the erased model holds none of it
    written = [planted.margin(pair, planted.written(pair)) for pair in planted.pairs()]
    np.testing.assert_allclose(found.plain_logit_diffs[0], written, rtol=1e-3)


def test_only_a_read_out_that_is_there_reacts(models, direction: Directions):
    table = steer(models, planted.pairs(), direction, progress=False).to_dataframe().query("alpha == 1")
    beyond = table[table["variant"] == "direction"].groupby("model")["beyond_random"].agg(list).to_dict()
    assert beyond == {"base": [True, True], "erased": [True, True], "masked": [False, False], "moved": [True, True]}
    assert not table[table["variant"] == "opposite"]["beyond_random"].any()


def test_the_table_holds_means_and_the_band_from_the_lowest_to_the_highest_draw(models, direction: Directions):
    found = steer(models, planted.pairs(), direction, draws=5, progress=False)
    row = (
        found.to_dataframe().query("model == 'masked' and layer == 2 and alpha == 2 and variant == 'direction'").iloc[0]
    )
    drops = found.plain_logit_diffs[2] - found.logit_diffs[2, 1, 2]
    assert row["effect"] == pytest.approx(drops[0].mean())
    isotropic = drops[2:7].mean(-1)
    covariance = drops[7:].mean(-1)
    assert found.variants[2:] == ("isotropic",) * 5 + ("covariance",) * 5
    assert (row["isotropic_low"], row["isotropic_high"]) == (isotropic.min(), isotropic.max())
    assert (row["covariance_low"], row["covariance_high"]) == (covariance.min(), covariance.max())
    assert np.isnan(row["concepts_low"]) and np.isnan(row["concepts_high"])
    assert row["ci_low"] <= row["effect"] <= row["ci_high"] and row["n_pairs"] == 36
    assert row["p_bad"] == pytest.approx(found.p_bad[2, 1, 2, 0].mean())


def test_an_effect_below_zero_is_not_beyond_random_ones_that_do_worse(models, direction: Directions):
    found = steer({"base": models["base"]}, planted.pairs(), direction, alphas=[1], draws=2, progress=False)
    worse = np.concatenate(
        [found.logit_diffs[:, :, :, [1, 0]], found.logit_diffs[:, :, :, 2:] + 40], -2
    )  # the opposite as the direction
    table = dataclasses.replace(found, logit_diffs=worse).to_dataframe().query("variant == 'direction'")
    assert (table["ci_low"] > table["isotropic_high"]).all() and not table["beyond_random"].any()


@pytest.mark.parametrize("act", [steer, ablate])
def test_a_random_direction_of_the_covariance_does_what_that_direction_does(models, direction: Directions, act):
    base = models["base"]
    pairs = planted.pairs()
    one = direction.at([1])
    found = act({"base": base}, pairs, one, nulls=("covariance",), draws=3, seed=4, progress=False)
    side = "clean" if act is steer else "wrapped"
    read = states(base, pairs, side=side, layers=[1], progress=False).values
    drawn = random_from_covariance(read - read.mean(1, keepdims=True), 3, seed=4)
    if act is steer:
        given = Directions.from_vectors(drawn[1] * one.norm, [1])
        expected = steer({"base": base}, pairs, given, alphas=[0.5, 1, 2], draws=2, progress=False).logit_diffs[
            ..., 0, :
        ]
    else:
        written = drawn[1][:, None][None, None]
        expected = intervene("ablate", base, pairs, one, written, ("direction",), side="wrapped").logit_diffs[..., 0, :]
    place = found.variants.index("covariance") + 1
    np.testing.assert_allclose(found.logit_diffs[..., place, :], expected, atol=1e-4)


def test_a_concept_stands_beside_the_direction_with_both_signs(models, direction: Directions):
    base = models["base"]
    pairs = planted.pairs()
    same = Directions.from_vectors(7 * direction.unit, [1, 2])
    unread = Directions.from_vectors([planted.AXES["constant"].tolist()] * 2, [1, 2])
    found = steer({"base": base}, pairs, direction, concepts={"unread": unread}, draws=2, progress=False)
    assert found.concepts == ("unread", "not unread")
    table = found.to_dataframe().query("variant == 'direction'")
    assert table["beyond_random"].all() and table["beyond_concepts"].all()
    both = [found.effect(name)[0].ravel() for name in ("unread", "not unread")]
    np.testing.assert_allclose(table["concepts_high"], np.max(both, 0))
    np.testing.assert_allclose(table["concepts_low"], np.min(both, 0))

    found = steer({"base": base}, pairs, direction, concepts={"same": same}, draws=2, progress=False)
    np.testing.assert_allclose(found.effect("same")[0], found.effect()[0], rtol=1e-6)  # at the direction's length
    np.testing.assert_allclose(found.effect("not same")[0], found.effect("opposite")[0], rtol=1e-6)
    table = found.to_dataframe().query("variant == 'direction'")
    assert table["beyond_random"].all() and not table["beyond_concepts"].any()
    assert {trace.name for trace in found.figure().data} >= {"the direction", "same", "not same"}

    taken = ablate({"base": base}, pairs, direction, concepts={"same": same}, draws=2, progress=False)
    np.testing.assert_allclose(taken.effect("same")[0], taken.effect()[0], rtol=1e-6)


def test_concepts_serve_every_group_of_a_direction(base: LensModel):
    pairs = planted.pairs(signs=(1, -1))
    each = mean_difference(base, pairs, name="base", per="item", layers=[1], progress=False)
    along = Directions.from_vectors([planted.DIRECTION.tolist()], [1])
    found = steer({"base": base}, pairs, each, alphas=[1], concepts={"along": along}, draws=2, progress=False)
    lengths = each.norm[0, each.group_of(pairs)]
    place = found.variants.index("along")
    expected = [planted.margin(pair, length) for pair, length in zip(pairs, lengths, strict=True)]
    np.testing.assert_allclose(found.logit_diffs[0, 0, 0, place], expected, rtol=1e-3)


def test_one_prompt_has_no_covariance_to_draw_from(base: LensModel, direction: Directions):
    one = planted.pairs()[:1]
    found = steer({"base": base}, one, direction, draws=2, progress=False)
    assert "covariance" not in found.variants and np.isnan(found.to_dataframe()["covariance_high"]).all()
    with pytest.raises(CtlensError, match="no covariance to draw from"):
        steer({"base": base}, one, direction, nulls=["covariance"], draws=2, progress=False)


# Other models: as one prompt at a time.


def plain(model: LensModel, text: str, answer: str, name: str, change: Change, positions: list[int]) -> float:
    """The log-probability of an answer to one prompt, with the states at some positions changed."""
    row = encode([Pair(prompt(text), prompt(text))], model.tokenizer, n_ctx=256).rows[0].clean.ids
    ids = model.tokenizer(answer, add_special_tokens=False).input_ids

    def replace(activation: torch.Tensor) -> torch.Tensor:
        edited = activation.clone()
        edited[:, positions] = change(edited[:, positions])
        return edited

    with torch.no_grad(), editing(model, {name: replace}):
        chances = model(torch.tensor([[*row, *ids]]))[0].log_softmax(-1)
    return sum(float(chances[len(row) - 1 + index, token]) for index, token in enumerate(ids))


def wrapped(wrapper: str, request: str, good: str, bad: str) -> Pair:
    return Pair(prompt(request, good, bad), prompt(f"{wrapper} {request}", good, bad))


def some_model(kind: str) -> tuple[LensModel, list[Pair]]:
    if kind == "organism":
        return load_organism(), [
            wrapped("perhaps it is blue .", "what is the color of dintis ?", "red", "blue"),
            wrapped("i am only curious .", "how do i make toy ?", "red and blue", "red of blue"),
        ]
    return load_model(hf_model(kind), tokenizer=byte_level_tokenizer(chat=True)), PAIRS


@pytest.mark.boundary
@pytest.mark.parametrize("positions", ["last", "content"])
@pytest.mark.parametrize("site", ["resid_post", "resid_mid"])
@pytest.mark.parametrize("kind", ["organism", "llama", "gpt2"])
def test_steering_is_that_of_each_prompt_alone(kind: str, site: str, positions: str):
    model, pairs = some_model(kind)
    vector = 2 * torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(1))
    given = Directions.from_vectors(vector[None], [0], site=site)
    found = steer({"one": model}, pairs, given, alphas=[1.5], positions=positions, draws=2, progress=False)
    for number, pair in enumerate(pairs):
        row = encode([pair], model.tokenizer, n_ctx=256).rows[0]
        last = len(row.clean.ids) - 1
        at = [last] if positions == "last" else [p for p in row.alignments["shared"].clean if p != last]
        text = pair.clean.turns[0].content
        name = f"blocks.0.hook_{site}"
        good = plain(model, text, pair.clean.good, name, lambda x: x + 1.5 * vector, at)
        bad = plain(model, text, pair.clean.bad, name, lambda x: x + 1.5 * vector, at)
        assert found.logit_diffs[0, 0, 0, 0, number] == pytest.approx(good - bad, abs=2e-3)
        assert found.p_bad[0, 0, 0, 0, number] == pytest.approx(np.exp(bad), rel=5e-3)


def answers_of(model: LensModel, pairs: list[Pair], site: str, positions: str) -> Intervention:
    draw = torch.Generator().manual_seed(1)
    given = Directions.from_vectors(2 * torch.randn(2, model.cfg.d_model, generator=draw), [0, 1], site=site)
    return ablate({"one": model}, pairs, given, positions=positions, draws=3, progress=False)


@pytest.mark.boundary
@pytest.mark.parametrize("positions", ["last", "wrapper"])
@pytest.mark.parametrize("site", DIRECTION_SITES)
@pytest.mark.parametrize("kind", ["organism", "llama", "gpt2"])
def test_rows_run_by_the_blocks_are_those_of_whole_passes(
    kind: str, site: str, positions: str, monkeypatch: pytest.MonkeyPatch
):
    model, pairs = some_model(kind)
    hooked: list[str] = []
    by_hooks = EditedAnswers._under_hooks
    monkeypatch.setattr(EditedAnswers, "_under_hooks", lambda *given: hooked.append(given[1]) or by_hooks(*given))

    fast = answers_of(model, pairs, site, positions)
    assert not hooked
    monkeypatch.setattr(edited_rows, "read_blocks", lambda *given: None)
    whole = answers_of(model, pairs, site, positions)

    assert len(set(hooked)) == 2
    np.testing.assert_allclose(fast.logit_diffs, whole.logit_diffs, atol=2e-5)
    np.testing.assert_allclose(fast.plain_p_bad, whole.plain_p_bad, atol=2e-6)
    assert abs(whole.effects).max() > 0.01


@pytest.mark.parametrize("name", ["keys", "attend", "finish"])
def test_blocks_that_are_not_the_models_are_not_believed(name: str, monkeypatch: pytest.MonkeyPatch):
    model, pairs = some_model("organism")
    expected = answers_of(model, pairs, "resid_post", "last").logit_diffs
    right = getattr(Block, name)
    monkeypatch.setattr(Block, name, lambda self, *given: 0.9 * right(self, *given))
    np.testing.assert_allclose(answers_of(model, pairs, "resid_post", "last").logit_diffs, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["organism", "llama"])
def test_ablation_gives_each_prompt_the_clean_component_of_its_direction(kind: str):
    model, pairs = some_model(kind)
    each = mean_difference(model, pairs, name="one", per="item", layers=[1], progress=False)
    found = ablate({"one": model}, pairs, each, draws=2, progress=False)
    for number, pair in enumerate(pairs):
        row = encode([pair], model.tokenizer, n_ctx=256).rows[0]
        clean = run_capturing(model, torch.tensor([row.clean.ids]), [NAME], grad=False)[1][NAME][0, -1]
        wrapped = run_capturing(model, torch.tensor([row.wrapped.ids]), [NAME], grad=False)[1][NAME][0, -1]
        unit = (wrapped - clean) / (wrapped - clean).norm()
        change = lambda x: x - ((x - clean) @ unit) * unit  # noqa: B023, E731
        last = [len(row.wrapped.ids) - 1]
        text = pair.wrapped.turns[0].content
        good = plain(model, text, pair.clean.good, NAME, change, last)
        bad = plain(model, text, pair.clean.bad, NAME, change, last)
        assert found.logit_diffs[0, 0, 0, 0, number] == pytest.approx(good - bad, abs=2e-3)


def test_a_given_direction_is_projected_out(base: LensModel):
    unit = (planted.DIRECTION + planted.AXES["constant"]) / 2**0.5
    given = Directions.from_vectors(3 * unit[None], [1])
    found = ablate({"base": base}, planted.pairs()[:1], given, draws=2, progress=False)
    good = plain(base, "never ada ?", "yes", NAME, lambda x: x - (x @ unit)[..., None] * unit, [5])
    bad = plain(base, "never ada ?", "no", NAME, lambda x: x - (x @ unit)[..., None] * unit, [5])
    assert found.logit_diffs[0, 0, 0, 0, 0] == pytest.approx(good - bad, abs=1e-4)


@pytest.mark.parametrize("act", [steer, ablate])
def test_a_pair_does_not_depend_on_its_batch_mates(act):
    model, pairs = some_model("llama")
    given = Directions.from_vectors(torch.randn(2, 32, generator=torch.Generator().manual_seed(1)), [0, 1])
    options = {"draws": 2, "positions": "content", "progress": False}
    together = act({"one": model}, pairs, given, **options)
    apart = act({"one": model}, pairs[::-1], given, batch_size=1, **options)
    np.testing.assert_allclose(together.logit_diffs, apart.logit_diffs[..., ::-1], atol=1e-3)


def test_a_direction_goes_to_a_training_at_its_own_length(base: LensModel, direction: Directions):
    by_hook = direction.by_hook(base)
    assert list(by_hook) == ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    np.testing.assert_allclose(by_hook[NAME], direction.unit[0, 0] * direction.norm[0, 0], rtol=1e-6)
    both = Directions.from_vectors(np.ones((1, 2, 24)), [1], per="item", groups="ab")
    with pytest.raises(CtlensError, match="each of 2 groups"):
        both.by_hook(base)


def test_random_directions_keep_norms_and_angles_and_depend_on_the_seed():
    vectors = np.random.default_rng(0).normal(size=(2, 5, 8)) + 1
    given = Directions.from_vectors(vectors, [0, 1], per="item", groups="abcde")
    drawn = given.random(4, seed=1)
    for draw in drawn:
        np.testing.assert_allclose(draw @ draw.swapaxes(-1, -2), given.unit @ given.unit.swapaxes(-1, -2), atol=1e-9)
    assert (drawn == given.random(4, seed=1)).all() and np.abs(drawn - given.random(4, seed=2)).max() > 0.1
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1 and np.abs(drawn[0] - given.unit).max() > 0.1


def test_random_directions_point_everywhere():
    drawn = Directions.from_vectors([[1.0, 0, 0]], [0]).random(2000)[:, 0, 0]
    np.testing.assert_allclose(drawn.mean(0), 0, atol=0.06)
    np.testing.assert_allclose(drawn.T @ drawn / 2000, np.eye(3) / 3, atol=0.04)


def test_results_round_trip_through_a_file_and_are_drawn(models, direction: Directions, tmp_path):
    found = steer(models, planted.pairs(), direction, draws=2, progress=False)
    found.save(tmp_path / "steer.safetensors")
    again = Intervention.load(tmp_path / "steer.safetensors")
    assert (again.logit_diffs == found.logit_diffs).all() and again.variants == found.variants
    assert again.to_dataframe().equals(found.to_dataframe())
    direction.save(tmp_path / "direction.safetensors")
    assert (Directions.load(tmp_path / "direction.safetensors").unit == direction.unit).all()
    line = next(trace for trace in direction.figure().data if trace.mode and "markers" in trace.mode)
    assert list(line.x) == [1, 2] and line.y == pytest.approx(direction.norm[:, 0])
    by_alpha = found.figure("alpha", at=2)
    by_layer = found.figure()
    line = next(trace for trace in by_alpha.data if trace.name == "the direction")
    np.testing.assert_allclose(line.y, found.effects[0, 1, :, 0].mean(-1))
    band = next(trace for trace in by_layer.data if trace.name == "random directions")
    np.testing.assert_allclose(band.y[:2], found.random_band[1][0, :, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": Directions.from_vectors([[1.0, 2.0]], [1])}, "has 2 numbers, but the model's states 24"),
        ({"direction": Directions.from_vectors(np.ones((1, 24)), [7])}, "layer 7 does not exist"),
        ({"layers": [0]}, "no direction at layer 0, only at 1, 2"),
        ({"layers": "last"}, "no direction at layer last"),
        ({"layers": []}, "name at least one"),
        ({"positions": "wrapper"}, "no wrapper"),
        ({"positions": lambda row, side: []}, "no token at these positions"),
        ({"draws": 1}, "at least 2 random directions"),
        ({"alphas": []}, "nothing to do"),
        ({"nulls": ["uniform"]}, "unknown kind of random direction 'uniform'"),
        ({"nulls": []}, "says nothing without a null"),
        ({"concepts": {"opposite": Directions.from_vectors(np.ones((2, 24)), [1, 2])}}, "name of another variant"),
        ({"concepts": {"x": Directions.from_vectors(np.ones((1, 24)), [1])}}, "no direction at layer 2"),
        ({"concepts": {"x": Directions.from_vectors(np.ones((2, 24)), [1, 2], site="attn_out")}}, "is at attn_out"),
        ({"models": {}}, "no models"),
        ({"pairs": [Pair(prompt("ada ?"), prompt("never ada ?"))]}, "no good and bad answer that differ"),
        ({"pairs": [Pair(prompt("ada ?", "yes", "yes"), prompt("never ada ?"))]}, "no good and bad answer that differ"),
        ({"pairs": [Pair(prompt("is it " * 7 + "?", "yes", "no"), prompt("is it " * 7 + "?"))]}, "context"),
    ],
)
def test_what_cannot_be_steered_is_refused(base: LensModel, direction: Directions, change: dict, message: str):
    options = {"models": {"base": base}, "pairs": planted.pairs(), "direction": direction, "progress": False} | change
    with pytest.raises(CtlensError, match=message):
        steer(options.pop("models"), options.pop("pairs"), options.pop("direction"), **options)


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        (np.zeros((1, 3)), {}, "layer 4 has no length"),
        ([[np.nan, 1.0]], {}, "layer 4 has no length"),
        (np.ones((2, 3)), {}, "one vector per layer and group is expected"),
        (np.ones(3), {}, "one vector per layer and group is expected"),
        (np.ones((1, 3)), {"site": "pattern"}, "unknown site of directions"),
    ],
)
def test_what_is_no_direction_is_refused(vectors, options: dict, message: str):
    with pytest.raises(CtlensError, match=message):
        Directions.from_vectors(vectors, [4], **options)


def test_pairs_without_a_direction_of_their_own_are_refused(base: LensModel):
    few = planted.pairs()[:2]
    rest = planted.pairs()[2:]
    each = mean_difference(base, few, name="base", per="item", layers=[1], progress=False)
    with pytest.raises(CtlensError, match="no direction for the item 'ada"):
        steer({"base": base}, rest, each, progress=False)
    with pytest.raises(CtlensError, match="unknown label 'hunt'; did you mean 'hint'"):
        mean_difference(base, few, name="base", per="hunt", layers=[1], progress=False)


def test_models_in_training_mode_or_of_other_words_are_refused(base: LensModel, direction: Directions):
    training = planted.model()
    training.train()
    with pytest.raises(CtlensError, match="eval mode"):
        steer({"base": training}, planted.pairs(), direction, progress=False)
    other = planted.model()
    other.tokenizer = byte_level_tokenizer(chat=True)
    with pytest.raises(CtlensError, match="do not compare"):
        steer({"base": base, "other": other}, planted.pairs(), direction, progress=False)


@pytest.mark.parametrize(("over", "at", "message"), [("depth", None, "over 'layer' or"), ("layer", 3, "nothing at 3")])
def test_a_figure_of_what_was_not_measured_is_refused(base, direction: Directions, over, at, message):
    found = steer({"base": base}, planted.pairs(), direction, draws=2, progress=False)
    with pytest.raises(CtlensError, match=message):
        found.figure(over, at)
