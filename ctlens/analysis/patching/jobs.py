"""The patches of a sweep: pairs with the positions that hold the same token, and one job per patch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ctlens.analysis.base.contrast import Contrast, ContrastBatch, encoded_contrasts
from ctlens.analysis.base.forward import encoded_pairs
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.types import LensModel
from ctlens.data.alignment import WINDOWS, opening
from ctlens.data.batch import EncodedPair, Matched, Side, pad, require_room
from ctlens.data.pairs import Pair
from ctlens.data.token_kinds import token_kinds

PATCH_DIRECTIONS = {"denoising": ("clean", "wrapped"), "noising": ("wrapped", "clean")}
"""The source side of each direction, whose activations are taken, and the target side, into whose run they are put."""
PATCH_POSITIONS = ("each", "last", "content", "all")
SAME_INDEX = "position"
"""The window that aligns tokens of the same number, whatever they are."""
_OWN_TWINS = ("explicit", SAME_INDEX)

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
        kinds: the kind of every token of the run they are put into, see `ctlens.data.token_kinds`.
    """

    source: tuple[int, ...]
    contrast: Contrast
    columns: tuple[Column, ...]
    keys: Column
    kinds: tuple[str, ...]

    @property
    def target(self) -> tuple[int, ...]:
        """Token ids of the run that is patched."""
        return self.contrast.prompt

    def to_patch(self, *, skip_unchanged: bool = False) -> list[bool]:
        """Tells which columns have something to patch.

        Args:
            skip_unchanged: leave out the columns that change nothing: before the first token that differs, both
                runs are the same.
        """
        if not skip_unchanged:
            return [bool(column) for column in self.columns]
        alike = len(list(takewhile(lambda ids: ids[0] == ids[1], zip(self.source, self.target, strict=False))))
        return [any(here != there or there >= alike for here, there in column) for column in self.columns]


def patch_pairs(
    model: LensModel, pairs: Sequence[Pair], direction: str, positions: str, window: str
) -> list[PatchPair]:
    """Builds every pair with its columns; the last column holds each pair's last twins.

    Args:
        model: for its tokenizer and context.
        pairs: clean and wrapped prompts with good and bad answers.
        direction: one of `PATCH_DIRECTIONS`.
        positions: one of `PATCH_POSITIONS`.
        window: one of `ctlens.data.alignment.WINDOWS` but `answer`, or `"position"`.

    Raises:
        CtlensError: an option is unknown, a pair does not align or has no answers, or no token is left to patch.
    """
    _check(direction, positions, window)
    source, target = PATCH_DIRECTIONS[direction]
    rows = _encoded_rows(model, pairs, window)
    found = []
    for number, (row, contrast) in enumerate(zip(rows, encoded_contrasts(model, rows, target), strict=True), start=1):
        sides = _Sides(row, contrast, source, target, number)
        require_room(len(sides.source_ids), model.cfg.n_ctx, f"the {source} prompt of pair {number}")
        columns = _columns(sides.twins(window), sides.last, positions, number)
        found.append(PatchPair(sides.source_ids, contrast, columns, sides.keys(window), sides.kinds))
    width = max(len(pair.columns) for pair in found)
    return [_widened(pair, width) for pair in found]


def _check(direction: str, positions: str, window: str) -> None:
    if direction not in PATCH_DIRECTIONS:
        raise unknown("direction", direction, PATCH_DIRECTIONS)
    if positions == "wrapper":
        raise CtlensError(
            "positions='wrapper' cannot be patched, for the wrapper's tokens have no twin in the clean prompt: choose "
            "'content', 'last' or 'all'."
        )
    if positions not in PATCH_POSITIONS:
        raise unknown("choice of positions", positions, PATCH_POSITIONS)
    known = (*(name for name in WINDOWS if name != "answer"), SAME_INDEX)
    if window not in known:
        raise unknown("alignment window", window, known)


def _encoded_rows(model: LensModel, pairs: Sequence[Pair], window: str) -> Sequence[EncodedPair]:
    """Encodes every pair, with the alignments of the window and of the keys."""
    windows = () if window == SAME_INDEX else tuple(dict.fromkeys((window, _key_window(window))))
    return encoded_pairs(model, pairs, windows)


