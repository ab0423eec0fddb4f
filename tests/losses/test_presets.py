"""Every preset against a plain restatement of its source's formula: on random tensors and on two tiny models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers.models import hf_model
from helpers.presets import CONTENT, HINT, RESTATED, Raw, windows
from torch import Tensor

import ctlens as ct
from ctlens import losses
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import EncodedPair, collate, encode
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import Forwards, Loss
from ctlens.losses.presets import PUBLISHED, SOURCES, page
from ctlens.models.hooks import FINAL_NORM, resolve, run_capturing
from ctlens.models.loading import load_model
from ctlens.models.weights import canonical_weights

INTERNAL = sorted(RESTATED)


@pytest.fixture(scope="module")
def row(chat_tokenizer) -> EncodedPair:
    """A hint in front of the content, in a chat frame."""
    pair = Pair(prompt(CONTENT), prompt(HINT + CONTENT))
    return encode([pair], chat_tokenizer, windows=["suffix", "content", "shared"], n_ctx=256).rows[0]


def built(n_layers: int = 4) -> LensModel:
    """A model made here, in double precision, with random norms."""
    model = ct.build(ct.ModelConfig(n_layers=n_layers, n_heads=2, d_model=16, d_mlp=24, d_vocab=400, n_ctx=256))
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "ln" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model.to(torch.float64)  # type: ignore[attr-defined]


def store(raw: Raw, side: int) -> dict[str, Tensor]:
    """One side of a pair under the names of this package's hook points, as a batch of one."""
    by_hook: dict[str, Tensor] = {FINAL_NORM: raw.hidden[side][-1]}
    for layer, state in enumerate(raw.blocks[side]):
        by_hook[f"blocks.{layer}.hook_resid_post"] = state
        by_hook[f"blocks.{layer}.mlp.hook_post"] = raw.mlp[side][layer]
        by_hook[f"blocks.{layer}.attn.hook_pattern"] = raw.attention[side][layer]
    return {name: state[None] for name, state in by_hook.items()}


def total(
    loss: Loss, model: LensModel, row: EncodedPair, clean: dict[str, Tensor], wrapped: dict[str, Tensor]
) -> float:
    graph = {name: state.detach().clone().requires_grad_() for name, state in wrapped.items()}
    unused = torch.zeros(1, len(row.wrapped.ids), 2, dtype=torch.float64)
    return loss.compute(Forwards(collate([row]), clean, graph, unused), loss.factors(model)).total.item()


def random_raw(row: EncodedPair, n_layers: int) -> Raw:
    draw = torch.Generator().manual_seed(0)

    def states(width: int) -> tuple[list[Tensor], list[Tensor]]:
        sides = [
            [torch.randn(len(side.ids), width, generator=draw, dtype=torch.float64) for _ in range(n_layers)]
            for side in (row.clean, row.wrapped)
        ]
        return sides[0], sides[1]

    def attention(length: int) -> Tensor:
        scores = torch.randn(3, length, length, generator=draw, dtype=torch.float64)
        return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)

    blocks, last = states(12), states(12)
    hidden = tuple([*side[:-1], normed[-1]] for side, normed in zip(blocks, last, strict=True))
    patterns = tuple([attention(len(side.ids)) for _ in range(n_layers)] for side in (row.clean, row.wrapped))
    return Raw(blocks, hidden, states(20), patterns, *windows(row))  # type: ignore[arg-type]


@pytest.mark.parametrize("key", INTERNAL, ids="-".join)
def test_a_preset_is_its_source_s_formula_on_random_tensors(row, key) -> None:
    raw = random_raw(row, n_layers=4)

    ours = total(losses.preset(*key), built(), row, store(raw, 0), store(raw, 1))

    assert ours == pytest.approx(RESTATED[key](raw), rel=1e-6)


