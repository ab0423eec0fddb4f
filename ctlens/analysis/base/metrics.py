"""Metrics of a patch: numbers made of the logits at the last token, one per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ctlens.analysis.base.contrast import ContrastBatch
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.types import PerRow

LastLogits: TypeAlias = Float[Tensor, "batch d_vocab"]
UserMetric: TypeAlias = Callable[[LastLogits, ContrastBatch], PerRow]
Metric: TypeAlias = Callable[[LastLogits, ContrastBatch, LastLogits], PerRow]
"""A function of the logits, the rows they belong to, and the source run's logits of the same rows."""


def logit_diff(logits: LastLogits, rows: ContrastBatch, source: LastLogits) -> PerRow:
    """The good token's logit minus the bad one's."""
    return rows.logit_diff(logits)


def probability(logits: LastLogits, rows: ContrastBatch, source: LastLogits) -> PerRow:
    """The probability of the good token, 0 to 1."""
    return logits.softmax(-1).gather(-1, rows.answers[:, :1])[:, 0]


def divergence(logits: LastLogits, rows: ContrastBatch, source: LastLogits) -> PerRow:
    """KL(source || patched) over the whole vocabulary, in nats."""
    here, there = source.log_softmax(-1), logits.log_softmax(-1)
    return (here.exp() * (here - there)).sum(-1)


METRICS: dict[str, Metric] = {"logit_diff": logit_diff, "probability": probability, "kl": divergence}
SMALLEST_GAPS = {"logit_diff": 0.5, "probability": 0.05, "kl": 0.05}
"""The smallest gap between source and target run, in the metric's unit, of which a share is more than noise."""


def named_metrics(metrics: Sequence[str | UserMetric]) -> dict[str, Metric]:
    """Metrics by name; a function goes by its own.

    Raises:
        CtlensError: a name is unknown or there twice, or there are none.
    """
    found: dict[str, Metric] = {}
    for metric in (metrics,) if isinstance(metrics, str) else metrics:
        name = metric if isinstance(metric, str) else metric.__name__
        if isinstance(metric, str) and metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        if name in found:
            raise CtlensError(f"two metrics are called {name!r}: name each once.")
        found[name] = METRICS[metric] if isinstance(metric, str) else _of_user(metric, name)
    if not found:
        raise CtlensError("there are no metrics: name at least one.")
    return found


def _of_user(metric: UserMetric, name: str) -> Metric:
    def measure(logits: LastLogits, rows: ContrastBatch, source: LastLogits) -> PerRow:
        values = metric(logits, rows)
        if values.shape != logits.shape[:1]:
            raise CtlensError(f"metric {name!r} gave shape {tuple(values.shape)}: one number per row is expected.")
        return values

    return measure


def measured(metrics: dict[str, Metric], logits: Tensor, rows: ContrastBatch, source: Tensor) -> Tensor:
    """Computes every metric of every row, `[metric, row]`."""
    return torch.stack([metric(logits.float(), rows, source.float()).float() for metric in metrics.values()])
