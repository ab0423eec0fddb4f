"""Three scores of tokens: each against its own definition, and their agreement against plain correlations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.attention import NAMES, PAIRS
from helpers.models import byte_level_tokenizer
from scipy import stats

from ctlens import plots
from ctlens.analysis import SaliencyAgreement, saliency_agreement
from ctlens.analysis.attention.saliency import COMPARISONS, SALIENCY_METHODS, gradient_x_input, rollout
from ctlens.analysis.base.contrast import ContrastBatch, contrast_batches, contrasts
from ctlens.analysis.base.positions import segments
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import encode
from ctlens.data.pairs import Pair, prompt
from ctlens.models.hooks import editing, run_capturing
from ctlens.models.parameters import copy_model

TOKENIZER = byte_level_tokenizer(chat=True)


def batched(model: LensModel) -> ContrastBatch:
    (batch,) = contrast_batches(model, contrasts(model, PAIRS), 8, progress=False)
    return batch


def test_gradient_x_input_is_the_slope_of_the_answer_when_a_tokens_embedding_grows(model) -> None:
    """By finite differences: the embedding of one token times 1 + h and 1 - h."""
    batch = batched(model)
    scores = gradient_x_input(model, batch)

    def difference(row: int, token: int, by: float) -> float:
        def scale(embedding: torch.Tensor) -> torch.Tensor:
            embedding = embedding.clone()
            embedding[row, token] *= by
            return embedding

        with torch.no_grad(), editing(model, {"blocks.0.hook_resid_pre": scale}):
            return float(batch.logit_diff(batch.at_last(model(batch.side.tokens)))[row])

    for row, token in ((0, 12), (1, 20), (2, int(batch.last[2]))):
        slope = (difference(row, token, 1.02) - difference(row, token, 0.98)) / 0.04
        assert float(scores[row, token]) == pytest.approx(abs(slope), rel=0.03, abs=2e-3)
    assert (scores[batch.side.mask] > 0).all()


def test_padding_and_a_frozen_model_change_no_gradient(llama) -> None:
    frozen: Any = copy_model(llama)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    batch = batched(llama)
    scores = gradient_x_input(llama, batch)
    with torch.no_grad():
        torch.testing.assert_close(gradient_x_input(frozen, batch), scores)
    assert scores[~batch.side.mask].abs().max() == 0
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_rollout_is_the_product_of_the_layers_with_half_a_residual(llama) -> None:
    patterns = run_capturing(llama, batched(llama).side.tokens, NAMES, grad=False)[1]
    found = rollout([patterns[name] for name in NAMES])
    for row in range(3):
        first = patterns[NAMES[0]][row].double().numpy()
        second = patterns[NAMES[1]][row].double().numpy()
        expected = (0.5 * second.mean(0) + 0.5 * np.eye(len(second[0]))) @ (
            0.5 * first.mean(0) + 0.5 * np.eye(len(first[0]))
        )
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-4)


def test_rollout_of_attention_to_oneself_stays_and_of_two_layers_is_in_order() -> None:
    eye = torch.eye(3)[None, None]
    torch.testing.assert_close(rollout([eye, eye]), torch.eye(3)[None])
    back = torch.tensor([[[[1.0, 0, 0], [1, 0, 0], [0, 0, 1]]]])  # token 1 reads token 0
    on = torch.tensor([[[[1.0, 0, 0], [0, 1, 0], [0, 1, 0]]]])  # token 2 reads token 1
    assert rollout([back, on])[0, 2].tolist() == [0.25, 0.25, 0.5]  # so token 0 reaches token 2
    assert rollout([on, back])[0, 2].tolist() == [0.0, 0.5, 0.5]  # in the other order it does not


def test_agreement_and_shares_are_plain_statistics_of_the_scores(model) -> None:
    found = saliency_agreement(model, PAIRS, progress=False)
    for number, (pair, row) in enumerate(zip(PAIRS, encode(PAIRS, TOKENIZER, n_ctx=256).rows, strict=True)):
        (batch,) = contrast_batches(model, contrasts(model, [pair]), 1, progress=False)
        patterns = run_capturing(model, batch.side.tokens, NAMES, grad=False)[1]
        last = np.mean([patterns[name][0, head, -1].numpy() for name in NAMES for head in range(4)], axis=0)
        scores = {
            "gradient": gradient_x_input(model, batch)[0].numpy(),
            "rollout": rollout([patterns[name] for name in NAMES])[0, -1].numpy(),
            "attention": last,
        }
        assert segments(row)["bos"] == (0,)
        for at, (one, other) in enumerate(COMPARISONS):
            spearman = stats.spearmanr(scores[one][1:], scores[other][1:]).statistic
            pearson = np.corrcoef(scores[one][1:], scores[other][1:])[0, 1]
            assert found.agreement[0, :, at, number].tolist() == pytest.approx([spearman, pearson], abs=0.02)
        for at, method in enumerate(SALIENCY_METHODS):
            share = scores[method][list(row.wrapper)].sum() / scores[method][1:].sum()
            assert found.wrapper[0, at, number] == pytest.approx(share, rel=1e-3)


def test_order_and_batch_mates_change_nothing(llama) -> None:
    whole = saliency_agreement(llama, PAIRS, batch_size=64, progress=False)
    single = saliency_agreement(llama, PAIRS, batch_size=1, progress=False)
    turned = saliency_agreement(llama, PAIRS[::-1], progress=False)
    for name in ("agreement", "wrapper"):
        np.testing.assert_allclose(getattr(single, name), getattr(whole, name), atol=0.02)
        np.testing.assert_allclose(getattr(turned, name)[..., ::-1], getattr(whole, name), atol=0.02)


def test_attention_that_is_on_the_wrapper_has_all_its_share_there_and_a_flat_score_no_agreement(llama) -> None:
    other: Any = copy_model(llama)

    def on_the_wrapper(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        planted = torch.zeros_like(pattern)
        planted[..., :10, 0] = 1
        planted[..., 10:, 10] = 1
        return planted

    def flat(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.full_like(pattern, 1 / pattern.shape[-1])

    for layer in NAMES:
        other.add_hook(layer, on_the_wrapper)
    found = saliency_agreement(other, PAIRS, progress=False)
    assert found.wrapper[0, SALIENCY_METHODS.index("attention")].tolist() == [1.0, 1.0, 1.0]
    same: Any = copy_model(llama)
    for layer in NAMES:
        same.add_hook(layer, flat)
    table = saliency_agreement(same, PAIRS[:1], progress=False).to_dataframe()
    with_attention = table.query("quantity == 'pearson' and other == 'attention'")
    assert with_attention["n_pairs"].tolist() == [0, 0] and with_attention["value"].isna().all()


def test_results_stand_side_by_side_and_round_trip(llama, tmp_path) -> None:
    found = saliency_agreement({"base": llama, "act": copy_model(llama)}, PAIRS, progress=False)
    assert (found.agreement[0] == found.agreement[1]).all() and (found.wrapper[0] == found.wrapper[1]).all()
    found.save(tmp_path / "saliency.safetensors")
    table = found.to_dataframe()
    assert SaliencyAgreement.load(tmp_path / "saliency.safetensors").to_dataframe().equals(table)
    assert len(table) == 2 * 9 and set(table["n_pairs"]) == {3}
    figure = found.figure("pearson")
    assert [note.text for note in figure.layout.annotations] == [
        "Pearson correlation over tokens",
        "share on the wrapper",
    ]
    pearson = table.query("quantity == 'pearson' and model == 'act'")
    share = table.query("quantity == 'wrapper_share' and model == 'act'")
    np.testing.assert_allclose(figure.data[1].y, pearson["value"])
    np.testing.assert_allclose(figure.data[3].y, share["value"])
    assert [trace.name for trace in figure.data if trace.showlegend] == ["base", "ACT"]


def test_what_has_no_score_is_refused(llama) -> None:
    twice = Pair(prompt("Is it?", "the", "a"), prompt("Is it? Is it?", "the", "a"))
    for pairs, message in (
        ([Pair(prompt("Is it right?"), prompt("I think so. Is it right?"))], "names no good and bad answer"),
        ([twice], "aligns"),
        ([], "no pairs"),
    ):
        with pytest.raises(CtlensError, match=message):
            saliency_agreement(llama, pairs, progress=False)
    with pytest.raises(CtlensError, match="did you mean 'pearson'"):
        saliency_agreement(llama, PAIRS, progress=False).figure("pearsn")
    with pytest.raises(CtlensError, match="expected from the labels"):
        plots.agreement({"x": (["a", "b"], {"act": np.zeros((3, 3))})}, "?")
    with pytest.raises(CtlensError, match="models is empty"):
        plots.agreement({"x": (["a"], {})}, "?")
