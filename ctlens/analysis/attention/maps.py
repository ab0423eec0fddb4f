"""Maps of one head's attention on one pair: clean, wrapped by each model, and the change in training.

A map can be weighted by values: attention times the norm of the value vector written through the
head's output matrix, `a[q, k] |v[k] W_O|`, which is what the head takes from that token rather than how much it
looks there (Kobayashi et al. 2020, arXiv 2004.10102; without the output bias).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctlens import plots
from ctlens.analysis.base.forward import comparable_by_label, pair_batches
from ctlens.analysis.base.positions import SEGMENTS, token_segments
from ctlens.analysis.base.result import Result
from ctlens.core.errors import CtlensError
from ctlens.core.public import public
from ctlens.core.types import LensModel, Tokens
from ctlens.data.batch import EncodedPair
from ctlens.data.chat import Rendered
from ctlens.data.inputs import OnePair
from ctlens.models.hooks import resolve, run_capturing, select_layers
from ctlens.models.parameters import require_whole
from ctlens.plots import Figure, LabelledMap

READABLE = 40  # tokens along an axis whose labels can still be read; chosen by eye
_LAST_TOKEN = "last token"
Map = Float[np.ndarray, "q k"]


@dataclass(frozen=True)
class AttentionMaps(Result):
    """The result of `attention_maps`: the maps of one head on one pair.

    Attributes:
        clean: of the first model on the clean prompt.
        wrapped: `[model, q, k]`, of every model on the wrapped prompt.
        twins: per token of the wrapped prompt, the position of its twin in the clean one; -1 for none.
        clean_tokens, tokens: the text of every token.
        clean_segments, segments: the segment of every token, see `ctlens.analysis.base.positions.token_segments`.
        models: their labels.
        layer, head: which head it is.
        weighted: whether attention is weighted by values.
    """

    clean: Float[np.ndarray, "clean_q clean_k"]
    wrapped: Float[np.ndarray, "model q k"]
    twins: Int[np.ndarray, " q"]
    clean_tokens: tuple[str, ...]
    tokens: tuple[str, ...]
    clean_segments: tuple[str, ...]
    segments: tuple[str, ...]
    models: tuple[str, ...]
    layer: int
    head: int
    weighted: bool

    def to_dataframe(self) -> pd.DataFrame:
        """One row per map, segment of queries and segment of keys: `mass`, the mean over the segment's queries."""
        rows = [
            (name, query, key, mass)
            for name, values, segments in self._maps()
            for query, of_query in _between_segments(values, segments).items()
            for key, mass in of_query.items()
        ]
        return pd.DataFrame(rows, columns=["map", "query_segment", "key_segment", "mass"])

    def figure(self, queries: tuple[int, int] | None = None, top: int = 12) -> Figure:
        """Draws the maps, and the last model's minus the first's, on one scale.

        A long prompt stays readable: only a window of queries is shown (of a long clean prompt, the
        twins of that window). The keys with most attention stand alone; keys between
        them are added up by segment, so that nothing is left out of a row.

        Args:
            queries: first position and the one behind the last, in the wrapped prompt; None for
                all of a short prompt, and the last ones of a long one.
            top: how many keys of a long prompt have a column of their own.

        Raises:
            CtlensError: there is no such window.
        """
        n = len(self.tokens)
        if queries is not None and not (isinstance(queries, tuple) and len(queries) == 2):
            raise CtlensError("queries are a window: give the first position and the one behind the last, (0, 8).")
        start, stop = queries or (max(0, n - READABLE), n)
        if not 0 <= start < stop <= n:
            raise CtlensError(f"queries {(start, stop)} are no window: the wrapped prompt has {n} tokens.")
        window = list(range(start, stop))
        twins = [int(twin) for twin in self.twins[window] if twin >= 0]
        whole = queries is None and len(self.clean_tokens) <= READABLE
        clean = list(range(len(self.clean_tokens))) if whole else twins
        maps: dict[str, LabelledMap] = {}
        if clean:
            maps["clean"] = _shown(self.clean[None], clean, self.clean_tokens, self.clean_segments, top)[0]
        shown = _shown(self.wrapped, window, self.tokens, self.segments, top)
        maps |= dict(zip(self._names(), shown, strict=True))
        return self._drawn(maps, f"Where does head L{self.layer}H{self.head} look?")

    def flow(self) -> Figure:
        """Attention from segment to segment, for prompts of any length: the mean over a segment's queries."""
        maps = {}
        for name, values, segments in self._maps():
            flows = _between_segments(values, segments)
            sizes = Counter(segments)
            keys = [f"{segment} ({sizes[segment]})" for segment in flows[_LAST_TOKEN]]
            maps[name] = LabelledMap(np.array([[*of_query.values()] for of_query in flows.values()]), [*flows], keys)
        return self._drawn(maps, f"From which segments to which does head L{self.layer}H{self.head} look?")

    def _names(self) -> list[str]:
        shown = [plots.label(name) for name in self.models]
        return [f"wrapped, {name}" for name in (shown if len(set(shown)) == len(shown) else self.models)]

    def _maps(self) -> Iterator[tuple[str, Map, tuple[str, ...]]]:
        yield "clean", self.clean, self.clean_segments
        for name, values in zip(self._names(), self.wrapped, strict=True):
            yield name, values, self.segments

    def _drawn(self, maps: Mapping[str, LabelledMap], title: str) -> Figure:
        names = self._names()
        between = (names[0], names[-1]) if len(names) > 1 else None
        unit = "attention x norm of the written value" if self.weighted else "attention"
        subtitle = "rows are queries, columns the keys they look at; numbers are positions, in brackets how many tokens"
        return plots.labelled_maps(maps, title, unit=unit, difference=between, subtitle=subtitle)


