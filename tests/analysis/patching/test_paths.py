"""A patched path gives what hooks give that hand one component's output to one reader and freeze what lies between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import GROUPED_MODELS, hf_model, made
from helpers.patching import BLOCK_KINDS, CLOSE, PAIRS, TOKENIZER, hooked, logit_diff, swept
from torch import Tensor

from ctlens.analysis import PathPatching, path_patch
from ctlens.analysis.patching import paths
from ctlens.analysis.patching.jobs import patch_pairs
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair
from ctlens.models.loading import load_model
from ctlens.models.parameters import copy_model

pytestmark = pytest.mark.boundary

READERS = ("L2H3.q", "L2H3.k", "L2H3.v", "L1.mlp", "logits")
LAST = 2  # the last layer of the three


def patched(model: LensModel, pairs: list[Pair], **options: Any) -> PathPatching:
    return path_patch(model, pairs, **{"receivers": READERS, "direction": "denoising", "progress": False} | options)


def recorded(model: Any, ids: tuple[int, ...], hooks: list[Any] | None = None) -> dict[str, Tensor]:
    """Every activation of one run by TransformerLens's own cache."""
    with torch.no_grad(), model.hooks(fwd_hooks=hooks or []):
        return dict(model.run_with_cache(torch.tensor([ids]))[1])


