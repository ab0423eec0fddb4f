"""Agreement of attention and gradients: three scores of each prompt token, compared pair by pair.

- `gradient`: gradient x input of the logit difference, good answer minus bad, at the embedding, `|<g, x>|`
  (with the position where the model adds one there);
- `rollout`: attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928): the product over layers of the head-averaged
  pattern, half of it the residual connection, read at the last token;
- `attention`: the last token's attention, the mean over heads and layers.

A prompt's first token is left out where no message holds it: attention rests on the BOS whatever the
prompt says, and would make any two attention scores agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ctlens import plots
from ctlens.analysis.base.contrast import ContrastBatch, contrast_batches, encoded_contrasts
from ctlens.analysis.base.forward import comparable_by_label, encoded_pairs
from ctlens.analysis.base.positions import segments
from ctlens.analysis.base.result import ResultOverPairs, groups_of
from ctlens.core.clusters import clustered_mean
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.public import public
from ctlens.core.types import LensModel, Pattern
from ctlens.data.batch import EncodedPair
from ctlens.data.inputs import Pairs
from ctlens.models.hooks import editing, resolve, run, run_capturing
from ctlens.plots import Figure

SALIENCY_METHODS = ("gradient", "rollout", "attention")
COMPARISONS = tuple(combinations(SALIENCY_METHODS, 2))
CORRELATIONS = ("spearman", "pearson")
WRAPPER_SHARE = "wrapper_share"

Scores = Float[Tensor, "batch pos"]


@dataclass(frozen=True)
class SaliencyAgreement(ResultOverPairs):
    """The result of `saliency_agreement`: how far three scores of tokens agree, and how much of each is on the wrapper.

    Attributes:
        agreement: `[model, statistic, comparison, pair]`, correlations over a prompt's tokens, as in
            `CORRELATIONS` and `COMPARISONS`; NaN where a score is the same for all tokens.
        wrapper: `[model, method, pair]`, the share of a score that is on the wrapper, 0 to 1, as in `SALIENCY_METHODS`.
        models: their labels.
    """

    agreement: Float[np.ndarray, "model statistic comparison pair"]
    wrapper: Float[np.ndarray, "model method pair"]
    models: tuple[str, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model and number.

        Returns:
            `quantity` is one of `CORRELATIONS`, between a `method` and an `other`, or `"wrapper_share"`
            of a method; `value` is the mean over `n_pairs`, with its 95 percent interval.
        """
        rows = []
        for index, model in enumerate(self.models):
            for number, statistic in enumerate(CORRELATIONS):
                for pair, values in zip(COMPARISONS, self.agreement[index, number], strict=True):
                    rows.append((model, statistic, *pair, *self._mean(values)))
            for method, values in zip(SALIENCY_METHODS, self.wrapper[index], strict=True):
                rows.append((model, WRAPPER_SHARE, method, "", *self._mean(values)))
        columns = ["model", "quantity", "method", "other", "value", "ci_low", "ci_high", "n_pairs"]
        return pd.DataFrame(rows, columns=columns)

    def _mean(self, values: Float[np.ndarray, " pair"]) -> tuple[float, float, float, int]:
        """The mean over pairs that have the number, its interval, and how many they are."""
        known = ~np.isnan(values)
        if not known.any():
            return np.nan, np.nan, np.nan, 0
        mean, low, high = clustered_mean(values[known], self.clusters(known))
        return float(mean), float(low), float(high), int(known.sum())

    def figure(self, statistic: str = "spearman") -> Figure:
        """Agreement of every two scores, and the share of each on the wrapper, one marker per model.

        Raises:
            CtlensError: the statistic is unknown.
        """
        if statistic not in CORRELATIONS:
            raise unknown("statistic", statistic, CORRELATIONS)
        table = self.to_dataframe()
        groups = [" and<br>".join(pair) for pair in COMPARISONS]
        agreement = _by_model(table, statistic)
        share = _by_model(table, WRAPPER_SHARE)
        return plots.agreement(
            {
                f"{statistic.title()} correlation over tokens": (groups, agreement),
                "share on the wrapper": ([*SALIENCY_METHODS], share),
            },
            "Do attention and gradients point at the same tokens?",
            subtitle=f"{self.wrapper.shape[-1]} wrapped prompts",
        )


def _by_model(table: pd.DataFrame, quantity: str) -> dict[str, Float[np.ndarray, "ends row"]]:
    """Each model's values of a quantity with their intervals."""
    return {
        str(model): np.asarray(rows[["value", "ci_low", "ci_high"]], dtype=float).T
        for model, rows in table[table["quantity"] == quantity].groupby("model", sort=False)
    }


