"""Patching by feature: feature activations of one run put into another, all that the dictionary misses left as it is.

With `f` the features of a token in the target run and `f'` those of the source, the state `x` becomes
`x + decode(f with some of f') - decode(f)`. The source is the same model on the clean prompt, which is denoising by
feature, or another model on the same wrapped prompt, whose features then say what a training does by them.

Three further edits tell what the dictionary can say at all: all features together (`"features"`), what it misses
(`"error"`), and both, which is the source's whole state (`"states"`). Where the error brings much of the effect,
features are the wrong words for it. Beside each feature stand random directions with its change written along them, as
long at every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ctlens import plots
from ctlens.analysis.base.contrast import ContrastBatch, contrast_batches, contrasts, encoded_contrasts, logit_diffs
from ctlens.analysis.base.forward import pair_batches, require_comparable, require_eval
from ctlens.analysis.base.metrics import SMALLEST_GAPS
from ctlens.analysis.base.nulls import random_band
from ctlens.analysis.base.positions import ALIGNED_POSITIONS, POSITIONS_IN_WORDS
from ctlens.analysis.base.result import ResultOverPairs, groups_of
from ctlens.analysis.base.shares import shares
from ctlens.analysis.features.readout import Features
from ctlens.analysis.residual.shift_vectors import last_and_content
from ctlens.core.clusters import clustered_mean
from ctlens.core.config import generator
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.keeping import keeping
from ctlens.core.public import public
from ctlens.core.types import Activations, LensModel, Positions
from ctlens.data.batch import EncodedPair, PairBatch
from ctlens.data.inputs import Pairs
from ctlens.losses.base import at_positions
from ctlens.models.hooks import editing, run, run_capturing
from ctlens.plots import Figure

CHOSEN_FEATURES = "chosen"
ALL_FEATURES = "features"
ERROR = "error"
WHOLE = "states"
EDITS_TOGETHER = (CHOSEN_FEATURES, ALL_FEATURES, ERROR, WHOLE)
"""The edits that follow those of single features: the chosen ones together, all, what the dictionary misses, both."""
_States = Float[Tensor, "token d"]


class _Tokens(NamedTuple):
    """The states of some tokens: those that the dictionary reads, and those that it decodes to."""

    read: _States
    written: _States


@dataclass(frozen=True)
class FeaturePatching(ResultOverPairs):
    """The result of `feature_patch`: the logit difference of each pair under each edit, good answer minus bad.

    Attributes:
        logit_diffs: `[edit, pair]`, each feature alone in the order of `features`, then `EDITS_TOGETHER`.
        random: `[feature, draw, pair]`, with a feature's change written along random directions.
        target, source: `[pair]`, of the run without an edit, and of that whose features were put in.
        features: their numbers.
        positions: the tokens that were edited.
        hook_name: the hook point that the dictionary reads.
        source_name: what the features are of, in words.
    """

    logit_diffs: Float[np.ndarray, "edit pair"]
    random: Float[np.ndarray, "feature draw pair"]
    target: Float[np.ndarray, " pair"]
    source: Float[np.ndarray, " pair"]
    features: tuple[int, ...]
    positions: str
    hook_name: str
    source_name: str

    @property
    def edits(self) -> tuple[str, ...]:
        """The name of each edit."""
        return (*[f"feature {number}" for number in self.features], *EDITS_TOGETHER)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per edit.

        Returns:
            The mean `change` of the logit difference with `ci_low` and `ci_high`; its `share` of the way from target to
            source with `share_low` and `share_high`, NaN where the two hardly differ; of single features the lowest and
            highest change of the random directions, and `beyond_random`, whether the interval lies outside of them.
        """
        moved = self.logit_diffs - self.target
        change, low, high = clustered_mean(moved.T, self.clusters())
        floor = SMALLEST_GAPS["logit_diff"]
        share, share_low, share_high = shares(moved, self.source - self.target, floor, self.clusters)
        band = np.full((2, len(self.edits)), np.nan)
        band[:, : len(self.features)] = random_band(self.random - self.target)
        columns = {"edit": self.edits, "change": change, "ci_low": low, "ci_high": high, "share": share}
        columns |= {"share_low": share_low, "share_high": share_high, "random_low": band[0], "random_high": band[1]}
        table = pd.DataFrame(columns).assign(n_pairs=len(self.target))
        return table.assign(beyond_random=(low > band[1]) | (high < band[0]))

    def figure(self) -> Figure:
        """Draws the change of the logit difference of every edit, with the whole way as a line."""
        table = self.to_dataframe()
        n = len(self.features)
        rows = {"one feature": list(self.edits[:n]), "together": list(EDITS_TOGETHER)}
        curves = {
            name: (part["change"], part["ci_low"], part["ci_high"])
            for name, part in (("one feature", table[:n]), ("together", table[n:]))
        }
        widest = float(np.abs(table[["random_low", "random_high"]].to_numpy()[:n]).max())
        return plots.points(
            rows,
            curves,
            "Which features carry the difference?",
            x_title="change of the logit difference, good minus bad",
            marks={"none": 0.0, "the source's": float((self.source - self.target).mean())},
            subtitle=f"{self.hook_name}, {POSITIONS_IN_WORDS[self.positions]}; features of {self.source_name}; "
            f"{len(self.target)} pairs",
            caption=f"Whiskers are 95% intervals. As much along random directions does {widest:.2g} at most.",
        )


