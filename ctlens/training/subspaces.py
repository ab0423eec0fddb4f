"""Subspaces of the stream that a loss is held to: those of the shifts which wrappers make before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ctlens.core.config import generator
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import EncodedPair, collate
from ctlens.losses.base import Loss, at_positions
from ctlens.models.hooks import run_capturing

Basis: TypeAlias = Float[Tensor, "rank d"]
_AT_ONCE = 32
"""Pairs per forward pass; their number changes nothing."""


def subspaces_of(
    loss: Loss, names: Sequence[str], reference: LensModel, pairs: Sequence[EncodedPair], seed: int
) -> dict[str, Basis]:
    """Finds the orthonormal bases that a loss projects on, by hook point; none for a loss that takes the whole stream.

    Args:
        loss: with one alignment window, and its `subspace_rank`.
        names: its hook points.
        reference: the model before training, in eval mode.
        pairs: all pairs of the training.
        seed: of random subspaces.

    Raises:
        CtlensError: the subspace would be as wide as the stream.
    """
    rank = loss.subspace_rank
    if not rank:
        return {}
    d_model = reference.cfg.d_model
    if rank >= d_model:
        raise CtlensError(f"a subspace of rank {rank} is not within the stream of {d_model} numbers: lower the rank.")
    if loss.subspace_is_random:
        draw = generator(seed, "random subspaces")
        drawn = {name: torch.randn(d_model, rank, generator=draw, dtype=torch.float64) for name in names}
        return {name: torch.linalg.qr(columns).Q.T for name, columns in drawn.items()}
    means = mean_shifts(reference, pairs, names, loss.windows[0])
    return {name: torch.linalg.svd(rows.double(), full_matrices=False).Vh[:rank] for name, rows in means.items()}


@torch.no_grad()
def mean_shifts(
    model: LensModel, pairs: Sequence[EncodedPair], names: Sequence[str], window: str
) -> Mapping[str, Float[Tensor, "wrapper d"]]:
    """The mean shift of each wrapper, wrapped less clean states at aligned tokens, by hook point.

    Pairs with one label `wrapper` share a wrapper; a pair without that label has one of its own.
    """
    device = next(model.parameters()).device
    shifts: dict[str, list[Tensor]] = {name: [] for name in names}
    for start in range(0, len(pairs), _AT_ONCE):
        batch = collate(pairs[start : start + _AT_ONCE]).to(device)
        matched = batch.matched[window]
        _, wrapped = run_capturing(model, batch.wrapped.tokens, names, grad=False, mask=batch.wrapped.needed_mask)
        _, clean = run_capturing(model, batch.clean.tokens, names, grad=False, mask=batch.clean.needed_mask)
        counted = matched.valid.sum(-1, keepdim=True)
        for name in names:
            shift = at_positions(wrapped[name], matched.wrapped) - at_positions(clean[name], matched.clean)
            shifts[name].append(torch.where(matched.valid[..., None], shift, 0.0).sum(1) / counted)
    wrappers = [row.pair.labels.get("wrapper") or f"pair {number}" for number, row in enumerate(pairs)]
    members = [[number for number, own in enumerate(wrappers) if own == wrapper] for wrapper in dict.fromkeys(wrappers)]
    every = {name: torch.cat(found) for name, found in shifts.items()}
    return {name: torch.stack([found[chosen].mean(0) for chosen in members]) for name, found in every.items()}
