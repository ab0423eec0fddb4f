"""Recordings of what a model computed at every token of some prompts, for any number of analyses to read.

An analysis that only reads takes a `Recording` in place of a model: it looks up each prompt by its
tokens and goes on with the same code, to the same numbers. An analysis that edits or differentiates
must run the model, and says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctlens import plots
from ctlens.analysis.base.result import UNSAVED, ResultOverPairs
from ctlens.core.clusters import clustered_mean
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.types import Activations, LensModel
from ctlens.data.batch import Side
from ctlens.models.hooks import run_capturing
from ctlens.models.parameters import fingerprint, same_fingerprint
from ctlens.plots import Figure

LOGITS = "logits"
"""Stands among hook names for the logits at the last token of each prompt."""


@dataclass(frozen=True)
class Recording(ResultOverPairs):
    """The activations of one model at chosen hook points, at every token of some prompts.

    It needs `4 * tokens * d` bytes per hook point, over all tokens of all prompts, whatever the
    precision of the model, and `4 * prompts * d_vocab` for the logits.

    Attributes:
        values: by full hook name, `[token, ...]`: the prompts one after another without padding, in
            float32; the logits `[prompt, d_vocab]`.
        tokens: the id of every token.
        lengths: how many tokens each prompt has.
        numbers: the index of each prompt's pair among the pairs.
        sides: the side of each prompt.
        weights: the fingerprint of the model's weights.
        model: whose activations they are; not saved, see `of`.
    """

    values: Mapping[str, Float[np.ndarray, ...]]
    tokens: Int[np.ndarray, " token"]
    lengths: Int[np.ndarray, " prompt"]
    numbers: Int[np.ndarray, " prompt"]
    sides: tuple[str, ...]
    weights: str
    model: LensModel | None = field(default=None, repr=False, compare=False, metadata=UNSAVED)

    def of(self, model: LensModel) -> Recording:
        """The recording with its model, which a recording from a file lacks.

        Raises:
            CtlensError: the model has other weights than the one that was recorded.
        """
        if not same_fingerprint(self.weights, fingerprint(model)):
            raise CtlensError("the recording is of a model with other weights: record this model.")
        return replace(self, model=model)

    def read(self, side: Side, names: Iterable[str], first: int = 0) -> Activations:
        """The activations of a batch of prompts, `[batch, pos, ...]` and zero at padding; of `LOGITS`, see there.

        Where a prompt was recorded several times, the one of the pair with the same index is
        read, because its last digits depend on the other prompts of its forward pass.

        Args:
            side: the prompts.
            names: full hook names, or `LOGITS`.
            first: the index of the first prompt's pair among the pairs.

        Raises:
            CtlensError: a hook point or a prompt was not recorded.
        """
        for name in names:
            if name not in self.values:
                raise unknown("hook point of the recording", name, self.values)
        rows = zip(side.tokens.tolist(), side.mask.tolist(), strict=True)
        prompts = [tuple(token for token, real in zip(*row, strict=True) if real) for row in rows]
        chosen = [self._find(prompt, first + row) for row, prompt in enumerate(prompts)]
        return {name: self._padded(name, chosen, side) for name in names}

    def to_dataframe(self) -> pd.DataFrame:
        """One row per hook point and prompt: its side, tokens, and the length of its activation at the last token."""
        rows = [
            (name, number, side, length, norm)
            for name in self.values
            for number, side, length, norm in zip(
                self.numbers.tolist(), self.sides, self.lengths.tolist(), self._norms(name).tolist(), strict=True
            )
        ]
        return pd.DataFrame(rows, columns=["hook_name", "pair", "side", "tokens", "norm"])

    def figure(self, site: str = "hook_resid_post") -> Figure:
        """The length of the activations at the last token by layer, one line per side.

        Raises:
            CtlensError: the site was recorded at no layer.
        """
        named = [name for name in self.values if name.startswith("blocks.") and name.endswith(site)]
        layers = {int(name.split(".")[1]): name for name in named}
        if not layers:
            raise unknown("hook point of the recording", site, self.values)
        norms = np.stack([self._norms(layers[layer]) for layer in sorted(layers)], 1)
        sides = np.array(self.sides)
        curves = {
            side: clustered_mean(norms[sides == side], self.clusters(self.numbers[sides == side]))
            for side in dict.fromkeys(self.sides)
        }
        title = "How long are the recorded activations, at the last token?"
        subtitle = f"{site}, {len(norms)} prompts"
        return plots.layer_curves(curves, title, y_title="length", layers=sorted(layers), subtitle=subtitle)

    def _norms(self, name: str) -> Float[np.ndarray, " prompt"]:
        values = self.values[name] if name == LOGITS else self.values[name][self._ends - 1]
        return np.linalg.norm(values.reshape(len(values), -1), axis=-1)

    @cached_property
    def _ends(self) -> Int[np.ndarray, " prompt"]:
        return self.lengths.cumsum()

    @cached_property
    def _prompts(self) -> dict[tuple[int, ...], list[int]]:
        """The numbers of the prompts that have these tokens."""
        prompts: dict[tuple[int, ...], list[int]] = {}
        for number, ids in enumerate(np.split(self.tokens, self._ends[:-1])):
            prompts.setdefault(tuple(ids.tolist()), []).append(number)
        return prompts

    def _find(self, prompt: tuple[int, ...], pair: int) -> int:
        if prompt not in self._prompts:
            raise CtlensError(
                f"prompt {pair + 1} was not recorded ({len(self.lengths)} others were): record these pairs and sides."
            )
        same = self._prompts[prompt]
        return next((number for number in same if self.numbers[number] == pair), same[0])

    def _padded(self, name: str, chosen: Sequence[int], side: Side) -> Float[Tensor, "batch ..."]:
        values = self.values[name]
        if name == LOGITS:
            return torch.from_numpy(values[chosen]).to(side.tokens.device)
        parts = [values[self._ends[number] - self.lengths[number] : self._ends[number]] for number in chosen]
        padded = torch.zeros(*side.mask.shape, *values.shape[1:])
        padded[side.mask.cpu()] = torch.from_numpy(np.concatenate(parts))
        return padded.to(side.tokens.device)


Readable: TypeAlias = LensModel | Recording
"""A model, or what was recorded of it, for an analysis that reads."""


def model_of(source: Readable) -> LensModel:
    """The model that is read, for its shape, its tokenizer and its weights.

    Raises:
        CtlensError: a recording comes from a file without its model, or its model has changed since.
    """
    if not isinstance(source, Recording):
        return source
    if source.model is None:
        raise CtlensError("a recording from a file needs its model: call recording.of(model).")
    source.of(source.model)
    return source.model


def read(source: Readable, side: Side, names: Sequence[str], first: int = 0) -> Activations:
    """The activations of a batch of prompts in float32; arguments and errors are those of `Recording.read`."""
    if isinstance(source, Recording):
        return source.read(side, names, first)
    hooked = [name for name in names if name != LOGITS]
    logits, found = run_capturing(source, side.tokens, hooked, grad=False, mask=side.needed_mask)
    if LOGITS in names:
        positions = torch.arange(side.mask.shape[1], device=side.mask.device)
        last = torch.where(side.mask, positions, 0).amax(-1)
        found[LOGITS] = logits[torch.arange(len(last), device=last.device), last]
    return {name: found[name].float() for name in names}
