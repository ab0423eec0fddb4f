"""The table of hook points: what a model has, what of it can be edited, and what trains on it."""

from __future__ import annotations

import pytest
from helpers.models import hf_model, made, odd_model

from ctlens import hook_table, load_organism, losses
from ctlens.core.types import LensModel
from ctlens.models.hooks import SHORTHANDS, resolve
from ctlens.models.loading import load_model


def test_a_model_made_here_has_every_site_and_all_can_be_edited() -> None:
    model = load_organism()
    table = hook_table(model).set_index("hook_name")

    for site in SHORTHANDS:
        assert table.index[table["site"] == site].tolist() == resolve(model, site)
    assert table["can_edit"].all() and (table["note"] == "").all()
    assert table.loc["blocks.2.attn.hook_pattern", "shape"] == "batch 4 pos pos"
    assert table.loc["blocks.2.hook_resid_post", ["layer", "shape"]].tolist() == ["2", "batch pos 96"]
    assert table.index.tolist().index("blocks.1.hook_resid_pre") < table.index.tolist().index("blocks.1.attn.hook_z")


def test_losses_stand_where_they_train() -> None:
    model = load_organism()
    table = hook_table(model).set_index("hook_name")["losses"]

    for name in ("act", "mlpct", "attct"):
        there = [hook_name for hook_name in table.index if name in table[hook_name].split(", ")]
        assert there == losses.get(name).hook_names(model)


@pytest.mark.boundary
@pytest.mark.parametrize("kind", ["made here", "gpt2", "llama"])
def test_each_hook_point_stands_once_and_tokens_cannot_be_edited(kind: str) -> None:
    model: LensModel = made() if kind == "made here" else load_model(hf_model(kind))
    table = hook_table(model)

    assert table["hook_name"].is_unique and set(table["hook_name"]) <= set(model.hook_dict)
    told = dict(table.loc[~table["can_edit"], ["hook_name", "note"]].itertuples(index=False))
    unread = {name for name, note in told.items() if note == "an edit of it reaches no logit"}
    assert all(name.endswith(("rotary_emb.hook_in", "hook_attn_scores")) for name in unread)  # the latter in 4.x
    assert set(told) - unread <= {"embed.hook_in", "pos_embed.hook_in"}
    assert {told[name] for name in set(told) - unread} <= {"it holds no numbers that could be changed"}
    assert {"resid_pre", "resid_post", "pattern", "z", "mlp_out"} <= set(table["site"])


def test_an_edit_that_reaches_nothing_is_told() -> None:
    """On GPT-Neo nobody reads `pattern`, and on a mixture of experts no one matrix reads `mlp_post`."""
    neo = hook_table(load_model(odd_model("gpt_neo"))).query("site == 'pattern'")
    assert not neo["can_edit"].any() and neo["note"].str.contains("go on with the attention they had").all()
    experts = hook_table(load_model(odd_model("mixtral"))).set_index("hook_name")
    assert "mlp_post" not in set(experts["site"])
