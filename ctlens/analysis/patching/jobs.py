"""What a sweep patches: pairs with the positions that hold the same token, and one job per site and pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ctlens.analysis.base.contrast import Contrast, ContrastBatch, encoded_contrasts
from ctlens.analysis.base.forward import encode_all
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.types import LensModel
from ctlens.data.alignment import WINDOWS, opening
from ctlens.data.batch import EncodedPair, Matched, Side, pad, require_room
from ctlens.data.pairs import Pair

DIRECTIONS = {"denoising": ("clean", "wrapped"), "noising": ("wrapped", "clean")}
"""Each direction's two sides: the one whose activations are taken, and the one whose run they are put into."""
POSITIONS = ("each", "last", "content", "all")
SAME_INDEX = "position"
OWN_TWINS = ("explicit", SAME_INDEX)

Twin: TypeAlias = tuple[int, int]
"""A position in the source prompt and its twin in the target prompt."""
Column: TypeAlias = tuple[Twin, ...]
JobNumbers: TypeAlias = Int[Tensor, " job"]
JobPositions: TypeAlias = Int[Tensor, "job width"]


@dataclass(frozen=True)
class PatchPair:
    """One pair, ready to be patched.

    Attributes:
        source: token ids of the run whose activations are taken.
        contrast: the prompt of the run they are put into, and its answers.
        columns: per column of the sweep, the positions that are patched together; empty for none.
        keys: twins between which attention mass moves when a pattern is patched.
    """

    source: tuple[int, ...]
    contrast: Contrast
    columns: tuple[Column, ...]
    keys: Column

    @property
    def target(self) -> tuple[int, ...]:
        """Token ids of the run that is patched."""
        return self.contrast.prompt

    def places(self, *, skip_unchanged: bool = False) -> list[bool]:
        """Per column, whether there is something to patch.

        Args:
            skip_unchanged: leave out what changes nothing: before the first token that differs, both
                runs are the same.
        """
        if not skip_unchanged:
            return [bool(column) for column in self.columns]
        alike = len(list(takewhile(lambda ids: ids[0] == ids[1], zip(self.source, self.target, strict=False))))
        return [any(here != there or there >= alike for here, there in column) for column in self.columns]


def prepare(model: LensModel, pairs: Sequence[Pair], direction: str, positions: str, window: str) -> list[PatchPair]:
    """Every pair with its columns, the last token of each in the last column.

    Args:
        model: for its tokenizer and context.
        pairs: clean and wrapped prompts with good and bad answers.
        direction: one of `DIRECTIONS`.
        positions: one of `POSITIONS`.
        window: one of `ctlens.data.alignment.WINDOWS` but `answer`, or `"position"`.

    Raises:
        CtlensError: an option is unknown, a pair does not align or has no answers, or no token is left to patch.
    """
    _check(direction, positions, window)
    source_side, target_side = DIRECTIONS[direction]
    windows = () if window == SAME_INDEX else tuple(dict.fromkeys((window, _key_window(window))))
    rows = encode_all(model, pairs, windows)
    found = []
    for number, (row, contrast) in enumerate(
        zip(rows, encoded_contrasts(model, rows, target_side), strict=True), start=1
    ):
        source, target = getattr(row, source_side).ids, getattr(row, target_side).ids
        begun = contrast.prompt[len(target) :]
        require_room(len(source) + len(begun), model.cfg.n_ctx, f"the {source_side} prompt of pair {number}")
        behind = [(len(source) + step, len(target) + step) for step in range(len(begun))]
        twins = (*_twins(row, window, source_side, target_side, number), *behind)
        ends = (len(source) + len(begun) - 1, len(contrast.prompt) - 1)
        keys = (*_twins(row, _key_window(window), source_side, target_side, number), *behind)
        front = tuple((step, step) for step in range(min(opening(row.clean, row.wrapped), *keys[0])))
        columns = _columns(twins, ends, positions, number)
        found.append(PatchPair(source + begun, contrast, columns, front + keys))
    width = max(len(pair.columns) for pair in found)
    return [_widened(pair, width) for pair in found]


def _check(direction: str, positions: str, window: str) -> None:
    if direction not in DIRECTIONS:
        raise unknown("direction", direction, DIRECTIONS)
    if positions == "wrapper":
        raise CtlensError(
            "the wrapper's tokens have no twin in the clean prompt to exchange with: patch 'content', 'last' or 'all'."
        )
    if positions not in POSITIONS:
        raise unknown("choice of positions", positions, POSITIONS)
    known = (*(name for name in WINDOWS if name != "answer"), SAME_INDEX)
    if window not in known:
        raise unknown("alignment window", window, known)


def _key_window(window: str) -> str:
    """Patterns are patched as whole rows, so all the content is in, whatever the window of the queries."""
    return window if window in OWN_TWINS else "shared"


def _twins(row: EncodedPair, window: str, source_side: str, target_side: str, number: int) -> Column:
    if window != SAME_INDEX:
        alignment = row.alignments[window]
        return tuple(zip(getattr(alignment, source_side), getattr(alignment, target_side), strict=True))
    clean, wrapped = len(row.clean.ids), len(row.wrapped.ids)
    if clean != wrapped:
        raise CtlensError(
            f"the prompts of pair {number} have {clean} and {wrapped} tokens: window='position' needs as many on both "
            "sides."
        )
    return tuple((position, position) for position in range(clean))


def _columns(twins: Column, ends: Twin, positions: str, number: int) -> tuple[Column, ...]:
    if positions == "each":
        return tuple((twin,) for twin in twins)
    last = tuple(twin for twin in twins if twin == ends)
    chosen = {"last": last, "content": tuple(twin for twin in twins if twin != ends), "all": twins}[positions]
    if not chosen:
        raise CtlensError(
            f"pair {number} has no aligned token at positions={positions!r}: leave it out or choose others."
        )
    return (chosen,)


