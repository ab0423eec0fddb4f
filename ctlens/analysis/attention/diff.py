"""The attention of every head on wrapped prompts, before and after a training.

Three quantities of each head's attention rows, from the last prompt token and from the aligned
tokens before it, which are never pooled because they give different answers:

- `mass`: the share of attention on a segment of the prompt, see `ctlens.analysis.base.positions`;
- `entropy`: the entropy of the row, in nats;
- `jsd`: the Jensen-Shannon divergence, in nats, from the reference's row on the clean prompt, for both
  models. The clean row is lifted to the keys of the wrapped prompt, with nothing on the wrapper and one
  bucket for what has no twin there. So attention that moves from the BOS to the wrapper counts, which
  it would not if everything outside the content were one bucket.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ctlens import plots
from ctlens.analysis.base.forward import pair_batches, require_comparable
from ctlens.analysis.base.positions import SEGMENTS, SegmentMasks, segment_masks
from ctlens.analysis.base.result import ResultOverPairs, beside, groups_of
from ctlens.core.clusters import clustered_mean, simultaneous_mean
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.labels import BASE
from ctlens.core.public import public
from ctlens.core.types import LensModel, Pattern
from ctlens.data.batch import Matched, PairBatch
from ctlens.data.inputs import Pairs
from ctlens.losses.attct import lifted_rows, query_rows, seen_keys, with_opening
from ctlens.losses.distances import LOG_FLOOR, jensen_shannon
from ctlens.models.hooks import resolve, run_capturing
from ctlens.plots import Curve, Figure

WHEN = ("before", "after")
_QUANTITIES = ("mass", "entropy", "jsd")
_QUERIES = ("last", "content")
HEADLINE = "mass/last/wrapper"


def _name(quantity: str, queries: str, keys: str = "") -> str:
    """The name of a measure; only the mass is that of a segment of keys."""
    return f"{quantity}/{queries}/{keys if quantity == 'mass' else ''}"


ATTENTION_MEASURES = tuple(
    name
    for queries in _QUERIES
    for name in (*(_name("mass", queries, keys) for keys in SEGMENTS), _name("entropy", queries), _name("jsd", queries))
)
_WORDS = {
    "mass": "attention mass on the {keys} tokens",
    "entropy": "entropy of the attention, in nats",
    "jsd": "divergence from the clean attention, in nats",
}
_FROM = {"last": "from the last token", "content": "from the content tokens"}
_CHANGE = ["change", "ci_low", "ci_high"]


@dataclass(frozen=True)
class AttentionDiff(ResultOverPairs):
    """The result of `attention_diff`: the attention of every head on every pair, before and after training.

    Attributes:
        values: `[when, measure, pair, layer, head]`, along the first axis as in `WHEN`; NaN where a pair has no
            such segment, no token before the last one, or no twin of its last token.
        measures: `"quantity/queries/keys"` each; the keys are empty but for the mass.
    """

    values: Float[np.ndarray, "when measure pair layer head"]
    measures: tuple[str, ...] = ATTENTION_MEASURES

    @property
    def before(self) -> Float[np.ndarray, "pair layer head"]:
        """The mass from the last token on the wrapper before training, 0 to 1."""
        return self.of("before")

    @property
    def after(self) -> Float[np.ndarray, "pair layer head"]:
        """The mass from the last token on the wrapper after training, 0 to 1."""
        return self.of("after")

    def of(
        self, when: str, quantity: str = "mass", queries: str = "last", keys: str = "wrapper"
    ) -> Float[np.ndarray, "pair layer head"]:
        """Picks one quantity, before or after training; `keys` matters to the mass only.

        Raises:
            CtlensError: a name is unknown, or no pair has that quantity.
        """
        for kind, name, known in (
            ("time", when, WHEN),
            ("quantity", quantity, _QUANTITIES),
            ("queries", queries, _QUERIES),
            ("keys", keys, SEGMENTS),
        ):
            if name not in known:
                raise unknown(kind, name, known)
        name = _name(quantity, queries, keys)
        values = self._measured(name)[WHEN.index(when)]
        if not len(values):
            raise CtlensError(f"no pair has {name}: choose another quantity, queries or keys.")
        return values

    def curve(self, when: str = "after", quantity: str = "mass", queries: str = "last", keys: str = "wrapper") -> Curve:
        """Mean over heads and pairs and its 95 percent interval over topics and wrapper texts, `[layer]`."""
        values = self.of(when, quantity, queries, keys).mean(-1)
        return clustered_mean(values, self.clusters(self._known(_name(quantity, queries, keys))))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per quantity, queries, keys, layer and head; largest change first within a quantity.

        Returns:
            The means over `n_pairs`, `before` and `after`, and their `change` with its 95 percent
            interval for that head alone; see `top` for one that holds for all heads.
            A segment that no pair has is left out.
        """
        names = sorted(self.measures, key=lambda name: name != HEADLINE)
        tables = [self._heads(name, simultaneous=False) for name in names if self._measured(name).shape[1]]
        return pd.concat(tables, ignore_index=True)

    def top(self, k: int = 10, quantity: str = "mass", queries: str = "last", keys: str = "wrapper") -> pd.DataFrame:
        """Lists the `k` heads that change most, with intervals that hold for all heads at once.

        Returns:
            Rows as in `to_dataframe`, but with intervals that hold for all heads at once at 95
            percent (`ctlens.core.clusters.simultaneous_mean`), because the largest of many changes is
            large by chance too; with `heads`, how many were compared, and `differs`, whether the
            interval leaves out 0.
        """
        compared = int(np.prod(self.of("before", quantity, queries, keys).shape[1:]))
        table = self._heads(_name(quantity, queries, keys), simultaneous=True).head(k)
        return table.assign(heads=compared, differs=(table["ci_low"] > 0) | (table["ci_high"] < 0))

    def figure(self, quantity: str = "mass", queries: str = "last", keys: str = "wrapper") -> Figure:
        """The quantity of every head before and after, and the difference."""
        before = self.of("before", quantity, queries, keys).mean(0)
        after = self.of("after", quantity, queries, keys).mean(0)
        what = f"{_WORDS[quantity].format(keys=keys)}, {_FROM[queries]}"
        return plots.attention_heads(before, after, f"Which heads change their {what}?", what=what)

    def compare(self, others: Mapping[str, AttentionDiff], *, label: str, subtitle: str | None = None) -> Figure:
        """The mass on the wrapper by layer, in the base and after several trainings, one line each.

        Args:
            others: the same of other trainings of the same base, by label; they may hold this one too, under its label.
            label: of this training.
            subtitle: one line under the title.

        Raises:
            CtlensError: another training has this one's label.
        """
        trained = {name: result.curve("after") for name, result in beside(self, others, label).items()}
        return plots.layer_curves(
            {BASE: self.curve("before"), **trained},
            "How much does the last token attend to the wrapper?",
            y_title="attention mass on the wrapper, mean over heads",
            subtitle=subtitle,
        )

    def _measured(self, name: str) -> Float[np.ndarray, "when pair layer head"]:
        """Picks a measure's values for the pairs that have it."""
        return self.values[:, self.measures.index(name), self._known(name)]

    def _known(self, name: str) -> Bool[np.ndarray, " pair"]:
        """Tells which pairs have a measure."""
        return ~np.asarray(np.isnan(self.values[:, self.measures.index(name)]).any((0, 2, 3)))

    def _heads(self, name: str, *, simultaneous: bool) -> pd.DataFrame:
        values = self._measured(name)
        before, after = values
        ends = (simultaneous_mean if simultaneous else clustered_mean)(after - before, self.clusters(self._known(name)))
        table = pd.DataFrame([*np.ndindex(values.shape[2:])], columns=["layer", "head"])
        for column, numbers in zip(["before", "after", *_CHANGE], (before.mean(0), after.mean(0), *ends), strict=True):
            table[column] = numbers.ravel()
        for index, (column, word) in enumerate(zip(("quantity", "queries", "keys"), name.split("/"), strict=True)):
            table.insert(index, column, word)
        return table.assign(n_pairs=len(before)).sort_values("change", key=np.abs, ascending=False, ignore_index=True)