def _key_window(window: str) -> str:
    """Patterns are patched as whole rows, so all the content is in, whatever the window of the queries."""
    return window if window in _OWN_TWINS else "shared"


@dataclass(frozen=True)
class _Sides:
    """A pair's two prompts, each with the tokens that both answers begin with appended, and who gives to whom.

    Attributes:
        row: the prompts as tokens, with their alignments.
        contrast: of the target side.
        source: the side whose activations are taken.
        target: the side into whose run they are put.
        number: of the pair, from 1, for refusals.
    """

    row: EncodedPair
    contrast: Contrast
    source: str
    target: str
    number: int

    @property
    def source_ids(self) -> tuple[int, ...]:
        """The source prompt and the answers' common beginning."""
        begun = self.contrast.prompt[len(getattr(self.row, self.target).ids) :]
        return getattr(self.row, self.source).ids + begun

    @property
    def last(self) -> Twin:
        """The positions that predict the answers."""
        return len(self.source_ids) - 1, len(self.contrast.prompt) - 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every token of the target side."""
        begun = self.contrast.prompt[len(getattr(self.row, self.target).ids) :]
        clean, wrapped = token_kinds(self.row.clean, self.row.wrapped, begun)
        return clean if self.target == "clean" else wrapped

    def twins(self, window: str) -> Column:
        """The twins of a window, and those in the answers' common beginning."""
        source_end = len(getattr(self.row, self.source).ids)
        target_end = len(getattr(self.row, self.target).ids)
        begun = range(len(self.contrast.prompt) - target_end)
        return (*self._aligned(window), *((source_end + step, target_end + step) for step in begun))

    def keys(self, window: str) -> Column:
        """The twins between which attention mass moves: the content's, and in front of it the template's opening."""
        keys = self.twins(_key_window(window))
        front = min(opening(self.row.clean, self.row.wrapped), *keys[0])
        return (*((step, step) for step in range(front)), *keys)

    def _aligned(self, window: str) -> Column:
        if window != SAME_INDEX:
            alignment = self.row.alignments[window]
            return tuple(zip(getattr(alignment, self.source), getattr(alignment, self.target), strict=True))
        clean, wrapped = len(self.row.clean.ids), len(self.row.wrapped.ids)
        if clean != wrapped:
            raise CtlensError(
                f"the prompts of pair {self.number} have {clean} and {wrapped} tokens: window='position' needs as many "
                "on both sides; choose another window."
            )
        return tuple((position, position) for position in range(clean))


def _columns(twins: Column, ends: Twin, positions: str, number: int) -> tuple[Column, ...]:
    """The twins that are patched together, `ends` being those that predict the answers."""
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
    """Puts empty columns in front, so that the last columns of all pairs stand under each other."""
    missing: tuple[Column, ...] = ((),) * (width - len(pair.columns))
    return replace(pair, columns=missing + pair.columns)


