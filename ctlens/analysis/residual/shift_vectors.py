"""The shifts of several trained models at one hook point, prompt by prompt, split by the gap.

With `h_w` and `h_c` the reference's activation on the wrapped and the clean prompt at aligned
tokens and `h'_w` a trained model's, the shift is `h'_w - h_w` and the gap `h_c - h_w`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from ctlens.analysis.base.positions import ALIGNED_POSITIONS
from ctlens.analysis.base.recording import Readable, read
from ctlens.core.progress import progress_bar
from ctlens.data.batch import Matched, PairBatch
from ctlens.losses.base import at_positions

SHIFT_PARTS = ("all", "along", "off")
SHIFT_ROUNDING = 2e-6  # share of a float32 activation, several times what another batch size changes

Where = Bool[Tensor, "batch pos"]


@dataclass(frozen=True)
class Shifts:
    """The shifts of several models at one hook point and one choice of positions, or one part of these shifts.

    Attributes:
        gram: inner products of the models' shifts, summed over the chosen tokens.
        mean: the mean shift over the chosen tokens; NaN for a prompt without such tokens.
        pull: with `s` the shifts at a prompt's tokens, `sum |s| s / sum |s|^2`: its product with a
            unit vector is the cosine of the shift with that direction at the same norms.
    """

    gram: Float[np.ndarray, "prompt model model"]
    mean: Float[np.ndarray, "prompt model d"]
    pull: Float[np.ndarray, "prompt model d"]

    @property
    def moved(self) -> Bool[np.ndarray, "prompt model model"]:
        """Marks where both models have a shift."""
        moved = np.einsum("naa->na", self.gram) > 0
        return moved[:, :, None] & moved[:, None, :]


def beyond_rounding(vectors: Float[Tensor, "*batch d"], base: Float[Tensor, "*#batch d"]) -> Float[Tensor, "*batch d"]:
    """Differences of activations, zero where they are no more than the rounding of the activations `base`."""
    return vectors * (vectors.norm(dim=-1) > SHIFT_ROUNDING * base.norm(dim=-1))[..., None]


def last_and_content(matched: Matched) -> tuple[Where, Where]:
    """Splits each row's aligned positions into the last one, where the answer is decided, and those before it."""
    last = matched.valid & (matched.valid.int().cumsum(-1) == matched.valid.sum(-1, keepdim=True))
    return last, matched.valid & ~last


def shifts_at(
    before: Readable,
    models: Sequence[Readable],
    passes: Sequence[PairBatch],
    hook_name: str,
    progress: bool,
) -> dict[tuple[str, str], Shifts]:
    """The shifts of models at one hook point, by part and positions; the wrapper has no gap, hence one part.

    Where models are run, and not read from recordings, only one batch is held with all its tokens.
    """
    chunks: list[dict[tuple[str, str], Shifts]] = []
    first = 0
    for batch in progress_bar(passes, desc="forward", shown=progress, leave=False):
        chunks.append(_of_batch(before, models, batch, hook_name, first))
        first += len(batch.wrapped.tokens)
    return {key: _joined([chunk[key] for chunk in chunks]) for key in chunks[0]}


def _of_batch(
    before: Readable, models: Sequence[Readable], batch: PairBatch, hook_name: str, first: int
) -> dict[tuple[str, str], Shifts]:
    matched = batch.matched["shared"]
    clean = read(before, batch.clean, [hook_name], first)[hook_name]
    wrapped = read(before, batch.wrapped, [hook_name], first)[hook_name]
    trained = [read(model, batch.wrapped, [hook_name], first)[hook_name] for model in models]
    shift = torch.stack([activation - wrapped for activation in trained])
    aligned = torch.stack([at_positions(of_model, matched.wrapped) for of_model in shift])
    base = at_positions(wrapped, matched.wrapped)
    gap = beyond_rounding(at_positions(clean, matched.clean) - base, base)
    found = {
        (part, positions): measure(beyond_rounding(vectors, base), where)
        for part, vectors in zip(SHIFT_PARTS, split(aligned, gap), strict=True)
        for positions, where in zip(ALIGNED_POSITIONS, last_and_content(matched), strict=True)
    }
    return found | {("all", "wrapper"): measure(beyond_rounding(shift, wrapped), batch.wrapper)}


def split(
    shift: Float[Tensor, "model batch pos d"], gap: Float[Tensor, "batch pos d"]
) -> tuple[Tensor, Tensor, Tensor]:
    """At each token the shift, its component along the gap, and what is off the gap."""
    unit = torch.nn.functional.normalize(gap, dim=-1)
    along = (shift * unit).sum(-1, keepdim=True) * unit
    return shift, along, shift - along


def measure(shift: Float[Tensor, "model batch pos d"], where: Where) -> Shifts:
    """Sums the shifts at all positions to the numbers of the tokens chosen by `where`."""
    shift = torch.where(where[..., None], shift, 0)
    norm = shift.norm(dim=-1, keepdim=True)
    gram = einsum(shift, shift, "a batch pos d, b batch pos d -> batch a b")
    mean = (shift.sum(-2) / where.sum(-1)[:, None]).swapaxes(0, 1)
    pull = ((norm * shift).sum(-2) / (norm**2).sum(-2)).swapaxes(0, 1)
    return Shifts(*(numbers.double().cpu().numpy() for numbers in (gram, mean, pull)))


def _joined(chunks: Sequence[Shifts]) -> Shifts:
    return Shifts(*(np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in ("gram", "mean", "pull")))
