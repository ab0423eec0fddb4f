"""A feature dictionary at the hook point that it reads, and the direction that a feature writes.

A dictionary is any object with `encode`, from states to feature activations, and `decode`, from these back to states:
the sparse autoencoders and transcoders of SAELens are such. ctlens trains none at scale, which is SAELens's job.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ctlens.analysis.directions.directions import DIRECTION_SITES, Directions
from ctlens.core.arguments import require_types
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.models.hooks import SHORTHANDS, require_hooks, site_at


@runtime_checkable
class FeatureDictionary(Protocol):
    """FeatureDictionary is an object with `encode` and `decode` of tensors whose last axis they change."""

    def encode(self, x: Tensor, /) -> Tensor:
        """The features of states."""
        ...

    def decode(self, x: Tensor, /) -> Tensor:
        """The states that features stand for."""
        ...


@dataclass(frozen=True)
class Features:
    """Features is a dictionary with the hook points that it reads and writes.

    Attributes:
        dictionary: any object with `encode` and `decode`.
        hook_name: the full name of the hook point that it encodes, such as `"blocks.2.hook_resid_post"`.
        output_name: that of the states it decodes to, where it is another one, as of a transcoder.
    """

    dictionary: FeatureDictionary
    hook_name: str
    output_name: str = ""

    def __post_init__(self) -> None:
        require_types(self)

    @property
    def written_at(self) -> str:
        """The full name of the hook point whose states the dictionary decodes to."""
        return self.output_name or self.hook_name

    def hook_names(self, model: LensModel) -> list[str]:
        """The hook points that must be captured, the encoded one first; raises as `require_hooks`."""
        names = list(dict.fromkeys((self.hook_name, self.written_at)))
        require_hooks(model, names)
        return names

    def encode(self, states: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch feature"]:
        """The activation of every feature in some states.

        Raises:
            CtlensError: the dictionary refuses the states, or gives something else.
        """
        return _applied(self.dictionary.encode, states, "encode")

    def decode(self, activations: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch d"]:
        """The states that some feature activations stand for; raises as `encode`."""
        return _applied(self.dictionary.decode, activations, "decode")

    def count(self, model: LensModel) -> int:
        """How many features there are."""
        return self.encode(torch.zeros(1, model.cfg.d_model, device=next(model.parameters()).device)).shape[-1]


@torch.no_grad()
def _applied(function: Callable[[Tensor], Tensor], given: Tensor, what: str) -> Tensor:
    flat = given.flatten(0, -2)
    try:
        found = function(flat)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CtlensError(
            f"the dictionary cannot {what} vectors of {given.shape[-1]} numbers ({reason}): check that it is of this "
            "model and hook point."
        ) from None
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(flat):
        raise CtlensError(f"the dictionary's {what} gave no tensor with one row per state: give one that does.")
    if not torch.isfinite(found).all():
        raise CtlensError(f"the dictionary's {what} gave numbers that are not finite: check its weights.")
    return found.float().unflatten(0, given.shape[:-1])


@public
def feature_direction(model: LensModel, features: Features, number: int, *, activation: float = 1.0) -> Directions:
    """The direction that a feature writes into the stream, for `ctlens.analysis.steer` and `ablate`.

    Args:
        model: the model that is read, for its size.
        features: a dictionary of one of `ctlens.analysis.directions.directions.DIRECTION_SITES`.
        number: of the feature.
        activation: of the feature that a strength of 1 stands for, such as its mean where it is active.

    Raises:
        CtlensError: there is no such feature, it writes nothing, or the hook point has no directions.
    """
    n_features = features.count(model)
    if not 0 <= number < n_features:
        raise CtlensError(f"there is no feature {number}: the dictionary has features 0 to {n_features - 1}.")
    site, layer = site_of(features.written_at)
    active = torch.zeros(2, n_features, device=next(model.parameters()).device)
    active[1, number] = activation
    nothing, written = features.decode(active)
    return Directions.from_vectors(
        (written - nothing)[None].cpu().numpy(), [layer], site=site, source=f"feature {number}"
    )


def site_of(hook_name: str) -> tuple[str, int]:
    """The site and the layer of a full hook name at which there are directions."""
    at = site_at(hook_name)
    if at.site in DIRECTION_SITES and isinstance(at.layers, int):
        return at.site, at.layers
    raise unknown("hook point of directions", hook_name, [SHORTHANDS[site] for site in DIRECTION_SITES])
