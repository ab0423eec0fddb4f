"""The shared part of losses on outputs: they compare next-token distributions at a temperature, token by token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctlens.core.errors import CtlensError
from ctlens.core.types import Logits, PerRow, widened
from ctlens.data.batch import Matched, PairBatch
from ctlens.losses.base import Distance, Forwards, at_positions
from ctlens.losses.distances import kl_divergence


def soft_cross_entropy(target: Float[Tensor, "... k"], logits: Float[Tensor, "... k"]) -> Float[Tensor, ...]:
    """Measures `-sum_k p_k log q_k` in nats, with `p` and `q` the softmax of `target` and `logits`.

    It is the KL plus the entropy of `p`, and has the KL's gradient.

    >>> import torch
    >>> soft_cross_entropy(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0]))  # 0 + log 2
    tensor(0.6931)
    """
    return -(target.softmax(-1) * logits.log_softmax(-1)).sum(-1)


OUTPUT_DISTANCES: Mapping[str, Distance] = {"kl": kl_divergence, "cross_entropy": soft_cross_entropy}


def output_distance(
    loss: str,
    forwards: Forwards,
    matched: Matched,
    *,
    distance: str = "kl",
    temperature: float = 1.0,
    confidence: float = 0.0,
    sharpen: float = 1.0,
) -> PerRow:
    """Compares next-token distributions in nats, averaged over each pair's tokens; the clean side is detached.

    The last two options are those of unsupervised data augmentation (Xie et al., arXiv 1904.12848).

    Args:
        loss: the name of the loss, for an error.
        forwards: both sides of the batch.
        matched: the tokens whose predictions are compared.
        distance: a name from `OUTPUT_DISTANCES`, whose functions take the clean side first.
        temperature: both sides' logits are divided by it. The distance is multiplied by its
            square, so that the size of the gradient stays (Hinton et al. 2015, arXiv 1503.02531).
        confidence: tokens to which the clean side gives no answer of at least this probability count as 0.
        sharpen: the clean side's logits alone are divided by it; below 1 the target is sharper than the prediction.

    Raises:
        CtlensError: `forwards` lacks the logits on the clean prompts.
    """
    if forwards.clean_logits is None:
        raise CtlensError(f"{loss} needs the logits on the clean prompts: give clean_logits to Forwards.")
    clean = at_positions(forwards.clean_logits, matched.clean).detach()
    wrapped = at_positions(forwards.wrapped_logits, matched.wrapped) / temperature
    values = OUTPUT_DISTANCES[distance](clean / (temperature * sharpen), wrapped)
    if confidence:
        values = torch.where(clean.softmax(-1).amax(-1) >= confidence, values, 0.0)
    return temperature**2 * matched.row_mean(values)


def before_the_answer(loss: str, batch: PairBatch) -> Matched:
    """Matches the tokens that predict the answer: from each prompt's last token to the answer's last but one.

    Args:
        loss: its name, for an error.
        batch: with the same answer behind both prompts.

    Raises:
        CtlensError: the answer is not behind the clean prompts.
    """
    device = batch.answer.device
    batch = batch.at_host
    lengths = batch.answer.sum(-1)
    if not torch.equal(lengths, batch.clean_answer.sum(-1)):
        raise CtlensError(f"{loss} needs the answer behind the clean prompts too: encode it on both sides.")
    steps, valid = steps_within(lengths)
    found = Matched((batch.last_clean[:, None] + steps) * valid, (batch.last_prompt[:, None] + steps) * valid, valid)
    return found.to(device)


def steps_within(lengths: Int[Tensor, " batch"]) -> tuple[Int[Tensor, " width"], Bool[Tensor, "batch width"]]:
    """Counts `0, 1, ...` up to the longest length, and marks the numbers within each row's own length."""
    steps = torch.arange(int(lengths.max()), device=lengths.device)
    return steps, steps < lengths[:, None]


def answer_log_p(logits: Logits, batch: PairBatch) -> PerRow:
    """The log-probability of each row's answer behind its wrapped prompt, summed over its tokens, in nats."""
    log_p = widened(logits[:, :-1]).log_softmax(-1).gather(-1, batch.wrapped.tokens[:, 1:, None]).squeeze(-1)
    return torch.where(batch.answer[:, 1:], log_p, 0.0).sum(-1)