@public
def attention_diff(
    before: LensModel, after: LensModel, pairs: Pairs, *, batch_size: int = 64, progress: bool = True
) -> AttentionDiff:
    """Compares the attention of two models on wrapped prompts; the clean side is that of `before`.

    >>> import ctlens as ct
    >>> model, pairs = ct.load_organism(), ct.threats.get("sycophancy").pairs(4, split="heldout")
    >>> found = ct.analysis.attention_diff(model, model, pairs, progress=False)
    >>> found.top(1)[["change", "heads", "differs"]].values.tolist()  # a model does not differ from itself
    [[0.0, 16, False]]

    Args:
        before: the reference, in eval mode.
        after: the trained model, in eval mode.
        pairs: clean and wrapped prompts; the wrapper is what the wrapped one adds to the clean one's message.
            `ctlens.pairs` makes them of two lists of texts.
        batch_size: pairs per forward pass.
        progress: show a progress bar.

    Raises:
        CtlensError: the models do not compare or are in training mode, or a pair does not align or
            its wrapper cannot be told from its content.
    """
    require_comparable(before, after)
    names = resolve(before, "pattern")
    chunks: list[np.ndarray] = []
    for rows, batch in pair_batches(before, pairs, "shared", batch_size, progress):
        if not batch.wrapper.any(-1).all():
            raise CtlensError("a pair's wrapper cannot be told from its content: leave that pair out.")
        segments = segment_masks(rows, batch.wrapped)
        clean = run_capturing(before, batch.clean.tokens, names, grad=False)[1]
        by_model = []
        for model in (before, after):
            wrapped = run_capturing(model, batch.wrapped.tokens, names, grad=False)[1]
            layers = [_measures(clean[name], wrapped[name], batch, segments) for name in names]
            by_model.append(torch.stack(layers, 2).float().cpu().numpy())
        chunks.append(np.stack(by_model))
    return AttentionDiff(np.concatenate(chunks, 2), groups=groups_of(pairs))


