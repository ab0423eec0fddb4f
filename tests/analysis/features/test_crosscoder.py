"""Crosscoders: a direction that only the trained model has is found and no other, and the twin has none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import chat_model
from helpers.transplants import moved
from torch import Tensor

import ctlens as ct
from ctlens.analysis import Crosscoder, crosscoder
from ctlens.analysis.features.crosscoder_checks import NU_ERROR, NU_RECONSTRUCTION, Checks, checks
from ctlens.analysis.features.crosscoder_fit import CrosscoderWeights, FitSettings, Fitted, fit
from ctlens.core.errors import CtlensError

SIZE = 16
FEATURES = torch.nn.functional.normalize(torch.randn(13, SIZE, generator=torch.Generator().manual_seed(9)), dim=-1)
PLANTED = FEATURES[-1]
N_FITTED = 3000
HOOK = "blocks.1.hook_resid_post"
SMALL: dict[str, Any] = {"n_latents": 32, "k": 3, "steps": 30, "batch_size": 64, "progress": False}


def states(planted: float = 0.0, noise: float = 0.0) -> Tensor:
    """Sparse sums of twelve directions in both models; in the trained one another direction, or noise, besides."""
    draw = torch.Generator().manual_seed(0)
    amounts = (torch.rand(N_FITTED + 1000, 13, generator=draw) < 0.1) * (1 + torch.rand(4000, 13, generator=draw))
    base = amounts[:, :-1] @ FEATURES[:-1]
    trained = base + planted * amounts[:, -1:] * PLANTED + noise * torch.randn(base.shape, generator=draw)
    both = torch.stack([base, trained], 1)
    return both / (both - both.mean(0)).square().mean().sqrt()


def checked(found: Tensor) -> tuple[Fitted, Checks]:
    """A crosscoder of some states, and its checks on those that it was not fitted to."""
    fitted = fit(found[:N_FITTED], FitSettings(n_latents=32, k=3, steps=400, batch_size=256, lr=3e-3, seed=0))
    codes = fitted.weights.codes(found[N_FITTED:])
    return fitted, checks(fitted.weights, found[N_FITTED:], codes * (fitted.weights.sizes(codes) > fitted.threshold))


def specific(found: Checks) -> np.ndarray:
    return np.flatnonzero((found.nu_error < NU_ERROR) & (found.nu_reconstruction < NU_RECONSTRUCTION))


@pytest.mark.slow
@pytest.mark.parametrize("owner", [1, 0])
def test_a_direction_of_one_model_alone_is_found_and_nothing_else(owner: int):
    found = states(planted=1)
    fitted, made = checked(found if owner else found.flip(1))
    (latent,) = specific(made)
    decoders = fitted.weights.decoder[:, latent]

    assert made.owner[latent] == owner and float(made.explained.min()) > 0.95
    assert torch.nn.functional.cosine_similarity(decoders[owner], PLANTED, dim=0) > 0.98
    assert decoders[1 - owner].norm() < 0.2 * decoders[owner].norm()
    others = np.delete(made.nu_error, latent)
    assert np.nanmin(others) > 0.8  # every other feature is in both


@pytest.mark.slow
def test_a_twin_has_no_direction_of_its_own():
    for twin in (states(), states(noise=0.05)):
        _, made = checked(twin)

        assert len(specific(made)) == 0 and float(np.nanmin(made.nu_error)) > 0.8
        assert float(made.explained.min()) > 0.95


def test_latent_scaling_is_the_least_squares_that_the_paper_fits():
    draw = torch.Generator().manual_seed(1)
    weights = CrosscoderWeights(
        *[torch.randn(*shape, generator=draw) for shape in ((2, 4, 3), (3,), (2, 3, 4), (2, 4))]
    )
    found = torch.randn(400, 2, 4, generator=draw)
    codes = weights.codes(found)
    made = checks(weights, found, codes)

    for latent in range(3):
        owner = int(weights.decoder[:, latent].norm(dim=-1).argmax())
        design = torch.outer(codes[:, latent], weights.decoder[owner, latent]).reshape(-1, 1)
        alone = codes.clone()
        alone[:, latent] = 0
        rest = found - weights.decoded(alone)
        written = weights.decoded(codes) - weights.decoder_bias
        for name, target in (("nu_error", rest), ("nu_reconstruction", written)):
            scales = [torch.linalg.lstsq(design, target[:, model].reshape(-1, 1)).solution.item() for model in (0, 1)]
            expected = scales[1 - owner] / scales[owner] if scales[owner] >= 0.1 else np.nan
            assert getattr(made, name)[latent] == pytest.approx(expected, rel=1e-3, nan_ok=True)
    left = (found - weights.decoded(codes)).square().sum((0, 2)) / (found - found.mean(0)).square().sum((0, 2))
    np.testing.assert_allclose(made.explained, 1 - left, rtol=1e-5)
    np.testing.assert_allclose(made.frequency, (codes > 0).float().mean(0))


def test_a_feature_that_was_shrunk_or_split_away_is_not_called_specific():
    """Two faults of a fit: a decoder of zero where the model has the feature, and another latent that writes it."""
    direction = torch.eye(3)[0]
    found = torch.rand(100, 1, 1) * direction.expand(100, 2, 3)
    encoder = torch.zeros(2, 3, 2)
    encoder[:, 0, 0] = 0.5
    shrunk = torch.zeros(2, 2, 3)
    shrunk[1, 0] = direction
    split = shrunk.clone()
    split[0, 1] = direction
    of_split = encoder.clone()
    of_split[:, 0, 1] = 0.5
    made = {}
    for name, (enc, dec) in {"shrunk": (encoder, shrunk), "split": (of_split, split)}.items():
        weights = CrosscoderWeights(enc, torch.zeros(2), dec, torch.zeros(2, 3))
        made[name] = checks(weights, found, weights.codes(found))

    assert made["shrunk"].owner[0] == 1 and made["shrunk"].nu_error[0] == pytest.approx(1)
    assert made["split"].nu_error[0] == pytest.approx(0, abs=1e-5)  # the error is clean,
    assert made["split"].nu_reconstruction[0] == pytest.approx(1)  # and the reconstruction tells
    assert all(len(specific(one)) == 0 for one in made.values())


@pytest.fixture(scope="module")
def found() -> Crosscoder:
    base = chat_model("made here")
    texts = [[number % 300 + 20, *range(30, 30 + number % 9), number + 5] for number in range(200)]
    return crosscoder(base, moved(base), texts, HOOK, **SMALL)


def test_its_codes_choose_what_lies_above_the_threshold_and_decode_to_both_models(found: Crosscoder):
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 2, 32, generator=draw)
    codes = found.encode(x)
    plain = (np.einsum("...md,mdl->...l", x.numpy() / found.scale, found.encoder) + found.encoder_bias).clip(0)
    sizes = plain * np.linalg.norm(found.decoder, axis=-1).sum(0)

    np.testing.assert_allclose(codes, plain * (sizes > found.threshold), atol=1e-4)
    back = np.einsum("...l,mld->...md", codes.numpy(), found.decoder) + found.decoder_bias
    np.testing.assert_allclose(found.decode(codes), back * found.scale, rtol=1e-3, atol=1e-4)
    assert found.losses[-1] < found.losses[0] and found.losses.shape == (30,)
    row = found.summary().iloc[0]
    assert row["active"] == pytest.approx(found.frequency.sum(), rel=1e-4) and row["n_latents"] == 32
    assert row["n_fitted"] + row["n_heldout"] == sum(number % 9 + 1 for number in range(200))


def test_it_survives_saving_and_its_figure_holds_its_numbers(found: Crosscoder, tmp_path):
    found.save(tmp_path / "cross.safetensors")
    again = Crosscoder.load(tmp_path / "cross.safetensors")
    assert again.to_dataframe().equals(found.to_dataframe()) and again.summary().equals(found.summary())
    table = found.to_dataframe()
    base, trained = table["norm_base"], table["norm_trained"]
    np.testing.assert_allclose(
        table["relative_norm"], 0.5 * ((trained - base) / np.maximum(trained, base) + 1), rtol=1e-5
    )
    drawn: Any = found.figure()
    known = table.dropna(subset=["nu_error", "nu_reconstruction"])
    assert sum(len(trace.x) for trace in drawn.data) == len(known) > 0
    direction = found.direction(3)
    np.testing.assert_allclose(
        direction.unit[0, 0] * direction.norm[0, 0], found.decoder[1, 3] * found.scale, rtol=1e-4
    )


def test_equal_texts_count_once_and_the_seed_makes_it_again():
    base = chat_model("made here")
    texts = [[number + 20, 7, 9] for number in range(30)]
    once = crosscoder(base, base, texts, HOOK, **SMALL)
    twice = crosscoder(base, base, texts * 2, HOOK, **SMALL)

    assert (once.n_fitted, once.n_heldout) == (twice.n_fitted, twice.n_heldout) == (48, 12)
    np.testing.assert_array_equal(once.decoder, twice.decoder)
    known = ~np.isnan(once.nu_error)
    np.testing.assert_allclose(once.nu_error[known], 1, atol=1e-3)
    assert once.summary()["trained_specific"].item() == once.summary()["base_specific"].item() == 0


def test_what_does_not_fit_is_refused(found: Crosscoder):
    base = chat_model("made here")

    def fitted(texts: Any = ([20, 7], [21, 7]), hook: Any = HOOK, **options: Any) -> Crosscoder:
        return crosscoder(base, base, list(texts), hook, **(SMALL | options))

    for options, words in (
        ({"texts": [[20, 7]]}, "there are 1 different texts: give enough to fit to and to hold out"),
        ({"texts": [[20], [21], [22]], "heldout": 0.4}, "a text has one token"),
        ({"hook": "resid_post"}, "resid_post is several hook points: give a full name"),
        ({"hook": "blocks.1.attn.hook_z"}, "one vector per head"),
        ({"hook": "blocks.9.hook_resid_post"}, "unknown hook point"),
        ({"k": 33}, "k 33: give a share between 0 and 1, and at most 32"),
        ({"heldout": 1.0}, "heldout is 1.0"),
    ):
        with pytest.raises(CtlensError, match=words):
            fitted(**options)
    with pytest.raises(CtlensError, match="no latent is active at enough held-out tokens to be scaled"):
        fitted([[number + 20, 7] for number in range(20)]).figure()
    with pytest.raises(CtlensError, match="there is no latent 32"):
        found.direction(32)
    with pytest.raises(CtlensError, match="unknown model 'twin'"):
        found.direction(1, "twin")


@pytest.mark.slow
def test_on_the_organism_a_crosscoder_of_two_equal_models_has_nothing_of_one_alone():
    base = ct.load_organism()
    texts = ct.threats.get("sycophancy").neutral(128)
    options: dict[str, Any] = SMALL | {"steps": 100}
    same = crosscoder(base, base, texts, "blocks.2.hook_resid_post", **options)

    assert same.summary()[["base_specific", "trained_specific"]].to_numpy().tolist() == [[0, 0]]
