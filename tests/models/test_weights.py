"""One set of weights means one model: on every TransformerLens version and in a restatement in plain torch."""

from __future__ import annotations

import random
from importlib.metadata import version

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctlens.core.config import to_dict
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.models.bridges import is_bridge
from ctlens.models.hooks import resolve
from ctlens.models.loading import build
from ctlens.models.parameters import present_parameters
from ctlens.models.weights import ModelConfig, canonical_weights, initial_weights, is_bias, load_weights

pytestmark = pytest.mark.boundary

CONFIG = ModelConfig(d_vocab=30, n_layers=2, n_heads=2, d_model=16, d_mlp=24, n_ctx=20)
TOKENS = torch.randint(30, (3, 9), generator=torch.Generator().manual_seed(1))
IS_3 = version("transformer-lens").startswith("3.")


def uneven(model: LensModel) -> LensModel:
    """With norms that are not one, so that a forgotten norm shows."""
    draw = torch.Generator().manual_seed(2)
    weights = canonical_weights(model)
    load_weights(model, {name: w + 0.2 * torch.randn(w.shape, generator=draw) for name, w in weights.items()})
    return model


def native() -> LensModel:
    """The bridge that 4.x makes, on any version."""
    import transformer_lens.model_bridge.sources.native  # noqa: F401
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    shape = {"d_head": CONFIG.d_head, "act_fn": "silu", "gated_mlp": True, "eps": 1e-5, "normalization_type": "RMS"}
    rotary = {"positional_embedding_type": "rotary", "rotary_adjacent_pairs": True, "rotary_dim": CONFIG.d_head}
    return TransformerBridge.boot_native(TransformerBridgeConfig(**to_dict(CONFIG), **shape, **rotary)).eval()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotate(x: Tensor) -> Tensor:
    """Turns the pair (2i, 2i+1) at position p by the angle p * 10000^(-2i/d), as a complex number."""
    pos = x.shape[1]
    width = x.shape[-1]
    angle = torch.arange(pos)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones(()), angle)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def attention(x: Tensor, w: dict[str, Tensor], block: str) -> Tensor:
    q = torch.einsum("bpd,hde->bphe", x, w[f"{block}.attn.W_Q"])
    k = torch.einsum("bpd,hde->bphe", x, w[f"{block}.attn.W_K"])
    v = torch.einsum("bpd,hde->bphe", x, w[f"{block}.attn.W_V"])
    scores = torch.einsum("bqhe,bkhe->bhqk", rotate(q), rotate(k)) / CONFIG.d_head**0.5
    unseen = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    z = torch.einsum("bhqk,bkhe->bqhe", scores.masked_fill(unseen, -torch.inf).softmax(-1), v)
    return torch.einsum("bqhe,hed->bqd", z, w[f"{block}.attn.W_O"])


def restated(tokens: Tensor, w: dict[str, Tensor]) -> Tensor:
    """The logits of a Llama-like model, written without any library of models."""
    x = w["embed.W_E"][tokens]
    for block in (f"blocks.{layer}" for layer in range(CONFIG.n_layers)):
        x = x + attention(rms(x, w[f"{block}.ln1.w"]), w, block)
        h = rms(x, w[f"{block}.ln2.w"])
        x = x + (F.silu(h @ w[f"{block}.mlp.W_gate"]) * (h @ w[f"{block}.mlp.W_in"])) @ w[f"{block}.mlp.W_out"]
    return rms(x, w["ln_final.w"]) @ w["unembed.W_U"]


