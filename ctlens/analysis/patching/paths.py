"""Path patching: what one component tells another one directly, with everything in between as it was.

A patch of a head's output changes all that reads the stream behind it. A path asks less: the sender's output is the
source run's for one reader alone, the receiver, which is the queries, keys or values of one head, an MLP, or the
logits. Whatever else reads the stream, and every component between the two, keeps the target run's value; what comes
behind the receiver is computed anew. So an edge of the computation has a number of its own (Wang et al., arXiv
2211.00593; Goldowsky-Dill et al., arXiv 2304.05969).

The sender's change is its output in the source run less that in the target run, at aligned tokens. It is added to what
the receiver reads in front of its norm, and the receiver's change to the stream is carried on by the engine of `patch`
from the first changed row on. Queries change at the patched tokens alone, keys and values for every later token too.

Paths do not add up: a norm stands in front of every receiver, and paths through other components are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctlens.analysis.base.forward import require_eval
from ctlens.analysis.base.metrics import Metric, UserMetric, measured, named_metrics
from ctlens.analysis.base.result import groups_of
from ctlens.analysis.patching.blocks import Block, read_blocks
from ctlens.analysis.patching.jobs import PatchBatch, patch_batch, patch_pairs
from ctlens.analysis.patching.path_result import PATH_TO_LOGITS, PathPatching
from ctlens.analysis.patching.suffix import Suffix, needed
from ctlens.analysis.patching.sweep import Recorded, fitting, source_and_target
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.progress import progress_bar
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.models.finite import require_finite
from ctlens.models.hooks import SHORTHANDS, Layers, resolve, select_layers

MLP = "MLP"
PATH_POSITIONS = ("last", "content", "all")
_NAMED = re.compile(r"L(?P<layer>\d+)(?:H(?P<head>\d+)\.(?P<reads>[qkv])|\.mlp)")
_SENT = ("z", "mlp_out")

PairRows: TypeAlias = Float[Tensor, "pair width d_model"]
ChangedRows: TypeAlias = Float[Tensor, "pair row d_model"]
ChangedAt: TypeAlias = Int[Tensor, "pair row"]
PairLogits: TypeAlias = Float[Tensor, "pair d_vocab"]


@dataclass(frozen=True)
class Receiver:
    """What reads a sender's output.

    Attributes:
        name: as it was given.
        layer: its block; of the logits the number of layers.
        reads: `"q"`, `"k"` or `"v"` of a head, `"mlp"` or `"logits"`.
        head: whose queries, keys or values; 0 where it is no head.
    """

    name: str
    layer: int
    reads: str
    head: int = 0

    def is_behind(self, layer: int, sender: str, *, parallel: bool) -> bool:
        """Tells whether the receiver reads a stream to which a component of a layer has written.

        Args:
            layer: of the sender.
            sender: `"MLP"`, or a head's name.
            parallel: whether MLPs read what the attention of their block reads.
        """
        beside = self.reads == "mlp" and sender != MLP and not parallel
        return layer < self.layer or (beside and layer == self.layer)


@public
def path_patch(
    model: LensModel,
    pairs: Pairs,
    *,
    receivers: str | Sequence[str] = PATH_TO_LOGITS,
    direction: str,
    positions: str = "all",
    window: str = "shared",
    layers: Layers = "all",
    metrics: Sequence[str | UserMetric] = ("logit_diff",),
    max_batch: int | None = None,
    progress: bool = True,
) -> PathPatching:
    """Path patching: the output of every head and MLP, taken from the other run for one receiver alone.

    >>> import ctlens as ct
    >>> model, pairs = ct.load_organism(), ct.threats.get("sycophancy").pairs(4, split="heldout")
    >>> options = {"direction": "denoising", "progress": False}
    >>> found = ct.analysis.path_patch(model, pairs, receivers=["L2H0.q", "logits"], **options)
    >>> found.values.shape  # metrics, receivers, layers, four heads and the MLP, pairs
    (1, 2, 4, 5, 4)
    >>> found.to_dataframe().groupby("receiver", sort=False).size().to_dict()  # only layers 0 and 1 precede layer 2
    {'L2H0.q': 10, 'logits': 20}

    Args:
        model: in eval mode; one whose blocks are known, see `Raises`.
        pairs: with good and bad answers. `ctlens.pairs` makes them of two lists of texts.
        receivers: what reads the senders: `"logits"`, `"L2.mlp"` for the MLP of layer 2, or `"L2H0.q"`, `"L2H0.k"` and
            `"L2H0.v"` for queries, keys and values of its head 0; one or several.
        direction: `"denoising"`, the clean run's outputs into the wrapped run, or `"noising"`, the reverse.
        positions: the aligned tokens at which the senders' outputs are exchanged, together: `"last"` the last token,
            `"content"` those in front of it, `"all"` all. The logits read the last token alone.
        window: which tokens are aligned, see `patch`.
        layers: of the senders.
        metrics: see `patch`.
        max_batch: pairs held at once; by default as many as fit.
        progress: show a progress bar.

    Raises:
        CtlensError: the model is in training mode or has blocks that are not known (those that `patch` patches by
            `"hooks"`), a receiver does not exist, is named twice or has no sender in front of it, an option is unknown,
            or a pair does not align, has no answers, or no token to patch.
    """
    require_eval(model)
    chosen = _receivers(model, (receivers,) if isinstance(receivers, str) else receivers)
    if positions not in PATH_POSITIONS:
        raise unknown("choice of positions", positions, PATH_POSITIONS)
    measures = named_metrics(metrics)
    prepared = patch_pairs(model, pairs, direction, positions, window)
    longest = max(len(ids) for pair in prepared for ids in (pair.source, pair.target))
    blocks = _blocks(model, longest)
    senders = (*(f"H{head}" for head in range(model.cfg.n_heads)), MLP)
    numbers = select_layers(model.cfg.n_layers, layers)
    paths = _paths_to(chosen, numbers, senders, parallel=blocks[0].parallel)
    size = max_batch or fitting(model, longest)
    groups = [prepared[start : start + size] for start in range(0, len(prepared), size)]
    names = [*(name for site in _SENT for name in resolve(model, site)), *needed(_SENT, len(blocks))]
    chunks = []
    with progress_bar(total=len(paths) * len(groups), desc="paths", shown=progress, leave=False) as bar:
        for group in groups:
            batch = patch_batch(group, next(model.parameters()).device)
            source, target = source_and_target(model, batch, names)
            runs = _Runs(model, blocks, batch, source, target)
            grid = np.full((len(measures), len(chosen), len(numbers), len(senders), len(group)), np.nan)
            for receiver, layer, sender in paths:
                last = runs.patched(chosen[receiver], numbers[layer], sender)
                grid[:, receiver, layer, sender] = _numbers(measures, last, batch, source)
                bar.update()
            chunks.append((grid, _numbers(measures, target.last, batch, source), _source(measures, batch, source)))
    values, target_values, source_values = zip(*chunks, strict=True)
    return PathPatching(
        values=np.concatenate(values, -1),
        target=np.concatenate(target_values, -1),
        source=np.concatenate(source_values, -1),
        metrics=tuple(measures),
        receivers=tuple(receiver.name for receiver in chosen),
        layers=numbers,
        senders=senders,
        direction=direction,
        positions=positions,
        window=window,
        groups=groups_of(pairs),
    )


def _receivers(model: LensModel, names: Sequence[str]) -> list[Receiver]:
    """The receivers of these names.

    Raises:
        CtlensError: one does not exist, or is named twice; or none is named.
    """
    if not names or len(set(names)) < len(names):
        raise CtlensError("name at least one receiver, and each once.")
    return [_receiver(model, name) for name in names]


def _receiver(model: LensModel, name: str) -> Receiver:
    cfg = model.cfg
    if name == PATH_TO_LOGITS:
        return Receiver(name, cfg.n_layers, PATH_TO_LOGITS)
    found = _NAMED.fullmatch(name)
    if found is None:
        raise CtlensError(f"there is no receiver {name!r}: name 'logits', an MLP as 'L2.mlp', or a head as 'L2H0.q'.")
    layer = int(found["layer"])
    head = int(found["head"] or 0)
    if layer >= cfg.n_layers or head >= cfg.n_heads:
        raise CtlensError(
            f"there is no receiver {name!r}: the model has layers 0 to {cfg.n_layers - 1} with heads 0 to "
            f"{cfg.n_heads - 1}."
        )
    return Receiver(name, layer, found["reads"] or "mlp", head)


def _blocks(model: LensModel, length: int) -> list[Block]:
    """The model's blocks; raises a `CtlensError` where something about them is not known."""
    blocks = read_blocks(model, length)
    if blocks is None:
        raise CtlensError(
            "path patching computes the blocks of the model itself, and this model's are not known: patch whole sites "
            "with `ct.analysis.patch`."
        )
    return blocks


