"""What the lens reads and what the components write add up to the model's own logits, on every model class."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import CHAT_MODELS, byte_level_tokenizer, chat_model, hf_model, odd_model

from ctlens.analysis import LogitAttribution, LogitLens, logit_attribution, logit_lens
from ctlens.analysis.base.contrast import contrasts
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.chat import render
from ctlens.data.pairs import Pair, prompt
from ctlens.models.bridges import is_bridge
from ctlens.models.loading import build, load_model
from ctlens.models.parameters import copy_model
from ctlens.models.weights import ModelConfig

pytestmark = pytest.mark.boundary

TOKENIZER = byte_level_tokenizer(chat=True)
QUESTIONS = ("Which term best describes the disease?", "Is it right?", "When a creature experiences feeling, what?")
PAIRS = [Pair(prompt(q, "the", "a"), prompt("no. " * n + q, "the", "a")) for n, q in enumerate(QUESTIONS, 1)]


@pytest.fixture(scope="module", params=CHAT_MODELS)
def model(request: pytest.FixtureRequest) -> LensModel:
    return chat_model(request.param)


def said(model: LensModel, pair: Pair) -> float:
    """The logit difference of one wrapped prompt, good minus bad, by a plain forward pass."""
    ids = render(TOKENIZER, pair.wrapped.turns).ids
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1]
    good = TOKENIZER("the", add_special_tokens=False)["input_ids"][0]
    bad = TOKENIZER("a", add_special_tokens=False)["input_ids"][0]
    return float(logits[good] - logits[bad])


def test_the_last_layer_of_the_lens_is_the_model_itself(model: LensModel):
    lens = logit_lens(model, PAIRS, batch_size=2, progress=False)
    assert lens.values.shape == (1, 2, 3)
    np.testing.assert_allclose(lens.values[0, -1], [said(model, pair) for pair in PAIRS], atol=1e-4)


@pytest.mark.parametrize("kind", ["granite", "gemma2", "opt"])
def test_what_follows_the_unembedding_is_in_the_lens_and_refused_by_the_attribution(kind: str):
    hf = odd_model(kind)
    model = load_model(hf, tokenizer=TOKENIZER)
    expected = [said(lambda tokens: hf(tokens).logits, pair) for pair in PAIRS]  # type: ignore[arg-type]

    np.testing.assert_allclose(logit_lens(model, PAIRS, progress=False).values[0, -1], expected, atol=1e-4)
    with pytest.raises(CtlensError, match="read (this model|it) by logit_lens"):
        logit_attribution(model, PAIRS, progress=False)


def test_an_earlier_layer_of_the_lens_is_the_model_without_the_layers_behind_it(model: LensModel):
    cut: Any = copy_model(model)
    for name in ("hook_attn_out", "hook_mlp_out"):
        cut.add_hook(f"blocks.1.{name}", lambda activation, hook: torch.zeros_like(activation))
    expected = [said(cut, pair) for pair in PAIRS]
    np.testing.assert_allclose(logit_lens(model, PAIRS, progress=False).values[0, 0], expected, atol=1e-4)


def test_the_components_add_up_to_the_logit_difference(model: LensModel):
    found = logit_attribution(model, PAIRS, batch_size=2, progress=False)
    heads = [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
    assert set(found.components) == {"embed", *heads, "L0 MLP", "L1 MLP", "bias"}
    np.testing.assert_allclose(found.values[0].sum(0), [said(model, pair) for pair in PAIRS], atol=1e-3)
    assert (np.abs(found.values[0, 1:-1]) > 1e-4).any(-1).all()


def test_only_the_embedding_speaks_in_a_model_whose_layers_write_nothing(model: LensModel):
    silent: Any = copy_model(model)
    for layer in range(2):
        for name in ("attn.hook_z", "hook_mlp_out"):
            silent.add_hook(f"blocks.{layer}.{name}", lambda activation, hook: torch.zeros_like(activation))
    found = logit_attribution(silent, PAIRS, progress=False)
    assert np.abs(found.values[0, 1:-1]).max() < 1e-6


def test_the_shares_are_those_of_transformer_lens_on_a_folded_copy():
    model: Any = build(ModelConfig(d_vocab=400, n_layers=2, n_heads=4, d_model=32, d_mlp=48, n_ctx=256), TOKENIZER)
    if is_bridge(model):
        pytest.skip("TransformerLens folds the weights of a HookedTransformer only")
    model.ln_final.w.data += torch.rand(32, generator=torch.Generator().manual_seed(0))
    folded = copy_model(model)
    folded.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    ids = render(TOKENIZER, PAIRS[0].wrapped.turns).ids
    _, cache = folded.run_with_cache(torch.tensor([ids]))
    stack, names = cache.decompose_resid(layer=2, mode="all", pos_slice=-1, return_labels=True)
    scaled = cache.apply_ln_to_stack(stack, layer=2, pos_slice=-1)[:, 0]
    item = contrasts(model, PAIRS[:1])[0]
    expected = dict(zip(names, (scaled @ (folded.W_U[:, item.good] - folded.W_U[:, item.bad])).tolist(), strict=True))
    found = logit_attribution(model, PAIRS[:1], progress=False)
    shares = dict(zip(found.components, found.values[0, :, 0].tolist(), strict=True))
    for layer in range(2):
        assert shares[f"L{layer} MLP"] == pytest.approx(expected[f"{layer}_mlp_out"], abs=1e-4)
        heads = sum(shares[f"L{layer}H{head}"] for head in range(4))
        assert heads == pytest.approx(expected[f"{layer}_attn_out"], abs=1e-4)
    assert shares["embed"] == pytest.approx(expected["embed"], abs=1e-4)


@pytest.mark.parametrize("at_once", [1, 3, 5])
def test_layers_that_are_read_together_are_read_as_each_alone(
    at_once: int, model: LensModel, monkeypatch: pytest.MonkeyPatch
):
    together = logit_lens(model, PAIRS, progress=False).values

    monkeypatch.setattr("ctlens.analysis.outputs.logit_lens._READ_AT_ONCE", at_once)

    np.testing.assert_allclose(logit_lens(model, PAIRS, progress=False).values, together, atol=1e-5)


def test_order_and_batches_change_nothing(model: LensModel):
    whole = logit_attribution(model, PAIRS, batch_size=64, progress=False)
    single = logit_attribution(model, PAIRS, batch_size=1, progress=False)
    turned = logit_attribution(model, PAIRS[::-1], progress=False)
    np.testing.assert_allclose(single.values, whole.values, atol=1e-4)
    np.testing.assert_allclose(turned.values[..., ::-1], whole.values, atol=1e-4)


def test_several_models_stand_side_by_side_and_round_trip(model: LensModel, tmp_path):
    models = {"base": model, "act": copy_model(model)}
    lens = logit_lens(models, PAIRS, progress=False)
    shares = logit_attribution(models, PAIRS, progress=False)
    for result, kind in ((lens, LogitLens), (shares, LogitAttribution)):
        assert (result.values[0] == result.values[1]).all()
        result.save(tmp_path / "result.safetensors")
        assert kind.load(tmp_path / "result.safetensors").to_dataframe().equals(result.to_dataframe())
    table = lens.to_dataframe()
    assert table["model"].tolist() == ["base", "base", "act", "act"] and table["layer"].tolist() == [0, 1, 0, 1]
    assert table["value"].tolist()[:2] == pytest.approx(lens.values[0].mean(-1).tolist())
    assert [trace.name for trace in lens.figure().data if trace.name] == ["base", "ACT"]
    assert np.shape(shares.figure().data[1].z) == (2, 5)


def test_answers_that_begin_alike_are_compared_where_they_part():
    model = load_model(hf_model("llama"), tokenizer=TOKENIZER)
    item = contrasts(
        model, [Pair(prompt("Is it?", "is right", "is that"), prompt("no. Is it?", "is right", "is that"))]
    )[0]
    ids = render(TOKENIZER, PAIRS[0].wrapped.turns).ids
    good = TOKENIZER("is right", add_special_tokens=False)["input_ids"]
    bad = TOKENIZER("is that", add_special_tokens=False)["input_ids"]
    alike = next(place for place, ends in enumerate(zip(good, bad, strict=False)) if ends[0] != ends[1])
    assert alike > 0 and ids
    assert item.prompt[-alike:] == tuple(good[:alike])
    assert (item.good, item.bad) == (good[alike], bad[alike])


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair(prompt("a"), prompt("b")), "wrapped prompt of pair 1 names no good and bad answer"),
        (Pair(prompt("a"), prompt("b", "the", "the")), "names no good and bad answer that differ"),
    ],
)
def test_pairs_without_a_contrast_are_refused(pair: Pair, message: str):
    with pytest.raises(CtlensError, match=message):
        logit_lens(load_model(hf_model("llama"), tokenizer=TOKENIZER), [pair], progress=False)


def test_heads_whose_sum_is_changed_and_capped_logits_are_refused():
    model: Any = load_model(hf_model("llama"), tokenizer=TOKENIZER)
    changed: Any = copy_model(model)
    changed.add_hook("blocks.0.hook_attn_out", lambda activation, hook: 2 * activation)
    with pytest.raises(CtlensError, match="layer 0 changes the sum of its heads"):
        logit_attribution(changed, PAIRS, progress=False)
    capped: Any = copy_model(model)
    capped.unembed.register_forward_hook(lambda module, inputs, output: output.tanh())
    with pytest.raises(CtlensError, match="do not add up"):
        logit_attribution(capped, PAIRS, progress=False)


def test_a_model_in_training_mode_and_no_model_are_refused():
    model = load_model(hf_model("llama"), tokenizer=TOKENIZER)
    model.train()
    with pytest.raises(CtlensError, match="eval mode"):
        logit_lens(model, PAIRS, progress=False)
    with pytest.raises(CtlensError, match="no models"):
        logit_lens({}, PAIRS, progress=False)
