"""Every HuggingFace architecture that is claimed: activations and edits are its own, and models.md is what runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import Call
from helpers.tiers import unit_first
from torch import Tensor, nn
from transformers import PreTrainedModel

from ctlens import compatibility as support
from ctlens.core.errors import CtlensError
from ctlens.models.architectures import ARCHITECTURES, tiny_model
from ctlens.models.hooks import editing, resolve, run, run_capturing
from ctlens.models.loading import load_model
from ctlens.models.parameters import fingerprint, parameter_groups, present_parameters
from ctlens.organism import load_organism

pytestmark = pytest.mark.boundary

PAGE = Path(__file__).parents[2] / "docs/models.md"
TOKENS = torch.randint(1, 380, (3, 12), generator=torch.Generator().manual_seed(1))
STACKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "gemma3": "model.language_model.layers"}
# Architectures that norm what attention and MLP give before it is added to the residual stream.
POST_NORMS = dict.fromkeys(
    ("gemma2", "gemma3", "gemma3_text", "olmo2"), ("post_attention_layernorm", "post_feedforward_layernorm")
)
ATTENTION = {"gpt2": "attn", "gpt_neox": "attention"}
MERGE = {"gpt2": "c_proj", "gpt_neox": "dense"}
DOWN = {"gpt2": "c_proj", "gpt_neox": "dense_4h_to_h"}

Place = tuple[nn.Module, str]
"""A HuggingFace module, and whether its input or its output is meant."""


def places(architecture: str, hf: PreTrainedModel, layer: int) -> dict[str, Place]:
    """Where HuggingFace has what a hook point is, written down by hand."""
    block: Any = hf.get_submodule(STACKS.get(architecture, "model.layers"))[layer]  # type: ignore[index]
    attention = getattr(block, ATTENTION.get(architecture, "self_attn"))
    mlp = block.mlp
    added = [getattr(block, name) for name in POST_NORMS.get(architecture, ())] or [attention, mlp]
    return {
        f"blocks.{layer}.hook_resid_pre": (block, "input"),
        f"blocks.{layer}.hook_resid_post": (block, "output"),
        f"blocks.{layer}.hook_attn_out": (added[0], "output"),
        f"blocks.{layer}.hook_mlp_out": (added[1], "output"),
        f"blocks.{layer}.attn.hook_z": (getattr(attention, MERGE.get(architecture, "o_proj")), "input"),
        f"blocks.{layer}.mlp.hook_post": (getattr(mlp, DOWN.get(architecture, "down_proj")), "input"),
    }


def watched(place: Place, change: Callable[[Tensor], Tensor]) -> Any:
    """A hook that passes the place's tensor through `change`."""
    module, side = place

    def on_input(
        _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), options
        return args, {**options, "hidden_states": change(options["hidden_states"])}

    def on_output(_: nn.Module, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    if side == "input":
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)


@pytest.fixture(scope="module", params=unit_first(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_every_activation_is_that_of_huggingface(architecture: str) -> None:
    hf: Any = tiny_model(architecture)
    hf.set_attn_implementation("eager")
    seen: dict[str, Tensor] = {}
    for layer in range(2):
        for name, place in places(architecture, hf, layer).items():
            watched(place, lambda value, name=name: seen.setdefault(name, value))
    attentions = hf(TOKENS, output_attentions=True).attentions
    seen |= {f"blocks.{layer}.attn.hook_pattern": attention for layer, attention in enumerate(attentions)}

    _, found = run_capturing(load_model(tiny_model(architecture)), TOKENS, seen, grad=False)

    assert len(seen) == 14
    for name, value in seen.items():
        torch.testing.assert_close(found[name].reshape(value.shape), value, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_edit_does_what_the_same_edit_does_inside_huggingface(architecture: str) -> None:
    hf: Any = tiny_model(architecture)
    model = load_model(hf)
    draw = torch.Generator().manual_seed(2)
    plain = run(model, TOKENS)
    for name, place in places(architecture, hf, 0).items():
        _, found = run_capturing(model, TOKENS, [name], grad=False)
        new = torch.randn(found[name].shape, generator=draw)
        hook = watched(place, lambda value, new=new: new.reshape(value.shape))
        expected = hf(TOKENS).logits
        hook.remove()
        with editing(model, {name: lambda _, new=new: new}):
            edited = run(model, TOKENS)
        torch.testing.assert_close(edited, expected, atol=2e-5, rtol=1e-4)
        assert (edited - plain).abs().max() > 0.1, name


def test_the_page_is_what_runs(architecture: str) -> None:
    found = support.support([architecture], progress=False)

    row, *reasons = [
        line for line in support.support_page(found).splitlines() if line.strip("|- ").startswith(architecture)
    ]

    assert not found[0].wrong
    assert set(found[0].refusals) == set(support.CHECKS)
    page = PAGE.read_text().splitlines()
    assert row in page and all(reason in page for reason in reasons)
    assert len(reasons) == row.count("| no |") == (1 if architecture == "gpt_neox" else 0)


def test_the_page_has_a_row_an_architecture_and_nothing_else() -> None:
    named = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    first = named.index("architecture")
    assert named[first:] == ["architecture", *ARCHITECTURES]
    assert named[:first] == ["`load_model` takes", *support.SOURCE_KINDS]


def test_a_parallel_block_says_that_it_has_no_resid_mid() -> None:
    model = load_model(tiny_model("gpt_neox"))
    for name in ("resid_mid", "blocks.1.hook_resid_mid"):
        with pytest.raises(CtlensError, match="no resid_mid.*side by side; name resid_pre or resid_post"):
            resolve(model, name)
    with pytest.raises(CtlensError, match="unknown hook point"):
        resolve(model, "blocks.9.hook_resid_mid")


@pytest.mark.slow
def test_wrong_numbers_are_told_from_refusals() -> None:
    tokenizer = load_organism().tokenizer
    subject = support.CheckedModel(tiny_model("gpt_neox", vocab_size=len(tokenizer)), tokenizer)
    next(iter(subject.hf.get_output_embeddings().parameters())).data[3, 2] += 1.0

    found = support.examine("gpt_neox", subject)

    assert set(found.wrong) == {"logits"} and "logits differs by" in found.wrong["logits"]
    row = support.support_table([found]).iloc[0]
    assert (row["logits"], row["mid"], row["resid"]) == ("WRONG", "no", "yes")


def test_a_vision_tower_is_kept_and_in_no_group() -> None:
    model = load_model(tiny_model("gemma3"))
    grouped = {name for names in parameter_groups(model).values() for name in names}
    left = present_parameters(model).keys() - grouped
    assert left and all("vision" in name or "multi_modal" in name for name in left)
    before = fingerprint(model)
    present_parameters(model)[min(left)].data += 1
    assert fingerprint(model) != before


@pytest.mark.slow
def test_the_command_prints_the_table_and_the_reasons(call: Call) -> None:
    ended = call("models --architectures gpt_neox --quiet")
    assert ended.code == 0 and ended.err == ""
    lines = [line.split() for line in ended.out.splitlines()]
    expected = ["no" if check == "mid" else "yes" for check in support.CHECKS]
    assert ["gpt_neox", *expected] in lines
    assert "gpt_neox, mid: this model has no resid_mid" in ended.out
    refused = call("models --architectures lama")
    assert refused.code == 2 and "did you mean 'llama'" in refused.err
