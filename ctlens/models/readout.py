"""The readout: what a model makes of the residual stream behind its last block, whatever that is."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ctlens.core.types import LensModel
from ctlens.models.hooks import editing, resolve, run


@torch.no_grad()
def read_out(model: LensModel, stream: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_vocab"]:
    """The logits that a model gives where its last block leaves these vectors in the residual stream.

    The model itself reads them: not only its final norm and its unembedding, but also what some do besides, as the cap
    of Gemma-2, the scale of Granite and Cohere, or the projection of OPT-350m. Its blocks run over a single token, in
    whose place the vectors leave the last one.

    Args:
        model: in eval mode.
        stream: vectors from any layer, in the precision of the model's weights.
    """
    last = resolve(model, "resid_post", "last")[0]
    with editing(model, {last: lambda activation: stream[:, None]}):
        return run(model, torch.zeros(1, 1, dtype=torch.long, device=stream.device))[:, 0]
