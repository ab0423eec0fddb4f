"""The losses of the code of *Consistency Training Along the Transformer Stack* (arXiv 2606.05817)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

FLOOR = 1e-9


@dataclass(frozen=True)
class Content:
    """Where the content begins on both sides, and its length on the clean side."""

    clean: int
    wrapped: int
    length: int


def act(
    hidden_clean: list[Tensor], hidden_wrapped: list[Tensor], suffix: int, weight: float, mse: bool = False
) -> float:
    """HuggingFace's hidden states `[token, d]` without the embedding's; summed, or for `mse` averaged, over d."""
    layers = []
    for clean, wrapped in zip(hidden_clean, hidden_wrapped, strict=True):
        tokens = []
        for back in range(suffix, 0, -1):
            squares = [(w - c) ** 2 for c, w in zip(clean[-back].tolist(), wrapped[-back].tolist(), strict=True)]
            tokens.append(sum(squares) / (len(squares) if mse else 1))
        layers.append(sum(tokens) / suffix)
    return weight * sum(layers) / len(layers)


def attention_output(
    hidden_clean: list[Tensor], hidden_wrapped: list[Tensor], content: Content, weight: float
) -> float:
    """Named so; the mean square between HuggingFace's hidden states `[token, d]` in the content."""
    layers = []
    for clean, wrapped in zip(hidden_clean, hidden_wrapped, strict=True):
        gap = wrapped[content.wrapped :][: content.length] - clean[content.clean :][: content.length]
        layers.append(float((gap**2).mean()))
    return weight * sum(layers) / len(layers)


def mlpct(states_clean: list[Tensor], states_wrapped: list[Tensor], content: Content, weight: float) -> float:
    """One minus the cosine of the inputs of the down-projections `[token, d_mlp]`."""
    layers = []
    for clean, wrapped in zip(states_clean, states_wrapped, strict=True):
        tokens = []
        for step in range(content.length):
            c, w = clean[content.clean + step], wrapped[content.wrapped + step]
            tokens.append(1 - float((c * w).sum()) / (math.sqrt(float((c**2).sum())) * math.sqrt(float((w**2).sum()))))
        layers.append(sum(tokens) / len(tokens))
    return weight * sum(layers) / len(layers)


def attct_jsd(
    attention_clean: list[Tensor],
    attention_wrapped: list[Tensor],
    content: Content,
    weight: float,
    layer_weights: str = "uniform",
    first_layer: int = 0,
) -> float:
    """The divergence of each head's content block `[head, q, k]`, as it is cut; `first_layer` is the first one used."""
    n_layers = len(attention_clean)
    total = 0.0
    for layer in range(first_layer, n_layers):
        rows = [
            divergence(clean, wrapped)
            for c_head, w_head in zip(*blocks(attention_clean[layer], attention_wrapped[layer], content), strict=True)
            for clean, wrapped in zip(c_head.tolist(), w_head.tolist(), strict=True)
        ]
        factor = {"uniform": 1.0, "exponential_decay": 2 ** (layer / n_layers) - 1}[layer_weights]
        total += factor * sum(rows) / len(rows)
    return weight * total / (n_layers - first_layer)


def attct_mse(
    attention_clean: list[Tensor], attention_wrapped: list[Tensor], content: Content, weight: float, average_heads: bool
) -> float:
    """The mean square over the whole content block, per head or of the heads' average."""
    layers = []
    for attention in zip(attention_clean, attention_wrapped, strict=True):
        clean, wrapped = blocks(*attention, content)
        if average_heads:
            clean, wrapped = clean.mean(0), wrapped.mean(0)
        squares = [(w - c) ** 2 for c, w in zip(clean.flatten().tolist(), wrapped.flatten().tolist(), strict=True)]
        layers.append(sum(squares) / len(squares))
    return weight * sum(layers) / len(layers)


def wrapper_mass(attention_wrapped: list[Tensor], queries: list[int], wrapper: list[int], weight: float) -> float:
    """Attention `[head, q, k]` from the queries to the tokens of the wrapper, over the number of these."""
    layers = []
    for attention in attention_wrapped:
        masses = [float(head[query, wrapper].sum()) / len(wrapper) for head in attention for query in queries]
        layers.append(sum(masses) / len(masses))
    return weight * sum(layers) / len(layers)


def bct(logits: Tensor, ids: tuple[int, ...], masked: int) -> float:
    """Cross-entropy of the tokens behind the `masked` first ones; of all but the very first where none is masked."""
    trained = range(max(masked, 1), len(ids))
    return -sum(float(logits[at - 1].log_softmax(-1)[ids[at]]) for at in trained) / len(trained)


def prefill_bct(logits_clean: Tensor, logits_wrapped: Tensor, positions: list[int]) -> float:
    """KL from the distribution after the clean prompt to the one at each position of the attacked prompt.

    The code's positions go from the prompt's last token to the prefill's last but one.
    """
    target = logits_clean[-1].softmax(-1)
    each = [
        sum(float(p) * (math.log(float(p)) - math.log(float(q))) for p, q in zip(target, row.softmax(-1), strict=True))
        for row in logits_wrapped[positions]
    ]
    return sum(each) / len(each)


def blocks(clean: Tensor, wrapped: Tensor, content: Content) -> tuple[Tensor, Tensor]:
    """Queries and keys of the content, on both sides."""
    here = slice(content.clean, content.clean + content.length)
    there = slice(content.wrapped, content.wrapped + content.length)
    return clean[:, here, here], wrapped[:, there, there]


def divergence(p: list[float], q: list[float]) -> float:
    """Half the KL of either row to their mean, in nats, logs floored."""

    def log(x: float) -> float:
        return math.log(max(x, FLOOR))

    terms = [a * (log(a) - log((a + b) / 2)) + b * (log(b) - log((a + b) / 2)) for a, b in zip(p, q, strict=True)]
    return sum(terms) / 2
