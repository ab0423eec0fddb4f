"""Edits of the stream while a model is trained, and only then: concept ablation and preventative steering.

Concept ablation fine-tuning projects directions out of the stream in every forward pass of the training, so that it
cannot be learned along them (Casademunt et al., arXiv 2507.16795). Preventative steering adds a trait's direction while
training, so that the data's pull towards the trait has nothing left to do, and takes it away afterwards (Chen et al.,
arXiv 2507.21509). Both say something only beside their random twin: as many directions, as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ctlens.core.config import generator
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.models.hooks import editing

_SAME = 1e-5
"""Directions that are nearer to each other's span than this share of their length are in it, up to rounding."""


@dataclass(frozen=True)
class TrainingEdits:
    """TrainingEdits are what the stream is changed by in every forward pass of a training; the run's model has none.

    >>> import torch
    >>> TrainingEdits(add={"blocks.1.hook_resid_post": torch.tensor([3.0, 4.0])}).random_twin(seed=1).lengths
    {'blocks.1.hook_resid_post': 5.0}

    Attributes:
        project_out: by full hook name, directions `[d]` or `[k, d]` whose span is taken out of the activation.
        add: by full hook name, a vector `[d]` that is added to the activation of every token.
    """

    project_out: Mapping[str, Tensor] = field(default_factory=dict)
    add: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.project_out and not self.add:
            raise CtlensError("there is nothing to edit: give directions to project out, or vectors to add.")
        if both := set(self.project_out) & set(self.add):
            raise CtlensError(f"{min(both)} is named twice: project out there, or add there.")
        for name, given in (*self.project_out.items(), *self.add.items()):
            ranks = (1, 2) if name in self.project_out else (1,)
            if given.ndim not in ranks or not bool(torch.isfinite(given).all()) or not bool(given.any(-1).all()):
                raise CtlensError(f"the directions at {name} are no vectors with a length: give finite ones, not 0.")

    @property
    def lengths(self) -> dict[str, float]:
        """The length of the vector that is added, by hook name."""
        return {name: float(vector.norm()) for name, vector in self.add.items()}

    def random_twin(self, seed: int = 0) -> TrainingEdits:
        """As many random directions at the same hook points, and vectors of the same length: the control."""
        draw = generator(seed, "random twin of edits")

        def drawn(given: Tensor) -> Tensor:
            return torch.randn(given.shape, generator=draw, dtype=torch.float64).to(given)

        vectors = {name: drawn(given) for name, given in self.add.items()}
        return TrainingEdits(
            {name: drawn(given) for name, given in self.project_out.items()},
            {name: vector * (self.add[name].norm() / vector.norm()) for name, vector in vectors.items()},
        )

    @contextmanager
    def on(self, model: LensModel) -> Iterator[None]:
        """Edits the forward passes inside the block.

        Raises:
            CtlensError: a hook point does not exist, or its activations have another size.
        """
        edits: dict[str, Callable[[Tensor], Tensor]] = {}
        for name, given in self.project_out.items():
            edits[name] = partial(_without, name, _basis(given))
        for name, given in self.add.items():
            edits[name] = partial(_plus, name, given)
        with editing(model, edits, required=False):  # at some steps retention has nothing to run
            yield


def _basis(given: Tensor) -> Tensor:
    """An orthonormal basis of the span of some vectors, `[rank, d]`."""
    _, lengths, basis = torch.linalg.svd(torch.atleast_2d(given).double(), full_matrices=False)
    return basis[lengths > lengths[0] * _SAME]


def _without(name: str, basis: Tensor, activation: Tensor) -> Tensor:
    _require_size(name, basis, activation)
    basis = basis.to(activation)
    return activation - (activation @ basis.T) @ basis


def _plus(name: str, vector: Tensor, activation: Tensor) -> Tensor:
    _require_size(name, vector, activation)
    return activation + vector.to(activation)


def _require_size(name: str, given: Tensor, activation: Tensor) -> None:
    if given.shape[-1] != activation.shape[-1]:
        raise CtlensError(
            f"a direction at {name} has {given.shape[-1]} numbers, and the activations there {activation.shape[-1]}: "
            "give one of this model."
        )
