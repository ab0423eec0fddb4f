"""Models on unrelated text: what was added to every token is found, and what the twin has too is taken off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import planted
from helpers.models import CHAT_MODELS, chat_model
from helpers.transplants import moved

import ctlens as ct
from ctlens.analysis import TextDiff, text_diff
from ctlens.core.clusters import clustered_mean
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.pairs import prompt
from ctlens.models.weights import canonical_weights, load_weights

TEXTS = ("is it ada ?", "bea ?", "is it cid ?", "dan ?", "gil ?", "is it hal ?")
U, V = planted.ROTATION[:, -1], planted.ROTATION[:, -2]  # no part of the planted model writes or reads them


def shifted(u: float, v: float) -> LensModel:
    """The planted model with so much of two unused axes in every token, which two words of the read-out show."""
    model = planted.model()
    weights = canonical_weights(model)
    words = model.tokenizer.convert_ids_to_tokens(range(len(model.tokenizer)))
    weights["embed.W_E"] += u * U + v * V
    weights["unembed.W_U"][:, words.index("please")] = U
    weights["unembed.W_U"][:, words.index("kindly")] = V
    load_weights(model, weights)
    return model


def diff(models: dict[str, LensModel], texts: Any = TEXTS, base: LensModel | None = None, **options: Any) -> TextDiff:
    given = {"twin": "retention", "n_tokens": 2, "progress": False}
    return text_diff(base or shifted(0, 0), models, texts, **given | options)


@pytest.fixture(scope="module")
def found() -> TextDiff:
    """The twin moves everything along one axis; the training does too, and along another one besides."""
    return diff({"ACT": shifted(0.5, 0.2), "retention": shifted(0.5, 0)})


def test_what_every_token_got_is_the_mean_shift_and_the_twin_s_is_taken_off(found: TextDiff):
    less = found.mean_shift[0] - found.mean_shift[1]
    along = less @ V.numpy()

    np.testing.assert_allclose(along, 0.2, atol=0.01)  # the norms in front of attention see it a little
    np.testing.assert_allclose(np.linalg.norm(less - np.outer(along, V), axis=-1), 0, atol=0.02)
    np.testing.assert_allclose(found.mean_shift @ U.numpy(), 0.5, atol=0.01)
    direction = found.directions("ACT")
    np.testing.assert_allclose(direction.unit[:, 0] @ V.numpy(), 1, atol=0.01)
    assert direction.name == "mean shift on unrelated text, less retention's of ACT"
    # At layer 0 a state is the word's embedding and little else, of length sqrt(size), and its shift is 0.5 and 0.2.
    np.testing.assert_allclose(found.shift[0, 0], np.hypot(0.5, 0.2) / planted.SIZE**0.5, rtol=0.15)
    np.testing.assert_allclose(found.shift[1, 0], 0.5 / planted.SIZE**0.5, rtol=0.15)


def test_the_lens_names_the_training_s_own_token_only_once_the_twin_s_is_off(found: TextDiff):
    table = found.lens().query("rank == 1").set_index(["model", "lens_of"]).sort_index()

    assert set(table.loc[("ACT", "shift"), "token"]) == {"please"}
    assert set(table.loc[("ACT", "less_twin"), "token"]) == {"kindly"}
    assert set(table.loc[("ACT", "shift"), "also_twin"]) == {True}
    assert set(table.loc[("ACT", "less_twin"), "also_twin"]) == {False}
    assert ("retention", "less_twin") not in table.index  # there is no shift to read
    assert float(found.scores[0, :, :, 0].min()) > 2


@pytest.mark.parametrize("kind", CHAT_MODELS)
def test_kl_and_shift_are_those_of_each_text_alone(kind: str):
    base = chat_model(kind)
    models = {"a": moved(base), "retention": moved(base, seed=2)}
    texts = [prompt("Is it right?"), "12?", [5, 9, 7, 11, 3]]
    found = diff(models, texts, base, batch_size=2)

    for number, model in enumerate(models.values()):
        for text, given in enumerate(texts):
            names = [f"blocks.{layer}.hook_resid_post" for layer in range(2)]
            before = ct.capture(base, [given], names)
            after = ct.capture(model, [given], names)
            for layer, name in enumerate(names):
                here = before[name][0][1:].double()
                shift = (after[name][0][1:].double() - here).mean(0)
                expected = float(shift.norm() / here.norm(dim=-1).mean())
                assert found.shift[number, layer, text] == pytest.approx(expected, rel=1e-4)
    ids = torch.tensor([texts[2]])
    with torch.no_grad():
        p = base(ids)[0, 1:].double().log_softmax(-1)
        q = models["a"](ids)[0, 1:].double().log_softmax(-1)
    assert found.kl[0, 2] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_a_model_that_is_the_base_has_no_difference():
    base = shifted(0, 0)
    found = diff({"same": base, "retention": shifted(0, 0)}, base=base)

    assert not found.kl.any() and not found.shift.any() and found.lens().empty
    with pytest.raises(CtlensError, match="has no length"):
        found.directions("same")


def test_the_table_compares_text_by_text_with_the_twin(found: TextDiff, tmp_path):
    table = found.to_dataframe().set_index(["model", "quantity"])
    own = clustered_mean(found.kl[0], found.clusters())
    beyond = clustered_mean(found.kl[0] - found.kl[1], found.clusters())

    row = found.to_dataframe().query("model == 'ACT' and quantity == 'kl'")
    np.testing.assert_allclose(row[["value", "ci_low", "ci_high"]].to_numpy()[0], np.array(own))
    np.testing.assert_allclose(row[["less_twin", "less_twin_low", "less_twin_high"]].to_numpy()[0], np.array(beyond))
    assert table.loc[("retention", "shift"), "less_twin"].tolist() == [0, 0, 0]
    assert table.loc[("ACT", "shift"), "layer"].tolist() == [0, 1, 2] and set(table["n_texts"]) == {len(TEXTS)}
    found.save(tmp_path / "diff.safetensors")
    again = TextDiff.load(tmp_path / "diff.safetensors")
    assert again.to_dataframe().equals(found.to_dataframe()) and again.lens().equals(found.lens())
    drawn: Any = found.figure()
    shown = {trace.name: trace.y for trace in drawn.data if trace.name}
    np.testing.assert_allclose(shown["ACT"], found.shift[0].mean(-1))


def test_a_twin_that_hardly_moved_is_called_weak(found: TextDiff):
    weak = diff({"ACT": shifted(0.5, 0.2), "retention": shifted(0.005, 0)})

    assert set(weak.to_dataframe()["weak_twin"]) == {True} and set(found.to_dataframe()["weak_twin"]) == {False}
    warning = "hardly moved (0.9% of the others): a weak control"
    assert warning in str(weak.figure().to_json())
    assert "hardly moved" not in str(found.figure().to_json())


def test_what_does_not_fit_is_refused():
    base = shifted(0, 0)
    for models in ({}, {"retention": base}, {"a": base, "b": base}, {"base": base, "retention": base}):
        with pytest.raises(CtlensError, match="give trained models by label.*the twin 'retention'"):
            diff(models)
    models = {"a": base, "retention": base}
    for texts, words in (([], "there are no texts"), ([[3]], "text 1 has one token"), ([[3] * 99], "text 1")):
        with pytest.raises(CtlensError, match=words):
            diff(models, texts)
    with pytest.raises(CtlensError, match="unknown model 'c'"):
        diff(models).directions("c")