def _widened(pair: PatchPair, width: int) -> PatchPair:
    missing: tuple[Column, ...] = ((),) * (width - len(pair.columns))
    return PatchPair(pair.source, pair.contrast, missing + pair.columns, pair.keys)


@dataclass(frozen=True)
class PatchBatch:
    """Pairs as tensors, padded on the right to one width.

    Attributes:
        source: the prompts whose activations are taken, and per row the position that predicts the answer.
        target: those they are put into, with their answers.
        source_at, target_at: `[pair, column, width]`, the positions patched together; one is repeated where fewer.
        keys: twins between which attention mass moves.
    """

    source: ContrastBatch
    target: ContrastBatch
    source_at: Int[Tensor, "pair column width"]
    target_at: Int[Tensor, "pair column width"]
    keys: Matched

    def target_of(self, pairs: JobNumbers) -> ContrastBatch:
        """The target's rows for some pairs, in any order, each as often as it is named."""
        side, last = self.target.side, self.target.last[pairs]
        length = int(last.max()) + 1
        rows = Side(side.tokens[pairs, :length], side.mask[pairs, :length], side.padding)
        return ContrastBatch(rows, last, self.target.answers[pairs])


def collate_patches(pairs: Sequence[PatchPair], device: torch.device) -> PatchBatch:
    """Pairs of any lengths as one batch, both sides padded to one width; the answers are those of the target."""
    prompts = [pair.source for pair in pairs] + [pair.target for pair in pairs]
    both, n = pad(prompts).to(device), len(pairs)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    answers = torch.tensor([(pair.contrast.good, pair.contrast.bad) for pair in pairs], device=device)
    source, target = (
        ContrastBatch(Side(both.tokens[rows], both.mask[rows], both.padding), last[rows], answers)
        for rows in (slice(n), slice(n, None))
    )
    width = max(len(column) for pair in pairs for column in pair.columns)
    filled = np.array([[_repeated(column, width) for column in pair.columns] for pair in pairs])
    source_at, target_at = (torch.from_numpy(filled[..., end]).to(device) for end in (0, 1))
    return PatchBatch(source, target, source_at, target_at, _keys(pairs, device))


def _repeated(column: Column, width: int) -> list[Twin]:
    """Fills a column up with its first twin: patching a position twice with the same value is patching it once."""
    return [*column, *[column[0] if column else (0, 0)] * (width - len(column))]


def _keys(pairs: Sequence[PatchPair], device: torch.device) -> Matched:
    width = max(len(pair.keys) for pair in pairs)
    twins = torch.tensor([_repeated(pair.keys, width) for pair in pairs], device=device)
    counts = torch.tensor([len(pair.keys) for pair in pairs], device=device)
    return Matched(twins[..., 0], twins[..., 1], torch.arange(width, device=device) < counts[:, None])


@dataclass(frozen=True)
class Jobs:
    """Patches to be made, one number of each per job.

    Attributes:
        site: the index among the sites.
        pair: its row in the batch.
        layer: the index among the chosen layers.
        column: of the sweep.
        head: 0 where the site has no heads.
    """

    site: JobNumbers
    pair: JobNumbers
    layer: JobNumbers
    column: JobNumbers
    head: JobNumbers

    def __len__(self) -> int:
        return len(self.pair)

    def take(self, chosen: JobNumbers | slice) -> Jobs:
        """Some of the jobs."""
        parts = (self.site, self.pair, self.layer, self.column, self.head)
        return Jobs(*(numbers[chosen] for numbers in parts))

    def cells(self) -> tuple[np.ndarray, ...]:
        """Layer, head, column and pair of every job."""
        return tuple(part.cpu().numpy() for part in (self.layer, self.head, self.column, self.pair))


Found: TypeAlias = Iterator[tuple[JobNumbers, Tensor]]
"""Numbers of jobs, and the logits `[job, d_vocab]` at the last token of their patched runs."""


def jobs(places: Bool[np.ndarray, "pair column"], layers: int, heads: Sequence[int], device: torch.device) -> Jobs:
    """A job for every site, layer, head and place, a place being a column of a pair.

    Args:
        places: where there is something to patch.
        layers: how many.
        heads: of every site, how many it has.
        device: of the numbers.
    """
    pair, column = np.nonzero(places)
    parts = []
    for site, of_site in enumerate(heads):
        layer, head, place = (index.ravel() for index in np.indices((layers, of_site, len(pair))))
        parts.append((np.full_like(layer, site), pair[place], layer, column[place], head))
    return Jobs(*(torch.from_numpy(np.concatenate(numbers)).to(device) for numbers in zip(*parts, strict=True)))


def chunks(first: JobNumbers, length: int, max_batch: int, most: int, enough: int) -> Iterator[JobNumbers]:
    """Splits jobs into batches of one first row each or, where one row has few jobs, of neighbouring first rows.

    Args:
        first: of every job, the row from which it is computed to the end.
        length: how many rows there are.
        max_batch: jobs together.
        most: rows together.
        enough: rows that make it worth computing a few too many in front.
    """
    firsts = first.cpu().numpy()
    order = np.argsort(firsts, kind="stable")
    firsts, begin = firsts[order], 0
    for stop in [*(np.flatnonzero(np.diff(firsts)) + 1).tolist(), len(order)]:
        rows = length - int(firsts[begin])
        if stop < len(order) and (stop - begin) * rows < enough:
            continue
        size = min(max_batch, max(1, most // rows))
        for part in np.array_split(order[begin:stop], -(-(stop - begin) // size)):
            yield torch.from_numpy(part).to(first.device)
        begin = stop
