"""SubACT: its subspaces are those of hand-made shifts, its parts add up to ACT, and its controls are what they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import hf_model

from ctlens import losses
from ctlens.analysis import cross_loss
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import collate, encode
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import ACT, Forwards
from ctlens.losses.subact import SubACT
from ctlens.models.hooks import run_capturing
from ctlens.models.loading import load_model
from ctlens.models.parameters import copy_model
from ctlens.training import TrainConfig, Trainer, train
from ctlens.training.subspaces import mean_shifts, subspaces_of

QUESTIONS = ("Which term best describes the disease?", "Is it right?", "When a creature experiences feeling, what?")
WRAPPERS = {"doubt": "I don't think it's right. ", "guess": "Sure, here it is: no, that is wrong. "}
PAIRS = [
    Pair(prompt(question), prompt(text + question), labels={"wrapper": name})
    for question in QUESTIONS
    for name, text in WRAPPERS.items()
]
CONFIG = TrainConfig(steps=2, batch_size=3, lr=1e-3)
NAMES = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> LensModel:
    return load_model(hf_model("llama"), tokenizer=tokenizer)


def encoded(model: LensModel, pairs: list[Pair] = PAIRS) -> Any:
    return encode(pairs, model.tokenizer, windows=["shared"], n_ctx=model.cfg.n_ctx).rows


def forwards(model: LensModel, trained: LensModel, pairs: list[Pair], loss: SubACT) -> Forwards:
    """Both sides of some pairs, with the subspaces that a training on all pairs finds."""
    batch = collate(encoded(model, pairs))
    logits, wrapped = run_capturing(trained, batch.wrapped.tokens, NAMES, grad=True)
    clean = run_capturing(model, batch.clean.tokens, NAMES, grad=False)[1]
    bases = subspaces_of(loss, NAMES, model, encoded(model), seed=0)
    return Forwards(batch, clean, wrapped, logits, subspaces=bases)


def test_a_subspace_is_that_of_the_wrappers_mean_shifts(model: LensModel) -> None:
    found = subspaces_of(SubACT(rank=2), NAMES, model, encoded(model), seed=0)
    for name in NAMES:
        means = []
        for wrapper in WRAPPERS:
            shifts = []
            for row in encoded(model):
                if row.pair.labels["wrapper"] == wrapper:
                    there = run_capturing(model, torch.tensor([row.wrapped.ids]), [name], grad=False)[1][name][0]
                    here = run_capturing(model, torch.tensor([row.clean.ids]), [name], grad=False)[1][name][0]
                    aligned = row.alignments["shared"]
                    shifts.append((there[list(aligned.wrapped)] - here[list(aligned.clean)]).mean(0))
            means.append(torch.stack(shifts).mean(0))
        rows = torch.stack(means).double().numpy()
        np.testing.assert_allclose(mean_shifts(model, encoded(model), [name], "shared")[name], rows, atol=1e-5)
        basis = found[name].numpy()
        np.testing.assert_allclose(basis @ basis.T, np.eye(2), atol=1e-9)
        np.testing.assert_allclose(rows @ basis.T @ basis, rows, atol=1e-4)  # two rows lie in their own plane
        _, _, vectors = np.linalg.svd(rows)
        one = subspaces_of(SubACT(rank=1), [name], model, encoded(model), seed=0)[name].numpy()
        assert abs(one[0] @ vectors[0]) == pytest.approx(1, abs=1e-6)  # the one along which the rows are longest


def test_its_value_is_the_projected_shift_over_the_clean_norm() -> None:
    """One pair of two aligned tokens in three dimensions, projected on the first axis."""
    batch = collate(
        encode([Pair(prompt("a b"), prompt("x a b"))], _words(), windows=["shared"], n_ctx=8).rows  # a, b at 0, 1
    )
    wrapped = torch.tensor([[[9.0, 9, 9], [3, 4, 0], [0, 5, 0]]], requires_grad=True)
    clean = torch.tensor([[[1.0, 0, 0], [0, 0, 2]]])
    basis = torch.tensor([[1.0, 0, 0]])
    seen = Forwards(batch, {"x": clean}, {"x": wrapped}, torch.zeros(1, 3, 2), subspaces={"x": basis})
    # shifts (2, 4, 0) and (0, 5, -2): inside 4 and 0, outside 16 and 29, over clean squared norms of 1 and 4
    assert SubACT().row_values(seen, ["x"])["x"].item() == pytest.approx((4 / 1 + 0 / 4) / 2, rel=1e-5)
    assert SubACT(part="rest").row_values(seen, ["x"])["x"].item() == pytest.approx((16 / 1 + 29 / 4) / 2, rel=1e-5)


def _words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: number for number, word in enumerate(["[UNK]", "a", "b", "x"])}
    words = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def test_the_leading_part_and_the_rest_are_relative_act(model: LensModel) -> None:
    trained = copy_model(model)
    draw = torch.Generator().manual_seed(0)
    for parameter in trained.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    leading = forwards(model, trained, PAIRS[:3], SubACT(rank=2))
    whole = ACT(distance="relative").row_values(leading, NAMES)
    parts = [SubACT(rank=2, part=part).row_values(leading, NAMES) for part in ("leading", "rest")]
    for name in NAMES:
        assert (parts[0][name] > 0).all() and (parts[1][name] > 0).all()
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name], rtol=1e-3, atol=1e-6)


def test_padding_and_batch_mates_change_nothing(model: LensModel) -> None:
    loss = SubACT(rank=2)
    together = loss.row_values(forwards(model, model, PAIRS, loss), NAMES)
    for number, pair in enumerate(PAIRS):
        alone = loss.row_values(forwards(model, model, [pair], loss), NAMES)
        for name in NAMES:
            torch.testing.assert_close(alone[name][0], together[name][number], rtol=1e-4, atol=1e-6)


def test_a_random_subspace_is_orthonormal_and_decided_by_the_seed(model: LensModel) -> None:
    loss = SubACT(rank=3, part="random")
    one = subspaces_of(loss, NAMES, model, [], seed=0)
    again = subspaces_of(loss, NAMES, model, [], seed=0)
    other = subspaces_of(loss, NAMES, model, [], seed=1)
    for name in NAMES:
        torch.testing.assert_close(one[name] @ one[name].T, torch.eye(3, dtype=torch.float64))
        assert torch.equal(one[name], again[name]) and not torch.allclose(one[name], other[name])
    assert not torch.allclose(*one.values())


def test_fewer_wrappers_than_the_rank_make_a_smaller_subspace(model: LensModel) -> None:
    found = subspaces_of(SubACT(rank=4), NAMES, model, encoded(model), seed=0)
    assert found[NAMES[0]].shape == (2, model.cfg.d_model)
    unlabelled = [replace(pair, labels={}) for pair in PAIRS]
    found = subspaces_of(SubACT(rank=4), NAMES, model, encoded(model, unlabelled), seed=0)
    assert found[NAMES[0]].shape == (4, model.cfg.d_model)  # then each pair counts as a wrapper


def test_training_closes_what_it_is_held_to(model: LensModel) -> None:
    config = replace(CONFIG, steps=30, batch_size=6, retention=0)
    for part in ("leading", "rest"):
        series = train(model, PAIRS, SubACT(rank=2, part=part), config=config, progress=False).history.series("subact")
        assert series[-1] < 0.7 * series[0]


def test_equal_seeds_give_equal_runs(model: LensModel) -> None:
    runs = [train(model, PAIRS, SubACT(rank=2), config=CONFIG, progress=False).history for _ in range(2)]
    assert runs[0].to_dataframe().equals(runs[1].to_dataframe())


def test_the_published_one_is_its_formula(model: LensModel) -> None:
    """On the middle layer, with the subspace of rank 4 or less, over the clean norm and its floor."""
    loss = losses.preset("subact", "trasn")
    assert isinstance(loss, SubACT) and loss.hook_names(model) == [NAMES[1]] and loss.rank == 4
    seen = forwards(model, model, PAIRS[:1], loss)
    row = encoded(model, PAIRS[:1])[0]
    basis = seen.subspaces[NAMES[1]].float()
    terms = []
    for there, here in zip(row.alignments["shared"].wrapped, row.alignments["shared"].clean, strict=True):
        wrapped = seen.wrapped[NAMES[1]][0, there].detach()
        clean = seen.clean[NAMES[1]][0, here]
        terms.append(float((basis @ (wrapped - clean)).norm() ** 2 / (clean.norm() ** 2 + 1e-6)))
    assert loss.row_values(seen, [NAMES[1]])[NAMES[1]].item() == pytest.approx(np.mean(terms), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"part": "top"}, "part of SubACT"),
        ({"window": "every"}, "alignment window"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        SubACT(**options)


def test_a_subspace_as_wide_as_the_stream_and_a_loss_without_one_are_refused(model: LensModel) -> None:
    with pytest.raises(CtlensError, match="not within the stream of 32 numbers"):
        Trainer(model, PAIRS, SubACT(rank=32), CONFIG)
    with pytest.raises(CtlensError, match="subspaces that a training finds"):
        cross_loss(model, {"x": model}, PAIRS, [SubACT()], progress=False)
