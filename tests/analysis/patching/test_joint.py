"""Activations patched together: what TransformerLens's hooks on a whole run give; of one, what `patch` gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import made
from helpers.patching import BLOCK_KINDS, CLOSE, PAIRS, hooked, logit_diff, swept
from torch import Tensor

from ctlens.analysis import JointPatching, joint_patch
from ctlens.analysis.patching.jobs import patch_pairs
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair
from ctlens.models.hooks import SHORTHANDS

pytestmark = pytest.mark.boundary

PATCHES = [
    ("blocks.2.attn.hook_z", 1),
    "blocks.0.mlp.hook_post",
    ("blocks.0.attn.hook_z", 3),
    ("blocks.0.attn.hook_z", 0),
    "blocks.1.hook_mlp_out",
]


def joint(model: LensModel, patches: list[Any], pairs: list[Pair] = PAIRS, **options: Any) -> JointPatching:
    return joint_patch(model, pairs, patches, **{"direction": "denoising", "progress": False} | options)


def by_hooks(model: Any, pair: Pair, direction: str, patches: list[Any]) -> float:
    """The logit difference of one pair with some activations of the source run, by TransformerLens's own hooks."""
    (found,) = patch_pairs(model, [pair], direction, "all", "shared")
    here, there = map(list, zip(*found.columns[0], strict=True))
    with torch.no_grad():
        source = model.run_with_cache(torch.tensor([found.source]))[1]

    def writing(name: str, heads: Any) -> Any:
        def hook(activation: Tensor, hook: Any) -> Tensor:
            activation = activation.clone()
            for position, twin in zip(there, here, strict=True):
                activation[0, position][heads] = source[name][0, twin][heads]
            return activation

        return name, hook

    named = [(given, slice(None)) if isinstance(given, str) else given for given in patches]
    return logit_diff(model, found.target, [writing(name, heads) for name, heads in named])


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_the_set_and_each_alone_are_what_plain_hooks_give(kind: str, direction: str) -> None:
    model = hooked(kind)

    found = joint(model, PATCHES, direction=direction)

    for number, pair in enumerate(PAIRS):
        expected = [by_hooks(model, pair, direction, chosen) for chosen in (PATCHES, *([one] for one in PATCHES))]
        np.testing.assert_allclose(found.values[0, :, number], expected, atol=1e-4, rtol=1e-4)
    together, *alone = (found.values[0] - found.target[0]).mean(-1)
    assert abs(together - sum(alone)) > 1e-3  # the patches of this model do not add up
    table = found.to_dataframe().set_index("patched")["value"]
    assert table["interaction"] == pytest.approx(together - sum(alone), abs=1e-5)
    assert table["sum of each alone"] == pytest.approx(sum(alone), abs=1e-5)


@pytest.mark.parametrize("site", SHORTHANDS)
def test_a_set_of_one_is_a_cell_of_the_sweep_and_has_no_interaction(site: str) -> None:
    model = made()
    name = SHORTHANDS[site].format(layer=1)
    with_head = site in ("z", "pattern")
    options: dict[str, Any] = {"positions": "content", "metrics": ("logit_diff", "kl")}

    found = joint(model, [(name, 2) if with_head else name], **options)

    whole = swept(model, PAIRS, site, **options)
    cell = whole.values[:, 1, 2, 0] if with_head else whole.values[:, 1, 0]
    np.testing.assert_allclose(found.values, np.stack([cell, cell], 1), **CLOSE)
    np.testing.assert_allclose([found.target, found.source], [whole.target, whole.source], **CLOSE)
    assert (found.to_dataframe().query("patched == 'interaction'")["value"] == 0).all()


def test_a_head_site_as_a_whole_is_all_its_heads_together() -> None:
    model = made()
    for name in ("blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern"):
        whole = joint(model, [name])
        heads = joint(model, [(name, head) for head in range(4)])
        np.testing.assert_allclose(whole.values[0, 0], heads.values[0, 0], **CLOSE)


def test_a_head_goes_by_its_name_in_figures_too() -> None:
    model = made()
    by_name = joint(model, ["L1H2", "blocks.0.hook_mlp_out"])
    np.testing.assert_array_equal(
        by_name.values, joint(model, [("blocks.1.attn.hook_z", 2), "blocks.0.hook_mlp_out"]).values
    )
    assert by_name.patches == ("L1H2", "blocks.0.hook_mlp_out")