def _measures(
    clean: Float[Tensor, "batch head clean_q clean_k"], wrapped: Pattern, batch: PairBatch, segments: SegmentMasks
) -> Float[Tensor, "measure batch head"]:
    """Measures every quantity of one layer, in the order of `ATTENTION_MEASURES`."""
    matched = batch.matched["shared"]
    twins = with_opening(batch, matched)
    here, there = batch.last_clean[:, None], batch.last_prompt[:, None]
    ends = Matched(here, there, torch.ones_like(there, dtype=torch.bool))
    is_end = matched.valid & (matched.wrapped == ends.wrapped)
    content = Matched(matched.clean, matched.wrapped, matched.valid & ~is_end)
    paired = (is_end & (matched.clean == ends.clean)).any(-1)
    found = []
    for queries in (ends, content):
        rows = query_rows(wrapped, queries.wrapped)
        mass = torch.einsum("bqhk,sbk->sbqh", rows, segments.to(rows.dtype))
        mass = mass.masked_fill(~segments.any(-1)[..., None, None], torch.nan)
        entropy = -(rows * rows.clamp(min=LOG_FLOOR).log()).sum(-1)
        jsd = _from_clean(clean, wrapped, queries, twins)
        if queries is ends:
            jsd = jsd.masked_fill(~paired[:, None, None], torch.nan)
        found += [_mean_row(value, queries) for value in (*mass, entropy, jsd)]
    return torch.stack(found)


def _from_clean(
    clean: Float[Tensor, "batch head clean_q clean_k"], wrapped: Pattern, queries: Matched, twins: Matched
) -> Float[Tensor, "batch width head"]:
    """The divergence of the lifted clean rows from the wrapped ones, both whole distributions."""
    lifted, there = lifted_rows(clean, wrapped, queries, twins, seen_keys(queries, twins))
    left_out = (1 - lifted.sum(-1, keepdim=True)).clamp(min=0)
    lifted = torch.cat([lifted, left_out], -1)
    there = torch.cat([there, torch.zeros_like(left_out)], -1)
    return jensen_shannon(lifted, there)


def _mean_row(values: Float[Tensor, "batch width head"], queries: Matched) -> Float[Tensor, "batch head"]:
    """The mean over each pair's queries, NaN where it has none."""
    return torch.where(queries.valid[..., None], values, 0).sum(1) / queries.valid.sum(-1, keepdim=True)