@public
@keeping()
def feature_patch(
    model: LensModel,
    pairs: Pairs,
    features: Features,
    numbers: Sequence[int],
    *,
    source: LensModel | None = None,
    positions: str = "last",
    draws: int = 5,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> FeaturePatching:
    """Puts feature activations of another run into a model's wrapped run, one feature at a time and together.

    Args:
        model: the model whose wrapped prompts are edited, in eval mode.
        pairs: with good and bad answers on both sides. `ctlens.pairs` makes them of lists of texts.
        features: the dictionary, and what it reads.
        numbers: of the features, such as `feature_shift(...).most_moved()`.
        source: the model whose features on the wrapped prompts are put in; None puts in those of `model` on the clean
            prompts.
        positions: the aligned tokens that are edited, `"last"` or `"content"`.
        draws: how many random directions.
        seed: of the random directions.
        batch_size: pairs per forward pass.
        progress: show a progress bar.

    Raises:
        CtlensError: models do not compare or are in training mode, a pair does not align or has no two answers, the
            dictionary does not fit, there is no such feature or none is named, or positions are unknown.
    """
    require_eval(model)
    if source is not None:
        require_comparable(model, source)
    if positions not in ALIGNED_POSITIONS:
        raise unknown("positions", positions, ALIGNED_POSITIONS)
    if draws < 2:
        raise CtlensError(f"a band needs at least 2 random directions, not {draws}.")
    chosen = _known(numbers, features.count(model))
    random = torch.randn(draws, model.cfg.d_model, generator=generator(seed, "features"))
    units = torch.nn.functional.normalize(random, dim=-1).to(next(model.parameters()).device)
    chunks = []
    for rows, batch in pair_batches(model, pairs, "shared", batch_size, progress):
        runs = _runs(model, source, rows, batch, features, positions)
        changes = [
            *_single(features, runs, chosen),
            *_together(features, runs, chosen),
            *_random(features, runs, chosen, units),
        ]
        chunks.append((runs, np.stack([_under(model, runs, features, change) for change in changes])))
    values = np.concatenate([found for _, found in chunks], 1)
    n_edits = len(chosen) + len(EDITS_TOGETHER)
    return FeaturePatching(
        logit_diffs=values[:n_edits],
        random=values[n_edits:].reshape(len(chosen), draws, -1),
        target=np.concatenate([runs.logit_diffs for runs, _ in chunks]),
        source=np.concatenate([runs.source_logit_diffs for runs, _ in chunks]),
        features=chosen,
        positions=positions,
        hook_name=features.hook_name,
        source_name="the clean prompt" if source is None else "the source model",
        groups=groups_of(pairs),
    )


def _known(numbers: Sequence[int], n_features: int) -> tuple[int, ...]:
    for number in numbers:
        if not 0 <= number < n_features:
            raise CtlensError(f"there is no feature {number}: the dictionary has features 0 to {n_features - 1}.")
    if not numbers or len(set(numbers)) < len(numbers):
        raise CtlensError("name at least one feature, and each once.")
    return tuple(map(int, numbers))


class _Runs(NamedTuple):
    """A batch of target runs and what is known of their source, at the edited tokens of all prompts one after another.

    Attributes:
        rows: the target's prompts, with the token that each answer begins with.
        row, position: `[token]`, where each edited token is in them.
        target, source: of each run.
        logit_diffs, source_logit_diffs: of each prompt.
    """

    rows: ContrastBatch
    row: Tensor
    position: Tensor
    target: _Tokens
    source: _Tokens
    logit_diffs: np.ndarray
    source_logit_diffs: np.ndarray


def _runs(
    model: LensModel,
    source: LensModel | None,
    rows: Sequence[EncodedPair],
    batch: PairBatch,
    features: Features,
    positions: str,
) -> _Runs:
    names = features.hook_names(model)
    (asked,) = contrast_batches(model, encoded_contrasts(model, rows), len(rows), progress=False)
    matched = batch.matched["shared"]
    where = last_and_content(matched)[ALIGNED_POSITIONS.index(positions)]
    logits, target = run_capturing(model, asked.side.tokens, names, grad=False, mask=asked.side.needed_mask)
    if source is None:
        clean_rows = contrasts(model, [row.pair for row in rows], "clean")
        theirs = logit_diffs(model, contrast_batches(model, clean_rows, len(rows), progress=False))
        _, found = run_capturing(
            model, batch.clean.tokens, names, grad=False, mask=batch.clean.needed_mask, logits=False
        )
    else:
        said, found = run_capturing(source, asked.side.tokens, names, grad=False, mask=asked.side.needed_mask)
        theirs = _logit_diffs(asked, said)
    return _Runs(
        rows=asked,
        row=where.nonzero()[:, 0],
        position=matched.wrapped[where],
        target=_tokens(features, target, matched.wrapped, where),
        source=_tokens(features, found, matched.clean if source is None else matched.wrapped, where),
        logit_diffs=_logit_diffs(asked, logits),
        source_logit_diffs=theirs,
    )


def _tokens(
    features: Features, found: Activations, positions: Positions, where: Bool[Tensor, "batch width"]
) -> _Tokens:
    read = at_positions(found[features.hook_name], positions)[where]
    return _Tokens(read, at_positions(found[features.written_at], positions)[where])


def _logit_diffs(rows: ContrastBatch, logits: Tensor) -> np.ndarray:
    return rows.logit_diff(rows.at_last(logits)).float().cpu().numpy()


def _single(features: Features, runs: _Runs, numbers: Sequence[int]) -> Iterator[_States]:
    """What each feature alone adds to the states."""
    here = features.encode(runs.target.read)
    there = features.encode(runs.source.read)
    before = features.decode(here)
    for number in numbers:
        mixed = here.clone()
        mixed[:, number] = there[:, number]
        yield features.decode(mixed) - before


def _together(features: Features, runs: _Runs, numbers: Sequence[int]) -> Iterator[_States]:
    """What the edits `EDITS_TOGETHER` add to the states."""
    here = features.encode(runs.target.read)
    there = features.encode(runs.source.read)
    mixed = here.clone()
    mixed[:, list(numbers)] = there[:, list(numbers)]
    before = features.decode(here)
    every = features.decode(there) - before
    whole = runs.source.written - runs.target.written
    yield features.decode(mixed) - before
    yield every
    yield whole - every
    yield whole


def _random(
    features: Features, runs: _Runs, numbers: Sequence[int], units: Float[Tensor, "draw d"]
) -> Iterator[_States]:
    """Each feature's change written along each random direction."""
    moved = features.encode(runs.source.read) - features.encode(runs.target.read)
    for number, change in zip(numbers, _single(features, runs, numbers), strict=True):
        amount = moved[:, number].sign() * change.norm(dim=-1)
        for unit in units:
            yield amount[:, None] * unit


@torch.no_grad()
def _under(model: LensModel, runs: _Runs, features: Features, change: _States) -> np.ndarray:
    """The logit differences with something added to the edited tokens."""

    def add(activation: Tensor) -> Tensor:
        edited = activation.clone()
        edited[runs.row, runs.position] += change.to(activation.dtype)
        return edited

    with editing(model, {features.written_at: add}):
        return _logit_diffs(runs.rows, run(model, runs.rows.side.tokens, runs.rows.side.needed_mask))
