"""What the answer loses by a model's own difference of wrapped and clean states, or by a part of it.

The directions are the model's own: the mean difference, per group of pairs, and the one that a gradient search finds
most effective. A base's direction cannot tell that a model's answer no longer rests on its cue, for the model may
have learned to write and read it along another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from ctlens.analysis.base.forward import pair_batches
from ctlens.analysis.base.positions import PositionsOf, positions_mask
from ctlens.analysis.base.states import States
from ctlens.analysis.directions.directions import SAME, Directions, turned
from ctlens.analysis.directions.edited_answers import EditedAnswers, adding
from ctlens.analysis.directions.searching import most_effective
from ctlens.core.config import generator
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair

_SEARCHED = 32  # pairs; the organism's held-out gain with twice as many was no larger

PairNumbers = Int[np.ndarray, " chosen"]


class OwnUse(NamedTuple):
    """The logit differences of one model's wrapped prompts without their own difference from the clean ones.

    Attributes:
        whole: `[layer, pair]`, with all of it taken out.
        own: `[layer, variant, pair]`, along the mean difference of the pair's group; then as much along random vectors.
        searched: `[layer, variant, pair]`, along the most effective direction; then along those of the null searches.
            Not a number for the pairs that are searched on.
    """

    whole: Float[np.ndarray, "layer pair"]
    own: Float[np.ndarray, "layer variant pair"]
    searched: Float[np.ndarray, "layer variant pair"]


class _Parts(NamedTuple):
    """Parts of the differences, one per variant and layer: how much of each pair's, and along which unit vector."""

    along: Float[np.ndarray, "variant layer pair"]
    unit: Float[np.ndarray, "variant layer group d"]
    group: Int[np.ndarray, " pair"]

    def taken_out(self, layer: int, pairs: PairNumbers) -> Float[np.ndarray, "variant chosen d"]:
        """What takes the parts out, when it is added to the states of some of the pairs."""
        return -self.along[:, layer, pairs][..., None] * self.unit[:, layer, self.group[pairs]]


def held_out_of_search(pairs: Sequence[Pair], seed: int) -> Bool[np.ndarray, " pair"]:
    """True at the half of the pairs that is not searched on; pairs with one clean prompt are in one half.

    Raises:
        CtlensError: all pairs have the same clean prompt.
    """
    texts = [tuple(turn.content for turn in pair.clean.turns) for pair in pairs]
    different = list(dict.fromkeys(texts))
    if len(different) < 2:
        raise CtlensError(
            "a direction is searched on some clean prompts and tried on others, but all pairs have the same one: "
            "give pairs with several."
        )
    order = torch.randperm(len(different), generator=generator(seed, "pairs to search on")).tolist()
    held_out = {different[number] for number in order[: len(different) // 2]}
    return np.array([text in held_out for text in texts])


def own_use(
    model: LensModel,
    pairs: Sequence[Pair],
    sides: tuple[States, States],
    direction: Directions,
    held_out: Bool[np.ndarray, " pair"],
    *,
    positions: str | PositionsOf,
    draws: int,
    seed: int,
    batch_size: int,
    progress: bool,
) -> OwnUse:
    """Runs a model on its wrapped prompts with its own difference, or parts of it, taken out.

    Args:
        model: in eval mode.
        pairs: with a good and a bad answer.
        sides: its wrapped and its clean states.
        direction: the base's; its site, layers and groups are used, not its vectors.
        held_out: the pairs that are not searched on.
        positions: the tokens whose states are changed.
        draws: how many random vectors, and how many null searches.
        seed: of both.
        batch_size: pairs per batch.
        progress: show a progress bar.
    """
    difference = _differences(*sides)
    names = direction.hook_names(model)
    group = np.unique(direction.group_of(pairs), return_inverse=True)[1]
    own = _along_mean(difference, group, draws, seed)
    chosen = np.flatnonzero(~held_out)
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(_SEARCHED, len(chosen))).round().astype(int)]
    (searched_on,) = _answers(model, [pairs[number] for number in chosen.tolist()], names, positions, _SEARCHED, False)
    searched = _along_most_effective(searched_on, names, difference, chosen, draws, seed)
    found = np.full((len(names), 1 + 2 * (1 + draws), len(pairs)), np.nan)
    for members, parts in ((np.flatnonzero(held_out), (own, searched)), (np.flatnonzero(~held_out), (own,))):
        done = 0
        for answers in _answers(
            model, [pairs[number] for number in members.tolist()], names, positions, batch_size, progress
        ):
            batch = members[done : done + answers.n_prompts]
            done += answers.n_prompts
            for layer, name in enumerate(names):
                logit_diffs = _logit_diffs(answers, name, layer, batch, difference, parts)
                found[layer, : len(logit_diffs), batch] = logit_diffs.T
    return OwnUse(found[:, 0], found[:, 1 : 2 + draws], found[:, 2 + draws :])


