"""Cuts of attention: the edges of some layers and heads, and the edit that takes them out of a pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ctlens.analysis.base.contrast import ContrastBatch
from ctlens.core.config import generator
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.types import Activations, HookFunction, LensModel, Pattern, widened
from ctlens.data.batch import EncodedPair, mark
from ctlens.models.hooks import resolve

QUERIES = {"last": "the last token", "content": "the content tokens", "all": "all other tokens"}
CUTS = ("layer", "head")
ALONE = "alone"
FROM = "from"
HEAD = "head"
DRAWS = 4  # sets of random keys per prompt; chosen by eye

Edges: TypeAlias = Bool[Tensor, "batch q k"]
"""Marks the cut: True where attention from a query to a key is cut."""


class Cut(NamedTuple):
    """Layers and heads whose attention is cut: one layer alone, it and those behind it, or one head."""

    kind: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]

    def edits(self, model: LensModel, edges: Edges) -> dict[str, HookFunction]:
        """The edits that make the cut, by hook name."""
        chosen = torch.zeros(model.cfg.n_heads, dtype=torch.bool, device=edges.device)
        chosen[list(self.heads)] = True
        cut = edges[:, None] & chosen[:, None, None]
        return {
            resolve(model, "pattern", layer)[0]: lambda pattern: without_edges(pattern, cut) for layer in self.layers
        }

    def attention(self, model: LensModel, patterns: Activations, edges: Edges) -> Float[Tensor, " batch"]:
        """The attention of the queries that see a key on the keys, the mean over these queries, layers and heads."""
        found = [patterns[resolve(model, "pattern", layer)[0]][:, list(self.heads)] for layer in self.layers]
        mass = (torch.stack(found).mean((0, 2)) * edges).sum((-2, -1))
        return mass / edges.any(-1).sum(-1).clamp(min=1)


def planned_cuts(layers: Sequence[int], heads: Sequence[int], by: str) -> list[Cut]:
    """The cuts of an analysis: every layer alone and every layer with those behind it, or every head."""
    if by not in CUTS:
        raise unknown("cut", by, CUTS)
    if by == "head":
        return [Cut(HEAD, (layer,), (head,)) for layer in layers for head in heads]
    ordered = sorted(layers)
    alone = [Cut(ALONE, (layer,), tuple(heads)) for layer in ordered]
    return alone + [Cut(FROM, tuple(ordered[index:]), tuple(heads)) for index in range(len(ordered))]


def without_edges(pattern: Pattern, cut: Bool[Tensor, "batch head q k"]) -> Pattern:
    """Takes the cut attention out of a pattern and scales up what is left of each row, as the softmax without it would.

    A row sums to one, or to less where a learned sink takes the rest: a number in the softmax's denominator that no key
    has, as in gpt-oss. The sink keeps its weight against the keys that are left.

    >>> pattern = torch.tensor([[[[0.5, 0.25, 0.25]]]])
    >>> cut = torch.tensor([[[[True, False, False]]]])
    >>> without_edges(pattern, cut)
    tensor([[[[0.0000, 0.5000, 0.5000]]]])
    >>> without_edges(pattern / 2, cut)  # the sink has half, twice as much as both keys that are left
    tensor([[[[0.0000, 0.1667, 0.1667]]]])

    Raises:
        CtlensError: nothing would be left of a row, or a row sums to more than one, so that it is no softmax.
    """
    left = pattern.masked_fill(cut, 0)
    total = left.sum(-1, keepdim=True) + _sink(pattern)
    touched = cut.any(-1, keepdim=True)
    if (touched & (total == 0)).any():
        raise CtlensError("the cut leaves a token without any attention: leave it a key, for example the first token.")
    return torch.where(touched, left / total, pattern)


def _sink(pattern: Pattern) -> Float[Tensor, "batch head q 1"]:
    """What each row leaves to a sink; zero in a pattern whose rows all sum to one up to rounding."""
    rest = 1 - widened(pattern).sum(-1, keepdim=True)
    rounding = torch.finfo(pattern.dtype).eps ** 0.5
    if (rest < -rounding).any():
        raise CtlensError(
            f"a row of attention sums to {1 - float(rest.min()):.3g}, so it is no softmax, and what a cut leaves is "
            "not known: read this model by attention_diff."
        )
    there = (rest > rounding).any()
    return (rest.clamp(min=0) * there).to(pattern.dtype)


def chosen_heads(model: LensModel, heads: Sequence[int] | None) -> tuple[int, ...]:
    """The heads of each layer that are cut; all of them where `heads` is None."""
    n_heads = model.cfg.n_heads
    chosen = tuple(range(n_heads)) if heads is None else tuple(heads)
    if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0 or max(chosen) >= n_heads:
        raise CtlensError(f"heads must name some of 0 to {n_heads - 1}, each once, not {chosen}.")
    return chosen


def edges(batch: ContrastBatch, rows: Sequence[EncodedPair], queries: str, keys: Sequence[Sequence[int]]) -> Edges:
    """The attention from the chosen queries of every prompt to its keys."""
    if queries not in QUERIES:
        raise unknown("queries", queries, tuple(QUERIES))
    there = mark(batch.side.mask, keys)
    steps = torch.arange(there.shape[1], device=there.device)
    last = steps == batch.last[:, None]
    if queries == "last":
        asking = last
    elif queries == "content":
        asking = mark(batch.side.mask, [row.alignments["shared"].wrapped for row in rows]) & ~last
    else:
        asking = batch.side.mask & ~there
    return asking[:, :, None] & there[:, None, :] & (steps[:, None] >= steps)


def random_keys(row: EncodedPair, keys: Sequence[int], seed: int) -> list[tuple[int, ...]]:
    """Draws the keys of the null, several times: as many other tokens of the wrapped prompt.

    They depend on the prompt and the seed alone. The first token is not among them: attention
    that nothing calls for rests on it, and without it a model breaks rather than forgets.

    Raises:
        CtlensError: the prompt has no other token.
    """
    others = sorted(set(range(1, len(row.wrapped.ids) - 1)) - set(keys))
    if not others:
        raise CtlensError("a prompt has no tokens beside the keys to draw a null from: choose fewer keys.")
    draw = generator(seed, "knockout", *row.wrapped.ids)
    shuffled = (torch.randperm(len(others), generator=draw)[: len(keys)].tolist() for _ in range(DRAWS))
    return [tuple(others[at] for at in found) for found in shuffled]
