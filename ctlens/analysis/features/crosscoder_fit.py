"""The fit of a BatchTopK crosscoder: one sparse code for the states of two models, and a decoder for each.

With `x_m` the state of model `m` at a token, the code is `f = relu(sum_m x_m W_enc_m + b)` and the reconstruction of
each model `f W_dec_m + b_m`. In a batch of `n` tokens only the `n k` largest `f_j sum_m |W_dec_mj|` are kept
(BatchTopK, arXiv 2412.06410; in crosscoders arXiv 2504.02922), so there is no penalty that shrinks codes or decoders.
Used later, a latent counts where that product lies above a threshold, the mean over batches of the smallest that was
kept.

Latents that have not been kept for a while learn what the others leave, at 1/32 of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctlens.core.config import generator
from ctlens.core.progress import progress_bar

PairedStates = Float[Tensor, "token model d"]
Codes = Float[Tensor, "token latent"]

# Chosen by eye on the organism: latents are seldom kept in early steps, and all are within 50 where they ever are.
_DEAD_AFTER = 50
_AUXILIARY = 1 / 32  # of arXiv 2406.04093
_DECAY_FROM = 0.8  # of the steps, behind which the learning rate falls to 0; not tuned


class CrosscoderWeights(NamedTuple):
    """The weights of a crosscoder of two models, for states divided by its scale.

    Attributes:
        encoder: `[model, d, latent]`.
        encoder_bias: `[latent]`.
        decoder: `[model, latent, d]`.
        decoder_bias: `[model, d]`.
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor

    def codes(self, states: PairedStates) -> Codes:
        """The code of each token, before any choice of latents."""
        return (torch.einsum("nmd,mdl->nl", states, self.encoder) + self.encoder_bias).relu()

    def decoded(self, codes: Codes) -> PairedStates:
        """The states that some codes stand for."""
        return torch.einsum("nl,mld->nmd", codes, self.decoder) + self.decoder_bias

    def sizes(self, codes: Codes) -> Codes:
        """What latents are chosen by: the length of what each writes, summed over the models."""
        return codes * self.decoder.norm(dim=-1).sum(0)


@dataclass(frozen=True)
class FitSettings:
    """FitSettings is how a crosscoder is fitted.

    Attributes:
        n_latents: of the crosscoder.
        k: how many latents a token has, on average.
        steps: of training.
        batch_size: tokens per step.
        lr: learning rate.
        seed: of the weights and of the order of tokens.
    """

    n_latents: int
    k: int
    steps: int
    batch_size: int
    lr: float
    seed: int


class Fitted(NamedTuple):
    """Fitted is the weights, the threshold on `CrosscoderWeights.sizes`, and the loss at every step."""

    weights: CrosscoderWeights
    threshold: float
    losses: list[float]


def fit(states: PairedStates, settings: FitSettings, *, progress: bool = False) -> Fitted:
    """Fits a crosscoder to the states of two models at the same tokens, of about unit variance in all."""
    draw = generator(settings.seed, "crosscoder")
    weights = _initial(states, settings.n_latents, draw)
    optimizer = torch.optim.Adam(weights, lr=settings.lr)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings.steps))
    last_kept = torch.zeros(settings.n_latents, device=states.device)
    smallest: list[float] = []
    losses: list[float] = []
    for step in progress_bar(range(settings.steps), desc="crosscoder", shown=progress, leave=False):
        batch = states[torch.randint(len(states), (settings.batch_size,), generator=draw)]
        codes = weights.codes(batch)
        sizes = weights.sizes(codes)
        bar = _bar(sizes.detach(), settings.k)
        kept = codes * (sizes >= bar)
        missed = batch - weights.decoded(kept)
        loss = missed.square().sum((1, 2)).mean()
        total = loss + _AUXILIARY * _of_dead(weights, codes, missed.detach(), last_kept >= _DEAD_AFTER, settings.k)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        decay.step()
        last_kept = torch.where(kept.detach().any(0), 0, last_kept + 1)
        losses.append(float(loss.detach()))
        if step >= _DECAY_FROM * settings.steps:
            smallest.append(float(bar))
    found = CrosscoderWeights(*[weight.detach() for weight in weights])
    return Fitted(found, sum(smallest) / len(smallest), losses)


def _initial(states: PairedStates, n_latents: int, draw: torch.Generator) -> CrosscoderWeights:
    """Random decoders of length 1, the same of both models, whose transposes are the encoders, and the mean states."""
    _, n_models, d = states.shape
    directions = nn.functional.normalize(torch.randn(n_latents, d, generator=draw), dim=-1).to(states.device)
    decoder = directions.repeat(n_models, 1, 1)
    parts = (decoder.mT / n_models, torch.zeros(n_latents, device=states.device), decoder, states.mean(0))
    return CrosscoderWeights(*[nn.Parameter(part.clone()) for part in parts])


def _rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step: all of it, then a straight line down to 0."""
    return min(1.0, (steps - step) / max(1.0, (1 - _DECAY_FROM) * steps))


def _bar(sizes: Codes, k: int) -> Tensor:
    """The smallest of the `k` largest sizes per token, over the batch; above 0, so that no silent latent is kept."""
    largest = sizes.flatten().topk(min(sizes.numel(), k * len(sizes))).values[-1]
    return largest.clamp_min(torch.finfo(sizes.dtype).tiny)


def _of_dead(weights: CrosscoderWeights, codes: Codes, missed: PairedStates, dead: Tensor, k: int) -> Float[Tensor, ""]:
    """How badly the latents that were not kept for a while reconstruct what the others leave."""
    if not dead.any():
        return missed.new_zeros(())
    of_dead = weights.sizes(codes)[:, dead]
    bar = _bar(of_dead.detach(), min(k, of_dead.shape[1]))
    written = torch.einsum("nl,mld->nmd", codes[:, dead] * (of_dead >= bar), weights.decoder[:, dead])
    return (missed - written).square().sum((1, 2)).mean()