@public
def saliency_agreement(
    models: LensModel | Mapping[str, LensModel],
    pairs: Pairs,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> SaliencyAgreement:
    """Compares gradient x input, attention rollout and attention on wrapped prompts: do they point to the same tokens?

    >>> import ctlens as ct
    >>> pairs = ct.threats.get("sycophancy").pairs(8, split="heldout")
    >>> table = ct.analysis.saliency_agreement(ct.load_organism(), pairs, progress=False).to_dataframe()
    >>> bool(table.query("quantity == 'spearman'")["value"].between(-1, 1).all()), len(table)
    (True, 9)

    Args:
        models: one, or several of one shape by their labels, in eval mode.
        pairs: with good and bad answers on the wrapped side, and a wrapper that can be told from the content.
            `ctlens.pairs` makes them of two lists of texts.
        batch_size: prompts per forward and backward pass.
        progress: show a progress bar.

    Raises:
        CtlensError: a model is in training mode or does not compare with the first, or a pair lacks
            a contrast, does not align or has no known wrapper.
    """
    named = comparable_by_label(models)
    first = next(iter(named.values()))
    rows = encoded_pairs(first, pairs, ("shared",))
    items = encoded_contrasts(first, rows)
    if not all(row.wrapper for row in rows):
        raise CtlensError("a pair's wrapper cannot be told from its content: leave that pair out.")
    agreement = []
    wrapper = []
    for model in named.values():
        found = zip(rows, _scored(model, contrast_batches(first, items, batch_size, progress)), strict=True)
        compared = [_compared(row, scores) for row, scores in found]
        agreement.append(np.stack([correlations for correlations, _ in compared], -1))
        wrapper.append(np.stack([shares for _, shares in compared], -1))
    return SaliencyAgreement(np.stack(agreement), np.stack(wrapper), tuple(named), groups=groups_of(pairs))


def _scored(model: LensModel, found: Iterator[ContrastBatch]) -> Iterator[Float[np.ndarray, "method pos"]]:
    """Scores the tokens of every prompt."""
    for batch in found:
        names = resolve(model, "pattern")
        patterns = run_capturing(model, batch.side.tokens, names, grad=False)[1]
        layers = [patterns[name] for name in names]
        attention = torch.stack([batch.at_last(layer.mean(1)) for layer in layers]).mean(0)
        scores = [gradient_x_input(model, batch), batch.at_last(rollout(layers)), attention]
        yield from torch.stack(scores, 1).float().cpu().numpy()


def gradient_x_input(model: LensModel, batch: ContrastBatch) -> Scores:
    """The size of every token's share in the logit difference by its gradient at the embedding, `|<g, x>|`."""
    name = resolve(model, "resid_pre", 0)[0]
    held: list[Tensor] = []

    def leaf(embedding: Tensor) -> Tensor:
        held.append(embedding.detach().requires_grad_())
        return held[-1]

    with torch.enable_grad():
        with editing(model, {name: leaf}):
            logit_diff = batch.logit_diff(batch.at_last(run(model, batch.side.tokens)))
        (slope,) = torch.autograd.grad(logit_diff.sum(), held)
    return (slope * held[0]).sum(-1).abs().detach()


def rollout(patterns: Sequence[Pattern]) -> Float[Tensor, "batch q k"]:
    """Attention rollout: how much of every token's final state comes from each token, if heads only mixed states.

    >>> rollout([torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])])  # half stays, half goes where attention is
    tensor([[[1.0000, 0.0000],
             [0.2500, 0.7500]]])

    Args:
        patterns: of every layer, the first one first.
    """
    mixed = [(pattern.mean(1) + torch.eye(pattern.shape[-1], device=pattern.device)) / 2 for pattern in patterns]
    return reduce(lambda below, layer: layer @ below, mixed)


def _compared(
    row: EncodedPair, scores: Float[np.ndarray, "method pos"]
) -> tuple[Float[np.ndarray, "statistic comparison"], Float[np.ndarray, " method"]]:
    """The correlations of a prompt's scores, and the share of each on the wrapper."""
    kept = sorted(set(range(len(row.wrapped.ids))) - set(segments(row)["bos"]))
    table = pd.DataFrame(scores[:, kept].T, columns=[*SALIENCY_METHODS], index=kept)
    correlations = [[tables.loc[pair] for pair in COMPARISONS] for tables in map(table.corr, CORRELATIONS)]
    return np.array(correlations), np.asarray(table.loc[list(row.wrapper)].sum() / table.sum())
