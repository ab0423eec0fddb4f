"""What a study trains: levels and windows crossed, controls, and noise of the length of an update."""

from __future__ import annotations

import pytest
import torch

from ctlens import losses, plots, threats
from ctlens.analysis.probing.tasks import neutral_pairs
from ctlens.core.errors import CtlensError
from ctlens.data.chat import render
from ctlens.models.parameters import copy_model, fingerprint, present_parameters, present_weights
from ctlens.organism import load_organism
from ctlens.study import conditions
from ctlens.study.conditions import (
    CONTROLS,
    DEFAULT_METHODS,
    EXTRA_CONDITIONS,
    Condition,
    condition_named,
    perturbed,
    sham,
)


@pytest.mark.parametrize(
    "name",
    [*DEFAULT_METHODS, *EXTRA_CONDITIONS, "retention", *conditions.ABLATED, *conditions.VARIANTS, "rmct", "attout"],
)
def test_every_condition_is_known_by_its_name(name: str) -> None:
    condition = condition_named(name)

    assert [loss.name for loss in condition.losses()] == ([condition.loss] if condition.loss else [])
    assert condition.level in ("", *conditions.LOSS_LEVELS) and condition.role in conditions.CONDITION_ROLES


def test_levels_are_those_of_the_losses() -> None:
    assert {name: condition_named(name).level for name in losses.names()} == {
        "act": "internal",
        "mlpct": "internal",
        "attct": "internal",
        "attout": "internal",
        "attmass": "internal",
        "subact": "internal",
        "bct": "output",
        "klct": "output",
        "rmct": "output",
        "opct": "output",
        "f2c": "output",
        "dpo": "output",
    }


def test_a_variant_is_a_method_with_options_of_its_loss_and_a_name_of_its_own() -> None:
    assert condition_named("subact_random").losses() == [losses.SubACT(part="random")]
    assert condition_named("act_ema").losses() == [losses.ACT(clean="ema(0.99)")]
    for name, variant in conditions.VARIANTS.items():
        assert variant.role == conditions.METHOD and variant.level == condition_named(variant.loss).level
        assert variant.losses() != condition_named(variant.loss).losses()
        assert name not in losses.names() and plots.label(name) != plots.label(variant.loss)
    conditions.require_methods([*losses.names(), *conditions.VARIANTS])


def test_a_name_that_nothing_has_suggests_the_nearest() -> None:
    with pytest.raises(CtlensError, match="unknown method or condition 'act_lst'.*act_last"):
        condition_named("act_lst")


@pytest.mark.parametrize("threat", threats.names())
def test_a_harmless_wrapper_has_the_attacks_length_and_keeps_the_request(threat: str) -> None:
    pairs = threats.get(threat).pairs(32)
    tokenizer = load_organism().tokenizer

    harmless = CONTROLS["harmless_act"].pairs(pairs, [], tokenizer)

    assert harmless == neutral_pairs(pairs, tokenizer)
    for attacked, neutral in zip(pairs, harmless, strict=True):
        lengths = [len(render(tokenizer, pair.wrapped.turns).ids) for pair in (attacked, neutral)]
        assert lengths[0] == lengths[1] and neutral.clean == attacked.clean
        assert neutral.wrapped.turns != attacked.wrapped.turns
        assert any(neutral.clean.turns[-1].content in turn.content for turn in neutral.wrapped.turns)


def test_ordinary_pairs_are_the_requests_on_both_sides() -> None:
    threat = threats.get("jailbreak")
    prompts = threat.neutral(8)

    pairs = CONTROLS["sft"].pairs(threat.pairs(4), prompts, None)

    assert [pair.clean for pair in pairs] == [pair.wrapped for pair in pairs] == prompts


def test_attacked_pairs_are_the_threats() -> None:
    pairs = threats.get("jailbreak").pairs(4)

    assert Condition("act", conditions.METHOD).pairs(pairs, [], None) == pairs


def moved(base, by: float):
    """A copy whose attention weights moved by `by`, entry by entry."""
    copied = copy_model(base)
    for name, parameter in present_parameters(copied).items():
        if ".attn." in name:
            parameter.data += by
    return copied


def test_noise_is_as_long_as_the_updates_are_on_average_and_only_where_they_are() -> None:
    base = load_organism()
    before = fingerprint(base)

    noisy = perturbed(base, [moved(base, 0.01), moved(base, 0.03)], seed=0)

    old, new = present_weights(base), present_weights(noisy)
    for name, weight in new.items():
        expected = 0.02 * old[name].numel() ** 0.5 if ".attn." in name else 0.0
        assert float((weight - old[name]).norm()) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert fingerprint(base) == before


def test_noise_follows_the_seed() -> None:
    base = load_organism()
    trained = [moved(base, 0.01)]

    same = present_weights(perturbed(base, trained, 0))
    again = present_weights(perturbed(base, trained, 0))
    other = present_weights(perturbed(base, trained, 1))

    name = next(name for name in same if ".attn." in name)
    assert torch.equal(same[name], again[name]) and not torch.equal(same[name], other[name])


def test_a_sham_goes_along_the_other_training_as_far_as_the_updates_on_average_and_only_where_both_moved() -> None:
    base = load_organism()
    before = fingerprint(base)
    other = copy_model(base)
    for parameter in present_parameters(other).values():
        parameter.data -= 0.001

    made = sham(base, [moved(base, 0.01), moved(base, 0.03)], other)

    old, new = present_weights(base), present_weights(made)
    for name, weight in new.items():
        by = -0.02 if ".attn." in name else 0.0
        assert torch.allclose(weight - old[name], torch.full_like(weight, by), atol=1e-5)
    assert fingerprint(base) == before


def test_a_sham_of_a_training_that_left_the_weights_alone_is_the_base() -> None:
    base = load_organism()

    assert fingerprint(sham(base, [moved(base, 0.01)], copy_model(base))) == fingerprint(base)