def _between_segments(values: Map, segments: Sequence[str]) -> dict[str, dict[str, float]]:
    """The mean attention to each segment of keys, per segment of queries and for the last token alone."""
    held = {
        name: [at for at, segment in enumerate(segments) if segment == name] for name in SEGMENTS if name in segments
    }
    queries = held | {_LAST_TOKEN: [len(segments) - 1]}
    return {
        query: {key: float(values[np.ix_(rows, columns)].sum(-1).mean()) for key, columns in held.items()}
        for query, rows in queries.items()
    }


def _shown(
    values: Float[np.ndarray, "map q k"], rows: Sequence[int], tokens: Sequence[str], segments: Sequence[str], top: int
) -> list[LabelledMap]:
    """Maps of the same prompt at some queries, with the keys of a long one pooled alike."""
    chosen = values[:, list(rows)]
    runs = _runs(chosen.sum((0, 1)), segments, top)
    labels = [f"{at} {token}" for at, token in enumerate(tokens)]
    columns = [
        labels[start] if stop - start == 1 else f"{start}–{stop - 1} {segments[start]} ({stop - start})"
        for start, stop in runs
    ]
    pooled = np.stack([chosen[..., start:stop].sum(-1) for start, stop in runs], -1)
    queries = [labels[row] for row in rows]
    kinds = [segments[row] for row in rows], [segments[start] for start, _ in runs]
    return [LabelledMap(of_map, queries, columns, *kinds) for of_map in pooled]


def _runs(mass: Float[np.ndarray, " k"], segments: Sequence[str], top: int) -> list[tuple[int, int]]:
    """Half-open runs of keys that share a column: each of the `top` largest alone, the others by segment."""
    if len(mass) <= READABLE:
        return [(at, at + 1) for at in range(len(mass))]
    alone = {int(at) for at in np.argsort(-mass, kind="stable")[:top]}
    runs: list[tuple[int, int]] = []
    for _, found in groupby(range(len(mass)), key=lambda at: (segments[at], at if at in alone else None)):
        keys = [*found]
        runs.append((keys[0], keys[-1] + 1))
    return runs