def test_the_order_of_the_set_and_the_batches_change_nothing() -> None:
    model = made()
    patches: list[Any] = [("blocks.1.attn.hook_z", 1), "blocks.0.mlp.hook_post", ("blocks.1.attn.hook_pattern", 0)]
    found = joint(model, patches).to_dataframe().set_index("patched")["value"]

    turned = joint(model, patches[::-1], max_batch=1).to_dataframe().set_index("patched")["value"]
    np.testing.assert_allclose(turned[found.index], found, **CLOSE)


def test_what_lies_behind_the_whole_stream_is_the_source_run_whatever_else_is_patched() -> None:
    model = made()
    found = joint(model, ["blocks.1.hook_resid_post", ("blocks.0.attn.hook_z", 2)])

    np.testing.assert_allclose(found.values[0, 0], found.source[0], **CLOSE)
    np.testing.assert_allclose(found.values[0, 1], found.source[0], **CLOSE)
    table = found.to_dataframe().set_index("patched")["value"]
    assert table["interaction"] == pytest.approx(-table["blocks.0.attn.hook_z head 2"], abs=1e-5)


def test_changes_sums_interactions_and_shares_by_hand(tmp_path) -> None:
    values = np.array([[[5.0, 7.0], [1.0, 3.0], [2.0, 2.0]]])  # together, then each alone
    found = JointPatching(
        values=values,
        target=np.array([[0.0, 1.0]]),
        source=np.array([[8.0, 9.0]]),
        metrics=("logit_diff",),
        patches=("a", "b"),
        direction="denoising",
        positions="all",
        window="shared",
    )

    table = found.to_dataframe().set_index("patched")
    shares = found.normalised().set_index("patched")["value"]

    # changes: together 5 and 6, a 1 and 2, b 2 and 1
    assert table["value"].to_dict() == {
        "all together": 5.5,
        "a": 1.5,
        "b": 1.5,
        "sum of each alone": 3.0,
        "interaction": 2.5,
    }
    assert shares["interaction"] == pytest.approx(5 / 16) and (table["n_pairs"] == 2).all()
    found.save(tmp_path / "joint.safetensors")
    assert JointPatching.load(tmp_path / "joint.safetensors").to_dataframe().equals(found.to_dataframe())
    drawn: Any = found.figure()
    assert (list(drawn.data[0].x), list(drawn.data[0].text)) == (table["value"].tolist(), table.index.tolist())
    with pytest.raises(CtlensError, match="unknown measured metric 'kl'"):
        found.figure("kl")


@pytest.mark.parametrize(
    ("patches", "options", "message"),
    [
        ([], {}, "there is nothing to patch"),
        (["z"], {}, "z is a site of every layer: name hook points in full, such as 'blocks.0.attn.hook_z'"),
        (["blocks.1.attn.hook_zz"], {}, "did you mean 'blocks.1.attn.hook_z'"),
        (["hook_embed"], {}, "unknown site 'hook_embed'"),
        (["blocks.2.hook_mlp_out"], {}, "layer 2 does not exist"),
        ([("blocks.1.attn.hook_z", 4)], {}, "head 4 does not exist: z has heads 0 to 3"),
        (["L1H4"], {}, "head 4 does not exist: z has heads 0 to 3"),
        (["L2H0"], {}, "layer 2 does not exist"),
        (["L1H0", ("blocks.1.attn.hook_z", 0)], {}, "blocks.1.attn.hook_z is named twice"),
        ([("blocks.1.hook_mlp_out", 0)], {}, "mlp_out has no heads"),
        ([("blocks.1.attn.hook_z", 0)] * 2, {}, "blocks.1.attn.hook_z is named twice"),
        (["blocks.1.attn.hook_z", ("blocks.1.attn.hook_z", 0)], {}, "by a head and as a whole"),
        ([3], {}, "patches must be"),
        (["blocks.1.hook_mlp_out"], {"positions": "each"}, "unknown choice of positions"),
        (["blocks.1.hook_mlp_out"], {"direction": "up"}, "unknown direction"),
    ],
)
def test_what_cannot_be_patched_is_refused(patches: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        joint(made(), patches, **options)


def test_a_model_in_training_mode_is_refused() -> None:
    training = made()
    training.train()
    with pytest.raises(CtlensError, match="eval mode"):
        joint(training, ["blocks.1.hook_mlp_out"])
