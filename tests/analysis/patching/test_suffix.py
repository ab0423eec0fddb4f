"""The fast way gives what whole forward passes give, on every kind of block it knows, and steps back from the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import SIZES, hf_model, made, random_model
from helpers.patching import BLOCK_KINDS, CLOSE, EQUAL, PAIRS, TOKENIZER, hooked, swept
from helpers.tiers import unit_first
from torch import Tensor

from ctlens.analysis import patch
from ctlens.analysis.patching import hooked as patching_hooks
from ctlens.analysis.patching import sweep as ours
from ctlens.analysis.patching.blocks import Block
from ctlens.analysis.patching.suffix import SUFFIX_SITES, Suffix
from ctlens.models.loading import HAS_HOOKED_TRANSFORMER, load_model
from ctlens.models.parameters import copy_model

pytestmark = pytest.mark.boundary


@pytest.mark.parametrize("site", unit_first(SUFFIX_SITES))
@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_both_ways_agree_on_every_kind_of_block(kind: str, site: str, monkeypatch: pytest.MonkeyPatch):
    if kind == "side by side" and site == "resid_mid":
        pytest.skip("there is no stream between attention and MLP")
    model = hooked(kind)
    options = {"metrics": ("logit_diff", "kl")}
    fast = [swept(model, PAIRS, site, **options), swept(model, [EQUAL], site, window="position", positions="all")]
    monkeypatch.setattr(ours, "read_blocks", lambda *parts: None)
    slow = [swept(model, PAIRS, site, **options), swept(model, [EQUAL], site, window="position", positions="all")]
    for quick, plain in zip(fast, slow, strict=True):
        assert (quick.path, plain.path) == ("suffix", "hooks")
        np.testing.assert_allclose(quick.values, plain.values, **CLOSE)


@pytest.mark.parametrize("kind", ["made here", "llama", "gpt2"])
def test_models_made_here_and_bridges_go_the_fast_way(kind: str):
    model = made() if kind == "made here" else load_model(hf_model(kind), tokenizer=TOKENIZER)
    assert {swept(model, PAIRS, site).path for site in SUFFIX_SITES} == {"suffix"}
    assert {swept(model, PAIRS, site).path for site in ("pattern", "mlp_post")} == {"hooks"}


LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
# What TransformerLens's own configuration does not say of a bridge's rotation: its base, its scaling, and its share.
ROTATIONS: dict[str, dict[str, Any]] = {
    "another base": {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    "scaled": {"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e4, **LLAMA_3}},
    "a part of the head": {
        "model_type": "gpt_neox",
        "rope_parameters": {"rope_theta": 5e4, "partial_rotary_factor": 0.5},
    },
}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_a_bridge_goes_the_fast_way_however_its_rotation_is_set(kind: str, monkeypatch: pytest.MonkeyPatch):
    model = load_model(random_model(**SIZES, **ROTATIONS[kind]), tokenizer=TOKENIZER)
    fast = swept(model, PAIRS, "resid_pre")
    monkeypatch.setattr(ours, "read_blocks", lambda *parts: None)
    slow = swept(model, PAIRS, "resid_pre")
    assert (fast.path, slow.path) == ("suffix", "hooks")
    np.testing.assert_allclose(fast.values, slow.values, **CLOSE)


def test_without_onednn_the_activation_follows_the_product(monkeypatch: pytest.MonkeyPatch):
    model = hooked("learned positions")
    expected = swept(model, PAIRS, "z")
    monkeypatch.setattr("ctlens.analysis.patching.blocks._FUSES", False)
    found = swept(model, PAIRS, "z")
    assert found.path == expected.path == "suffix"
    np.testing.assert_allclose(found.values, expected.values, **CLOSE)


@pytest.mark.parametrize("rows", [1, 40, 10_000])
def test_how_patches_share_batches_changes_nothing(rows: int, monkeypatch: pytest.MonkeyPatch):
    model = made()
    expected = swept(model, PAIRS, "z").values
    monkeypatch.setattr("ctlens.analysis.patching.suffix.ENOUGH_ROWS", rows)
    monkeypatch.setattr("ctlens.analysis.patching.suffix.LARGEST", rows * 96)  # of the gate and the MLP's input
    np.testing.assert_allclose(swept(model, PAIRS, "z").values, expected, **CLOSE)


def _offset_forgotten(turned: Any) -> Any:
    def wrong(self: Block, found: Tensor, width: int, positions: Any) -> Tensor:
        here = isinstance(positions, slice)
        return turned(self, found, width, slice(found.shape[1]) if here else positions - positions.min())

    return wrong


def _sees_the_next(attend: Any) -> Any:
    def wrong(self: Block, q: Tensor, kv: Tensor, hidden: Tensor) -> Tensor:
        return attend(self, q, kv, torch.cat([hidden[..., 1:], hidden[..., -1:]], -1))

    return wrong


def _sees_no_prefix(attend: Any) -> Any:
    def wrong(self: Block, q: Tensor, kv: Tensor, hidden: Tensor) -> Tensor:
        kv[:, : kv.shape[1] - q.shape[1]] = 0
        return attend(self, q, kv, hidden)

    return wrong


def test_the_general_way_begins_at_the_patch_only_where_that_gives_the_models_logits(monkeypatch: pytest.MonkeyPatch):
    if not HAS_HOOKED_TRANSFORMER:
        pytest.skip("TransformerLens 4 keeps no keys and values")
    model = made()
    begun: list[bool] = []
    kept_of = patching_hooks.kept_of

    def noted(*parts: Any) -> Any:
        begun.append((kept := kept_of(*parts)) is not None)
        return kept

    monkeypatch.setattr(patching_hooks, "kept_of", noted)
    right = swept(model, PAIRS, "pattern")
    last = patching_hooks.Kept.last
    monkeypatch.setattr(patching_hooks.Kept, "last", lambda self, *parts: 1.01 * last(self, *parts))
    found = swept(model, PAIRS, "pattern")
    assert begun == [True, False]
    np.testing.assert_allclose(found.values, right.values, **CLOSE)


def test_a_row_that_is_prepared_wrongly_is_noticed(monkeypatch: pytest.MonkeyPatch):
    model = made()
    right = swept(model, PAIRS, "mlp_out")
    changed = Suffix._changed
    monkeypatch.setattr(Suffix, "_changed", lambda *parts: 1.01 * changed(*parts))
    options: Any = {"direction": "denoising", "progress": False}
    found = patch(model, PAIRS, site=("resid_pre", "mlp_out", "pattern"), **options)  # the general way takes all sites
    assert right.path == "suffix" and {of_site.path for of_site in found.values()} == {"hooks"}
    np.testing.assert_allclose(found["mlp_out"].values, right.values, **CLOSE)


@pytest.mark.parametrize(
    ("method", "mistake"),
    [("_turned", _offset_forgotten), ("attend", _sees_the_next), ("attend", _sees_no_prefix)],
)
def test_a_mistake_in_the_fast_way_is_noticed_and_the_general_one_taken(
    method: str, mistake: Any, monkeypatch: pytest.MonkeyPatch
):
    model = made()
    right = swept(model, PAIRS, "resid_pre")
    monkeypatch.setattr(Block, method, mistake(getattr(Block, method)))
    found = swept(model, PAIRS, "resid_pre")
    assert (right.path, found.path) == ("suffix", "hooks")
    np.testing.assert_allclose(found.values, right.values, **CLOSE)
    monkeypatch.setattr("ctlens.analysis.patching.suffix.Suffix.agrees", lambda *parts: True)
    assert np.nanmax(np.abs(swept(model, PAIRS, "resid_pre").values - right.values)) > 1e-2


def test_models_it_does_not_know_go_the_general_way():
    normed = load_model(hf_model("qwen3"), tokenizer=TOKENIZER)  # normalises queries and keys
    hooked_by_its_user: Any = copy_model(made())
    hooked_by_its_user.add_hook("blocks.1.hook_attn_out", lambda activation, hook: 2 * activation)
    for model in (normed, hooked_by_its_user):
        assert swept(model, PAIRS, "z").path == "hooks"


def test_weights_are_read_anew_after_a_change():
    model: Any = made()
    before = swept(model, PAIRS, "resid_mid")
    for parameter in model.parameters():
        parameter.data *= 1.1
    after = swept(model, PAIRS, "resid_mid")
    assert after.path == "suffix" and not np.allclose(before.source, after.source)
