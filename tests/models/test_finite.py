"""NaN is never a result: whatever runs a model refuses it, and names where it appeared first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import ODD, chat_model, hf_model, made, odd_model
from torch import nn

from ctlens import analysis
from ctlens.core.errors import NotFinite
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.evaluation import evaluate
from ctlens.losses import ACT, BCT, AttCT
from ctlens.models.finite import forward, is_finite
from ctlens.models.generation import generate
from ctlens.models.hooks import editing
from ctlens.models.loading import load_model
from ctlens.models.optimisation import adamw, clipped_update
from ctlens.models.parameters import copy_model
from ctlens.models.scoring import choose
from ctlens.training import TrainConfig, train

QUESTIONS = ("Is it right?", "When a creature experiences feeling, what?")
WRAPPERS = ("I don't think it's right. ", "I may be in the minority here. ")
PAIRS = [Pair(prompt(q, "yes", "no"), prompt(w + q, "yes", "no")) for q, w in zip(QUESTIONS, WRAPPERS, strict=True)]
CHOICE = Pair(PAIRS[0].clean, Prompt(PAIRS[0].wrapped.turns, "yes", "no", options=("yes", "no")))
QUIET: dict[str, Any] = {"progress": False}


def with_nan(model: LensModel, part: str, value: float = float("nan")) -> LensModel:
    """A copy in which one number of the first weight with this in its name is not finite."""
    broken = copy_model(model)
    weight = next(weight for name, weight in broken.named_parameters() if part in name)
    weight.data.view(-1)[0] = value
    return broken


@pytest.fixture(scope="module")
def model() -> LensModel:
    return made()


@pytest.fixture(scope="module")
def broken(model: LensModel) -> LensModel:
    return with_nan(model, "blocks.1.mlp.W_out")


REQUESTS: dict[str, Callable[[LensModel, LensModel], Any]] = {
    "evaluate": lambda model, broken: evaluate(broken, pairs=PAIRS, **QUIET),
    "evaluate a choice": lambda model, broken: evaluate(broken, pairs=[CHOICE], **QUIET),
    "generate": lambda model, broken: generate(broken, [(1, 2, 3)]),
    "choose": lambda model, broken: choose(broken, [CHOICE.wrapped]),
    "train": lambda model, broken: train(broken, PAIRS, ACT(), steps=1, **QUIET),
    "train on answers": lambda model, broken: train(broken, PAIRS, BCT(), steps=1, **QUIET),
    "patch": lambda model, broken: analysis.patch(broken, PAIRS, site="z", direction="noising", **QUIET),
    "attribution_patch": lambda model, broken: analysis.attribution_patch(
        broken, PAIRS, site="resid_pre", direction="noising", **QUIET
    ),
    "states": lambda model, broken: analysis.states(broken, PAIRS, **QUIET),
    "record": lambda model, broken: analysis.record(broken, PAIRS, **QUIET),
    "logit_lens": lambda model, broken: analysis.logit_lens(broken, PAIRS, **QUIET),
    "logit_attribution": lambda model, broken: analysis.logit_attribution(broken, PAIRS, **QUIET),
    "knockout": lambda model, broken: analysis.knockout(broken, PAIRS, **QUIET),
    "saliency_agreement": lambda model, broken: analysis.saliency_agreement(broken, PAIRS, **QUIET),
    "attention_maps": lambda model, broken: analysis.attention_maps(broken, PAIRS[0], layer=0, head=0),
    "residual_shift": lambda model, broken: analysis.residual_shift(model, broken, PAIRS, **QUIET),
    "attention_diff": lambda model, broken: analysis.attention_diff(model, broken, PAIRS, **QUIET),
    "gap_recovered": lambda model, broken: analysis.gap_recovered(model, broken, PAIRS, **QUIET),
    "graft": lambda model, broken: analysis.graft(broken, model, PAIRS, **QUIET),
    "transplant": lambda model, broken: analysis.transplant(broken, model, PAIRS, **QUIET),
    "mediation": lambda model, broken: analysis.mediation(model, PAIRS, trained=broken, **QUIET),
    "cross_loss": lambda model, broken: analysis.cross_loss(model, {"act": broken}, PAIRS, ACT(), **QUIET),
    "probe": lambda model, broken: analysis.probe(
        {"base": broken}, analysis.labelled([*PAIRS, *PAIRS], ["a", "a", "b", "b"]), folds=2, **QUIET
    ),
    "mean_difference": lambda model, broken: analysis.mean_difference(broken, PAIRS, name="wrapper", **QUIET),
    "update_rank": lambda model, broken: analysis.update_rank(model, broken),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_no_number_comes_of_a_model_that_computes_nan(name: str, model: LensModel, broken: LensModel) -> None:
    where = r"the weight blocks\.1" if name == "update_rank" else r"nan, first at blocks\.1\.hook_mlp_out"

    with pytest.raises(NotFinite, match=where):
        REQUESTS[name](model, broken)


@pytest.mark.boundary
def test_every_pass_names_the_prompt_and_the_weight(model: LensModel) -> None:
    right = set(model.tokenizer(QUESTIONS[0]).input_ids)
    creature = set(model.tokenizer(QUESTIONS[1]).input_ids)
    unlucky = copy_model(model)
    embedding = next(weight for name, weight in unlucky.named_parameters() if "embed" in name)
    embedding.data[min(creature - right)] = float("nan")  # a token that only the second question has

    with pytest.raises(NotFinite) as refusal:
        evaluate(unlucky, pairs=PAIRS, **QUIET)

    assert "nan, first at hook_embed, in the prompt" in str(refusal.value).replace("embed.hook_out", "hook_embed")
    assert "creature experiences feeling, what?" in str(refusal.value) and "its weight" in str(refusal.value)


@pytest.mark.boundary
def test_a_bridge_names_a_hook_by_the_name_that_capture_takes() -> None:
    bridge = chat_model("gpt2")
    broken = with_nan(bridge, "h.1._original_component.mlp")

    with pytest.raises(NotFinite, match=r"first at (blocks\.1\.[\w.]+), in the prompt") as refusal:
        analysis.states(broken, PAIRS, **QUIET)

    assert str(refusal.value).split("first at ")[1].split(",")[0] in bridge.hook_dict


def test_loading_a_model_with_nan_gives_the_true_reason() -> None:
    hf = hf_model("llama")
    hf.lm_head.weight.data[5, 3] = float("nan")

    with pytest.raises(NotFinite, match=r"computes nan or infinity: its weight lm_head\.weight"):
        load_model(hf, tokenizer=made().tokenizer)


def test_a_direction_that_is_not_finite_is_found_where_it_is_put_in(model: LensModel) -> None:
    direction = analysis.mean_difference(model, PAIRS, name="wrapper", **QUIET)
    wrong = replace(direction, unit=np.full_like(direction.unit, np.nan))

    with pytest.raises(NotFinite, match="its weights are finite, so lower what trains or edits it"):
        analysis.steer(model, PAIRS, wrong, layers=[0], **QUIET)


def test_an_edit_that_overflows_is_found_at_its_own_hook(model: LensModel) -> None:
    tokens = torch.arange(1, 6)[None]

    with editing(model, {"blocks.1.hook_resid_pre": lambda state: state * float("inf")}), pytest.raises(NotFinite) as r:
        forward(model, tokens)

    assert "first at blocks.1.hook_resid_pre" in str(r.value)


def test_minus_infinity_masks_and_nothing_else_is_let_through() -> None:
    logits = torch.zeros(2, 3, 5)
    logits[..., 2:] = -torch.inf  # all but two tokens masked

    assert is_finite(logits)
    for value in (torch.nan, torch.inf):
        wrong = logits.clone()
        wrong[1, 2, 0] = value
        assert not is_finite(wrong)
    logits[0, 0] = -torch.inf  # no token is left, and a softmax would be NaN
    assert not is_finite(logits)


@pytest.mark.parametrize("loss", [ACT(), AttCT(), BCT()], ids=lambda loss: loss.name)
def test_a_training_that_explodes_names_its_step_and_where(model: LensModel, loss: Any) -> None:
    with pytest.raises(NotFinite, match=r"at step 2 the model computes (nan|infinity), first"):
        train(model, PAIRS, loss, config=TrainConfig(steps=3, lr=1e30, warmup=0.0, trainable=("attn", "mlp")), **QUIET)


def test_a_gradient_that_is_not_finite_is_never_put_into_the_weights(model: LensModel) -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = adamw([weight], lr=1.0, weight_decay=0.0)
    weight.sqrt().sum().backward()  # the root's slope at zero

    with pytest.raises(NotFinite, match="the norm of the gradient is infinity"):
        clipped_update(optimizer, [weight], 1.0)
    assert weight.tolist() == [0, 0, 0]


# What some have behind the unembedding (a cap, a scale) and in front of it (a projection) stays where it is.
@pytest.mark.boundary
@pytest.mark.parametrize("name", ["made here", "gpt2", "gemma2", "granite", "opt"])
@torch.no_grad()
def test_chosen_positions_alone_are_unembedded_and_have_their_logits(name: str) -> None:
    model = load_model(odd_model(name)) if name in ODD else chat_model(name)
    tokens = torch.randint(1, 300, (3, 6), generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros_like(tokens, dtype=torch.bool)
    chosen[0, 5] = True
    chosen[2, 1:3] = True
    seen: list[int] = []
    whole = forward(model, tokens)
    unembed: nn.Module = model.unembed  # type: ignore[attr-defined]
    with_count = unembed.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))

    torch.testing.assert_close(forward(model, tokens, logits_at=chosen)[0], whole[chosen], atol=1e-5, rtol=1e-5)
    assert forward(model, tokens, logits_at=torch.zeros_like(chosen)).shape == (1, 0, whole.shape[-1])
    with_count.remove()
    assert seen == [3, 0] and torch.equal(forward(model, tokens), whole)


def test_nan_at_positions_that_nobody_reads_is_refused_too(broken: LensModel) -> None:
    tokens = torch.tensor([[1, 2, 3]])
    with pytest.raises(NotFinite, match=r"first at blocks\.1"):
        forward(broken, tokens, logits_at=torch.zeros_like(tokens, dtype=torch.bool))
