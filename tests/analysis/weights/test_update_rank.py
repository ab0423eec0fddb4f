"""The rank of updates: planted ones are found on every class of model, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import byte_level_tokenizer, hf_model
from helpers.tiers import unit_first
from safetensors.numpy import save_file
from torch import Tensor

from ctlens.analysis import UpdateRank, update_rank
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import ACT
from ctlens.models.loading import build, load_model
from ctlens.models.lora import LoRA, LowRank, add_adapters, merge_adapters
from ctlens.models.matrices import MATRICES
from ctlens.models.parameters import copy_model
from ctlens.models.weights import ModelConfig
from ctlens.training import TrainConfig, train

pytestmark = pytest.mark.boundary

KINDS = unit_first(("made here", "llama", "gpt2"))


def lens(kind: str) -> LensModel:
    tokenizer = byte_level_tokenizer()
    if kind == "made here":
        return build(ModelConfig(d_vocab=400, n_layers=2, n_heads=4, d_model=32, d_mlp=48, n_ctx=256), tokenizer)
    return load_model(hf_model(kind), tokenizer=tokenizer)


def numbers(found: UpdateRank, layer: int, matrix: str) -> dict[str, float]:
    table = found.to_dataframe()
    return table[(table["layer"] == layer) & (table["matrix"] == matrix)].iloc[0].to_dict()


def orthonormal(size: int, count: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, count, generator=torch.Generator().manual_seed(size)))[0]


@torch.no_grad()
def plant(model: LensModel, matrix: str, update: Tensor) -> None:
    """Adds a matrix of outputs by inputs to a weight of layer 1, laid out as that weight is."""
    module = getattr(model.blocks[1], "attn" if matrix in "qo" else "mlp")  # type: ignore[attr-defined]
    own = {"q": "W_Q", "o": "W_O", "mlp_in": "W_in"}[matrix]
    if own in module._parameters:
        by_head = {"q": update.reshape(4, 8, -1).transpose(1, 2), "o": update.T.reshape(4, 8, -1)}
        module._parameters[own] += by_head.get(matrix, update.T)
        return
    linear = getattr(module, matrix.removeprefix("mlp_")).original_component
    linear.weight += update if isinstance(linear, torch.nn.Linear) else update.T


@pytest.mark.parametrize("matrix", ["q", "o", "mlp_in"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_update_is_found_where_it_is_and_nowhere_else(kind: str, matrix: str) -> None:
    before = lens(kind)
    after = copy_model(before)
    d_out = 32 if matrix != "mlp_in" else {"gpt2": 128}.get(kind, 48)
    plant(after, matrix, orthonormal(d_out, 3) @ torch.diag(torch.tensor([2.0, 2.0, 2.0])) @ orthonormal(32, 3).T)

    found = update_rank(before, after)

    there = numbers(found, 1, matrix)
    assert (there["rank"], there["largest"]) == (3, 32)
    assert there["effective_rank"] == pytest.approx(3, abs=1e-3) and there["stable_rank"] == pytest.approx(3, abs=1e-4)
    assert there["norm"] == pytest.approx(12**0.5, rel=1e-5)
    others = found.to_dataframe().query("not (layer == 1 and matrix == @matrix)")
    assert (others[["rank", "effective_rank", "stable_rank", "norm"]] == 0).all(axis=None)
    assert set(found.matrices) == set(MATRICES) - ({"mlp_gate"} if kind == "gpt2" else set())


def test_ranks_are_those_worked_out_by_hand() -> None:
    values = np.array([[[3.0, 1.0, 0.0], [5.0, 5.0, np.nan], [0.0, 0.0, 0.0], [np.nan, np.nan, np.nan]]])
    found = UpdateRank(values, np.array([[1.5, 0.1, 0.1, np.nan]]), ("q", "k", "v", "o"))

    # shares 3/4 and 1/4: exp(-(3/4 log 3/4 + 1/4 log 1/4)) = 4 / 3^(3/4)
    np.testing.assert_allclose(found.effective_rank, [[4 / 3**0.75, 2, 0, np.nan]])
    np.testing.assert_allclose(found.stable_rank, [[10 / 9, 2, 0, np.nan]])
    np.testing.assert_allclose(found.rank, [[1, 2, 0, np.nan]])
    np.testing.assert_allclose(found.norm, [[10**0.5, 50**0.5, 0, np.nan]])
    assert found.to_dataframe()[["matrix", "largest"]].values.tolist() == [["q", 3], ["k", 2], ["v", 3]]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_count_alike_before_and_after_they_are_merged(kind: str) -> None:
    before = lens(kind)
    adapted = copy_model(before)
    add_adapters(adapted, LoRA(rank=3, target_modules=("k", "mlp_out")))
    for adapter in (module for module in adapted.modules() if isinstance(module, LowRank)):  # type: ignore[attr-defined]
        adapter.B.data = 0.1 * torch.randn(adapter.B.shape, generator=torch.Generator().manual_seed(3))
    merged = copy_model(adapted)
    merge_adapters(merged)

    found = update_rank(before, adapted)

    np.testing.assert_array_equal(update_rank(before, merged).singular_values, found.singular_values)
    np.testing.assert_array_equal(update_rank(adapted, merged).norm, np.zeros((2, len(found.matrices))))
    ranks = found.to_dataframe().set_index(["layer", "matrix"])["rank"]
    assert ranks[:, "k"].tolist() == ranks[:, "mlp_out"].tolist() == [3, 3] and ranks.sum() == 12
    assert found.effective_rank.max() < 3.01


@pytest.mark.slow
def test_a_training_with_adapters_of_rank_2_has_updates_of_rank_2_and_a_full_one_more(chat_tokenizer) -> None:
    model = load_model(hf_model("llama"), tokenizer=chat_tokenizer)
    pairs = [Pair(prompt(q), prompt("I don't think it's right. " + q)) for q in ("Is it right?", "Which term is it?")]
    config = TrainConfig(steps=8, batch_size=2, lr=1e-2, max_new_tokens=4)

    ranks = {}
    for name, trainable in (("low", LoRA(rank=2, target_modules=("q", "v"))), ("full", ("attn",))):
        run = train(model, pairs, ACT(), config=TrainConfig(**{**vars(config), "trainable": trainable}), progress=False)
        ranks[name] = update_rank(model, run.model).to_dataframe().set_index(["layer", "matrix"])["rank"]

    assert ranks["low"][:, "q"].tolist() == ranks["low"][:, "v"].tolist() == [2, 2] and ranks["low"].sum() == 8
    assert (ranks["full"][:, "q"] > 2).all() and (ranks["full"][:, "mlp_in"] == 0).all()


def test_a_matrix_smaller_than_others_has_a_lower_highest_rank() -> None:
    model = lens("llama")  # two key-value heads of four

    table = update_rank(model, load_model(hf_model("llama", seed=1))).to_dataframe().set_index(["layer", "matrix"])

    assert table["largest"][0, "k"] == table["rank"][0, "k"] == 16 and table["largest"][0, "q"] == 32


def test_the_scale_of_an_update_changes_its_norm_alone() -> None:
    before = lens("made here")
    one, three = copy_model(before), copy_model(before)
    for model, scale in ((one, 1.0), (three, 3.0)):
        plant(model, "q", scale * torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))

    here = numbers(update_rank(before, one), 1, "q")
    there = numbers(update_rank(before, three), 1, "q")

    assert there["norm"] == pytest.approx(3 * here["norm"], rel=1e-5)
    assert there["effective_rank"] == pytest.approx(here["effective_rank"], rel=1e-5)
    assert there["stable_rank"] == pytest.approx(here["stable_rank"], rel=1e-5)


def test_results_survive_saving_and_the_figure_holds_their_numbers(tmp_path: Path) -> None:
    before = lens("gpt2")
    after = copy_model(before)
    plant(after, "o", orthonormal(32, 2) @ orthonormal(32, 2).T)
    found = update_rank(before, after)
    found.save(tmp_path / "rank.safetensors")

    again = UpdateRank.load(tmp_path / "rank.safetensors")

    assert again.to_dataframe().equals(found.to_dataframe())
    drawn = found.compare({"bct": again}, label="act", quantity="norm")
    assert len(drawn.data) == 2 * 6 and [trace.name for trace in drawn.data[:2]] == ["ACT", "BCT"]
    np.testing.assert_allclose(drawn.data[2 * found.matrices.index("o")].y, [0, 2**0.5], rtol=1e-5)
    assert len(found.figure().data) == 6
    with pytest.raises(CtlensError, match="two results are called 'act'"):
        found.compare({"act": again}, label="act")
    with pytest.raises(CtlensError, match="unknown quantity 'size'"):
        found.figure("size")


def test_a_result_of_another_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    arrays = {"singular_values": np.ones((1, 1, 2)), "rounding": np.zeros((1, 1))}
    labels = {"kind": "UpdateRank", "labels": {"sites": ["q"]}}  # the matrices were called so in 0.1
    save_file(arrays, tmp_path / "rank.safetensors", {"result": json.dumps(labels)})

    with pytest.raises(CtlensError, match="saved by another version of ctlens, whose UpdateRank had 'sites'"):
        UpdateRank.load(tmp_path / "rank.safetensors")


def test_models_that_do_not_compare_are_refused() -> None:
    model = lens("llama")
    wider = build(ModelConfig(d_vocab=400, n_layers=2, n_heads=4, d_model=32, d_mlp=40, n_ctx=256))

    with pytest.raises(CtlensError, match="eval mode"):
        update_rank(model, copy_model(model).train())
    with pytest.raises(CtlensError, match="n_layers is 2 before and 1 after"):
        update_rank(model, build(ModelConfig(d_vocab=400, n_layers=1, n_heads=4, d_model=32, d_mlp=48)))
    with pytest.raises(CtlensError, match="blocks.0.k is not the same matrix"):
        update_rank(model, wider)