def added(change: Tensor, there: list[int]) -> Any:
    """A hook that adds rows to the stream."""

    def hook(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        activation[0, there] += change
        return activation

    return hook


def written(value: Tensor, index: Any) -> Any:
    def hook(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        activation[index] = value
        return activation

    return hook


def attended(model: Any, q: Tensor, k: Tensor, v: Tensor, head: int) -> Tensor:
    """One head's `z` by the plain formula."""
    group = head // (q.shape[2] // k.shape[2])
    scores = q[0, :, head] @ k[0, :, group].T / (model.cfg.attn_scale if model.cfg.use_attn_scale else 1)
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v[0, :, group]


def by_hooks(model: Any, pair: Pair, direction: str, reader: str, layer: int, sender: str) -> float:
    """The logit difference with one path patched, by TransformerLens's hooks on whole runs."""
    (found,) = patch_pairs(model, [pair], direction, "all", "shared")
    here, there = map(list, zip(*found.columns[0], strict=True))
    source, target = recorded(model, found.source), recorded(model, found.target)
    if sender == "MLP":
        name = f"blocks.{layer}.hook_mlp_out"
        change = source[name][0, here] - target[name][0, there]
    else:
        head = int(sender[1:])
        name = f"blocks.{layer}.attn.hook_z"
        change = (source[name][0, here, head] - target[name][0, there, head]) @ model.blocks[layer].attn.W_O[head]
    if reader == "logits":
        return logit_diff(model, found.target, [(f"blocks.{LAST}.hook_resid_post", added(change, there))])
    block = f"blocks.{reader[1]}"
    if reader.endswith("mlp"):
        entering = "hook_resid_pre" if model.cfg.parallel_attn_mlp else "hook_resid_mid"
        mlp_out = f"{block}.hook_mlp_out"
        value = recorded(model, found.target, [(f"{block}.{entering}", added(change, there))])[mlp_out]
        return logit_diff(model, found.target, [(mlp_out, written(value[0, there], (0, there)))])
    changed = recorded(model, found.target, [(f"{block}.hook_resid_pre", added(change, there))])
    turned = "rot_" if model.cfg.positional_embedding_type == "rotary" else ""
    names = {"q": f"{turned}q", "k": f"{turned}k", "v": "v"}
    parts = [(changed if part == reader[-1] else target)[f"{block}.attn.hook_{name}"] for part, name in names.items()]
    head = int(reader[3])
    z = attended(model, *parts, head)
    return logit_diff(model, found.target, [(f"{block}.attn.hook_z", written(z, (0, slice(None), head)))])


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_every_path_is_what_hooks_on_whole_runs_give(kind: str, direction: str) -> None:
    model = hooked(kind)
    found = patched(model, PAIRS, direction=direction)
    expected = np.full_like(found.values[0], np.nan)
    for receiver, layer, sender in np.ndindex(*expected.shape[:-1]):
        reader = READERS[receiver]
        reads = LAST + 1 if reader == "logits" else int(reader[1])
        beside = reader.endswith("mlp") and found.senders[sender] != "MLP" and not model.cfg.parallel_attn_mlp
        if layer < reads or (beside and layer == reads):
            numbers = [by_hooks(model, pair, direction, reader, layer, found.senders[sender]) for pair in PAIRS]
            expected[receiver, layer, sender] = numbers
    np.testing.assert_allclose(found.values[0], expected, atol=1e-4, rtol=1e-4)
    moved = np.abs(found.values[0] - found.target[0]).max((1, 2, 3), where=~np.isnan(expected), initial=0)
    assert (moved > 1e-3).all()  # no receiver is deaf


@pytest.mark.parametrize("kind", GROUPED_MODELS)
def test_what_only_the_logits_read_is_what_a_patch_of_it_gives(kind: str) -> None:
    model = made() if kind == "made here" else load_model(hf_model(kind), tokenizer=TOKENIZER)
    found = patched(model, PAIRS, receivers="logits", positions="last", metrics=("logit_diff", "kl"))
    whole = swept(model, PAIRS, "mlp_out", positions="last", metrics=("logit_diff", "kl"))
    np.testing.assert_allclose(found.values[:, 0, -1, -1], whole.values[:, -1, 0], **CLOSE)
    np.testing.assert_allclose(found.source, whole.source, **CLOSE)
    np.testing.assert_allclose(found.target, whole.target, **CLOSE)


def test_the_changes_of_all_senders_and_the_embedding_are_that_of_the_stream() -> None:
    model: Any = hooked("learned positions")
    (pair,) = patch_pairs(model, PAIRS[:1], "denoising", "all", "shared")
    here, there = map(list, zip(*pair.columns[0], strict=True))
    source, target = recorded(model, pair.source), recorded(model, pair.target)

    def change(name: str) -> Tensor:
        return source[name][0, here] - target[name][0, there]

    total = change("hook_embed") + change("hook_pos_embed")
    for layer in range(LAST + 1):
        heads = change(f"blocks.{layer}.attn.hook_z")
        total = total + torch.einsum("phd,hdm->pm", heads, model.blocks[layer].attn.W_O)
        total = total + change(f"blocks.{layer}.hook_mlp_out")
    torch.testing.assert_close(total, change(f"blocks.{LAST}.hook_resid_post"), atol=1e-4, rtol=1e-4)


def test_padding_batches_and_order_change_nothing() -> None:
    model = made()
    receivers = ("L1H0.q", "L1H1.k", "L1H1.v", "logits")
    whole = patched(model, PAIRS, receivers=receivers)
    alone = [patched(model, [pair], receivers=receivers, max_batch=1).values for pair in PAIRS]
    np.testing.assert_allclose(whole.values, np.concatenate(alone, -1), **CLOSE)
    back = patched(model, PAIRS[::-1], receivers=receivers[::-1], max_batch=2)
    np.testing.assert_allclose(back.values[:, ::-1, :, :, ::-1], whole.values, **CLOSE)
    some = patched(model, PAIRS, receivers=receivers, layers=[0])
    np.testing.assert_array_equal(some.values, whole.values[:, :, :1])


def test_a_sender_that_writes_nothing_tells_nothing() -> None:
    model: Any = copy_model(hooked("learned positions"))
    model.blocks[0].attn.W_O.data[2] = 0
    found = patched(model, PAIRS)
    silent = found.values[0, :, 0, 2] - found.target[0]
    np.testing.assert_allclose(silent, 0, atol=1e-4)
    assert np.abs(found.values[0, :, 0, 1] - found.target[0]).max() > 1e-3


def test_the_table_and_the_shares_are_means_over_pairs() -> None:
    values = np.full((1, 2, 2, 2, 4), np.nan)
    values[0, 0, 0] = [[1, 2, 3, 4], [0, 0, 0, 0]]
    values[0, 1] = [[[0, 0, 0, 2], [2, 2, 2, 2]], [[4, 4, 4, 4], [0, 1, 0, 1]]]
    groups = {"topic": np.arange(4)}
    found = PathPatching(
        values=values,
        target=np.zeros((1, 4)),
        source=np.full((1, 4), 4.0),
        metrics=("logit_diff",),
        receivers=("L1H0.q", "logits"),
        layers=(0, 1),
        senders=("H0", "MLP"),
        direction="noising",
        positions="all",
        window="shared",
        groups=groups,
    )
    table = found.to_dataframe()
    named = list(zip(table["receiver"], table["layer"], table["sender"], strict=True))
    assert named == [
        ("L1H0.q", 0, "H0"),
        ("L1H0.q", 0, "MLP"),
        ("logits", 0, "H0"),
        ("logits", 0, "MLP"),
        ("logits", 1, "H0"),
        ("logits", 1, "MLP"),
    ]
    assert table["value"].tolist() == [2.5, 0, 0.5, 2, 4, 0.5] and set(table["n_pairs"]) == {4}
    assert found.normalised()["value"].tolist() == [0.625, 0, 0.125, 0.5, 1, 0.125]
    assert table.loc[0, "ci_low"] < 2.5 < table.loc[0, "ci_high"]
    grid = found.figure().data[0].z
    assert np.array(grid).tolist() == [[2.5, 0]]  # layer 1 does not write in front of the receiver
    assert np.array(found.figure("logits").data[0].z).tolist() == [[0.5, 2], [4, 0.5]]
    with pytest.raises(CtlensError, match="unknown receiver 'L9.mlp'"):
        found.figure("L9.mlp")
    with pytest.raises(CtlensError, match="'kl'"):
        found.figure(metric="kl")
    weaker = replace(found, values=found.target[0] + (found.values - found.target[0]) / 10)
    both = found.compare({"weaker": weaker}, label="attack", receiver="logits")
    assert np.array(both.data[1].z).tolist() == [[0.05, 0.2], [0.4, 0.05]] and both.layout.coloraxis.cmax == 4
    with pytest.raises(CtlensError, match="result 'weaker' has another direction"):
        found.compare({"weaker": replace(found, layers=(7, 8))}, label="attack")
    close = replace(found, source=np.full((1, 4), 0.1))
    with pytest.raises(CtlensError, match="is noise"):
        close.normalised()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"receivers": []}, "at least one receiver"),
        ({"receivers": ["logits", "logits"]}, "each once"),
        ({"receivers": "L1H0"}, "name 'logits', an MLP as 'L2.mlp', or a head as 'L2H0.q'"),
        ({"receivers": "L2.mlp"}, "layers 0 to 1 with heads 0 to 3"),
        ({"receivers": "L1H4.q"}, "layers 0 to 1 with heads 0 to 3"),
        ({"receivers": "L0H0.q"}, "in front of L0H0.q"),
        ({"receivers": "L1H0.q", "layers": [1]}, "in front of L1H0.q"),
        ({"receivers": "logits", "positions": "each"}, "'each'"),
        ({"receivers": "logits", "direction": "sideways"}, "'sideways'"),
        ({"receivers": "logits", "metrics": "loss"}, "'loss'"),
    ],
)
def test_what_cannot_be_asked_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(CtlensError, match=says):
        patched(made(), PAIRS, **options)


def test_blocks_that_are_not_known_or_give_other_logits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    monkeypatch.setattr(paths.Suffix, "agrees", lambda self, expected: False)
    with pytest.raises(CtlensError, match="do not give this model's logits"):
        patched(model, PAIRS, receivers="logits")
    monkeypatch.setattr(paths, "read_blocks", lambda *parts: None)
    with pytest.raises(CtlensError, match="are not known"):
        patched(model, PAIRS, receivers="logits")