@torch.no_grad()
def test_a_built_model_computes_what_its_restatement_in_plain_torch_computes():
    model = uneven(build(CONFIG))
    torch.testing.assert_close(model(TOKENS), restated(TOKENS, canonical_weights(model)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_native_bridge_with_the_same_weights_is_the_same_model():
    model = uneven(build(CONFIG))
    other = native()
    load_weights(other, canonical_weights(model))
    for name, weight in canonical_weights(model).items():
        assert torch.equal(canonical_weights(other)[name], weight), name
    torch.testing.assert_close(other(TOKENS), model(TOKENS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(initial_weights(CONFIG, 0)))
@torch.no_grad()
def test_every_weight_matters_in_its_own_place(name: str):
    model = uneven(build(CONFIG))
    before = model(TOKENS)
    weights = canonical_weights(model)
    weights[name] = weights[name] * 1.5
    load_weights(model, weights)
    assert (model(TOKENS) - before).abs().max() > 1e-3
    torch.testing.assert_close(model(TOKENS), restated(TOKENS, weights), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", [0, 7])
def test_the_seed_alone_decides_the_weights(seed: int):
    built = canonical_weights(build(CONFIG, seed=seed))
    drawn = initial_weights(CONFIG, seed)
    assert built.keys() == drawn.keys()
    assert all(torch.equal(built[name], drawn[name]) for name in drawn)


def test_the_weights_of_seed_zero_are_pinned():
    # Saved numbers, so that a change of the draw cannot pass unseen on both versions at once.
    weights = initial_weights(CONFIG, 0)
    expected = torch.tensor([-0.44021282, 0.12655537, 0.02051718])
    torch.testing.assert_close(weights["embed.W_E"][0, :3], expected, atol=1e-6, rtol=0)


def test_another_seed_gives_other_weights():
    first, second = initial_weights(CONFIG, 0), initial_weights(CONFIG, 1)
    assert not any(torch.equal(first[name], second[name]) for name in first if first[name].dim() > 1)


def test_matrices_are_spread_as_documented_and_norms_are_one():
    weights = initial_weights(ModelConfig(d_vocab=500, d_model=64), 0)
    assert float(weights["embed.W_E"].std()) == pytest.approx(0.8 / 8, rel=0.02)
    assert float(weights["blocks.3.mlp.W_in"].std()) == pytest.approx(0.8 / 8, rel=0.02)
    assert all((weights[name] == 1).all() for name in weights if name.endswith(("ln1.w", "ln2.w", "ln_final.w")))


def test_building_leaves_the_global_random_states_alone():
    before = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
    build(CONFIG)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_biases_are_zero_frozen_and_absent():
    model = build(CONFIG)
    biases = {name: value for name, value in model.named_parameters() if is_bias(name)}
    assert biases and not any(value.any() or value.requires_grad for value in biases.values())
    assert len(present_parameters(model)) == len(initial_weights(CONFIG, 0)) == 3 + 9 * CONFIG.n_layers
    assert not any(is_bias(name) for name in present_parameters(model))


def test_the_class_is_the_one_of_the_version():
    model = build(CONFIG)
    assert type(model).__name__ == ("HookedTransformer" if IS_3 else "TransformerBridge")
    assert is_bridge(model) is not IS_3
    assert not model.training and resolve(model, "pattern")


def test_canonical_weights_are_copies():
    model = build(CONFIG)
    canonical_weights(model)["embed.W_E"].zero_()
    assert canonical_weights(model)["embed.W_E"].any()


@pytest.mark.parametrize("change", ["missing", "foreign", "shape", "transposed"])
def test_weights_that_do_not_fit_are_refused(change: str):
    weights = initial_weights(CONFIG, 0)
    if change == "missing":
        del weights["blocks.1.mlp.W_in"]
    elif change == "foreign":
        weights["blocks.2.mlp.W_in"] = weights["blocks.1.mlp.W_in"]
    elif change == "shape":
        weights["blocks.1.mlp.W_in"] = weights["blocks.1.mlp.W_in"][:, :1]
    else:
        weights["blocks.1.mlp.W_in"] = weights["blocks.1.mlp.W_in"].T
    with pytest.raises(CtlensError, match=r"do not fit the model: .*mlp\.W_in"):
        load_weights(build(CONFIG), weights)


def test_weights_for_another_number_of_heads_are_refused_though_their_count_is_equal():
    weights = initial_weights(ModelConfig(**{**to_dict(CONFIG), "n_heads": 4}), 0)
    with pytest.raises(CtlensError, match=r"W_Q has shape \(4, 16, 4\)"):
        load_weights(build(CONFIG), weights)


def test_weights_that_do_not_fit_leave_the_model_as_it_was():
    model = build(CONFIG)
    weights = {**initial_weights(CONFIG, 1), "unembed.W_U": torch.zeros(1)}
    with pytest.raises(CtlensError):
        load_weights(model, weights)
    assert all(torch.equal(canonical_weights(model)[name], w) for name, w in initial_weights(CONFIG, 0).items())


@pytest.mark.parametrize(
    "sizes", [{"d_vocab": 0}, {"n_layers": 0}, {"d_model": 18, "n_heads": 4}, {"d_model": 12, "n_heads": 4}]
)
def test_impossible_sizes_are_refused(sizes: dict[str, int]):
    with pytest.raises(CtlensError, match="must be"):
        ModelConfig(**{"d_vocab": 30, **sizes})
