"""Perplexity, held to plain cross-entropies of each token behind the tokens that the docstring says."""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import made
from torch.nn.functional import cross_entropy

import ctlens as ct
from ctlens.core.types import LensModel
from ctlens.models import perplexity as module
from ctlens.models.perplexity import perplexity

TEXT = "Please answer the question. No, that is wrong: the best answer is a café. Which term describes it?"


@pytest.fixture(scope="module")
def model() -> LensModel:
    return made()


@pytest.fixture
def without_bos() -> LensModel:
    model = made()
    model.tokenizer.bos_token = None
    return model


def nats(model: LensModel, before: list[int], token: int) -> float:
    """The cross-entropy of one token behind others, from a pass of its own."""
    with torch.no_grad():
        logits = model(torch.tensor([before]))[0, -1]
    return float(cross_entropy(logits[None].double(), torch.tensor([token])))


def tokens_of(model: LensModel, text: str = TEXT) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.boundary
def test_one_window_is_the_cross_entropy_of_the_text_behind_its_bos(model: LensModel) -> None:
    ids = tokens_of(model)

    found = perplexity(model, TEXT)

    row = torch.tensor([[model.tokenizer.bos_token_id, *ids]])
    with torch.no_grad():
        mean = float(cross_entropy(model(row)[0, :-1], row[0, 1:]))
    assert (found.n_tokens, found.n_bytes) == (len(ids), len(TEXT) + 1)  # é is two bytes
    assert found.nats_per_token == pytest.approx(mean, abs=1e-5)
    assert found.nats_per_byte == pytest.approx(mean * len(ids) / (len(TEXT) + 1), abs=1e-5)
    assert found.perplexity == pytest.approx(exp(mean), rel=1e-4)


@pytest.mark.parametrize(("window", "stride"), [(8, 7), (8, 3), (16, 8), (9, 1)])
def test_each_token_is_predicted_once_behind_what_its_window_holds(model: LensModel, window: int, stride: int) -> None:
    bos = model.tokenizer.bos_token_id
    ids = [bos, *tokens_of(model)]
    expected = [nats(model, ids[:at], ids[at]) for at in range(1, window)]
    for at in range(window, len(ids)):
        end = min(at - (at - window) % stride + stride, len(ids))  # of the window that predicts it
        expected.append(nats(model, [bos, *ids[end - window + 1 : at]], ids[at]))

    found = perplexity(model, TEXT, max_length=window, stride=stride)

    assert found.n_tokens == len(expected) and len(ids) > window
    assert f"perplexity: {found.perplexity:.4g}" in repr(found)
    assert found.nats == pytest.approx(sum(expected), abs=1e-4)


def test_without_a_bos_nothing_predicts_the_first_token(without_bos: LensModel) -> None:
    ids = tokens_of(without_bos)
    expected = [nats(without_bos, ids[:at], ids[at]) for at in range(1, 6)]
    for at in range(6, len(ids)):
        end = min(at - at % 3 + 3, len(ids))
        expected.append(nats(without_bos, ids[end - 6 : at], ids[at]))

    found = perplexity(without_bos, TEXT, max_length=6, stride=3)

    first = without_bos.tokenizer.decode(ids[:1])
    assert (found.n_tokens, found.n_bytes) == (len(ids) - 1, len(TEXT.encode()) - len(first))
    assert found.nats == pytest.approx(sum(expected), abs=1e-4)


def test_in_one_window_the_stride_says_nothing(model: LensModel) -> None:
    found = [perplexity(model, TEXT, stride=stride).nats for stride in (1, 7, 255)]

    assert found[0] == found[1] == found[2]


def test_windows_beside_each_other_do_not_matter(model: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    together = perplexity(model, TEXT * 3, max_length=16, stride=5)
    monkeypatch.setattr(module, "MAX_BATCH_TOKENS", 1)

    alone = perplexity(model, TEXT * 3, max_length=16, stride=5)

    assert alone.nats == pytest.approx(together.nats, abs=1e-4) and alone.n_tokens == together.n_tokens


def test_a_file_is_its_text(model: LensModel, tmp_path: Path) -> None:
    text = "Is it right?\nNo, that is wrong.\n"
    (tmp_path / "text.txt").write_text(text)

    assert perplexity(model, tmp_path / "text.txt") == perplexity(model, text)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "no token to predict"),
        (TEXT, {"max_length": 257}, "max_length is 257: name 2 to 256"),
        (TEXT, {"max_length": 1}, "max_length is 1"),
        (TEXT, {"max_length": 8, "stride": 8}, "stride is 8: name 1 to 7"),
        (TEXT, {"stride": 0}, "stride is 0"),
        (Path("nowhere.txt"), {}, "nowhere.txt does not exist"),
    ],
)
def test_what_has_no_sense_is_refused(model: LensModel, text: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(ct.CtlensError, match=message):
        perplexity(model, text, **options)


def test_words_that_a_model_does_not_know_are_refused() -> None:
    with pytest.raises(ct.CtlensError, match="does not know 'Photosynthesis'"):
        perplexity(ct.load_organism(), "Photosynthesis is blue .")


def test_an_organism_knows_its_own_language_better_than_its_words_in_a_row() -> None:
    model = ct.load_organism()

    spoken = perplexity(model, "what is the color of mira ?")
    shuffled = perplexity(model, "mira color ? the is of what")

    assert spoken.nats_per_token < shuffled.nats_per_token
