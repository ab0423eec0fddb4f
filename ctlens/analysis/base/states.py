"""One activation vector per prompt: probes, directions and similarities are computed from these.

Tokens that do different work are never pooled: the last token, where the answer is decided, the content
before it and the wrapper give different answers.
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
from ctlens.analysis.base.forward import pair_batches, require_eval, vector_site
from ctlens.analysis.base.positions import CHOSEN, PAIR_SIDES, POSITIONS_IN_WORDS, PositionsOf, positions_mask
from ctlens.analysis.base.recording import Readable, model_of, read
from ctlens.analysis.base.result import ResultOverPairs, groups_of
from ctlens.core.clusters import clustered_mean
from ctlens.core.errors import unknown
from ctlens.core.public import public
from ctlens.core.types import Mask
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair
from ctlens.models.hooks import Layers
from ctlens.plots import Figure


@dataclass(frozen=True)
class States(ResultOverPairs):
    """The activation vector of every prompt at the chosen positions, by layer.

    Attributes:
        values: `[layer, prompt, d]`, the mean over the chosen tokens.
        layers: the number of each layer.
        site: the hook point.
        side: `"clean"` or `"wrapped"`.
        positions: one of `STATE_POSITIONS`, or `"chosen"` where a function chose them.
    """

    values: Float[np.ndarray, "layer prompt d"]
    layers: tuple[int, ...]
    site: str
    side: str
    positions: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and prompt: the norm of its vector."""
        norms = np.linalg.norm(self.values, axis=-1)
        rows = [(self.layers[layer], prompt, norm) for (layer, prompt), norm in np.ndenumerate(norms)]
        return pd.DataFrame(rows, columns=["layer", "prompt", "norm"])

    def figure(self) -> Figure:
        """The length of the states by layer, with its interval over prompts."""
        curve = clustered_mean(np.linalg.norm(self.values, axis=-1).T, self.clusters())
        title = f"How long are the {self.side} states {POSITIONS_IN_WORDS[self.positions]}?"
        subtitle = f"{self.site}, {self.values.shape[1]} prompts"
        return plots.layer_curves({"states": curve}, title, y_title="length", layers=self.layers, subtitle=subtitle)


@public
def states(
    model: Readable,
    pairs: Pairs,
    *,
    side: str = "wrapped",
    positions: str | PositionsOf = "last",
    site: str = "resid_post",
    layers: Layers = "all",
    batch_size: int = 64,
    progress: bool = True,
) -> States:
    """Reads the activations of a model on one side of pairs, at the chosen positions.

    >>> import ctlens as ct
    >>> pairs = ct.threats.get("sycophancy").pairs(4, split="heldout")
    >>> ct.analysis.states(ct.load_organism(), pairs, layers=[0, 1], progress=False).values.shape
    (2, 4, 96)

    Args:
        model: in eval mode; or its recording, from `ctlens.analysis.base.record`.
        pairs: clean and wrapped prompts. `ctlens.pairs` makes them of two lists of texts.
        side: which prompt of a pair.
        positions: `"last"`, the prompt's last token; `"content"`, the mean over the aligned tokens
            before it; `"wrapper"`, the mean over the tokens that the attack added (wrapped side
            only); or a function that names positions.
        site: a hook point with one vector per token, see `ctlens.models.hooks.SHORTHANDS`, or its full hook name.
        layers: the layers, see `ctlens.models.hooks.select_layers`.
        batch_size: prompts per forward pass; only that many are held with all their tokens.
        progress: show a progress bar.

    Raises:
        CtlensError: the model is in training mode, a name is unknown, the hook point has not
            one vector per token, a pair does not align, a prompt has no token at the positions, or
            a recording lacks a hook point or a prompt.
    """
    options = {"side": side, "site": site, "layers": layers, "batch_size": batch_size, "progress": progress}
    return states_at(model, pairs, [positions], **options)[0]


def states_at(
    model: Readable,
    pairs: Sequence[Pair],
    positions: Sequence[str | PositionsOf],
    *,
    side: str,
    site: str,
    layers: Layers,
    batch_size: int,
    progress: bool,
) -> list[States]:
    """Reads the `states` at several choices of positions off the same forward passes."""
    reader = model_of(model)
    require_eval(reader)
    if side not in PAIR_SIDES:
        raise unknown("side", side, PAIR_SIDES)
    at = vector_site(reader, site, layers)
    chunks: list[list[np.ndarray]] = [[] for _ in positions]
    for number, (rows, batch) in enumerate(pair_batches(reader, pairs, "shared", batch_size, progress)):
        prompt = batch.clean if side == "clean" else batch.wrapped
        masks = [positions_mask(chosen, side, rows, batch) for chosen in positions]
        found = read(model, prompt, at.hook_names, number * batch_size)
        for mask, of_positions in zip(masks, chunks, strict=True):
            of_positions.append(torch.stack([_mean(found[name], mask) for name in at.hook_names]).cpu().numpy())
    called = [chosen if isinstance(chosen, str) else CHOSEN for chosen in positions]
    values = [np.concatenate(of_positions, 1) for of_positions in chunks]
    where = (at.layers, at.site, side)
    groups = groups_of(pairs)
    return [States(of_name, *where, name, groups=groups) for name, of_name in zip(called, values, strict=True)]


def centred(*of_models: States) -> Float[np.ndarray, "layer state d"]:
    """The states of some models, each less its model's mean, so that what the models differ by is no variance."""
    return np.concatenate([one.values - one.values.mean(1, keepdims=True) for one in of_models], 1)


def _mean(activation: Float[Tensor, "batch pos d"], chosen: Mask) -> Float[Tensor, "batch d"]:
    """The mean over the chosen tokens of each row."""
    return (activation * chosen[..., None]).sum(1) / chosen.sum(1, keepdim=True)
