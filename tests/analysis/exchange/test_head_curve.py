"""Head curves: every value is that of one plain forward pass; a head that carries everything is a step at its rank."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from helpers import planted
from helpers.models import CHAT_MODELS, chat_model
from helpers.patching import CLOSE, logit_diff
from helpers.transplants import PAIRS, edited, moved

from ctlens.analysis import HeadCurve, attention_diff, head_curve, transplant
from ctlens.analysis.exchange import head_curve as head_curve_module
from ctlens.analysis.exchange.transplant import same_prompts
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import encode
from ctlens.models.parameters import copy_model, fingerprint

RANKING = [(1, 2), (0, 3), (0, 0), (1, 1), (1, 0), (0, 1), (0, 2), (1, 3)]


@pytest.fixture(scope="module", params=CHAT_MODELS)
def models(request: pytest.FixtureRequest) -> tuple[LensModel, LensModel]:
    """Source and target."""
    target = chat_model(request.param)
    return moved(target), target


def curve_of(models: tuple[LensModel, LensModel], pairs: Any = PAIRS, **options: Any) -> HeadCurve:
    return head_curve(*models, pairs, **{"draws": 2, "progress": False} | options)


@pytest.mark.boundary
@pytest.mark.parametrize("positions", ["all", "last"])
def test_every_value_is_that_of_one_plain_forward_pass(models: tuple[LensModel, LensModel], positions: str):
    source, target = models
    found = curve_of(models, ranking=RANKING, positions=positions)
    ids = encode(PAIRS[1:2], target.tokenizer, n_ctx=256).rows[0].wrapped.ids
    draw = np.random.default_rng(0)
    orders = [RANKING, *([list(product(range(2), range(4)))[n] for n in draw.permutation(8)] for _ in range(2))]
    first = 0 if positions == "all" else len(ids) - 1

    def put(theirs: torch.Tensor, heads: list[int], z: torch.Tensor, hook: Any) -> torch.Tensor:
        new = z.clone()
        new[0, first:, heads] = theirs[0, first:, heads]
        return new

    for quantity, (model, other) in enumerate(((target, source), (source, target))):
        theirs = other.run_with_cache(torch.tensor([ids]))[1]
        for order, count in product(range(3), range(9)):
            hooks = [
                (name, partial(put, theirs[name].detach(), [head for of, head in orders[order][:count] if of == layer]))
                for layer, name in enumerate(f"blocks.{number}.attn.hook_z" for number in range(2))
            ]
            expected = logit_diff(model, ids, hooks)
            assert found.values[quantity, 0, order, count, 1] == pytest.approx(expected, abs=2e-5), (order, count)
        assert found.unpatched[quantity, 0, 1] == pytest.approx(logit_diff(model, ids, []), abs=1e-5)
        assert found.source[quantity, 0, 1] == pytest.approx(logit_diff(other, ids, []), abs=1e-5)
    assert np.abs(np.diff(found.values, axis=3)).max() > 1e-3


def test_one_head_is_a_transplant_of_it_and_no_head_changes_nothing(models: tuple[LensModel, LensModel]):
    found = curve_of(models, ranking=RANKING, metrics=("logit_diff", "kl"))
    alone = transplant(*models, PAIRS, site="z", positions="all", metrics=("logit_diff", "kl"), progress=False)

    layer, head = RANKING[0]
    np.testing.assert_allclose(found.values[:, :, 0, 1], alone.values[:, :, layer, head, 0], **CLOSE)
    for order in range(3):
        np.testing.assert_array_equal(found.values[:, :, order, 0], found.unpatched)
        np.testing.assert_array_equal(found.values[:, :, order, -1], found.values[:, :, 0, -1])
    np.testing.assert_allclose(found.unpatched, alone.unpatched, **CLOSE)
    np.testing.assert_allclose(found.source, alone.source, **CLOSE)


def test_by_default_the_heads_come_by_their_change_of_attention(models: tuple[LensModel, LensModel]):
    source, target = models
    found = curve_of(models, counts=[3])
    changes = attention_diff(target, source, PAIRS, progress=False).to_dataframe()
    expected = changes.query("quantity == 'mass' and queries == 'last' and keys == 'wrapper'")

    assert (
        list(zip(found.layers, found.heads, strict=True)) == expected[["layer", "head"]].apply(tuple, axis=1).tolist()
    )
    assert found.counts == (0, 3, 8)
    every = curve_of(models)
    np.testing.assert_array_equal(found.values, every.values[:, :, :, [0, 3, 8]])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_curve_steps_at_the_rank_of_the_one_head_that_carries_everything(rank: int):
    repaired = edited("W_K")  # the head of layer 1 no longer finds the cue
    base = planted.model()
    pairs = planted.pairs()
    others = [(0, 0), (2, 0)]
    ranking = [*others[: rank - 1], (1, 0), *others[rank - 1 :]]
    found = head_curve(repaired, base, pairs, ranking=ranking, draws=19, progress=False)

    for quantity in range(2):
        for count in range(4):
            there = found.source if count >= rank else found.unpatched
            np.testing.assert_allclose(found.values[quantity, 0, 0, count], there[quantity, 0], atol=1e-4)
    assert abs(found.effect()).min() > 1
    draw = np.random.default_rng(0)
    at = [1 + draw.permutation(3).tolist().index(1) for _ in range(19)]  # heads in order of layers: the second carries
    assert set(at) == {1, 2, 3}  # the random orders lie on both sides
    needed = found.heads_needed()
    assert needed["n_heads"].tolist() == [rank, rank]
    assert needed[["ci_low", "ci_high"]].to_numpy().tolist() == [[rank, rank]] * 2
    assert needed[["random_low", "random_median", "random_high"]].to_numpy().tolist() == [[1, np.median(at), 3]] * 2
    assert needed["p_random"].tolist() == pytest.approx([(1 + sum(n <= rank for n in at)) / 20] * 2)
    default = head_curve(repaired, base, pairs, draws=1, progress=False)
    assert (default.layers[0], default.heads[0]) == (1, 0)


def test_matched_orders_swap_heads_whose_outputs_changed_about_as_much(models: tuple[LensModel, LensModel]):
    source, target = models
    ids = [row.wrapped.ids for row in encode(PAIRS, target.tokenizer, n_ctx=256).rows]
    changes = np.zeros((2, 4))
    for tokens in ids:
        runs = [model.run_with_cache(torch.tensor([tokens]))[1] for model in models]
        for layer in range(2):
            states = [run[f"blocks.{layer}.attn.hook_z"] for run in runs]
            changes[layer] += (states[0] - states[1]).detach().square().sum((0, 1, 3)).numpy()
    by_change = sorted(product(range(2), range(4)), key=lambda head: changes[head])
    sets = [set(by_change[:4]), set(by_change[4:])]

    assert head_curve_module._alike((target, source), [same_prompts(target, PAIRS, "wrapped", ("all",))]) == [
        by_change[:4],
        by_change[4:],
    ]
    for order in head_curve_module._swapped(RANKING, [list(one) for one in sets], 5, 0):
        assert sorted(order) == sorted(RANKING)
        assert [next(n for n, of in enumerate(sets) if head in of) for head in order] == [
            next(n for n, of in enumerate(sets) if head in of) for head in RANKING
        ]
    found = curve_of(models, ranking=RANKING, matched=True)
    plain = curve_of(models, ranking=RANKING)
    assert found.matched and not plain.matched
    np.testing.assert_allclose(found.values[:, :, 0], plain.values[:, :, 0], **CLOSE)
    assert np.abs(found.values[:, :, 1:] - plain.values[:, :, 1:]).max() > 1e-4


def test_pairs_in_another_order_and_in_groups_give_equal_answers(models: tuple[LensModel, LensModel]):
    together = curve_of(models, metrics=("logit_diff", "kl"))
    turned = curve_of(models, PAIRS[::-1], metrics=("logit_diff", "kl"), max_batch=2)

    assert (turned.layers, turned.heads) == (together.layers, together.heads)
    for name in ("values", "unpatched", "source"):
        np.testing.assert_allclose(getattr(turned, name)[..., ::-1], getattr(together, name), **CLOSE)


def test_exchanged_models_exchange_the_directions_and_stay_as_they_are(models: tuple[LensModel, LensModel]):
    before = [fingerprint(model) for model in models]
    there = curve_of(models, ranking=RANKING)
    back = curve_of(models[::-1], ranking=RANKING)

    np.testing.assert_allclose(back.values[::-1], there.values, **CLOSE)
    assert [fingerprint(model) for model in models] == before


def by_hand(values: Any, source: float) -> HeadCurve:
    """One metric, two directions alike: `[order, count, pair]`, from 0 without a head."""
    found = np.array([[values], [values]], dtype=float)
    ends = np.zeros((2, 1, found.shape[-1]))
    counts = tuple(range(found.shape[3]))
    where = {"layers": (0, 0, 1), "heads": (0, 1, 0), "ranked_by": "given", "positions": "all", "side": "wrapped"}
    return HeadCurve(found, ends, ends + source, ("logit_diff",), counts=counts, matched=False, **where)


def test_the_heads_needed_are_counted_against_what_all_heads_bring():
    ranked = [[0, 0], [2, 1], [3, 4], [4, 4]]  # means 0, 1.5, 3.5 and 4 of an effect of 10
    slow = [[0, 0], [0, 1], [1, 1], [4, 4]]
    found = by_hand([ranked, slow, slow, ranked], source=10.0)
    table = found.heads_needed(0.8)  # of 4 that all heads bring

    assert table["whole"].tolist() == [4, 4]
    assert table["n_heads"].tolist() == [2, 2]
    assert table[["random_low", "random_median", "random_high"]].to_numpy().tolist() == [[2, 3, 3]] * 2
    assert table["p_random"].tolist() == [0.5, 0.5]  # the ranking and one draw, of four orders
    assert found.heads_needed(0.3)["n_heads"].tolist() == [1, 1] and found.heads_needed(1.0)["n_heads"].tolist() == [
        3,
        3,
    ]
    falling = by_hand([[[-n for n in row] for row in ranked]] * 2, source=-10.0)
    assert falling.heads_needed(0.8)["n_heads"].tolist() == [2, 2]


def test_the_interval_of_the_heads_needed_holds_what_single_pairs_need():
    fast = [0, 4, 4, 4]
    late = [0, 0, 0, 4]
    curves = np.array([*[fast] * 5, *[late] * 5]).T  # the mean reaches 0.8 with the third head alone
    table = by_hand([curves, curves], source=4.0).heads_needed(0.8)

    assert table[["n_heads", "ci_low", "ci_high"]].to_numpy().tolist() == [[3, 1, 3]] * 2  # all fast in 2.5% or more


def test_what_all_heads_do_not_bring_is_not_counted():
    still = [[0, 0], [0.1, 0], [0.1, 0.2], [0.2, 0.2]]
    table = by_hand([still, still], source=10.0).heads_needed()

    assert table["whole"].tolist() == pytest.approx([0.2, 0.2])
    assert table.drop(columns=["quantity", "metric", "share", "whole", "n_pairs"]).isna().to_numpy().all()


def test_the_result_survives_saving_and_its_figure_holds_its_numbers(tmp_path: Any):
    found = head_curve(edited("W_K"), planted.model(), planted.pairs(), draws=5, progress=False)
    found.save(tmp_path / "curve.safetensors")

    assert HeadCurve.load(tmp_path / "curve.safetensors").normalised().equals(found.normalised())
    figure: Any = found.figure()
    drawn = [trace for trace in figure.data if trace.name == "ranked heads"]
    table = found.normalised().query("order == 'ranked'")
    for trace, quantity in zip(drawn, ("sufficient", "lost"), strict=True):
        np.testing.assert_allclose(trace.y, table.query(f"quantity == '{quantity}'")["value"])
        assert list(trace.x) == [0, 1, 2, 3]


def test_what_does_not_fit_is_refused(models: tuple[LensModel, LensModel]):
    for ranking, message in (
        (RANKING[:-1], r"names head 3 of layer 1 0 times.*name each of these heads once"),
        ([*RANKING, (0, 0)], "names head 0 of layer 0 2 times"),
        ([*RANKING[:-1], (2, 0)], "names head 0 of layer 2 1 times, and the model has layers 0 to 1"),
    ):
        with pytest.raises(CtlensError, match=message):
            curve_of(models, ranking=ranking)
    with pytest.raises(CtlensError, match="counts has 9, but the model has 8 heads"):
        curve_of(models, counts=[9])
    with pytest.raises(CtlensError, match="unknown choice of positions"):
        curve_of(models, positions="middle")
    with pytest.raises(CtlensError, match="eval mode"):
        curve_of((copy_model(models[0]).train(), models[1]))
    same = curve_of((models[1], copy_model(models[1])))
    assert same.heads_needed()["n_heads"].isna().all()
    with pytest.raises(CtlensError, match="logit_diff differs by 0 between source and target"):
        same.figure()
    with pytest.raises(CtlensError, match="share is a probability"):
        same.heads_needed(0.0)
