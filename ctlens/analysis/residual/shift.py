"""The shift of the residual stream in training, on wrapped prompts, relative to what the wrapper had done to it.

With `h_w` and `h_c` the reference's residual on the wrapped and the clean prompt at aligned
tokens and `h'_w` the trained model's, the shift is `h'_w - h_w` and the gap `h_c - h_w`:

- `gap_closed = sum_t <shift, gap> / sum_t |gap|^2`: 0 as before training, 1 as on the clean prompt;
- `cosine = sum_t <shift, gap> / sqrt(sum_t |shift|^2 sum_t |gap|^2)`;
- `distance = sum_t |h'_w - h_c|^2 / sum_t |gap|^2`: 1 as before training, 0 as on the clean prompt;
- `relative = sqrt(sum_t |shift|^2 / sum_t |h_w|^2)`: 0 as before training;
- `norm_ratio = sqrt(sum_t |h'_w|^2 / sum_t |h_w|^2)`: 1 as before training.

All are free of scale, because the norm of the residual stream grows with depth; `shift_norm` and
`gap_norm`, the root mean square over the chosen tokens, are not, and come on request. The last
aligned token, where the answer is decided, the content before it and the wrapper are never
pooled: they give different answers. The wrapper has no clean counterpart, hence no gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ctlens import plots
from ctlens.analysis.base.forward import pair_batches, require_comparable
from ctlens.analysis.base.positions import POSITIONS_IN_WORDS, STATE_POSITIONS
from ctlens.analysis.base.recording import Readable, model_of, read
from ctlens.analysis.base.result import ResultOverPairs, beside, groups_of
from ctlens.analysis.residual.shift_vectors import beyond_rounding, last_and_content
from ctlens.core.clusters import clustered_mean
from ctlens.core.errors import unknown
from ctlens.core.public import public
from ctlens.core.types import PerRow
from ctlens.data.batch import Matched
from ctlens.data.inputs import Pairs
from ctlens.losses.base import at_positions
from ctlens.models.hooks import resolve
from ctlens.plots import Curve, CurvePanel, Figure

GAP_QUANTITIES = ("gap_closed", "cosine", "distance")  # they need a clean counterpart of each token
SHIFT_QUANTITIES = (*GAP_QUANTITIES, "relative", "norm_ratio")
RAW_QUANTITIES = ("shift_norm", "gap_norm")
SITE = "resid_post"
_TITLES = {
    "gap_closed": "share of the residual-stream gap closed",
    "cosine": "cosine of shift and gap",
    "distance": "squared distance to clean, relative to the gap",
    "relative": "length of the shift, relative to the residual stream",
    "norm_ratio": "length of the residual stream, relative to that before",
    "shift_norm": "length of the shift",
    "gap_norm": "length of the gap",
}
_BESIDE_GAP = {
    "gap_closed": "share of the gap closed",
    "distance": "squared distance left",
    "norm_ratio": "length of the stream, over that before",
}
"""What stands beside the share of the gap: it may be large far off the clean state, or in a stream that shrinks."""
MARKS = {
    "gap_closed": {"as before training": 0.0, "as on the clean prompt": 1.0},
    "cosine": {"orthogonal": 0.0, "same direction": 1.0},
    "distance": {"as on the clean prompt": 0.0, "as before training": 1.0},
    "relative": {"as before training": 0.0},
    "norm_ratio": {"as before training": 1.0},
}


@dataclass(frozen=True)
class ResidualShift(ResultOverPairs):
    """The result of `residual_shift`: the shift of each pair at each layer.

    Attributes:
        gap_closed, cosine, distance, gap_norm: `[positions, pair, layer]`, at the positions with a
            clean counterpart, `ctlens.analysis.base.states.ALIGNED_POSITIONS`; not a number where the gap (or for
            the cosine the shift) is zero.
        relative, norm_ratio, shift_norm: the same with the wrapper's tokens as third choice of positions; not a number
            where a pair has no token there.
        site: the hook point.
        window: the alignment window.
    """

    gap_closed: Float[np.ndarray, "positions pair layer"]
    cosine: Float[np.ndarray, "positions pair layer"]
    distance: Float[np.ndarray, "positions pair layer"]
    gap_norm: Float[np.ndarray, "positions pair layer"]
    relative: Float[np.ndarray, "any_positions pair layer"]
    norm_ratio: Float[np.ndarray, "any_positions pair layer"]
    shift_norm: Float[np.ndarray, "any_positions pair layer"]
    site: str
    window: str

    def curve(self, quantity: str = "gap_closed", positions: str = "last") -> Curve:
        """Mean over pairs and its 95 percent interval over topics and wrapper texts, `[layer]` each.

        A pair whose value is not a number at some layer does not count; NaN where none is left.

        Raises:
            CtlensError: the quantity or the positions are unknown, or the quantity needs a gap and
                there is none at these positions.
        """
        values = self._values(quantity, positions)
        known = ~np.asarray(np.isnan(values).any(-1))
        unknown_mean = np.full(values.shape[1], np.nan)
        if not known.any():
            return unknown_mean, unknown_mean, unknown_mean
        return clustered_mean(values[known], self.clusters(known))

    def _values(self, quantity: str, positions: str) -> Float[np.ndarray, "pair layer"]:
        """The values of every pair; a pair that has none at some layer does not count."""
        if quantity not in (*SHIFT_QUANTITIES, *RAW_QUANTITIES):
            raise unknown("quantity", quantity, (*SHIFT_QUANTITIES, *RAW_QUANTITIES))
        values: np.ndarray = getattr(self, quantity)
        measured = STATE_POSITIONS[: len(values)]
        if positions not in measured:
            raise unknown(f"positions for {quantity}", positions, measured)
        return values[measured.index(positions)]

    def to_dataframe(self, *, raw: bool = False) -> pd.DataFrame:
        """One row per quantity, positions and layer: `mean`, `ci_low` and `ci_high` over `n_pairs`.

        Args:
            raw: also `shift_norm` and `gap_norm`, in the model's own units.
        """
        rows = []
        for quantity in (*SHIFT_QUANTITIES, *RAW_QUANTITIES) if raw else SHIFT_QUANTITIES:
            for positions in STATE_POSITIONS[: len(getattr(self, quantity))]:
                n_pairs = int((~np.isnan(self._values(quantity, positions)).any(-1)).sum())
                curve = np.stack([np.asarray(end) for end in self.curve(quantity, positions)], axis=1)
                rows += [(quantity, positions, layer, *numbers, n_pairs) for layer, numbers in enumerate(curve)]
        columns = ["quantity", "positions", "layer", "mean", "ci_low", "ci_high", "n_pairs"]
        return pd.DataFrame(rows, columns=columns)

    def figure(self, quantity: str = "gap_closed", positions: str = "last") -> Figure:
        """The quantity by layer."""
        return _drawn({"trained": self}, quantity, positions)

    def compare(
        self,
        others: Mapping[str, ResidualShift],
        *,
        label: str,
        quantity: str = "gap_closed",
        positions: str = "last",
        subtitle: str | None = None,
    ) -> Figure:
        """The quantity by layer in several trainings, one line per training and this one first.

        Args:
            others: the shifts of other trainings, by label; they may hold this one too, under its label.
            label: of this training.
            quantity, positions: as in `curve`.
            subtitle: one line under the title.

        Raises:
            CtlensError: another training has this one's label, or as `curve`.
        """
        return _drawn(beside(self, others, label), quantity, positions, subtitle)


def _drawn(results: Mapping[str, ResidualShift], quantity: str, positions: str, subtitle: str | None = None) -> Figure:
    """Draws one line per result; beside the share of the gap, what is left of the gap and the stream's length."""
    shown = [*_BESIDE_GAP] if quantity == "gap_closed" else [quantity]
    curves = {name: {label: result.curve(name, positions) for label, result in results.items()} for name in shown}
    undone = "How far does training undo the wrapper"
    moved = "How far does training move the residual stream"
    title = f"{undone if quantity in GAP_QUANTITIES else moved}, {POSITIONS_IN_WORDS[positions]}?"
    if len(shown) == 1:
        lines = MARKS.get(quantity)
        return plots.layer_curves(
            curves[quantity], title, y_title=_TITLES[quantity], reference_lines=lines, subtitle=subtitle
        )
    panels = {
        words: CurvePanel(curves[name], "", levels=[*MARKS[name].values()]) for name, words in _BESIDE_GAP.items()
    }
    caption = (
        "Lines are means, bands their 95% intervals. Dotted: as before training, and of the gap also as on the clean "
        "prompt. Layer 0 is the first layer."
    )
    layers = range(next(iter(results.values())).gap_closed.shape[-1])
    return plots.curve_panels(layers, panels, title, x_title="layer", caption=caption, subtitle=subtitle)


