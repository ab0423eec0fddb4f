"""One activation vector a prompt: what probes, directions and similarities are computed from.

A prompt's tokens are never pooled across places: the last token, where the answer is decided, the
content before it and the wrapper give different answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ctlens import plots
from ctlens.analysis.base.forward import batches, require_eval, vector_hooks
from ctlens.analysis.base.recording import Readable, model_of, read
from ctlens.analysis.base.result import Result
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.stats import bootstrap_mean
from ctlens.core.types import Mask
from ctlens.data.batch import EncodedPair, PairBatch
from ctlens.data.pairs import Pair
from ctlens.models.hooks import Layers, select_layers
from ctlens.plots import Figure

SIDES = ("clean", "wrapped")
PLACES = ("last", "content", "wrapper")
ALIGNED = PLACES[:2]
"""The places with a clean counterpart."""
SPAN = "span"
WHERE = {
    "last": "at the last token",
    "content": "at the content tokens",
    "wrapper": "at the wrapper's tokens",
    SPAN: "at the chosen tokens",
}
"""The places in words."""
Span: TypeAlias = Callable[[EncodedPair, str], Sequence[int]]
"""Of a pair and one of `SIDES`, positions in that prompt; at least one."""


@dataclass(frozen=True)
class States(Result):
    """The activation of every prompt at one place, by layer.

    Attributes:
        values: `[layer, prompt, d]`, the mean over the place's tokens.
        layers: the number of each layer.
        site: the hook point.
        side: `"clean"` or `"wrapped"`.
        place: one of `PLACES`, or `"span"` for a user's.
    """

    values: Float[np.ndarray, "layer prompt d"]
    layers: tuple[int, ...]
    site: str
    side: str
    place: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and prompt: the norm of its vector."""
        norms = np.linalg.norm(self.values, axis=-1)
        rows = [(self.layers[layer], prompt, norm) for (layer, prompt), norm in np.ndenumerate(norms)]
        return pd.DataFrame(rows, columns=["layer", "prompt", "norm"])

    def figure(self) -> Figure:
        """The length of the states by layer, with its interval over prompts."""
        curve = bootstrap_mean(np.linalg.norm(self.values, axis=-1).T)
        title = f"How long are the {self.side} states {WHERE[self.place]}?"
        subtitle = f"{self.site}, {self.values.shape[1]} prompts"
        return plots.layer_curves({"states": curve}, title, y_title="length", layers=self.layers, subtitle=subtitle)


def states(
    model: Readable,
    pairs: Sequence[Pair],
    *,
    side: str = "wrapped",
    place: str | Span = "last",
    site: str = "resid_post",
    layers: Layers = "all",
    batch_size: int = 64,
    progress: bool = True,
) -> States:
    """The activations of a model on one side of pairs, at one place.

    >>> import ctlens as ct
    >>> pairs = ct.threats.get("sycophancy").pairs(4, split="heldout")
    >>> ct.analysis.states(ct.load_organism(), pairs, layers=[0, 1], progress=False).values.shape
    (2, 4, 96)

    Args:
        model: in eval mode; or its recording, from `ctlens.analysis.base.record`.
        pairs: clean and wrapped prompts.
        side: which prompt of a pair.
        place: `"last"`, the prompt's last token; `"content"`, the mean over the aligned tokens
            before it; `"wrapper"`, the mean over the tokens that the attack added (wrapped side
            only); or a function that names positions.
        site: a hook point with one vector a token, see `ctlens.models.hooks.SHORTHANDS`.
        layers: which ones, see `ctlens.models.hooks.select_layers`.
        batch_size: prompts a forward pass; only that many are held with all their tokens.
        progress: show a progress bar.

    Raises:
        CtlensError: the model is in training mode, a name is unknown, the hook point has no one
            vector a token, a pair does not align, a prompt has no token at the place, or a
            recording lacks a hook point or a prompt.
    """
    reader = model_of(model)
    require_eval(reader)
    if side not in SIDES:
        raise unknown("side", side, SIDES)
    names = vector_hooks(reader, site, layers)
    chunks = []
    for number, (rows, batch) in enumerate(batches(reader, pairs, "shared", batch_size, progress)):
        prompt = batch.clean if side == "clean" else batch.wrapped
        chosen = place_mask(place, side, rows, batch)
        found = read(model, prompt, names, number * batch_size)
        chunks.append(torch.stack([_mean(found[name], chosen) for name in names]).cpu().numpy())
    numbers = select_layers(reader.cfg.n_layers, layers)
    return States(np.concatenate(chunks, 1), numbers, site, side, place if isinstance(place, str) else SPAN)


def place_mask(place: str | Span, side: str, rows: Sequence[EncodedPair], batch: PairBatch) -> Mask:
    """True at the tokens of the place, on one side.

    Raises:
        CtlensError: the place is unknown, or a prompt has no token there.
    """
    if isinstance(place, str) and place not in PLACES:
        raise unknown("place", place, PLACES)
    if place == "wrapper" and side == "clean":
        raise CtlensError("a clean prompt has no wrapper: choose side='wrapped' or another place.")
    chosen = _at_place(place, side, rows, batch)
    if not chosen.any(-1).all():
        raise CtlensError("a prompt has no token at this place: leave its pair out or choose another place.")
    return chosen


def _at_place(place: str | Span, side: str, rows: Sequence[EncodedPair], batch: PairBatch) -> Mask:
    mask = batch.clean.mask if side == "clean" else batch.wrapped.mask
    if place == "wrapper":
        return batch.wrapper
    if not isinstance(place, str):
        return _marked(mask, [place(row, side) for row in rows])
    last = (batch.last_clean if side == "clean" else batch.last_prompt)[:, None]
    positions = torch.arange(mask.shape[1], device=mask.device)
    if place == "last":
        return positions == last
    aligned = [row.alignments["shared"] for row in rows]
    return _marked(mask, [getattr(alignment, side) for alignment in aligned]) & (positions != last)


def _marked(mask: Mask, positions: Sequence[Sequence[int]]) -> Mask:
    marked = torch.zeros_like(mask)
    for row, of_row in enumerate(positions):
        marked[row, list(of_row)] = True
    return marked & mask


def _mean(activation: Float[Tensor, "batch pos d"], chosen: Mask) -> Float[Tensor, "batch d"]:
    """The mean over the chosen tokens of each row."""
    return (activation * chosen[..., None]).sum(1) / chosen.sum(1, keepdim=True)
