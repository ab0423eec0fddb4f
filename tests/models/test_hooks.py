"""A hook name means the same on every model class, and hooks are gone when a block ends, however it ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import hf_model
from helpers.tiers import unit_first
from torch import Tensor, nn

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.models.bridges import is_bridge
from ctlens.models.hooks import (
    FINAL_NORM,
    SHORTHANDS,
    capturing,
    editing,
    resolve,
    run,
    run_capturing,
    select_layers,
    site_at,
)
from ctlens.models.loading import build, load_model
from ctlens.models.weights import ModelConfig

pytestmark = pytest.mark.boundary

CONFIG = ModelConfig(d_vocab=400, n_layers=2, n_heads=4, d_model=32, d_mlp=48, n_ctx=40)
TOKENS = torch.randint(1, 400, (3, 7), generator=torch.Generator().manual_seed(1))
ALL = ("made here", "llama", "gpt2", "qwen3")
PRE = "blocks.0.hook_resid_pre"
MID = "blocks.0.hook_resid_mid"
POST = "blocks.0.hook_resid_post"
MLP_OUT = "blocks.0.hook_mlp_out"
ATTN_OUT = "blocks.0.hook_attn_out"


@pytest.fixture(scope="module", params=unit_first(ALL, 2))
def model(request: pytest.FixtureRequest) -> LensModel:
    return build(CONFIG) if request.param == "made here" else load_model(hf_model(request.param))


def every_point(model: LensModel) -> list[str]:
    return [name for shorthand in SHORTHANDS for name in resolve(model, shorthand)]


def hooks_on(model: LensModel) -> int:
    return sum(len(point.fwd_hooks) for point in model.hook_dict.values())


def close(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("last", (7,)),
        ("middle", (4,)),
        ("last_half", (4, 5, 6, 7)),
        ("last_quarter", (6, 7)),
        (3, (3,)),
        (-8, (0,)),
        ((5, -1, 0), (5, 7, 0)),
    ],
)
def test_layers_are_selected_as_one_counts_them_by_hand(layers: object, expected: tuple[int, ...]):
    assert select_layers(8, layers) == expected


@pytest.mark.parametrize("layers", ["all", "last", "middle", "last_half", "last_quarter"])
def test_every_named_selection_of_one_layer_is_that_layer(layers: str):
    assert select_layers(1, layers) == (0,)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (8, "layer 8 does not exist"),
        (-9, "0 to 7"),
        ([], "at least one"),
        ([7, -1], "once"),
        ("lsat", "did you mean 'last'"),
    ],
)
def test_selections_that_name_no_layer_are_refused(layers: object, message: str):
    with pytest.raises(CtlensError, match=message):
        select_layers(8, layers)


@pytest.mark.parametrize("site", SHORTHANDS)
def test_a_full_name_is_the_short_one_at_its_layer(site: str):
    full = SHORTHANDS[site].format(layer=11)
    assert site_at(full) == site_at(full, [11]) == (site, 11)
    assert site_at(site, [0, 2]) == (site, [0, 2])


def test_a_hook_point_without_a_short_name_keeps_its_own():
    assert site_at("blocks.2.attn.hook_q") == ("blocks.2.attn.hook_q", 2)
    assert site_at("hook_embed", "last") == ("hook_embed", "last")


@pytest.mark.parametrize("layers", [0, [1, 2], "last"])
def test_a_full_name_and_other_layers_are_refused(layers: Any):
    with pytest.raises(CtlensError, match="blocks.1.attn.hook_z stands in layer 1, and the layers are .*: leave the"):
        site_at("blocks.1.attn.hook_z", layers)


def test_shorthands_and_full_names_resolve(model: LensModel):
    assert resolve(model, "resid_post") == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert resolve(model, "pattern", "last") == ["blocks.1.attn.hook_pattern"]
    assert resolve(model, "hook_embed") == ["hook_embed"]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("resid_pots", "resid_post"), ("blocks.0.hook_resid_psot", POST), ("blocks.9.hook_resid_pre", PRE)],
)
def test_an_unknown_point_is_refused_with_the_nearest_names(model: LensModel, wrong: str, right: str):
    with pytest.raises(CtlensError, match=f"unknown hook point.*did you mean.*'{right}'"):
        resolve(model, wrong)


def test_captures_are_keyed_by_the_requested_names_and_shaped_by_their_kind(model: LensModel):
    logits, store = run_capturing(model, TOKENS, every_point(model), grad=False)
    assert set(store) == set(every_point(model))
    shapes = {"pattern": (3, 4, 7, 7), "z": (3, 7, 4, 8), "mlp_post": (3, 7, model.cfg.d_mlp)}
    for shorthand in SHORTHANDS:
        assert store[resolve(model, shorthand)[0]].shape == shapes.get(shorthand, (3, 7, 32)), shorthand
    assert torch.equal(logits, run(model, TOKENS))


def test_patterns_are_causal_distributions(model: LensModel):
    _, store = run_capturing(model, TOKENS, resolve(model, "pattern"), grad=False)
    for pattern in store.values():
        close(pattern.sum(-1), torch.ones(3, 4, 7))
        assert (pattern >= 0).all() and not pattern.triu(1).any()


def test_the_residual_stream_adds_up(model: LensModel):
    _, at = run_capturing(model, TOKENS, [PRE, ATTN_OUT, MID, MLP_OUT, POST, "blocks.1.hook_resid_pre"], grad=False)
    close(at[PRE] + at[ATTN_OUT], at[MID])
    close(at[MID] + at[MLP_OUT], at[POST])
    assert torch.equal(at[POST], at["blocks.1.hook_resid_pre"])


@pytest.mark.parametrize(
    ("kind", "stack", "last"), [("llama", "model.layers", "down_proj"), ("gpt2", "transformer.h", "c_proj")]
)
@torch.no_grad()
def test_activations_are_those_of_huggingface(kind: str, stack: str, last: str):
    hf = hf_model(kind)
    seen = {}
    model = load_model(hf)

    def keep(name: str, value: Tensor | tuple[Tensor, ...]) -> None:
        seen[name] = value[0] if isinstance(value, tuple) else value

    for layer, block in enumerate(hf.get_submodule(stack)):
        assert isinstance(block, nn.Module)
        post = f"blocks.{layer}.hook_resid_post"
        mlp = f"blocks.{layer}.mlp.hook_post"
        block.register_forward_hook(lambda _, __, out, name=post: keep(name, out))
        block.mlp.get_submodule(last).register_forward_pre_hook(lambda _, args, name=mlp: keep(name, args))
    hf(TOKENS)
    _, store = run_capturing(model, TOKENS, seen, grad=False)
    for name, value in seen.items():
        close(store[name], value)


def test_capturing_with_grad_reaches_the_parameters_and_without_has_no_graph(model: LensModel):
    for name in every_point(model):
        _, store = run_capturing(model, TOKENS, [name], grad=True)
        model.zero_grad()
        store[name].pow(2).sum().backward()
        assert any(value.grad is not None and value.grad.any() for value in model.parameters()), name
    logits, store = run_capturing(model, TOKENS, every_point(model), grad=False)
    assert not logits.requires_grad and not any(value.requires_grad for value in store.values())


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_capture_restores_the_global_grad_mode(model: LensModel, outer: bool, inner: bool):
    with torch.set_grad_enabled(outer):
        logits, _ = run_capturing(model, TOKENS, [POST], grad=inner)
        assert torch.is_grad_enabled() is outer
    assert logits.requires_grad is inner


def test_a_name_asked_for_twice_is_captured_once(model: LensModel):
    _, twice = run_capturing(model, TOKENS, [POST, POST], grad=False)
    assert list(twice) == [POST]


def test_hooks_are_gone_after_success(model: LensModel):
    run_capturing(model, TOKENS, every_point(model), grad=False)
    with editing(model, {MID: lambda a: a, POST: lambda a: a}):
        assert hooks_on(model) > 0
        run(model, TOKENS)
    assert hooks_on(model) == 0


def test_hooks_are_gone_after_an_exception_and_the_exception_is_kept(model: LensModel):
    with pytest.raises(ZeroDivisionError), capturing(model, every_point(model), {}):
        run(model, TOKENS)
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), editing(model, {MID: lambda a: 1 / 0}):
        run(model, TOKENS)
    assert hooks_on(model) == 0


def test_a_hook_that_never_fires_is_an_error(model: LensModel):
    with pytest.raises(ValueError, match="hook_result"):
        run_capturing(model, TOKENS, ["blocks.0.attn.hook_result"], grad=False)
    with pytest.raises(CtlensError, match="did not fire"), capturing(model, [POST], {POST: torch.zeros(1)}):
        pass
    with pytest.raises(CtlensError, match="did not fire"), editing(model, {POST: lambda a: a}):
        pass
    assert hooks_on(model) == 0


@torch.no_grad()
def test_a_block_takes_off_its_own_hooks_alone(model: LensModel):
    seen = []
    with model.hooks(fwd_hooks=[(POST, lambda a, hook: seen.append("theirs"))]):
        with capturing(model, [POST], store := {}):
            with editing(model, {POST: lambda a: seen.append("ours")}):
                run(model, TOKENS)
            store.clear()
            run(model, TOKENS)
            assert POST in store
        run(model, TOKENS)
    assert seen == ["theirs", "ours", "theirs", "theirs"] and hooks_on(model) == 0


def test_hook_points_are_looked_up_once_however_many_are_read(model: LensModel, monkeypatch: pytest.MonkeyPatch):
    lookups = []
    names = every_point(model)
    known = model.hook_dict

    def looked_up(model: LensModel) -> Any:
        lookups[-1] += 1
        return known

    monkeypatch.setattr(type(model), "hook_dict", property(looked_up), raising=False)
    for count in (1, len(names)):
        lookups.append(0)
        run_capturing(model, TOKENS, names[:count], grad=False)
    assert lookups[0] == lookups[1] > 0


@torch.no_grad()
def test_an_edit_replaces_what_follows_and_nothing_before(model: LensModel):
    new = torch.randn(3, 7, 32)
    store = {}
    with editing(model, {POST: lambda a: new}), capturing(model, [MID, "blocks.1.hook_resid_pre"], store):
        run(model, TOKENS)
    assert torch.equal(store["blocks.1.hook_resid_pre"], new)
    assert torch.equal(store[MID], run_capturing(model, TOKENS, [MID], grad=False)[1][MID])


@pytest.mark.parametrize("point", [PRE, MID, POST, ATTN_OUT, MLP_OUT, "blocks.0.attn.hook_pattern"])
@torch.no_grad()
def test_an_edit_that_changes_nothing_changes_nothing(model: LensModel, point: str):
    plain = run(model, TOKENS)
    with editing(model, {point: lambda a: a.clone()}):
        close(run(model, TOKENS), plain)
    with editing(model, {point: lambda a: None}):
        assert torch.equal(run(model, TOKENS), plain)


@torch.no_grad()
def test_an_edit_of_resid_mid_reaches_the_skip_path(model: LensModel):
    new = torch.randn(3, 7, 32)
    store = {}
    with editing(model, {MID: lambda a: new}), capturing(model, [MID, MLP_OUT, POST], store):
        run(model, TOKENS)
    close(store[MID], new)
    close(store[POST] - store[MLP_OUT], new)


@torch.no_grad()
def test_a_plain_hook_on_resid_mid_misses_the_skip_path_of_a_bridge(model: LensModel):
    # The reason for `editing`: were this to change, the detour could go.
    new = torch.randn(3, 7, 32)
    store = {}
    with model.hooks(fwd_hooks=[(MID, lambda a, hook: new)]), capturing(model, [MLP_OUT, POST], store):
        run(model, TOKENS)
    assert ((store[POST] - store[MLP_OUT] - new).abs().max() > 0.1) == is_bridge(model)


@pytest.mark.parametrize("order", [(PRE, ATTN_OUT, MID), (MID, ATTN_OUT, PRE)])
@torch.no_grad()
def test_edits_of_one_block_compose_whatever_their_order(model: LensModel, order: tuple[str, ...]):
    edits = {PRE: lambda a: a + 1, ATTN_OUT: lambda a: 0 * a + 2, MID: lambda a: 3 * a}
    (_, before) = run_capturing(model, TOKENS, [PRE], grad=False)
    store = {}
    with editing(model, {name: edits[name] for name in order}), capturing(model, [MLP_OUT, POST], store):
        run(model, TOKENS)
    close(store[POST] - store[MLP_OUT], 3 * (before[PRE] + 1 + 2))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_does_not_change_what_real_tokens_see(model: LensModel, side: str):
    padding = torch.zeros(3, 4, dtype=torch.long)
    padded = torch.cat([padding, TOKENS] if side == "left" else [TOKENS, padding], dim=1)
    real = slice(4, None) if side == "left" else slice(0, 7)
    logits, alone = run_capturing(model, TOKENS, every_point(model), grad=False)
    mask = padded > 0 if side == "left" else None
    padded_logits, together = run_capturing(model, padded, every_point(model), grad=False, mask=mask)
    close(padded_logits[:, real], logits)
    for name, value in together.items():
        close(value[:, :, real, real] if name.endswith("pattern") else value[:, real], alone[name])


@torch.no_grad()
def test_left_padding_without_a_mask_does_change_it(model: LensModel):
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), TOKENS], dim=1)
    assert (run(model, padded)[:, 4:] - run(model, TOKENS)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_the_final_norm_is_the_last_hidden_state_of_huggingface(kind: str):
    expected = hf_model(kind)(TOKENS, output_hidden_states=True).hidden_states[-1]
    close(run_capturing(load_model(hf_model(kind)), TOKENS, [FINAL_NORM], grad=False)[1][FINAL_NORM], expected)


def test_the_final_norm_is_what_is_unembedded_and_its_hook_is_gone(model: LensModel):
    parts: Any = model
    logits, states = run_capturing(model, TOKENS, [FINAL_NORM, POST], grad=True)
    close(parts.unembed(states[FINAL_NORM]), logits)
    assert states[FINAL_NORM].requires_grad and set(states) == {FINAL_NORM, POST}
    assert not parts.ln_final._forward_hooks
    assert hooks_on(model) == 0


def test_a_further_hook_lists_the_points_of_a_bridge_once(model: LensModel, monkeypatch) -> None:
    """A bridge puts the list together anew each time it is asked, which takes longer the more layers it has."""
    if not is_bridge(model):
        return
    listed: list[int] = []
    whole = type(model).hook_dict

    def hook_dict(self: Any) -> Any:
        listed.append(1)
        return whole.__get__(self)

    every = resolve(model, "resid_post")
    monkeypatch.setattr(type(model), "hook_dict", property(hook_dict))
    times = []
    for names in (every[:1], every):
        listed.clear()
        run_capturing(model, TOKENS, names, grad=False)
        times.append(len(listed))
    assert len(every) == 2 and times[1] - times[0] <= 1
