"""What models computed on single prompts, kept so that to look again costs no forward pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ctlens.core.public import at_work
from ctlens.core.types import Activations, LensModel
from ctlens.models.hooks import capturing, resolve
from ctlens.models.kv_cache import Begun, Ids, Sequences, begin

_T = TypeVar("_T")
CAPTURED_BYTES = 2**28  # 256 MiB, chosen by eye: a dozen prompts of 100 tokens on a model of 135 million parameters
"""Bytes of activations that are kept; those that nobody looked at for longest go first."""


class PromptStates(NamedTuple):
    """The activations of one model on one prompt, on the CPU.

    Attributes:
        patterns: the attention of every head.
        stream: the residual stream behind every layer.
        last: the logits at the last token.
        sequences: the prompt on the model's device, to be continued without running it again.
    """

    patterns: Float[Tensor, "layer head q k"]
    stream: Float[Tensor, "layer pos d"]
    last: Float[Tensor, " d_vocab"]
    sequences: Sequences

    @property
    def n_bytes(self) -> int:
        """The memory that they take."""
        states = (self.patterns, self.stream, self.last)
        return self.sequences.n_bytes + sum(part.numel() * part.element_size() for part in states)


class Captures:
    """Captures holds activations by model and prompt, and small results that follow from them.

    A model whose weights were changed in place is run again.

    Args:
        models: in eval mode, by label.
    """

    def __init__(self, models: Mapping[str, LensModel]) -> None:
        self.models = models
        self._held: dict[Hashable, PromptStates] = {}
        self._results: dict[Hashable, Any] = {}

    def of(self, label: str, ids: Ids) -> PromptStates:
        """The activations of a model on a prompt's tokens."""
        key = (*self._known(label), ids)
        found = self._held.pop(key, None) or self._run(self.models[label], ids)
        self._held[key] = found  # the last one is the one that was looked at last
        while len(self._held) > 1 and sum(seen.n_bytes for seen in self._held.values()) > CAPTURED_BYTES:
            del self._held[next(iter(self._held))]
        return found

    def begin(self, label: str, model: LensModel, prompts: Sequence[Ids]) -> Begun:
        """Prompts that a model has run, to be continued: what `ctlens.models.kv_cache.begin` gives."""
        states = [self.of(label, ids) for ids in prompts]
        logits = torch.stack([of_prompt.last for of_prompt in states])
        together = Sequences.joined([of_prompt.sequences for of_prompt in states])
        return Begun(together, logits.to(next(model.parameters()).device))

    def once(self, label: str, known: Hashable, make: Callable[[LensModel], _T]) -> _T:
        """A result of a model, made the first time that it is asked for.

        Args:
            label: of the model.
            known: all that the result follows from besides the model.
            make: makes it, from the model.
        """
        key = (*self._known(label), known)
        if key not in self._results:
            with at_work(self.models[label]):
                self._results[key] = make(self.models[label])
        return self._results[key]

    def _known(self, label: str) -> tuple[str, int]:
        """A model by its label and the changes that were made to its weights."""
        return label, sum(parameter._version for parameter in self.models[label].parameters())

    @torch.no_grad()
    def _run(self, model: LensModel, ids: Ids) -> PromptStates:
        patterns = resolve(model, "pattern")
        stream = resolve(model, "resid_post")
        found: Activations = {}
        with at_work(model), capturing(model, [*patterns, *stream], found):
            sequences, logits = begin(model, [ids])
        return PromptStates(_stack(found, patterns), _stack(found, stream), logits[0].cpu(), sequences)


def _stack(found: Activations, names: list[str]) -> Tensor:
    return torch.stack([found[name][0] for name in names]).cpu()
