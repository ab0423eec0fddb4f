"""Features of a dictionary of known directions: what was planted moves its feature, which carries the effect."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import planted
from helpers.models import CHAT_MODELS, chat_model
from helpers.transplants import PAIRS, moved
from torch import Tensor

from ctlens.analysis import (
    FeaturePatching,
    Features,
    FeatureShift,
    ablate,
    feature_direction,
    feature_patch,
    feature_shift,
    patch,
    record,
)
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel

TRUE = planted.pairs()
KNOWN = planted.NAMES
MINUS = len(KNOWN)  # behind the features of the axes are those of the opposite directions
PLANTED = MINUS + KNOWN.index("planted")  # the cues press with a negative amount
OTHER = MINUS + KNOWN.index("other")


class Known:
    """A dictionary with a feature for each known axis of the planted model and for its opposite."""

    axes = torch.stack([sign * planted.AXES[name] for sign in (1, -1) for name in KNOWN])

    def encode(self, x: Tensor) -> Tensor:
        found = x @ self.axes.T
        return found * (found > 1e-4)  # what is smaller is rounding

    def decode(self, x: Tensor) -> Tensor:
        return x @ self.axes


class Linear:
    """A dictionary with random weights and a bias, of any sizes."""

    def __init__(self, d: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.up = torch.randn(d, 5, generator=draw)
        self.down = torch.randn(5, d, generator=draw)

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.up).relu()

    def decode(self, x: Tensor) -> Tensor:
        return x @ self.down + 1


FEATURES = Features(Known(), "blocks.1.hook_resid_post")
QUIET: dict[str, Any] = {"progress": False}


@pytest.mark.parametrize("variant", ["erased", "moved", "masked"])
def test_a_planted_shift_moves_exactly_its_features(variant: str):
    found = feature_shift(planted.model(), planted.model(variant), TRUE, FEATURES, **QUIET)
    table = found.to_dataframe().set_index("feature")

    expected = {"erased": (PLANTED,), "moved": (PLANTED, OTHER), "masked": ()}[variant]
    assert set(table.query("moved").index) == set(expected)
    assert set(found.most_moved(len(expected))) == set(expected)
    cue = np.mean([abs(planted.written(pair)) for pair in TRUE])
    row = table.loc[PLANTED, ["wrapped", "trained", "clean"]].to_numpy(dtype=float)
    np.testing.assert_allclose(row, np.array([cue, cue if variant == "masked" else 0, 0]), atol=1e-4)
    if variant == "moved":
        row = table.loc[OTHER, ["wrapped", "trained", "change"]].to_numpy(dtype=float)
        np.testing.assert_allclose(row, np.array([0, cue, cue]), atol=1e-4)
    unmoved = table.drop(list(expected))
    np.testing.assert_allclose(unmoved["change"], 0, atol=1e-4)
    assert found.n_features == 2 * len(KNOWN)


def test_reconstruction_is_one_less_the_share_that_is_missed():
    base = planted.model()
    found = feature_shift(base, base, TRUE, FEATURES, **QUIET)

    # the word asked is "?", so its state differs between prompts along known axes alone
    np.testing.assert_allclose(found.reconstruction()["explained"], 1, atol=1e-3)
    blind = Known()
    blind.axes = Known.axes * (torch.arange(2 * MINUS) != PLANTED)[:, None]
    seen = feature_shift(base, base, TRUE, Features(blind, FEATURES.hook_name), **QUIET)
    cues = np.array([planted.written(pair) for pair in TRUE])
    truths = np.array([planted.TRUTHS[pair.labels["entity"]] for pair in TRUE])
    people = (1 - 1 / 6) * 1.0  # each of six people has an axis of its own
    expected = 1 - (cues**2).mean() / (cues.var() + truths.var() + people)
    assert seen.explained[0] == pytest.approx(expected, abs=1e-3)
    assert seen.explained[2] == pytest.approx(1, abs=1e-3) and found.active[2] == found.active[0] - 1


def test_recordings_stand_for_the_models_and_positions_are_averaged(tmp_path):
    base = planted.model()
    trained = planted.model("erased")
    recorded = [record(model, TRUE, sites=["resid_post"], **QUIET) for model in (base, trained)]
    here = feature_shift(base, trained, TRUE, FEATURES, positions="content", batch_size=7, **QUIET)
    there = feature_shift(recorded[0], recorded[1], TRUE, FEATURES, positions="content", **QUIET)

    np.testing.assert_allclose(here.activations, there.activations, atol=1e-5)
    here.save(tmp_path / "shift.safetensors")
    assert FeatureShift.load(tmp_path / "shift.safetensors").to_dataframe().equals(here.to_dataframe())
    drawn: Any = here.figure(3)
    assert list(drawn.data[0].x) == here.to_dataframe()["change"][:3].tolist()


@pytest.mark.parametrize("source", [None, "erased"])
def test_the_planted_feature_carries_the_effect_and_no_other_does(source: str | None):
    base = planted.model()
    of = None if source is None else planted.model(source)
    numbers = [PLANTED, OTHER, KNOWN.index("truth")]
    found = feature_patch(base, TRUE, FEATURES, numbers, source=of, **QUIET)
    table = found.to_dataframe().set_index("edit")

    for column, pair in enumerate(TRUE):
        assert found.target[column] == pytest.approx(planted.margin(pair, planted.written(pair)), abs=1e-3)
        assert found.logit_diffs[0, column] == pytest.approx(planted.margin(pair, 0), abs=1e-3)
        assert found.source[column] == pytest.approx(planted.margin(pair, 0), abs=1e-3)
    assert table["share"].tolist() == pytest.approx([1, 0, 0, 1, 1, 0, 1], abs=1e-3)
    assert table["beyond_random"].tolist() == [True] + [False] * 6
    assert table.loc[f"feature {PLANTED}", "change"] > 2 * table.loc[f"feature {PLANTED}", "random_high"]


def test_what_a_dictionary_cannot_say_is_in_its_error():
    blind = Known()
    blind.axes = Known.axes * (torch.arange(2 * MINUS) != PLANTED)[:, None]
    found = feature_patch(planted.model(), TRUE, Features(blind, FEATURES.hook_name), [PLANTED], **QUIET)

    assert found.to_dataframe()["share"].tolist() == pytest.approx([0, 0, 0, 1, 1], abs=1e-3)


@pytest.mark.parametrize("kind", CHAT_MODELS)
@pytest.mark.parametrize(
    ("hook", "output", "site"),
    [("hook_resid_post", "", "resid_post"), ("ln2.hook_normalized", "hook_mlp_out", "mlp_out")],
)
def test_the_whole_state_is_that_of_patching_and_features_and_error_add_up_to_it(
    kind: str, hook: str, output: str, site: str
):
    model = chat_model(kind)
    features = Features(Linear(model.cfg.d_model), f"blocks.0.{hook}", f"blocks.0.{output}" if output else "")
    found = feature_patch(model, PAIRS, features, range(5), batch_size=2, **QUIET)
    exact = patch(model, PAIRS, site=site, direction="denoising", layers=[0], positions="last", **QUIET)

    whole = found.logit_diffs[found.edits.index("states")]
    np.testing.assert_allclose(whole, exact.values[0, 0, ..., :].reshape(-1), atol=1e-3)
    np.testing.assert_allclose(*found.logit_diffs[[5, 6]], atol=1e-4)  # all are chosen
    assert np.abs(found.logit_diffs[7] - found.target).max() > 1e-3  # a random dictionary misses much
    alone = feature_patch(model, PAIRS[1:2], features, [3], **QUIET)
    np.testing.assert_allclose(alone.logit_diffs[0, 0], found.logit_diffs[3, 1], atol=1e-3)


def test_features_of_another_model_are_read_on_the_same_prompt(tmp_path):
    model = chat_model("made here")
    trained = moved(model)
    features = Features(Linear(model.cfg.d_model), "blocks.1.hook_resid_post")
    same = feature_patch(model, PAIRS, features, [0], source=model, positions="content", **QUIET)
    found = feature_patch(model, PAIRS, features, [0, 2], source=trained, **QUIET)

    np.testing.assert_allclose(same.logit_diffs - same.target, 0, atol=1e-5)
    np.testing.assert_allclose(
        found.logit_diffs[found.edits.index("states")], found.source, atol=1e-3
    )  # the last layer
    found.save(tmp_path / "patch.safetensors")
    again = FeaturePatching.load(tmp_path / "patch.safetensors")
    assert again.to_dataframe().equals(found.to_dataframe()) and again.edits == found.edits
    drawn: Any = found.figure()
    assert list(drawn.data[0].x) == found.to_dataframe()["change"][:2].tolist()


def test_a_feature_s_direction_is_what_it_writes():
    model = planted.model()
    direction = feature_direction(model, FEATURES, PLANTED, activation=2.0)
    with_bias = feature_direction(chat_model("made here"), Features(Linear(32), "blocks.1.hook_mlp_out"), 4)

    np.testing.assert_allclose(direction.unit[0, 0], -planted.DIRECTION, atol=1e-5)
    assert (direction.norm.item(), direction.site, direction.layers) == (pytest.approx(2), "resid_post", (1,))
    np.testing.assert_allclose(with_bias.unit[0, 0] * with_bias.norm[0, 0], Linear(32).down[4], atol=1e-5)
    taken = ablate(model, TRUE, direction, draws=2, **QUIET)
    np.testing.assert_allclose(taken.logit_diffs[0, 0, 0, 0], [planted.margin(pair, 0) for pair in TRUE], atol=1e-3)


def test_what_does_not_fit_is_refused():
    model = planted.model()
    trained = planted.model("erased")

    def shift(features: Any = FEATURES, **options: Any) -> FeatureShift:
        return feature_shift(model, trained, TRUE, features, **QUIET, **options)

    with pytest.raises(CtlensError, match="unknown hook point 'blocks.7.hook_resid_post'"):
        shift(Features(Known(), "blocks.7.hook_resid_post"))
    with pytest.raises(CtlensError, match="cannot encode vectors of 24 numbers .*check that it is of this model"):
        shift(Features(Linear(7), FEATURES.hook_name))
    with pytest.raises(CtlensError, match="features must be a Features, not 'sae'"):
        shift("sae")
    with pytest.raises(CtlensError, match="no wrapper"):
        shift(positions="wrapper")
    silent = Known()
    silent.axes = Known.axes * 0
    with pytest.raises(CtlensError, match="no feature is active"):
        shift(Features(silent, FEATURES.hook_name))
    silent.encode = lambda x: x[:1]  # type: ignore[method-assign]
    with pytest.raises(CtlensError, match="one row per state"):
        shift(Features(silent, FEATURES.hook_name))
    silent.encode = lambda x: x / 0  # type: ignore[method-assign]
    with pytest.raises(CtlensError, match="not finite"):
        shift(Features(silent, FEATURES.hook_name))
    for numbers, words in (([], "name at least one"), ([1, 1], "each once"), ([99], "there is no feature 99")):
        with pytest.raises(CtlensError, match=words):
            feature_patch(model, TRUE, FEATURES, numbers, **QUIET)
    with pytest.raises(CtlensError, match="unknown positions 'wrapper'"):
        feature_patch(model, TRUE, FEATURES, [1], positions="wrapper", **QUIET)
    with pytest.raises(CtlensError, match="at least 2 random directions"):
        feature_patch(model, TRUE, FEATURES, [1], draws=1, **QUIET)
    with pytest.raises(CtlensError, match="there is no feature 99"):
        feature_direction(model, FEATURES, 99)
    with pytest.raises(CtlensError, match="unknown hook point of directions"):
        feature_direction(model, Features(Known(), "blocks.1.ln2.hook_normalized"), 1)


def test_autoencoders_and_transcoders_of_saelens_are_dictionaries():
    sae_lens = pytest.importorskip(
        "sae_lens", reason="SAELens is no dependency: its dictionaries are read as any other"
    )
    model: LensModel = chat_model("made here")
    d = model.cfg.d_model
    sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=d, d_sae=40))
    transcoder = sae_lens.Transcoder(sae_lens.TranscoderConfig(d_in=d, d_out=d, d_sae=24, apply_b_dec_to_input=False))
    of_stream = Features(sae, "blocks.1.hook_resid_post")
    of_mlp = Features(transcoder, "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")

    for features, size, weights in ((of_stream, 40, sae.W_dec), (of_mlp, 24, transcoder.W_dec)):
        found = feature_shift(model, moved(model), PAIRS, features, **QUIET)
        assert found.n_features == size and len(found.features) > 0
        patched = feature_patch(model, PAIRS, features, found.features[:2].tolist(), **QUIET)
        np.testing.assert_allclose(feature_direction(model, features, 3).norm, weights[3].norm().item())
        assert np.isfinite(patched.logit_diffs).all()