@dataclass(frozen=True)
class PatchBatch:
    """Pairs as tensors, padded on the right to one width.

    Attributes:
        source: the prompts whose activations are taken, and per row the position that predicts the answer.
        target: the prompts into whose runs they are put, with their answers.
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
        side = self.target.side
        last = self.target.last[pairs]
        length = int(last.max()) + 1
        rows = Side(side.tokens[pairs, :length], side.mask[pairs, :length], side.padding)
        return ContrastBatch(rows, last, self.target.answers[pairs])


def patch_batch(pairs: Sequence[PatchPair], device: torch.device) -> PatchBatch:
    """Pairs of any lengths as one batch, both sides padded to one width; the answers are those of the target."""
    prompts = [pair.source for pair in pairs] + [pair.target for pair in pairs]
    both = pad(prompts).to(device)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    answers = torch.tensor([(pair.contrast.good, pair.contrast.bad) for pair in pairs], device=device)

    def side(rows: slice) -> ContrastBatch:
        return ContrastBatch(Side(both.tokens[rows], both.mask[rows], both.padding), last[rows], answers)

    width = max(len(column) for pair in pairs for column in pair.columns)
    filled = np.array([[_repeated(column, width) for column in pair.columns] for pair in pairs])
    return PatchBatch(
        source=side(slice(len(pairs))),
        target=side(slice(len(pairs), None)),
        source_at=torch.from_numpy(filled[..., 0]).to(device),
        target_at=torch.from_numpy(filled[..., 1]).to(device),
        keys=_keys(pairs, device),
    )


def _repeated(column: Column, width: int) -> list[Twin]:
    """Fills a column up with its first twin: patching a position twice with the same value is patching it once."""
    return [*column, *[column[0] if column else (0, 0)] * (width - len(column))]


def _keys(pairs: Sequence[PatchPair], device: torch.device) -> Matched:
    """The keys of every pair, filled up to one width; those that fill up do not count."""
    width = max(len(pair.keys) for pair in pairs)
    twins = torch.tensor([_repeated(pair.keys, width) for pair in pairs], device=device)
    counts = torch.tensor([len(pair.keys) for pair in pairs], device=device)
    return Matched(twins[..., 0], twins[..., 1], torch.arange(width, device=device) < counts[:, None])


@dataclass(frozen=True)
class Jobs:
    """Patches to be made; each attribute holds one index per job.

    Attributes:
        site: among the sites of the sweep.
        pair: among the rows of the batch.
        layer: among the chosen layers.
        column: among the columns of the sweep.
        head: among the heads; 0 where the site has none.
    """

    site: JobNumbers
    pair: JobNumbers
    layer: JobNumbers
    column: JobNumbers
    head: JobNumbers

    def __len__(self) -> int:
        return len(self.pair)

    def take(self, chosen: JobNumbers | slice) -> Jobs:
        """The chosen jobs."""
        parts = (self.site, self.pair, self.layer, self.column, self.head)
        return Jobs(*(numbers[chosen] for numbers in parts))

    def cells(self) -> tuple[np.ndarray, ...]:
        """Layer, head, column and pair of every job."""
        return tuple(part.cpu().numpy() for part in (self.layer, self.head, self.column, self.pair))


Found: TypeAlias = Iterator[tuple[JobNumbers, Tensor]]
"""Numbers of jobs, and the logits `[job, d_vocab]` at the last token of their patched runs."""


def jobs(to_patch: Bool[np.ndarray, "pair column"], layers: int, heads: Sequence[int], device: torch.device) -> Jobs:
    """Makes one job per site, layer, head, and column of a pair that has something to patch.

    Args:
        to_patch: where there is something to patch.
        layers: how many layers.
        heads: how many heads each site has.
        device: of the indices.
    """
    pair, column = np.nonzero(to_patch)
    parts = []
    for site, of_site in enumerate(heads):
        layer, head, patch = np.indices((layers, of_site, len(pair))).reshape(3, -1)
        parts.append((np.full_like(layer, site), pair[patch], layer, column[patch], head))
    return Jobs(*(torch.from_numpy(np.concatenate(numbers)).to(device) for numbers in zip(*parts, strict=True)))


def chunks(first: JobNumbers, length: int, max_batch: int, most: int, enough: int) -> Iterator[JobNumbers]:
    """Splits jobs into batches that are each computed from one row on: the smallest first row of its jobs.

    Jobs of one first row waste nothing. Few of them make a small product, though, so a batch also takes jobs of the
    next first rows until it has enough rows; the later jobs then compute some rows in front that they do not need.

        first row     3  3  4  7  7  7  7        the jobs in order of their first row
                     |-------||----------|       enough rows only with the job from row 4 on

    Args:
        first: of every job, the row from which it is computed to the end.
        length: the number of rows of a prompt.
        max_batch: the most jobs in a batch.
        most: the most rows in a batch.
        enough: the number of rows from which a batch takes no jobs of later first rows.
    """
    firsts = first.cpu().numpy()
    order = np.argsort(firsts, kind="stable")
    firsts = firsts[order]
    ends_of_rows = (np.flatnonzero(np.diff(firsts)) + 1).tolist()
    begin = 0
    for stop in [*ends_of_rows, len(order)]:
        rows = length - int(firsts[begin])
        if stop < len(order) and (stop - begin) * rows < enough:
            continue  # too small: goes on with the jobs of the next first row
        size = min(max_batch, max(1, most // rows))
        for part in np.array_split(order[begin:stop], math.ceil((stop - begin) / size)):
            yield torch.from_numpy(part).to(first.device)
        begin = stop
