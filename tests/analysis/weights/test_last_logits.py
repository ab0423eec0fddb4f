"""A model changed in one block answers from that block on as a whole pass does."""

from __future__ import annotations

import pytest
import torch
from helpers.models import chat_model

from ctlens.analysis.base.contrast import ContrastBatch, contrast_batches, contrasts
from ctlens.analysis.weights import last_logits
from ctlens.analysis.weights.last_logits import SwappedModel
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, Prompt, Turn
from ctlens.models.hooks import run
from ctlens.models.matrices import components
from ctlens.models.parameters import present_parameters

TEXTS = ("Is it right?", "I say no. Is it right, then?")


def prompt(text: str) -> Prompt:
    return Prompt((Turn("user", text),), " yes", " no")


def batch_of(model: LensModel) -> ContrastBatch:
    pairs = [Pair(prompt(text), prompt(text)) for text in TEXTS]
    return next(iter(contrast_batches(model, contrasts(model, pairs), 8, progress=False)))


def whole(model: LensModel, batch: ContrastBatch) -> torch.Tensor:
    with torch.no_grad():
        return batch.at_last(run(model, batch.side.tokens))


@pytest.mark.boundary
@pytest.mark.parametrize("kind", ["made here", "llama"])
def test_a_change_in_one_block_is_that_of_a_whole_pass(kind: str) -> None:
    model = chat_model(kind)
    batch = batch_of(model)
    found = SwappedModel(model, batch)
    assert found.blocks is not None
    torch.testing.assert_close(found.plain, whole(model, batch))

    for block in range(model.cfg.n_layers):
        name = next(name for name, owner in components(model).items() if owner == (block, "qk"))
        weight = present_parameters(model)[name]
        before = weight.detach().clone()
        with torch.no_grad():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(block)))
        changed = found.changed_in(block)
        torch.testing.assert_close(changed, whole(model, batch), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.changed_in(None), whole(model, batch))
        assert not torch.allclose(changed, found.plain, atol=1e-4)
        with torch.no_grad():
            weight.copy_(before)


def test_whole_passes_are_taken_where_blocks_are_not_known_or_too_much_would_be_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = chat_model("made here")
    batch = batch_of(model)
    monkeypatch.setattr(last_logits, "_MOST_HELD", 1)
    found = SwappedModel(model, batch)
    assert found.blocks is None and not found.streams
    torch.testing.assert_close(found.changed_in(0), whole(model, batch))
