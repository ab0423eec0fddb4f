"""The checks of a crosscoder: what it explains, how often latents are active, and which are one model's alone.

A latent whose decoder is short in one model looks as if that model had no such feature. It may be that the crosscoder
merely wrote it otherwise, so latent scaling (arXiv 2504.02922) asks the states themselves. With `d_j` the decoder of
latent `j` in its *owner*, the model where it is longer, and `f_j` its code, a number `b` is fitted by which `b f_j d_j`
comes nearest to what stands in each model:

- its *error*: the state less what all other latents write. The ratio of the other model's number to the owner's,
  `nu_error`, is high where the other model holds the feature and its decoder was shrunk away.
- its *reconstruction*: what all latents write. The ratio `nu_reconstruction` is high where other latents write the same
  in the other model.

A latent is specific to its owner where `nu_error < 0.2` and `nu_reconstruction < 0.5`. These thresholds come from what
others write of the method and were not checked against the paper. Two models that are close share most decoders'
lengths, so every latent is asked, and not only those that look specific.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctlens.analysis.features.crosscoder_fit import Codes, CrosscoderWeights, PairedStates

NU_ERROR = 0.2
NU_RECONSTRUCTION = 0.5
_FEWEST = 20
"""With fewer tokens at which a latent is active its scale is not known; chosen by eye."""
_USED = 0.1
"""Where the owner's own number, about 1 in a good fit, is less than this, a ratio to it says nothing; chosen by eye."""


class Checks(NamedTuple):
    """The checks of a crosscoder on some tokens.

    Attributes:
        explained: `[model]`, the share of the variance of each model's states that is explained.
        frequency: `[latent]`, at which share of tokens it is active.
        owner: `[latent]`, the number of the model in which its decoder is longer.
        nu_error, nu_reconstruction: NaN where a latent is active too seldom, or its owner has no use for it.
    """

    explained: Float[np.ndarray, " model"]
    frequency: Float[np.ndarray, " latent"]
    owner: Int[np.ndarray, " latent"]
    nu_error: Float[np.ndarray, " latent"]
    nu_reconstruction: Float[np.ndarray, " latent"]


@torch.no_grad()
def checks(weights: CrosscoderWeights, states: PairedStates, codes: Codes) -> Checks:
    """Checks a crosscoder of two models.

    Args:
        weights: of the crosscoder.
        states: of tokens that it was not fitted to, divided by its scale.
        codes: of these tokens, of the latents that count alone.
    """
    missed = states - weights.decoded(codes)
    spread = (states - states.mean(0)).square().sum((0, 2))
    owner = weights.decoder.norm(dim=-1).argmax(0)
    energy = codes.square().sum(0)
    own = weights.decoder[owner, torch.arange(len(owner), device=owner.device)]
    # A latent's own part is in what all write; in its error it is missing, and put back.
    of_error = _product(own, codes, missed) + energy * (weights.decoder * own).sum(-1)
    of_all = _product(own, codes, weights.decoded(codes) - weights.decoder_bias)
    size = energy * own.square().sum(-1)
    known = (codes > 0).sum(0) >= _FEWEST
    return Checks(
        explained=(1 - missed.square().sum((0, 2)) / spread).cpu().numpy(),
        frequency=(codes > 0).float().mean(0).cpu().numpy(),
        owner=owner.cpu().numpy(),
        nu_error=_ratio(of_error / size, owner, known),
        nu_reconstruction=_ratio(of_all / size, owner, known),
    )


def _product(own: Float[Tensor, "latent d"], codes: Codes, there: PairedStates) -> Float[Tensor, "model latent"]:
    """The product of each latent's part of the states, at its owner's decoder, with what stands in each model."""
    return torch.einsum("nl,nmd,ld->ml", codes, there, own)


def _ratio(
    numbers: Float[Tensor, "model latent"], owner: Int[Tensor, " latent"], known: Bool[Tensor, " latent"]
) -> Float[np.ndarray, " latent"]:
    """The other model's number over the owner's; NaN where it is not known."""
    index = torch.arange(len(owner), device=owner.device)
    of_owner = numbers[owner, index]
    ratio = numbers[1 - owner, index] / of_owner
    return torch.where(known & (of_owner >= _USED), ratio, torch.nan).cpu().numpy()