@public
def residual_shift(
    before: Readable,
    after: Readable,
    pairs: Pairs,
    *,
    window: str = "shared",
    batch_size: int = 64,
    progress: bool = True,
) -> ResidualShift:
    """Measures the shift from `before` to `after` at every layer's `resid_post`.

    >>> import ctlens as ct
    >>> base, pairs = ct.load_organism(), ct.threats.get("sycophancy").pairs(4, split="heldout")
    >>> shift = ct.analysis.residual_shift(base, base, pairs, progress=False)  # a model that was not trained
    >>> shift.to_dataframe().query("quantity == 'distance' and positions == 'last'")["mean"].tolist()
    [1.0, 1.0, 1.0, 1.0]

    Args:
        before: the reference, in eval mode; or its recording of both sides, from `ctlens.analysis.base.record`.
        after: the trained model, in eval mode; or its recording of the wrapped side.
        pairs: clean and wrapped prompts. `ctlens.pairs` makes them of two lists of texts.
        window: alignment window; must hold a token before the last one.
        batch_size: pairs per forward pass.
        progress: show a progress bar.

    Raises:
        CtlensError: the models do not compare or are in training mode, a pair does not align, or a
            recording lacks a layer or a prompt.
    """
    base = model_of(before)
    require_comparable(base, model_of(after))
    names = resolve(base, SITE)
    chunks: list[dict[str, np.ndarray]] = []
    for number, (_, batch) in enumerate(pair_batches(base, pairs, window, batch_size, progress)):
        matched = batch.matched[window]
        first = number * batch_size
        clean = read(before, batch.clean, names, first)
        wrapped = read(before, batch.wrapped, names, first)
        trained = read(after, batch.wrapped, names, first)
        layers = [_of_layer(clean[name], wrapped[name], trained[name], matched, batch.wrapper) for name in names]
        chunks.append({key: torch.stack([layer[key] for layer in layers], -1).cpu().numpy() for key in layers[0]})
    values = {key: np.concatenate([chunk[key] for chunk in chunks], axis=1) for key in chunks[0]}
    return ResidualShift(**values, site=SITE, window=window, groups=groups_of(pairs))


