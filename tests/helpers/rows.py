"""Pairs with a hint, and what the losses make of a batch of them."""

from __future__ import annotations

import torch

from ctlens.core.types import LensModel
from ctlens.data.batch import EncodedPair, PairBatch
from ctlens.losses import Forwards, Loss
from ctlens.models.hooks import run_capturing

QUESTIONS = ("Which term best describes the disease?", "Is it right?", "When a creature experiences feeling, what?")
HINT = "I may be in the minority here. "


def forwards(model: LensModel, loss: Loss, batch: PairBatch, other: LensModel | None = None) -> Forwards:
    names = loss.hook_names(model)
    reference = other or model
    target, clean = run_capturing(reference, batch.clean.tokens, names, grad=False, mask=batch.clean.needed_mask)
    logits, wrapped = run_capturing(model, batch.wrapped.tokens, names, grad=True, mask=batch.wrapped.needed_mask)
    return Forwards(batch, clean, wrapped, logits, target)


def row_values(model: LensModel, loss: Loss, batch: PairBatch) -> dict[str, torch.Tensor]:
    return loss.row_values(forwards(model, loss, batch), loss.hook_names(model))


def one_pair(model: LensModel, row: EncodedPair, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations at the aligned tokens of one pair, clean and wrapped, by plain indexing."""
    alignment = row.alignments["shared"]
    sides = []
    for prompt_, positions in ((row.clean, alignment.clean), (row.wrapped, alignment.wrapped)):
        activation = run_capturing(model, torch.tensor([prompt_.ids]), [name], grad=False)[1][name][0]
        sides.append(activation[list(positions)] if activation.ndim == 2 else activation[:, positions][:, :, positions])
    return sides[0], sides[1]
