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

from ctlens.analysis.base.forward import encoded_batches
from ctlens.analysis.base.positions import ALIGNED_POSITIONS
from ctlens.analysis.base.recording import Readable, model_of, read
from ctlens.core.progress import progress_bar
from ctlens.data.batch import EncodedPair, Matched, PairBatch
from ctlens.losses.base import at_positions

SHIFT_PARTS = ("all", "along", "off")
_HELD = 2**26
"""The most numbers, 256 MiB in float32, that are held of a batch at several hook points together; chosen by eye."""
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
    rows: Sequence[EncodedPair],
    hook_names: Sequence[str],
    batch_size: int,
    progress: bool,
) -> list[dict[tuple[str, str], Shifts]]:
    """The shifts of models at hook points, each by part and positions; the wrapper has no gap, hence one part.

    As many prompts share a batch as fit into `_HELD` at all hook points; where not even one fits, models run again for
    other hook points.
    """
    base = model_of(before)
    of_row = max(len(row.wrapped.ids) for row in rows) * base.cfg.d_model * (len(models) + 2)
    size = min(batch_size, max(1, _HELD // (of_row * len(hook_names))))
    passes = [batch for _, batch in encoded_batches(base, rows, size, progress=False)]
    together = max(1, _HELD // (of_row * size))
    parts = [hook_names[start : start + together] for start in range(0, len(hook_names), together)]
    return [of_hook for names in parts for of_hook in _at_hooks(before, models, passes, names, progress)]


def _at_hooks(
    before: Readable,
    models: Sequence[Readable],
    passes: Sequence[PairBatch],
    hook_names: Sequence[str],
    progress: bool,
) -> list[dict[tuple[str, str], Shifts]]:
    """The shifts at hook points that share their forward passes."""
    chunks: list[list[dict[tuple[str, str], Shifts]]] = []
    first = 0
    for batch in progress_bar(passes, desc="forward", shown=progress, leave=False):
        clean = read(before, batch.clean, hook_names, first)
        wrapped = read(before, batch.wrapped, hook_names, first)
        trained = [read(model, batch.wrapped, hook_names, first) for model in models]
        chunks.append(
            [_of_batch(batch, clean[name], wrapped[name], [found[name] for found in trained]) for name in hook_names]
        )
        first += len(batch.wrapped.tokens)
    return [
        {key: _joined([chunk[key] for chunk in of_hook]) for key in of_hook[0]} for of_hook in zip(*chunks, strict=True)
    ]


def _of_batch(
    batch: PairBatch,
    clean: Float[Tensor, "batch clean_pos d"],
    wrapped: Float[Tensor, "batch pos d"],
    trained: Sequence[Float[Tensor, "batch pos d"]],
) -> dict[tuple[str, str], Shifts]:
    """The shifts of a batch at one hook point, from the activations of the reference and of the trained models."""
    matched = batch.matched["shared"]
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