@public
def attention_maps(
    models: LensModel | Mapping[str, LensModel], pair: OnePair, layer: int, head: int, *, weighted: bool = False
) -> AttentionMaps:
    """Reads one head's attention: on the clean prompt, and on the wrapped prompt by every model.

    >>> import ctlens as ct
    >>> (pair,) = ct.threats.get("sycophancy").pairs(1, split="heldout")
    >>> maps = ct.analysis.attention_maps(ct.load_organism(), pair, layer=0, head=1)
    >>> maps.tokens[:6], maps.segments[2]
    (('<bos>', '<user>', 'i', 'would', 'bet', 'on'), 'wrapper')

    Args:
        models: one, or several of one shape by their labels, in eval mode; the clean map is the first one's.
        pair: a clean and a wrapped prompt.
        layer, head: which head; negative layers count from the end.
        weighted: weight attention by the norm of what the value vector writes.

    Raises:
        CtlensError: a model is in training mode or does not compare with the first, the head does
            not exist, the pair does not align, or a layer's head is not attention times values.
    """
    named = comparable_by_label(models)
    first = next(iter(named.values()))
    (layer,) = select_layers(first.cfg.n_layers, layer)
    if not 0 <= head < first.cfg.n_heads:
        raise CtlensError(f"head {head} does not exist: the model has heads 0 to {first.cfg.n_heads - 1}.")
    ((row,), batch) = next(iter(pair_batches(first, [pair], "shared", 1, False)))
    read = partial(_map, layer=layer, head=head, weighted=weighted)
    length = len(row.wrapped.ids)
    clean_length = len(row.clean.ids)
    clean = read(first, batch.clean.tokens)[:clean_length, :clean_length]
    wrapped = np.stack([read(model, batch.wrapped.tokens)[:length, :length] for model in named.values()])
    return maps_of_pair(first.tokenizer, row, clean, wrapped, tuple(named), layer, head, weighted=weighted)


def maps_of_pair(
    tokenizer: Any,
    row: EncodedPair,
    clean: Float[np.ndarray, "clean_q clean_k"],
    wrapped: Float[np.ndarray, "model q k"],
    models: tuple[str, ...],
    layer: int,
    head: int,
    *,
    weighted: bool = False,
) -> AttentionMaps:
    """Labels one head's attention on an encoded pair, aligned in the window `shared`; see `AttentionMaps`."""
    twins = np.full(len(row.wrapped.ids), -1)
    twins[list(row.alignments["shared"].wrapped)] = row.alignments["shared"].clean
    return AttentionMaps(
        clean,
        wrapped,
        twins,
        token_texts(tokenizer, row.clean),
        token_texts(tokenizer, row.wrapped),
        token_segments(row, "clean"),
        token_segments(row, "wrapped"),
        models,
        layer,
        head,
        weighted,
    )


def _map(model: LensModel, tokens: Tokens, layer: int, head: int, weighted: bool) -> Map:
    (pattern,) = resolve(model, "pattern", layer)
    (z,) = resolve(model, "z", layer)
    value = f"blocks.{layer}.attn.hook_v"
    found = run_capturing(model, tokens, [pattern, z, value] if weighted else [pattern], grad=False)[1]
    attention = found[pattern][0, head]
    if weighted:
        group = model.cfg.n_heads // found[value].shape[2]
        values = found[value][0, :, head // group]
        if not torch.allclose(attention @ values, found[z][0, :, head], atol=1e-3, rtol=1e-3):
            raise CtlensError(
                f"layer {layer} changes its heads after the values, so their norms say nothing of a token: leave out "
                "weighted=True."
            )
        attention = attention * _written(model, values, layer, head)
    return attention.float().cpu().numpy()


@torch.no_grad()
def _written(model: LensModel, values: Float[Tensor, "k d_head"], layer: int, head: int) -> Float[Tensor, " k"]:
    """The norm of what each value vector writes into the residual stream."""
    require_whole(model)
    return torch.linalg.vector_norm(values @ cast(Any, model).blocks[layer].attn.W_O[head], dim=-1)


def token_texts(tokenizer: Any, prompt: Rendered) -> tuple[str, ...]:
    """The text of every token; its name in the vocabulary where it covers no text."""
    names = tokenizer.convert_ids_to_tokens(list(prompt.ids))
    found = (prompt.text[slice(*ends)].replace("\n", "⏎") for ends in prompt.offsets)
    return tuple(text or name for text, name in zip(found, names, strict=True))
