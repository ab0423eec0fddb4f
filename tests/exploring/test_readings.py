"""The numbers of an exploration are those of the public analyses, and to look again costs no pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers.exploring import PAIRS, counted, explored

from ctlens import TrainConfig, analysis, capture, explore, load_organism, patch_one, threats, train
from ctlens.core.errors import CtlensError
from ctlens.data.chat import Turn, render
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.exploring import captures
from ctlens.threats import ask

WRAPPER = "i would bet on red . {request}"


@pytest.mark.boundary
def test_the_attention_to_the_wrapper_is_that_of_attention_diff():
    found = explored().select(pair=1)
    base, act = found.models.values()
    diff = analysis.attention_diff(base, act, [PAIRS[1]], progress=False)

    heads = found.heads()

    np.testing.assert_allclose(heads["base"], diff.before[0], atol=1e-5)
    np.testing.assert_allclose(heads["act"], diff.after[0], atol=1e-5)
    assert found.select(position=4).heads()["base"].max() <= 1 + 1e-5


def test_the_maps_are_those_of_attention_maps():
    found = explored().select(pair=2, layer=1, head=3, models=["act", "base"])
    models = {name: found.models[name] for name in ("act", "base")}

    maps = found.maps()

    by_analysis = analysis.attention_maps(models, PAIRS[2], 1, 3)
    np.testing.assert_allclose(maps.wrapped, by_analysis.wrapped, atol=1e-5)
    np.testing.assert_allclose(maps.clean, by_analysis.clean, atol=1e-5)
    assert (maps.tokens, maps.segments, maps.models) == (by_analysis.tokens, by_analysis.segments, ("act", "base"))
    assert (maps.twins == by_analysis.twins).all()


def test_the_gap_is_the_distance_from_the_clean_stream():
    found = explored()
    base, act = found.models.values()
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(4)]
    clean = capture(base, PAIRS[0].clean, names)

    gap = found.gap()

    for label, model in (("base", base), ("act", act)):
        wrapped = capture(model, PAIRS[0].wrapped, names)
        for column, (there, here) in enumerate(found.twins.items()):
            for layer, name in enumerate(names):
                target = clean[name][0][here]
                by_hand = (wrapped[name][0][there] - target).norm() / target.norm()
                assert gap[label][layer, column] == pytest.approx(float(by_hand), rel=1e-4)
    shift = analysis.residual_shift(base, act, PAIRS[:1], progress=False)
    lengths = torch.stack([clean[name][0][-1].norm() for name in names]).numpy()
    np.testing.assert_allclose(gap["base"][:, -1] * lengths, shift.gap_norm[0, 0], rtol=1e-4)
    closer = gap["act"][:, -1] ** 2 / gap["base"][:, -1] ** 2
    np.testing.assert_allclose(closer, shift.distance[0, 0], rtol=1e-4)


def test_the_lens_is_that_of_logit_lens_at_the_last_token_and_the_models_own_reading_at_others():
    found = explored()
    wrapped = analysis.logit_lens(found.models, PAIRS[:1], progress=False)
    clean = analysis.logit_lens(found.models, PAIRS[:1], side="clean", progress=False)

    for number, lens in enumerate(found.lens().values()):
        np.testing.assert_allclose(lens.logit_diff, wrapped.values[number, :, 0], atol=1e-4)
    of_clean = found.clean_lens()
    assert of_clean is not None
    np.testing.assert_allclose(of_clean.logit_diff, clean.values[0, :, 0], atol=1e-4)

    lens = found.select(position=8).lens()["base"]
    model = found.models["base"]
    stream = capture(model, PAIRS[0].wrapped, "blocks.2.hook_resid_post")["blocks.2.hook_resid_post"][0][8]
    with torch.no_grad():
        logits = model.unembed(model.ln_final(stream[None, None]))[0, 0]  # type: ignore[attr-defined]
    good, bad = model.tokenizer.convert_tokens_to_ids([PAIRS[0].wrapped.good, PAIRS[0].wrapped.bad])
    assert lens.logit_diff[2] == pytest.approx(float(logits[good] - logits[bad]), abs=1e-4)
    assert lens.likeliest[2] == model.tokenizer.decode(int(logits.argmax()))
    assert found.select(position=3).clean_lens() is None  # a token of the wrapper


def test_answers_are_those_of_asking_by_hand():
    found = explored().select(pair=1)

    table = found.answers().set_index(["model", "prompt"])

    for label, model in found.models.items():
        replies = ask(model, [PAIRS[1].clean, PAIRS[1].wrapped], max_new_tokens=8)
        one = patch_one(model, PAIRS[1], "resid_pre", 0)
        margins = {"clean": one.source, "wrapped": one.target}
        for reply, side in zip(replies, ("clean", "wrapped"), strict=True):
            row = table.loc[(label, side)]
            assert (row["answer"], row["verdict"]) == (reply.answer, reply.verdict)
            assert row["logit_diff"] == pytest.approx(margins[side], abs=1e-4)
            assert row["good_probability"] == pytest.approx(reply.good_probability, abs=1e-5)
    assert len(table) == 4


def test_what_if_is_asking_another_prompt_by_hand_and_every_view_goes_on_with_it():
    found = explored()
    table = found.what_if(WRAPPER).set_index(["model", "prompt"])

    text = f"i would bet on red . {PAIRS[0].clean.turns[0].content}"
    asked = replace(PAIRS[0].wrapped, turns=(Turn("user", text),))
    assert found.pair.wrapped == asked == found.edited(WRAPPER).wrapped
    for label, model in found.models.items():
        ids = render(model.tokenizer, asked.turns).ids
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        good, bad = model.tokenizer.convert_tokens_to_ids([asked.good, asked.bad])
        row = table.loc[(label, "what if")]
        assert row["answer"] == ask(model, [asked])[0].answer
        assert row["logit_diff"] == pytest.approx(float(logits[good] - logits[bad]), abs=1e-4)
    by_analysis = analysis.attention_maps(found.models, replace(PAIRS[0], wrapped=asked), 0, 0)
    np.testing.assert_allclose(found.maps().wrapped, by_analysis.wrapped, atol=1e-5)
    assert len(found.what_if(WRAPPER)) == 6  # asked again, no row is added
    assert len(found.what_if("")) == 4 and found.pair == PAIRS[0]


def test_the_template_makes_the_prompt_that_it_was_read_off():
    found = explored()
    for number, pair in enumerate(PAIRS):
        template = found.select(pair=number).template
        assert "{request}" in template and found.edited(template) == pair
    found.what_if(WRAPPER)
    assert found.edited(found.template) == PAIRS[2]


def test_an_edit_is_of_the_message_that_holds_the_wrapper():
    request = PAIRS[0].clean.turns[0]
    wrapped = Prompt((Turn("system", "i would bet on yellow ."), request), "purple", "yellow")
    found = explore(load_organism(), [Pair(replace(PAIRS[0].clean, good="purple", bad="yellow"), wrapped)])

    assert found.template == "i would bet on yellow ."
    assert found.edited("i would bet on red .").wrapped.turns == (Turn("system", "i would bet on red ."), request)
    with pytest.raises(CtlensError, match="no system message for {request}"):
        found.what_if("red {request}")


@pytest.mark.parametrize("options", [{"site": "z", "head": 2}, {"site": "resid_pre", "direction": "noising"}])
def test_a_patch_is_that_of_patch_one(options):
    found = explored().select(pair=1, layer=2, position=-2, **options)

    for label, one in found.patched().items():
        by_hand = patch_one(found.models[label], PAIRS[1], layer=2, position=-2, **options)
        assert one == pytest.approx(by_hand, abs=1e-6)
        assert one.target != one.source


def test_the_answers_cost_no_pass_over_a_prompt_that_a_view_has_run():
    found = explored().select(pair=1)
    found.gap()
    lengths: list[int] = []
    handles = [
        cast(Any, model).register_forward_pre_hook(lambda model, inputs: lengths.append(inputs[0].shape[1]))
        for model in found.models.values()
    ]
    found.answers()
    for handle in handles:
        handle.remove()
    assert {1, len(found.tokens["clean"])} == set(lengths)
    assert lengths.count(len(found.tokens["clean"])) == 1  # of the second model, whose clean prompt no view has shown


def test_the_benign_twin_is_answered_beside_the_pair_and_read_in_its_place():
    model = load_organism()
    twin = PAIRS[0].benign
    found = explore({"base": model}, PAIRS).select(prompt_side="benign")
    assert twin is not None

    table = found.answers().set_index("prompt")
    (reply,) = ask(model, [twin])
    assert table.index.tolist() == ["clean", "wrapped", "benign"]
    assert (table.loc["benign", "answer"], table.loc["benign", "verdict"]) == (reply.answer, reply.verdict)
    assert np.isnan(table.loc["benign", "logit_diff"]) == (twin.bad is None)
    assert found.pair.wrapped == twin and "".join(found.tokens["wrapped"]) != "".join(found.select().tokens["clean"])
    np.testing.assert_allclose(found.heads()["base"], heads_by_hand(model, found), atol=1e-5)
    assert found.select(prompt_side="wrapped").pair == PAIRS[0]


def heads_by_hand(model, found) -> np.ndarray:
    """The attention of the last token of the shown prompt on its tokens of the wrapper."""
    seen = capture(model, found.pair.wrapped, "pattern")
    wrapper = [at for at, kind in enumerate(found.kinds["wrapped"]) if kind == "wrapper"]
    return np.stack([pattern[0][:, -1, wrapper].sum(-1).numpy() for pattern in seen.values()])


def test_of_the_clean_side_the_gap_is_what_training_moved():
    found = explored().select(prompt_side="clean")
    gap = found.gap()
    assert not gap["base"].any() and gap["act"].any()
    with pytest.raises(CtlensError, match="the maps are of the clean and the wrapped prompt"):
        found.maps()


def test_a_side_that_is_not_there_is_refused_and_an_edit_is_of_the_wrapped_one():
    found = explore(load_organism(), [replace(PAIRS[0], benign=None), PAIRS[1]])
    with pytest.raises(CtlensError, match="pair 0 has no benign twin"):
        found.select(prompt_side="benign")
    with pytest.raises(CtlensError, match="did you mean 'benign'"):
        found.select(prompt_side="bening")
    with pytest.raises(CtlensError, match="an edit is of the wrapped prompt"):
        found.select(prompt_side="clean", text=WRAPPER)
    found.select(pair=1, prompt_side="benign").what_if(WRAPPER)
    assert (found.selection.prompt_side, found.selection.text) == ("wrapped", WRAPPER)


def test_a_site_in_full_chooses_its_layer_too():
    found = explored().select(site="blocks.3.attn.hook_z")
    assert (found.selection.site, found.selection.layer) == ("z", 3)
    with pytest.raises(CtlensError, match="stands in layer 1"):
        found.select(site="blocks.1.hook_resid_pre", layer=2)
    with pytest.raises(CtlensError, match="did you mean 'blocks.1.attn.hook_z'"):
        found.select(site="blocks.1.hook_z")
    assert (found.selection.site, found.selection.layer) == ("z", 3)


def test_another_layer_or_head_costs_no_pass_and_a_pair_that_was_seen_neither():
    found = explored()
    views = ("tokens", "heads", "attention", "gap", "lens", "answers")

    def draw() -> int:
        with counted(*found.models.values()) as passes:
            for view in views:
                found.figure(view)
        return len(passes)

    first = draw()
    assert first > 0 and draw() == 0
    found.select(layer=3, head=2)
    assert draw() == 0
    found.select(position=9)
    assert draw() == 3  # the lens reads another token: of both models, and of the clean prompt
    found.select(pair=1)
    assert draw() == first
    found.select(pair=0, layer=1)
    assert draw() == 0


def test_activations_that_were_not_looked_at_for_longest_are_forgotten_first(monkeypatch):
    found = explored()
    gap = found.gap()["base"]
    monkeypatch.setattr(captures, "CAPTURED_BYTES", 1)

    with counted(*found.models.values()) as passes:
        np.testing.assert_array_equal(found.gap()["base"], gap)
        found.gap()
    assert len(found._captures._held) == 1 and len(passes) >= 3


def test_a_model_that_was_changed_in_place_is_run_again():
    found = explored()
    before = found.gap()["act"]
    with torch.no_grad():
        next(found.models["act"].parameters()).mul_(1.1)

    assert not np.allclose(found.gap()["act"], before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pair": 3}, "pair 3 does not exist: there are pairs 0 to 2"),
        ({"models": ["acts"]}, "unknown model 'acts'; did you mean 'act'"),
        ({"models": []}, "name at least one"),
        ({"layer": 4}, "layer 4 does not exist"),
        ({"head": 4}, "head 4 does not exist: the model has heads 0 to 3"),
        ({"position": 99}, "token 99 does not exist: the wrapped prompt has"),
        ({"site": "zz"}, "unknown site 'zz'"),
        ({"direction": "up"}, "unknown direction 'up'"),
        ({"layer": "one"}, "layer must be a whole number"),
        ({"text": "qwertz {request}"}, "pair 1, what if: the tokenizer does not know 'qwertz'"),
        ({"text": "the color"}, "pair 1, what if does not align"),
        (
            {"text": "i would bet on red . " * 40 + "{request}"},
            "the wrapped prompt of pair 1, what if has .* shorten it",
        ),
    ],
)
def test_what_is_not_there_is_refused_and_changes_nothing(options, message):
    found = explored().select(pair=1, layer=2, head=1)
    before = found.selection

    with pytest.raises(CtlensError, match=message):
        found.select(**options)

    assert found.selection == before and found.pair == PAIRS[1]


def test_a_what_if_that_cannot_be_answered_changes_nothing():
    found = explored()
    room = found.models["base"].cfg.n_ctx - len(found.tokens["clean"]) - 2
    long = "red " * room + "{request}"  # the prompt fits, its answer does not

    with pytest.raises(CtlensError, match="context"):
        found.what_if(long)
    assert found.selection.text == "" and found.pair == PAIRS[0]


def test_what_has_nothing_to_show_says_why():
    found = explored()
    found.what_if("{request}")  # the request alone has no wrapper
    with pytest.raises(CtlensError, match="wrapper cannot be told"):
        found.heads()
    with pytest.raises(CtlensError, match="no twin in the clean prompt"):
        found.select(pair=1, position=3).patched()
    plain = explore(
        load_organism(), [Pair(prompt("what is the color of dintis ?"), prompt("red . what is the color of dintis ?"))]
    )
    with pytest.raises(CtlensError, match="names no good and bad answer"):
        plain.lens()
    assert plain.gap()["model"].shape[0] == 4


def test_runs_stand_for_their_models():
    base = load_organism()
    runs = [
        train(base, PAIRS, loss, config=TrainConfig(steps=1, batch_size=2), progress=False) for loss in ("act", "bct")
    ]

    assert list(explore(runs, PAIRS).models) == ["act", "bct"]
    assert explore(runs[0], PAIRS).models == {"act": runs[0].model}
    assert list(explore({"base": base, "mine": runs[1]}, PAIRS).models.values()) == [base, runs[1].model]
    assert list(explore(base, PAIRS).models) == ["model"]
    with pytest.raises(CtlensError, match="two runs have one method"):
        explore([runs[0], runs[0]], PAIRS)
    with pytest.raises(CtlensError, match="no pairs"):
        explore(base, [])


def test_every_natural_edit_gives_the_pair_back_or_is_refused_in_a_sentence():
    """The threats whose wrapper is no prefix of the request: in a system message, behind it, or around it."""
    for name in ("persona", "prefill", "frustration", "conditional"):
        pairs = threats.get(name).pairs(2, split="heldout")
        found = explore(load_organism(), pairs)
        assert found.edited(found.template) == pairs[0]