@torch.no_grad()
def huggingface(model: torch.nn.Module, ids: tuple[int, ...]) -> tuple[list[Tensor], ...]:
    """Block outputs, hidden states, inputs of the down-projections and attention of HuggingFace's own forward pass."""
    blocks: list[Tensor] = []
    mlp: list[Tensor] = []
    layers = model.model.layers
    handles = [
        layer.register_forward_hook(lambda m, i, out: blocks.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    handles += [
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, inputs: mlp.append(inputs[0][0])) for layer in layers
    ]
    out = model(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
    for handle in handles:
        handle.remove()
    rows = [state.reshape(len(ids), -1) for state in blocks]
    return rows, [state[0] for state in out.hidden_states[1:]], mlp, [pattern[0] for pattern in out.attentions]


@pytest.fixture(scope="module")
def llamas() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The reference and a trained model of HuggingFace, in double precision."""
    models = [hf_model("llama", seed=seed).double() for seed in (0, 1)]
    for model in models:
        model.set_attn_implementation("eager")
    return models[0], models[1]


@pytest.mark.parametrize("key", INTERNAL, ids="-".join)
def test_a_preset_is_its_source_s_formula_on_huggingface_s_own_states(row, llamas, key) -> None:
    loss = losses.preset(*key)
    clean_model = llamas[1 if loss.clean_side == "own" else 0]
    trained = llamas[1]
    sides = huggingface(clean_model, row.clean.ids), huggingface(trained, row.wrapped.ids)
    raw = Raw(*zip(*sides, strict=True), *windows(row))  # type: ignore[arg-type]

    bridges = [load_model(model, dtype=torch.float64) for model in (clean_model, trained)]
    names = loss.hook_names(bridges[0])
    clean = run_capturing(bridges[0], torch.tensor([row.clean.ids]), names, grad=False)[1]
    wrapped = run_capturing(bridges[1], torch.tensor([row.wrapped.ids]), names, grad=False)[1]

    assert total(loss, bridges[0], row, clean, wrapped) == pytest.approx(RESTATED[key](raw), rel=1e-6)
    if FINAL_NORM in names:
        before = dataclasses.replace(raw, hidden=raw.blocks)
        assert RESTATED[key](before) != pytest.approx(RESTATED[key](raw), rel=1e-2)


@pytest.mark.parametrize("key", INTERNAL, ids="-".join)
def test_a_preset_is_its_source_s_formula_on_a_model_made_here(row, key) -> None:
    """The final norm by hand: the last block's output over its root mean square, times the norm's weight."""
    loss = losses.preset(*key)
    model = built()
    points = ("resid_post", "mlp_post", "pattern")
    names = [name for point in points for name in resolve(model, point)]
    sides = []
    for side in (row.clean, row.wrapped):
        states = run_capturing(model, torch.tensor([side.ids]), names, grad=False)[1]
        blocks = [states[name][0] for name in resolve(model, "resid_post")]
        mlp = [states[name][0] for name in resolve(model, "mlp_post")]
        attention = [states[name][0] for name in resolve(model, "pattern")]
        last = blocks[-1] / (blocks[-1].pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        weight = canonical_weights(model)["ln_final.w"]
        sides.append((blocks, [*blocks[:-1], (last * weight).detach()], mlp, attention))
    raw = Raw(*zip(*sides, strict=True), *windows(row))  # type: ignore[arg-type]

    clean = run_capturing(model, torch.tensor([row.clean.ids]), loss.hook_names(model), grad=False)[1]
    wrapped = run_capturing(model, torch.tensor([row.wrapped.ids]), loss.hook_names(model), grad=False)[1]

    assert total(loss, model, row, clean, wrapped) == pytest.approx(RESTATED[key](raw), rel=1e-6)


def test_every_source_is_explained() -> None:
    assert {source.split("-")[0] for _, source in PUBLISHED} == set(SOURCES) - {"ctlens"}


def test_the_defaults_are_a_source_too() -> None:
    assert losses.preset("mlpct", "ctlens") == ct.MLPCT()
    assert losses.preset("klct", "ctlens") == ct.KLCT()


@pytest.mark.parametrize(
    ("method", "source", "message"),
    [
        ("atct", "stack", "unknown method 'atct'; did you mean 'attct' or 'act'"),
        ("attct", "stack-jailbreaks", "unknown source of attct .* did you mean 'stack-jailbreak'"),
        ("mlpct", "irpan", "unknown source of mlpct 'irpan'.* Known: ctlens, stack, ctm"),
    ],
)
def test_an_unknown_preset_is_refused_with_the_known_ones(method, source, message) -> None:
    with pytest.raises(CtlensError, match=message):
        losses.preset(method, source)


def test_the_table_has_a_row_for_each_definition_and_tells_what_the_loss_does() -> None:
    table = losses.table().set_index(["method", "source"])

    assert set(table.index) == set(PUBLISHED) | {(name, "ctlens") for name in losses.names()}
    assert table.loc[("act", "stack"), "layers"] == "all, the last after the final norm"
    assert tuple(table.loc[("act", "aisi"), ["window", "distance", "clean side"]]) == ("suffix", "mse", "own")
    assert table.loc[("attct", "stack-jailbreak"), "options"] == "keys=raw, heads=mean"
    assert table.loc[("attct", "stack-exponential"), "layer weights"] == "exponential"
    assert (table.loc[("bct", "ctlens"), "tokens"], table.loc[("bct", "ctlens"), "distance"]) == (
        "answer",
        "cross_entropy",
    )
    assert table.loc[("attout", "stack"), "loss"] == "act"
    assert tuple(table.loc[("bct", "aisi"), ["loss", "distance", "clean side"]]) == ("klct", "cross_entropy", "own")
    assert tuple(table.loc[("bct", "stack"), ["tokens", "distance"]]) == ("prompt and answer", "cross_entropy")
    assert tuple(table.loc[("bct", "stack-prefill"), ["tokens", "distance"]]) == ("prefill", "kl")
    assert table.loc[("attmass", "stack"), "clean side"] == "none"
    assert all(losses.preset(*key).weight == row["weight"] for key, row in table.iterrows())
    assert table.drop(columns="note").map(lambda cell: cell is not None).all(axis=None)


def test_the_page_of_the_losses_is_the_table() -> None:
    assert (Path(__file__).parents[2] / "docs/losses.md").read_text() == page(losses.table())