def _answers(
    model: LensModel,
    pairs: Sequence[Pair],
    names: Sequence[str],
    positions: str | PositionsOf,
    batch_size: int,
    progress: bool,
) -> Iterator[EditedAnswers]:
    """The answers to wrapped prompts, by batch, to be asked for under edits."""
    for rows, batch in pair_batches(model, pairs, "shared", batch_size, progress):
        mask = positions_mask(positions, "wrapped", rows, batch)
        yield EditedAnswers(model, rows, "wrapped", mask, names)


def _logit_diffs(
    answers: EditedAnswers,
    name: str,
    layer: int,
    pairs: PairNumbers,
    difference: Float[np.ndarray, "layer pair d"],
    parts: Sequence[_Parts],
) -> Float[np.ndarray, "edit chosen"]:
    """The logit differences at one layer: without the whole difference, then without each of the parts."""
    added = np.concatenate([-difference[layer, pairs][None], *(part.taken_out(layer, pairs) for part in parts)])
    good, bad = np.moveaxis(answers.log_probabilities(name, adding(answers.tensor(added))), -1, 0)
    return good - bad


def _differences(wrapped: States, clean: States) -> Float[np.ndarray, "layer pair d"]:
    """Wrapped less clean states; nothing where they differ by rounding."""
    difference = wrapped.values.astype(float) - clean.values
    size = np.linalg.norm(clean.values, axis=-1).mean(1)
    difference[np.linalg.norm(difference, axis=-1) < SAME * size[:, None]] = 0
    return difference


def _along_mean(
    difference: Float[np.ndarray, "layer pair d"], group: Int[np.ndarray, " pair"], draws: int, seed: int
) -> _Parts:
    """The parts along the mean difference of each pair's group; none where a group has no mean difference."""
    means = np.stack([difference[:, group == number].mean(1) for number in range(group.max() + 1)], 1)
    length = np.linalg.norm(means, axis=-1, keepdims=True)
    unit = means / np.where(length > 0, length, 1)
    along = (difference * unit[:, group]).sum(-1)
    return _Parts(np.stack([along] * (1 + draws)), np.concatenate([unit[None], turned(unit, draws, seed)]), group)


def _along_most_effective(
    answers: EditedAnswers,
    names: Sequence[str],
    difference: Float[np.ndarray, "layer pair d"],
    chosen: Int[np.ndarray, " chosen"],
    draws: int,
    seed: int,
) -> _Parts:
    """The parts along the most effective direction, and in the null those of turned differences along theirs."""
    along = []
    units = []
    for layer, name in enumerate(names):
        here = difference[[layer]]
        variants = np.concatenate([here[None], turned(here, draws, seed)])[:, 0]
        unit = most_effective(answers, name, answers.tensor(variants[:, chosen])).double().cpu().numpy()
        along.append(np.einsum("vpd,vd->vp", variants, unit))
        units.append(unit)
    everyone = np.zeros(difference.shape[1], dtype=int)
    return _Parts(np.stack(along, 1), np.stack(units, 1)[:, :, None], everyone)