def _of_layer(
    clean: Float[Tensor, "batch clean_pos d"],
    wrapped: Float[Tensor, "batch pos d"],
    trained: Float[Tensor, "batch pos d"],
    matched: Matched,
    wrapper: Bool[Tensor, "batch pos"],
) -> dict[str, Float[Tensor, "positions batch"]]:
    """Measures every quantity at one layer."""
    aligned = last_and_content(matched)
    base = at_positions(wrapped, matched.wrapped)
    moved = at_positions(trained, matched.wrapped)
    gaps = [_gaps(base, moved, at_positions(clean, matched.clean), where) for where in aligned]
    moves = [*(_moves(base, moved, where) for where in aligned), _moves(wrapped, trained, wrapper)]
    return {key: torch.stack([values[key] for values in found]) for found in (gaps, moves) for key in found[0]}


def _gaps(
    wrapped: Float[Tensor, "batch pos d"],
    trained: Float[Tensor, "batch pos d"],
    clean: Float[Tensor, "batch pos d"],
    where: Bool[Tensor, "batch pos"],
) -> dict[str, PerRow]:
    """The quantities that compare with the clean prompt, at the chosen tokens."""
    shift = trained - wrapped
    gap = beyond_rounding(clean - wrapped, wrapped)
    rest = trained - clean
    dot = _total(shift * gap, where)
    shift2 = _total(shift * shift, where)
    gap2 = _total(gap * gap, where)
    rest2 = _total(rest * rest, where)
    return {
        "gap_closed": dot / gap2,
        "cosine": dot / (shift2 * gap2).sqrt(),
        "distance": (rest2 / gap2).where(gap2 > 0, torch.nan),
        "gap_norm": (gap2 / where.sum(-1)).sqrt(),
    }


def _moves(
    wrapped: Float[Tensor, "batch pos d"], trained: Float[Tensor, "batch pos d"], where: Bool[Tensor, "batch pos"]
) -> dict[str, PerRow]:
    """The quantities that need no clean prompt, at the chosen tokens."""
    shift2 = _total((trained - wrapped) ** 2, where)
    before2 = _total(wrapped**2, where)
    after2 = _total(trained**2, where)
    return {
        "relative": (shift2 / before2).sqrt(),
        "norm_ratio": (after2 / before2).sqrt(),
        "shift_norm": (shift2 / where.sum(-1)).sqrt(),
    }


def _total(values: Float[Tensor, "batch pos d"], where: Bool[Tensor, "batch pos"]) -> PerRow:
    return (values.sum(-1) * where).sum(-1)