def _paths_to(
    receivers: Sequence[Receiver], layers: Sequence[int], senders: Sequence[str], *, parallel: bool
) -> list[tuple[int, int, int]]:
    """The indices of every receiver, layer and sender that are in front of each other.

    Raises:
        CtlensError: a receiver has no sender.
    """
    found = []
    for number, receiver in enumerate(receivers):
        own = [
            (number, index, sender)
            for index, layer in enumerate(layers)
            for sender, name in enumerate(senders)
            if receiver.is_behind(layer, name, parallel=parallel)
        ]
        if not own:
            raise CtlensError(f"nothing among the senders writes in front of {receiver.name}: choose a later receiver.")
        found += own
    return found


def _numbers(
    metrics: dict[str, Metric], last: PairLogits, batch: PatchBatch, source: Recorded
) -> Float[np.ndarray, "metric pair"]:
    require_finite(last, "a run with a patched path")
    return measured(metrics, last, batch.target, source.last).cpu().numpy()


def _source(metrics: dict[str, Metric], batch: PatchBatch, source: Recorded) -> Float[np.ndarray, "metric pair"]:
    return measured(metrics, source.last, batch.source, source.last).cpu().numpy()


class _Runs:
    """The target runs of a batch of pairs, to be patched along one path at a time.

    Raises:
        CtlensError: the blocks do not give the model's own logits.
    """

    def __init__(
        self, model: LensModel, blocks: list[Block], batch: PatchBatch, source: Recorded, target: Recorded
    ) -> None:
        self.blocks = blocks
        self.source = source.states
        self.target = target.states
        self.suffix = Suffix(model, blocks, batch, (), (0,), source.states, target.states)
        if not self.suffix.agrees(target.last):
            raise CtlensError(
                "path patching computes the blocks of the model itself, and they do not give this model's logits: "
                "patch whole sites with `ct.analysis.patch`."
            )
        self.pairs = torch.arange(len(target.last), device=target.last.device)
        self.rows = self.pairs[:, None]
        self.here = batch.source_at[:, 0]
        self.there = batch.target_at[:, 0]
        self.last = batch.target.last

    @torch.no_grad()
    def patched(self, receiver: Receiver, layer: int, sender: int) -> PairLogits:
        """The last logits of every pair where the receiver alone reads the source run's output of a sender.

        Args:
            receiver: behind the sender.
            layer: of the sender.
            sender: the number of a head; behind the last one, the MLP.
        """
        change = self._change(layer, sender)
        if receiver.reads == PATH_TO_LOGITS:
            return self.suffix.logits(self._final(change))
        read = self._mlp if receiver.reads == "mlp" else self._attention
        positions, rows = read(receiver, change)
        return self.suffix.logits(self.suffix.run_from(receiver.layer + 1, self.pairs, positions, rows))

    def _change(self, layer: int, sender: int) -> PairRows:
        """The sender's output in the source run less that in the target run, at the patched tokens."""
        site = "z" if sender < self._n_heads else "mlp_out"
        name = SHORTHANDS[site].format(layer=layer)
        change = self.source[name][self.rows, self.here] - self.target[name][self.rows, self.there]
        if site == "mlp_out":
            return change
        return change[:, :, sender] @ self.blocks[layer].out.weight.unflatten(0, (self._n_heads, -1))[sender]

    @property
    def _n_heads(self) -> int:
        return self.blocks[0].n_queries // self.blocks[0].d_head

    def _final(self, change: PairRows) -> Float[Tensor, "pair d_model"]:
        """The last row of the last stream with the change, where the last token is among those patched."""
        final = self.suffix.stream[-1][self.pairs, self.last]
        number, column = (self.there == self.last[:, None]).nonzero(as_tuple=True)
        final[number] = final[number] + change[number, column]  # a repeated twin writes the same row again
        return final

    def _mlp(self, receiver: Receiver, change: PairRows) -> tuple[ChangedAt, ChangedRows]:
        """Positions and rows of the stream behind a block whose MLP reads the change."""
        block = self.blocks[receiver.layer]
        before = self.suffix.stream[receiver.layer][self.rows, self.there]
        middle = before + self._of_target("attn_out", receiver.layer)[self.rows, self.there]
        read = (before if block.parallel else middle) + change
        return self.there, block.add_mlp(middle, read)

    def _attention(self, receiver: Receiver, change: PairRows) -> tuple[ChangedAt, ChangedRows]:
        """Positions and rows of the stream behind a block where the queries, keys or values of one head read it."""
        block = self.blocks[receiver.layer]
        held = self.suffix.held[receiver.layer]
        before = self.suffix.stream[receiver.layer]
        q, kv = block.queries_and_keys(block.ln1(before[self.rows, self.there] + change), self.there)
        own = slice(receiver.head * block.d_head, (receiver.head + 1) * block.d_head)
        if receiver.reads == "q":
            positions = self.there
            queries = held.q[self.rows, positions]
            queries[..., own] = q[..., own]
            z = block.attend(queries, held.kv, self.suffix.hidden[positions][:, None])
        else:
            span = torch.arange(int(self.there.min()), int(self.last.max()) + 1, device=self.last.device)
            positions = span.expand(len(self.pairs), -1)
            keys = held.kv.clone()
            of_head = _columns_of_head(block, receiver)
            keys[self.rows, self.there, of_head] = kv[..., of_head]
            z = block.attend(held.q[:, span], keys, self.suffix.hidden[span])
        patched = self._of_target("z", receiver.layer)[self.rows, positions].flatten(-2)
        patched[..., own] = z[..., own]  # other heads share the keys of a group, but do not read the change
        return positions, block.finish(before[self.rows, positions], patched)

    def _of_target(self, site: str, layer: int) -> Tensor:
        return self.target[SHORTHANDS[site].format(layer=layer)]


def _columns_of_head(block: Block, receiver: Receiver) -> slice:
    """Where the keys or the values that a head reads stand among those of all heads."""
    width = block.kv.weight.shape[1] // 2
    group = receiver.head // (block.n_queries // width)
    start = group * block.d_head + (width if receiver.reads == "v" else 0)
    return slice(start, start + block.d_head)
