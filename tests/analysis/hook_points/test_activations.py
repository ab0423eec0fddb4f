"""Activations by hook name, against plain passes, and one patch against the sweep that it is a cell of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import CHAT_MODELS, chat_model

from ctlens import capture, load_organism, patch_one, threats
from ctlens.analysis import patch
from ctlens.core.errors import CtlensError
from ctlens.data.chat import render
from ctlens.data.pairs import prompt
from ctlens.models.hooks import SHORTHANDS

PAIRS = threats.get("sycophancy").pairs(3, split="heldout")


@pytest.mark.boundary
@pytest.mark.parametrize("kind", CHAT_MODELS)
def test_activations_are_those_of_each_prompt_alone(kind: str) -> None:
    model = chat_model(kind)
    texts = ["Is it right?", "Which term best describes the disease?"]
    found = capture(model, texts, ["resid_post", "blocks.0.attn.hook_pattern"])

    assert list(found) == [*(f"blocks.{layer}.hook_resid_post" for layer in range(2)), "blocks.0.attn.hook_pattern"]
    for number, text in enumerate(texts):
        ids = render(model.tokenizer, prompt(text).turns).ids
        seen = {}
        names = list(found)
        hooks = [(name, _keeping(seen, name)) for name in names]
        with model.hooks(hooks), torch.no_grad():
            model(torch.tensor([ids]))
        for name in names:
            torch.testing.assert_close(found[name][number], seen[name][0])
        assert len(found.tokens[number]) == len(ids) == found[names[0]][number].shape[0]
    alone = capture(model, texts[1], "resid_post")
    torch.testing.assert_close(alone["blocks.1.hook_resid_post"][0], found["blocks.1.hook_resid_post"][1])


def _keeping(seen: dict[str, torch.Tensor], name: str):
    def keep(activation: torch.Tensor, hook: object) -> None:
        seen[name] = activation.clone()

    return keep


def test_prompts_and_tokens_are_taken_as_they_are() -> None:
    model = load_organism()
    wrapped = PAIRS[0].wrapped
    ids = list(render(model.tokenizer, wrapped.turns).ids)

    one = capture(model, wrapped, "hook_embed")["hook_embed"]
    for given in (ids, [ids], torch.tensor(ids), torch.tensor([ids]), [wrapped]):
        (again,) = capture(model, given, "hook_embed")["hook_embed"]
        torch.testing.assert_close(again, one[0])
    assert repr(capture(model, ids, "hook_embed")) == "Captured(1 prompts at hook_embed)"


@pytest.mark.parametrize(
    ("prompts", "names", "message"),
    [
        ([], "resid_post", "at least one prompt"),
        ([[]], "resid_post", "has no tokens"),
        (["hello", 1, 2], "resid_post", "prompts must be a text or"),
        ([1, 2], [], "at least one prompt and one name"),
        ([1, 2], "resid_pots", "unknown hook point 'resid_pots'.*resid_post"),
    ],
)
def test_nothing_to_capture_is_refused(prompts: list, names: object, message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        capture(load_organism(), prompts, names)  # type: ignore[arg-type]


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(CtlensError, match="eval"):
        capture(load_organism().train(), [1, 2], "resid_post")  # type: ignore[attr-defined]


@pytest.mark.parametrize(("site", "head"), [("resid_pre", None), ("z", 2)])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_one_patch_is_a_cell_of_the_sweep(site: str, head: int | None, direction: str) -> None:
    model = load_organism()
    swept = patch(model, PAIRS[:1], site=site, direction=direction, progress=False)
    cell = (0, 2, *(() if head is None else (head,)), -3, 0)

    one = patch_one(model, PAIRS[0], site, 2, -3, head=head, direction=direction)
    assert one.patched == pytest.approx(swept.values[cell], abs=1e-5)
    assert (one.target, one.source) == pytest.approx((swept.target[0, 0], swept.source[0, 0]), abs=1e-5)
    assert one.share == pytest.approx((one.patched - one.target) / (one.source - one.target))
    assert np.isnan(one._replace(source=one.target).share)
    in_full = SHORTHANDS[site].format(layer=2)
    assert patch_one(model, PAIRS[0], in_full, position=-3, head=head, direction=direction) == one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "z"}, "z has heads: name one"),
        ({"site": "resid_pre", "head": 0}, "resid_pre has no heads"),
        ({"site": "z", "head": 4}, "head 4 does not exist: z has heads 0 to 3"),
        ({"site": "resid_pre", "position": 99}, "aligned tokens, and none at 99"),
        ({"site": "resid_pre", "layer": 9}, "layer 9 does not exist"),
        ({"site": "resid_pre", "layer": None}, "resid_pre is a site of every layer: name a layer"),
        ({"site": "blocks.1.hook_resid_pre", "layer": 2}, "stands in layer 1, and the layers are 2"),
    ],
)
def test_an_activation_that_is_not_there_is_refused(options: dict, message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        patch_one(load_organism(), PAIRS[0], **{"layer": 0, **options})


def test_a_hook_point_that_was_not_captured_is_named_with_those_that_were():
    found = capture(load_organism(), "what is the color of mira ?", ["hook_embed"])
    with pytest.raises(KeyError) as refusal:
        found["resid_post"]
    assert isinstance(refusal.value, CtlensError)
    assert str(refusal.value) == "'resid_post' was not captured: name one in full, of hook_embed."
