"""Grafts: every value is that of a model put together by hand; no input is ever changed."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from helpers import planted
from helpers.models import CHAT_MODELS, chat_model
from helpers.patching import CLOSE, logit_diff
from helpers.tiers import unit_first
from helpers.transplants import PAIRS, edited, moved

from ctlens.analysis import Graft, graft
from ctlens.analysis.weights import graft as grafts
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import encode
from ctlens.data.pairs import Pair, prompt
from ctlens.models.lora import LoRA, add_adapters, merge_adapters
from ctlens.models.matrices import COMPONENTS, TIED, components
from ctlens.models.parameters import GROUPS, copy_model, fingerprint, parameter_groups, present_parameters

pytestmark = pytest.mark.boundary

INSIDE = {  # of layer 1, by model: what belongs to each component, as patterns of the names that architectures give
    "made here": {
        "qk": (r"attn\.(W_Q|q\.weight)", r"attn\.(W_K|k\.weight)"),
        "ov": (r"attn\.(W_V|v\.weight)", r"attn\.(W_O|o\.weight)"),
        "norm": (r"ln1\.w(eight)?", r"ln2\.w(eight)?"),
    },
    "llama": {"qk": (r"attn\.q_proj\.weight", r"attn\.k_proj\.weight"), "ov": (r"v_proj\.weight", r"o_proj\.weight")},
    "gpt2": {
        "qk": (r"attn\.q\.weight", r"attn\.q\.bias", r"attn\.k\.weight", r"attn\.k\.bias"),
        "mlp": (r"c_fc\.bias",),
    },
    "qwen3": {"qk": (r"q_proj\.weight", r"k_proj\.weight", r"q_norm\.weight", r"k_norm\.weight")},
}


@pytest.fixture(scope="module", params=CHAT_MODELS)
def models(request: pytest.FixtureRequest) -> tuple[LensModel, LensModel]:
    """Source and target, apart in all their weights."""
    target = chat_model(request.param)
    return moved(target, GROUPS), target


def grafted(models: tuple[LensModel, LensModel], pairs: list[Pair] = PAIRS, **options: Any) -> Graft:
    return graft(*models, pairs, **{"progress": False} | options)


@pytest.mark.parametrize("kind", unit_first(INSIDE))
def test_every_weight_has_one_place(kind: str):
    model = chat_model(kind)
    found = components(model)
    assert found.keys() == present_parameters(model).keys()
    assert {place[1] for place in found.values()} <= {*COMPONENTS, TIED}
    assert (TIED in {place[1] for place in found.values()}) == (kind == "gpt2")
    for component, ends in INSIDE[kind].items():
        for end in ends:
            (place,) = [place for name, place in found.items() if re.search(rf"\.1\..*{end}$", name)]
            assert place == (1, component)
    qk = [name for name, place in found.items() if place == (1, "qk")]
    assert len(qk) == len(INSIDE[kind]["qk"])
    assert [place for place in found.values() if place[1] == "norm" and place[0] is None]


def put_together(target: LensModel, source: LensModel, names: list[str]) -> LensModel:
    made = copy_model(target)
    theirs = present_parameters(source)
    for name in names:
        present_parameters(made)[name].data = theirs[name].data.clone()
    return made


def test_every_value_is_that_of_a_model_put_together_by_hand(models: tuple[LensModel, LensModel]):
    source, target = models
    found = grafted(models)
    where = components(target)
    ids = encode(PAIRS[:1], target.tokenizer, n_ctx=256).rows[0].wrapped.ids
    for quantity, (model, other) in enumerate(((target, source), (source, target))):
        for at, (block, component) in enumerate(zip(found.blocks, found.components, strict=True)):
            names = [
                name
                for name, (of_block, kind) in where.items()
                if component in ("all", kind)
                and (block == "all" or of_block == (None if block == "outside" else block))
            ]
            assert names
            expected = logit_diff(put_together(model, other, names), ids, [])
            assert found.values[quantity, 0, at, 0] == pytest.approx(expected, abs=2e-5), (block, component)
        assert found.unpatched[quantity, 0, 0] == pytest.approx(logit_diff(model, ids, []), abs=2e-5)
        assert found.source[quantity, 0, 0] == pytest.approx(logit_diff(other, ids, []), abs=2e-5)
    assert (np.abs(found.values - found.unpatched[:, :, None]).max(-1) > 1e-4).all()


@pytest.mark.parametrize("by", ["block", "component"])
def test_all_parts_together_are_the_other_model(models: tuple[LensModel, LensModel], by: str):
    source, target = models
    made = copy_model(target)
    theirs = {name: value.data for name, value in present_parameters(source).items()}
    own = {name: value.data for name, value in present_parameters(made).items()}
    chosen = [
        names
        for (block, component), names in grafts._parts((target, source), grafts.PART_KINDS).items()
        if (block == "all" if by == "component" else component == "all" or block == "outside" or "embed" in component)
    ]
    assert sorted(name for names in chosen for name in names) == sorted(own)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        before = made(tokens)
        with ExitStack() as grafting:
            for names in chosen:
                grafting.enter_context(grafts._swapped(own, theirs, names))
            assert torch.equal(made(tokens), source(tokens))
        assert torch.equal(made(tokens), before) and not torch.equal(before, source(tokens))


@pytest.mark.parametrize("group", GROUPS)
def test_models_apart_in_one_part_are_told_apart_there_alone(group: str):
    target = chat_model("made here")
    source = moved(target, (group,))
    found = grafted((source, target))
    whole = np.array([component in _inside(group) and block == "all" for block, component in _places(found)])
    elsewhere = found.moved == 0
    if group != "attn":  # QK and OV are two parts
        assert whole.sum() == 1
        np.testing.assert_array_equal(found.values[:, 0, whole][:, 0], found.source[:, 0])
    for quantity in range(2):
        still = np.broadcast_to(found.unpatched[quantity, 0], found.values[quantity, 0, elsewhere].shape)
        np.testing.assert_array_equal(found.values[quantity, 0, elsewhere], still)
    assert {component for (_, component), moved in zip(_places(found), found.moved, strict=True) if moved} <= {
        "all",
        *_inside(group),
    }


def _inside(group: str) -> tuple[str, ...]:
    return ("qk", "ov") if group == "attn" else (group,)


def _places(found: Graft) -> list[tuple[int | str, str]]:
    return list(zip(found.blocks, found.components, strict=True))


def test_no_input_is_changed_even_when_it_fails(models: tuple[LensModel, LensModel]):
    source, target = models
    before = fingerprint(source), fingerprint(target)
    gradients = [parameter.requires_grad for model in models for parameter in model.parameters()]
    grafted(models)

    def failing(logits: Any, rows: Any) -> Any:
        calls.append(1)
        if len(calls) > 6:
            raise RuntimeError("stop")
        return rows.logit_diff(logits)

    calls: list[int] = []
    with pytest.raises(RuntimeError, match="stop"):
        grafted(models, metrics=(failing,))
    assert (fingerprint(source), fingerprint(target)) == before
    assert [parameter.requires_grad for model in models for parameter in model.parameters()] == gradients


@pytest.mark.parametrize(("part", "component"), [("W_O", "ov"), ("W_V", "ov"), ("W_Q", "qk"), ("W_K", "qk")])
def test_a_planted_edit_is_found_in_its_part_and_nowhere_else(part: str, component: str):
    found = graft(edited(part), planted.model(), planted.pairs(), progress=False)
    table = found.normalised()
    inside = ((table["block"] == 1) | (table["block"] == "all")) & table["component"].isin(["all", component])
    assert inside.sum() == 2 * 3  # the block, the component, the component of the block
    np.testing.assert_allclose(table["value"][inside], 1, atol=1e-6)
    np.testing.assert_array_equal(table["value"][~inside], 0)
    np.testing.assert_array_equal(table["moved"] > 0, inside)


def test_parts_act_on_each_other():
    """Two edits that each repair the answer: either graft is sufficient, and neither loses it."""
    fixed = edited("W_O")
    read = present_parameters(planted.model("masked"))
    for name, value in present_parameters(fixed).items():
        if components(fixed)[name][1] == "unembed":
            value.data.copy_(read[name].data)
    table = graft(fixed, planted.model(), planted.pairs(), by="component", progress=False).normalised()
    chosen = table[table["component"].isin(["ov", "unembed"])]
    np.testing.assert_allclose(chosen.query("quantity == 'sufficient'")["value"], 1, atol=0.05)
    np.testing.assert_allclose(chosen.query("quantity == 'lost'")["value"], 0, atol=0.05)


def test_equal_models_have_no_shares(models: tuple[LensModel, LensModel]):
    found = grafted((models[1], copy_model(models[1])))
    assert (found.moved == 0).all() and (found.values == found.unpatched[:, :, None]).all()
    for refused in (found.normalised, found.figure):
        with pytest.raises(CtlensError, match="logit_diff differs by 0 between source and target"):
            refused()


def test_batch_mates_and_order_change_nothing(models: tuple[LensModel, LensModel]):
    options: dict[str, Any] = {"metrics": ("logit_diff", "kl"), "by": ("block", "component")}
    together = grafted(models, **options)
    for turned in (grafted(models, PAIRS[::-1], **options), grafted(models, PAIRS[::-1], batch_size=1, **options)):
        np.testing.assert_allclose(turned.values[..., ::-1], together.values, **CLOSE)
        np.testing.assert_allclose(turned.source[..., ::-1], together.source, **CLOSE)


def test_clean_prompts_are_read_where_asked(models: tuple[LensModel, LensModel]):
    turned = [Pair(pair.wrapped, pair.clean) for pair in PAIRS]
    here = grafted(models, side="clean", by="block")
    there = grafted(models, turned, by="block")
    np.testing.assert_allclose(here.values, there.values, **CLOSE)
    assert not np.allclose(here.values, grafted(models, by="block").values)


def test_adapters_count_as_weights():
    base, adapted = chat_model("made here"), chat_model("made here")
    for update in add_adapters(adapted, LoRA(2, target_modules=("q", "mlp_out"))):
        update.data.normal_(generator=torch.Generator().manual_seed(2))
    merged = copy_model(adapted)
    merge_adapters(merged)
    found, expected = grafted((adapted, base)), grafted((merged, base))
    np.testing.assert_allclose(found.values, expected.values, **CLOSE)
    assert {component for (_, component), apart in zip(_places(found), found.moved, strict=True) if apart} == {
        "all",
        "qk",
        "mlp",
    }
    assert grafted((base, adapted)).values == pytest.approx(found.values[::-1], abs=1e-5)


def test_how_far_the_models_are_apart_is_the_norm_of_the_difference():
    target = chat_model("made here")
    source = copy_model(target)
    for name in parameter_groups(source)["mlp"]:
        if name.startswith("blocks.1.") or ".1." in name:
            present_parameters(source)[name].data *= 1.5
    found = grafted((source, target))
    apart = dict(zip(_places(found), found.moved.tolist(), strict=True))
    assert apart[1, "mlp"] == pytest.approx(0.5) and apart[0, "mlp"] == 0
    assert 0 < apart["all", "mlp"] < 0.5


def test_results_round_trip_and_draw(tmp_path, models: tuple[LensModel, LensModel]):
    found = grafted(models, metrics=("logit_diff", "kl"))
    found.save(tmp_path / "graft.safetensors")
    again = Graft.load(tmp_path / "graft.safetensors")
    assert again.to_dataframe().equals(found.to_dataframe()) and again.blocks == found.blocks
    drawn = found.compare({"bct": found}, label="act", smallest_gap=0.0)
    bars = [trace for trace in drawn.data if trace.type == "bar"]
    assert [(bar.name, bar.xaxis) for bar in bars] == [("ACT", "x"), ("BCT", "x"), ("ACT", "x2"), ("BCT", "x2")]
    table = found.normalised(smallest_gap=0.0)
    lost = table[(table["quantity"] == "lost") & ((table["component"] == "all") | (table["block"] == "all"))]
    np.testing.assert_array_equal(bars[2].y, lost["value"])
    words = drawn.layout.xaxis.ticktext
    assert words[:4] == ("L0", "L1", "QK", "OV") and len(words) == len(bars[0].y)
    assert list(found.figure("both", smallest_gap=0.0).layout.xaxis.ticktext)[:2] == ["L0 QK", "L0 OV"]


def test_parts_that_are_equal_are_not_drawn():
    found = graft(edited("W_O"), planted.model(), planted.pairs(), progress=False)
    drawn = found.figure()
    assert drawn.layout.xaxis.ticktext == ("L1", "OV")
    assert "equal in both: L0, L2, QK, MLP, norms, embedding, unembedding" in drawn.layout.meta["subtitle"]
    with pytest.raises(CtlensError, match="unknown kind of part 'head'"):
        found.figure("head")
    blocks = graft(edited("W_O"), planted.model(), planted.pairs(), by="block", progress=False)
    with pytest.raises(CtlensError, match="no part by both was measured"):
        blocks.figure("both")
    with pytest.raises(CtlensError, match="have different layers, positions or parts"):
        found.compare({"bct": blocks}, label="act")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": "benign"}, "unknown side"),
        ({"by": "head"}, "unknown kind of part"),
        ({"by": ()}, "no part is named"),
        ({"metrics": ()}, "no metrics"),
    ],
)
def test_what_cannot_be_had_is_refused(options: dict[str, Any], message: str):
    model = chat_model("made here")
    with pytest.raises(CtlensError, match=message):
        grafted((model, model), **options)


def test_models_that_cannot_exchange_weights_are_refused():
    model = chat_model("made here")
    with pytest.raises(CtlensError, match="do not compare: n_layers"):
        grafted((model, planted.model()))
    with pytest.raises(CtlensError, match="under different names"):
        grafted((model, chat_model("llama")))
    with pytest.raises(CtlensError, match="names no good and bad answer"):
        grafted((model, model), [Pair(prompt("a?"), prompt("no. a?"))])
    training = copy_model(model)
    training.train()
    with pytest.raises(CtlensError, match="eval mode"):
        grafted((training, model))


def test_queries_keys_and_values_in_one_matrix_cannot_be_told_apart():
    fused: Any = chat_model("gpt2")
    fused.ctlens_absent = frozenset()  # as if it computed with the fused matrix
    with pytest.raises(CtlensError, match="qkv.* is not split into queries, keys and values"):
        grafted((fused, fused))
