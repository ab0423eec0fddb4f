"""The forward passes of a step: each side of a batch runs once, whatever the number of losses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ctlens.core.errors import CtlensError
from ctlens.core.types import Activations, CleanLogits, LensModel, Scalar
from ctlens.data.batch import EncodedPairs, PairBatch, collate
from ctlens.losses import DPO, Forwards, Loss
from ctlens.losses.base import moving_target
from ctlens.models.finite import read_at_once
from ctlens.models.hooks import run_capturing, visiting
from ctlens.models.parameters import evaluating
from ctlens.models.sharding import is_sharded
from ctlens.training.config import TrainConfig
from ctlens.training.edits import TrainingEdits
from ctlens.training.layerwise import Layerwise, blocks_again, is_layerwise
from ctlens.training.moving import Follower
from ctlens.training.order import homes
from ctlens.training.preferences import Preferences
from ctlens.training.rollouts import Rollouts, rollouts_of
from ctlens.training.subspaces import subspaces_of
from ctlens.training.targets import CleanTargets, Fetch, fetch_from


@dataclass(frozen=True)
class Term:
    """Term is a loss with its hook points on this model; each hook point has a factor in the mean over them."""

    loss: Loss
    factors: Mapping[str, float]


class Passes:
    """Passes runs the models for the losses: `open` gives the `OpenPasses` that run them on some pairs.

    Args:
        reference: the model before training, in eval mode now and while passes are open.
        model: the trained model.
        pairs: the encoded pairs, with their answers.
        terms: every loss of the training, by its key.
        units: rows that stay together in a batch.
        config: the settings of the training.
        folder: keeps the reference's clean side on disk; None keeps it in memory.
        edits: of the trained model's stream, in every pass; None for none.

    Raises:
        CtlensError: as `rollouts_of`, `Preferences` and `subspaces_of`; or moving targets are to be kept on disk.
    """

    def __init__(
        self,
        reference: LensModel,
        model: LensModel,
        pairs: EncodedPairs,
        terms: Mapping[str, Term],
        units: Sequence[Sequence[int]],
        config: TrainConfig,
        folder: Path | None = None,
        edits: TrainingEdits | None = None,
    ) -> None:
        self.edits = edits
        self.model = model
        self.pairs = pairs
        self.memory = config.memory
        self.own_rows: dict[str, Rollouts | Preferences] = {}
        for key, term in terms.items():
            if isinstance(term.loss, DPO):
                self.own_rows[key] = Preferences(reference, pairs.rows)
            elif drawing := rollouts_of(term.loss, reference, pairs.rows, config):
                self.own_rows[key] = drawing
        self.subspaces = {
            key: subspaces_of(term.loss, list(term.factors), reference, pairs.rows, config.seed)
            for key, term in terms.items()
        }
        sides = _sides(self.on_pairs(terms).values())
        self.followers = {
            side: Follower(reference, model, side, pairs.rows) for side in sides if moving_target(side) is not None
        }
        if self.followers and folder is not None:
            raise CtlensError(
                f"the targets of {', '.join(self.followers)} move, so they cannot be kept on disk: leave out the cache "
                "folder."
            )
        names, logits = _clean_needs(self.on_pairs(terms).values(), "reference")
        self.targets = CleanTargets(
            reference, pairs, homes(units, config), names, logits=logits, cache=config.cache, folder=folder
        )

    def on_pairs(self, terms: Mapping[str, Term]) -> dict[str, Term]:
        """Takes the losses that run on the pairs; a loss that makes its own rows runs elsewhere."""
        return {key: term for key, term in terms.items() if key not in self.own_rows}

    def model_of(self, side: str) -> LensModel:
        """The model whose clean side is computed anew at every step: the trained one, or one that follows it."""
        return self.followers[side].model if side in self.followers else self.model

    def measured(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """How far moving targets are from the first one on some pairs, by name; of several, with their side."""
        chosen = [self.pairs.rows[row] for row in rows]
        return {
            name if len(self.followers) == 1 else f"{name} {side}": value
            for side, follower in self.followers.items()
            for name, value in follower.measured(chosen).items()
        }

    def follow(self, step: int) -> None:
        """Moves the moving targets behind a step."""
        for follower in self.followers.values():
            follower.follow(step)

    @contextmanager
    def open(self) -> Iterator[OpenPasses]:
        """Opens passes over some pairs, and takes their hooks off the model at the end of the block.

        The backward pass belongs inside the block: with `memory="blocks"` it runs the model's blocks again, and
        the hooks must still be on them.
        """
        again = blocks_again(self.model) if self.memory == "blocks" else nullcontext()
        edited = self.edits.on(self.model) if self.edits else nullcontext()
        with edited, again, ExitStack() as hooks:
            yield OpenPasses(self, hooks)


class OpenPasses:
    """OpenPasses runs the models on some pairs, with hooks that stay on until `Passes.open` ends.

    Args:
        passes: the models, the pairs and the clean targets.
        hooks: takes the hooks off when it is closed.
    """

    def __init__(self, passes: Passes, hooks: ExitStack) -> None:
        self.passes = passes
        self.model = passes.model
        self._hooks = hooks

    def seen(self, rows: Sequence[int], terms: Mapping[str, Term], *, step: int, grad: bool) -> dict[str, Forwards]:
        """Returns the forward passes that each loss needs on some pairs, by its key; losses share passes if they can.

        Args:
            rows: numbers of the pairs.
            terms: the losses, by their keys in `Passes`.
            step: number of the step, from 1; together with the rows it decides the sampled answers.
            grad: keep the graph of the wrapped side.
        """
        on_pairs = self.passes.on_pairs(terms)
        found = self._on_pairs(rows, on_pairs, grad=grad) if on_pairs else {}
        return {key: found[key] if key in found else self._of_its_own(rows, key, step) for key in terms}

    def _of_its_own(self, rows: Sequence[int], key: str, step: int) -> Forwards:
        pairs = [self.passes.pairs.rows[row] for row in rows]
        with evaluating(self.model), read_at_once():  # tokens are drawn from numbers that were read
            drawn = self.passes.own_rows[key].draw(self.model, pairs, step, *rows[:1])
        return drawn.seen_by(self.model)

    def _on_pairs(self, rows: Sequence[int], terms: Mapping[str, Term], *, grad: bool) -> dict[str, Forwards]:
        """Runs each side once for all losses on pairs, and computes layerwise losses on the way to save memory."""
        device = next(self.model.parameters()).device
        batch = collate([self.passes.pairs.rows[row] for row in rows]).to(device)
        on_the_way = {
            key: term for key, term in terms.items() if self.passes.memory != "all" and is_layerwise(term.loss)
        }
        rest = [term for key, term in terms.items() if key not in on_the_way]
        fetch = {side: self._fetch(side, rows, batch, on_the_way.values()) for side in _sides(on_the_way.values())}
        reading = {key: (term.loss, list(term.factors)) for key, term in on_the_way.items()}
        layerwise = Layerwise(reading, batch, fetch, self.passes.subspaces, grad=grad)
        self._hooks.enter_context(visiting(self.model, layerwise.visits()))
        names = list(dict.fromkeys(name for term in rest for name in term.factors))
        tokens, mask = batch.wrapped.tokens, batch.wrapped.needed_mask
        read = not all(is_layerwise(term.loss) for term in terms.values())
        with layerwise.in_force():
            logits, wrapped = run_capturing(self.model, tokens, names, grad=grad, mask=mask, logits=read)
        sides = {}
        for side in _sides(terms.values()):
            clean, clean_logits = self._clean(side, rows, batch, rest)
            sides[side] = Forwards(batch, clean, wrapped, logits, clean_logits)
        return {
            key: replace(
                sides[term.loss.clean_side],
                known=layerwise.values.get(key, {}),
                subspaces=self.passes.subspaces[key],
            )
            for key, term in terms.items()
        }

    def _fetch(self, side: str, rows: Sequence[int], batch: PairBatch, terms: Iterable[Term]) -> Fetch:
        if side == "reference":
            return self.passes.targets.fetch(rows, batch)
        return fetch_from(self._clean(side, rows, batch, terms)[0])

    def _clean(
        self, side: str, rows: Sequence[int], batch: PairBatch, terms: Iterable[Term]
    ) -> tuple[Activations, CleanLogits | None]:
        names, logits = _clean_needs(terms, side)
        if not names and not logits:
            return {}, None
        if side == "reference":
            return self.passes.targets.of(rows, batch, names)
        model = self.passes.model_of(side)
        with evaluating(model):
            clean = batch.clean
            seen, states = run_capturing(model, clean.tokens, names, grad=False, mask=clean.needed_mask, logits=logits)
        return states, seen if logits else None


def backward(total: Scalar, model: LensModel, forwards: Iterable[Forwards], *, again: bool = False) -> None:
    """Runs the backward pass of a sum of losses.

    A block of a sharded model gathers its weights when a gradient comes to its output, which that of a loss on an
    activation inside of the block does not. So a gradient of zero starts at the logits and passes through them all.

    Args:
        total: the sum.
        model: the trained model.
        forwards: what the losses were computed from.
        again: keep the graph for another backward pass.
    """
    ends = [total]
    if is_sharded(model):
        logits = {id(seen.wrapped_logits): seen.wrapped_logits for seen in forwards}
        ends += [value for value in logits.values() if value.requires_grad]
    starts = [None, *map(torch.zeros_like, ends[1:])]
    torch.autograd.backward(ends, starts, retain_graph=again)


def _sides(terms: Iterable[Term]) -> list[str]:
    return list(dict.fromkeys(term.loss.clean_side for term in terms))


def _clean_needs(terms: Iterable[Term], side: str) -> tuple[list[str], bool]:
    """Finds the hook points that these losses read on one clean side, and whether they read its logits."""
    chosen = [term for term in terms if term.loss.clean_side == side]
    names = dict.fromkeys(name for term in chosen if term.loss.needs_clean_activations for name in term.factors)
    return list(names), any(term.loss.needs_clean_logits for term in chosen)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Gives the block its own state of torch's global generator, from which dropout draws, and restores the old one."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if device.type == "cpu":  # `torch.manual_seed` does this and then writes down the stack for each accelerator
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        yield
