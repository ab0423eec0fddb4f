"""The base of the methods that an audit trains with: what each trains on, and by which loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from ctlens.data.pairs import Pair, Prompt
from ctlens.losses import Loss


class Method(ABC):
    """A method is a training on the prompts of a pool: on labels of theirs, or on agreement with other prompts.

    It is given the pairs of the pool, turned so that the wrapped prompt of each is the one of the pool.

    Attributes:
        name: what results call it.
    """

    name: str

    @property
    @abstractmethod
    def trained_with(self) -> Loss:
        """The loss of the training."""

    @abstractmethod
    def seen(self, pair: Pair) -> tuple[Prompt, ...]:
        """The prompts of a pair that the training sees."""

    @abstractmethod
    def trained_on(self, pairs: Sequence[Pair], labels: Mapping[Prompt, str | None]) -> list[Pair]:
        """Makes the pairs of the training; `labels` are those of the method's own, None where a prompt was dropped."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """Says in words and numbers what the method is, for the file of settings."""
