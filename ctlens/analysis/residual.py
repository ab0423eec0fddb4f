"""What a training did to the residual stream on wrapped prompts, relative to what the wrapper had done to it.

With `h_w` and `h_c` the reference's residual on the wrapped and the clean prompt at aligned
tokens and `h'_w` the trained model's, the shift is `h'_w - h_w` and the gap `h_c - h_w`:

- `gap_closed = sum_t <shift, gap> / sum_t |gap|^2`: 0 as before training, 1 as on the clean prompt;
- `cosine = sum_t <shift, gap> / sqrt(sum_t |shift|^2 sum_t |gap|^2)`;
- `distance = sum_t |h'_w - h_c|^2 / sum_t |gap|^2`: 1 as before training, 0 as on the clean prompt.

All are free of scale, because the norm of the residual stream grows with depth. The last aligned
token, where the answer is decided, and the tokens before it are never pooled: they give different
answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ctlens import plots
from ctlens.analysis.forward import batches, require_comparable
from ctlens.analysis.result import Result
from ctlens.errors import unknown
from ctlens.hooks import capture, resolve
from ctlens.intervals import bootstrap_mean
from ctlens.losses.base import at_positions
from ctlens.pairs import Pair
from ctlens.plots import Curve, Figure
from ctlens.types import LensModel

QUANTITIES = ("gap_closed", "cosine", "distance")
PLACES = ("last", "content")
SITE = "resid_post"
TITLES = {
    "gap_closed": "share of the residual-stream gap closed",
    "cosine": "cosine of shift and gap",
    "distance": "squared distance to clean, relative to the gap",
}
MARKS = {
    "gap_closed": {"as before training": 0.0, "as on the clean prompt": 1.0},
    "cosine": {"orthogonal": 0.0, "same direction": 1.0},
    "distance": {"as on the clean prompt": 0.0, "as before training": 1.0},
}


@dataclass(frozen=True)
class ResidualShift(Result):
    """The shift of each pair at each layer.

    Attributes:
        gap_closed, cosine, distance: `[place, pair, layer]`, places as in `PLACES`; not a number
            where the gap (or for the cosine the shift) is zero.
        site: the hook point.
        window: the alignment window.
    """

    gap_closed: Float[np.ndarray, "place pair layer"]
    cosine: Float[np.ndarray, "place pair layer"]
    distance: Float[np.ndarray, "place pair layer"]
    site: str
    window: str

    def curve(self, quantity: str = "gap_closed", place: str = "last") -> Curve:
        """Mean over pairs and its 95 percent bootstrap interval, `[layer]` each.

        Raises:
            CtlensError: the quantity or the place is unknown.
        """
        if quantity not in QUANTITIES:
            raise unknown("quantity", quantity, QUANTITIES)
        if place not in PLACES:
            raise unknown("place", place, PLACES)
        values = getattr(self, quantity)[PLACES.index(place)]
        return bootstrap_mean(values[~np.isnan(values).any(-1)])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per quantity, place and layer: `mean`, `ci_low`, `ci_high`, and `n` pairs."""
        rows = []
        for quantity in QUANTITIES:
            for index, place in enumerate(PLACES):
                n = int((~np.isnan(getattr(self, quantity)[index]).any(-1)).sum())
                curve = np.stack([np.asarray(end) for end in self.curve(quantity, place)], axis=1)
                rows += [(quantity, place, layer, *numbers, n) for layer, numbers in enumerate(curve)]
        return pd.DataFrame(rows, columns=["quantity", "place", "layer", "mean", "ci_low", "ci_high", "n"])

    def figure(self, quantity: str = "gap_closed", place: str = "last") -> Figure:
        """The quantity by layer."""
        return figure({"trained": self}, quantity, place)


def figure(
    results: dict[str, ResidualShift],
    quantity: str = "gap_closed",
    place: str = "last",
    *,
    subtitle: str | None = None,
) -> Figure:
    """Several trainings in one figure, one line a method."""
    where = "at the last token" if place == "last" else "at the content tokens"
    return plots.layer_curves(
        {name: result.curve(quantity, place) for name, result in results.items()},
        f"How far does training undo the wrapper, {where}?",
        y_title=TITLES[quantity],
        reference_lines=MARKS[quantity],
        subtitle=subtitle,
    )


def residual_shift(
    before: LensModel,
    after: LensModel,
    pairs: Sequence[Pair],
    *,
    window: str = "shared",
    batch_size: int = 64,
    progress: bool = True,
) -> ResidualShift:
    """The shift from `before` to `after` at every layer's `resid_post`.

    Args:
        before: the reference, in eval mode.
        after: the trained model, in eval mode.
        pairs: clean and wrapped prompts.
        window: alignment window; must hold a token before the last one.
        batch_size: pairs a forward pass.
        progress: show a progress bar.

    Raises:
        CtlensError: the models do not compare or are in training mode, or a pair does not align.
    """
    require_comparable(before, after)
    names = resolve(before, SITE)
    chunks: list[np.ndarray] = []
    for _, batch in batches(before, pairs, window, batch_size, progress):
        matched = batch.matched[window]
        clean = capture(before, batch.clean.tokens, names, grad=False)[1]
        wrapped = capture(before, batch.wrapped.tokens, names, grad=False)[1]
        trained = capture(after, batch.wrapped.tokens, names, grad=False)[1]
        layers = [
            _quantities(
                at_positions(wrapped[name], matched.wrapped),
                at_positions(clean[name], matched.clean),
                at_positions(trained[name], matched.wrapped),
                matched.valid,
            )
            for name in names
        ]
        chunks.append(torch.stack(layers, -1).cpu().numpy())
    values = np.concatenate(chunks, axis=2)
    return ResidualShift(values[0], values[1], values[2], SITE, window)


def _quantities(
    wrapped: Float[Tensor, "batch width d"],
    clean: Float[Tensor, "batch width d"],
    trained: Float[Tensor, "batch width d"],
    valid: Tensor,
) -> Float[Tensor, "quantity place batch"]:
    last = valid & (valid.int().cumsum(-1) == valid.sum(-1, keepdim=True))
    shift, gap, rest = trained - wrapped, clean - wrapped, trained - clean
    values = []
    for where in (last, valid & ~last):
        dot, shift2, gap2, rest2 = (
            ((a * b).sum(-1) * where).sum(-1) for a, b in ((shift, gap), (shift, shift), (gap, gap), (rest, rest))
        )
        values.append(torch.stack([dot / gap2, dot / (shift2 * gap2).sqrt(), rest2 / gap2]))
    return torch.stack(values, 1)
