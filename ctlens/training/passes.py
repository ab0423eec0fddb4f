"""The forward passes behind a step: each side of a batch once, whatever the number of losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from ctlens.core.types import Activations, CleanLogits, LensModel
from ctlens.data.batch import EncodedPairs, PairBatch, collate
from ctlens.losses import RMCT, Forwards, Loss
from ctlens.models.hooks import capture, visiting
from ctlens.training.config import TrainConfig
from ctlens.training.layerwise import Layerwise, blocks_again, is_layerwise
from ctlens.training.order import homes
from ctlens.training.rollouts import Rollouts
from ctlens.training.targets import CleanTargets, Fetch, fetch_from


@dataclass(frozen=True)
class Term:
    """Term is a loss with the hook points it reads on this model, each with its factor in the mean over them."""

    loss: Loss
    factors: Mapping[str, float]


class Passes:
    """Runs the models for the losses.

    Args:
        reference: in eval mode now, and whenever `seen` is called.
        model: the trained one.
        pairs: encoded, with their answers.
        terms: every loss that will ever be asked for.
        units: rows that are drawn together.
        config: the settings.
        folder: where the reference's clean side is kept; None for in memory.

    Raises:
        CtlensError: as `Rollouts`.
    """

    def __init__(
        self,
        reference: LensModel,
        model: LensModel,
        pairs: EncodedPairs,
        terms: Sequence[Term],
        units: Sequence[Sequence[int]],
        config: TrainConfig,
        folder: Path | None = None,
    ) -> None:
        self.model, self.pairs = model, pairs
        sampled = [term.loss for term in terms if isinstance(term.loss, RMCT)]
        self.rollouts = {loss.name: Rollouts(reference, pairs.rows, loss, config) for loss in sampled}
        names, logits = _clean_needs(self._on_pairs(terms), "reference")
        self.memory, self._hooks = config.memory, ExitStack()
        self.targets = CleanTargets(
            reference, pairs, homes(units, config), names, logits=logits, cache=config.cache, folder=folder
        )

    def seen(self, rows: Sequence[int], terms: Sequence[Term], *, step: int, grad: bool) -> list[Forwards]:
        """What each loss sees of some pairs, on the same passes where it can.

        Args:
            rows: numbers of the pairs.
            terms: the losses.
            step: from 1; with the rows it decides what is sampled.
            grad: keep the graph of the wrapped side.
        """
        on_pairs = self._on_pairs(terms)
        sides = self.forwards(rows, on_pairs, grad=grad) if on_pairs else {}
        return [
            self._sampled(rows, term.loss.name, step)
            if term.loss.name in self.rollouts
            else sides[term.loss.clean_side]
            for term in terms
        ]

    def _on_pairs(self, terms: Sequence[Term]) -> list[Term]:
        return [term for term in terms if term.loss.name not in self.rollouts]

    def _sampled(self, rows: Sequence[int], name: str, step: int) -> Forwards:
        pairs = [self.pairs.rows[row] for row in rows]
        with evaluating(self.model):
            drawn = self.rollouts[name].draw(self.model, pairs, step, *rows[:1])
        return drawn.seen_by(self.model)

    @contextmanager
    def open(self) -> Iterator[None]:
        """A forward pass with what belongs to it; where blocks are run again, its backward pass belongs inside."""
        again = blocks_again(self.model) if self.memory == "blocks" else nullcontext()
        with again, ExitStack() as self._hooks:
            yield

    def forwards(self, rows: Sequence[int], terms: Sequence[Term], *, grad: bool) -> dict[str, Forwards]:
        """What losses on pairs see of some of them, by whose clean side they are compared with."""
        batch = collate([self.pairs.rows[row] for row in rows]).to(next(self.model.parameters()).device)
        known = [term for term in terms if self.memory != "all" and is_layerwise(term.loss)]
        rest = [term for term in terms if term not in known]
        fetch = {side: self._fetch(side, rows, batch, known) for side in _sides(known)}
        layerwise = Layerwise([(term.loss, list(term.factors)) for term in known], batch, fetch, grad=grad)
        self._hooks.enter_context(visiting(self.model, layerwise.visits()))
        names = list(dict.fromkeys(name for term in rest for name in term.factors))
        tokens, mask = batch.wrapped.tokens, batch.wrapped.needed_mask
        with layerwise.in_force():
            logits, wrapped = capture(self.model, tokens, names, grad=grad, mask=mask)
        clean = {side: self._clean(side, rows, batch, rest) for side in _sides(terms)}
        return {
            side: Forwards(batch, states, wrapped, logits, found, known=layerwise.values)
            for side, (states, found) in clean.items()
        }

    def _fetch(self, side: str, rows: Sequence[int], batch: PairBatch, terms: Sequence[Term]) -> Fetch:
        if side == "reference":
            return self.targets.fetch(rows, batch)
        return fetch_from(self._clean(side, rows, batch, terms)[0])

    def _clean(
        self, side: str, rows: Sequence[int], batch: PairBatch, terms: Sequence[Term]
    ) -> tuple[Activations, CleanLogits | None]:
        names, logits = _clean_needs(terms, side)
        if not names and not logits:
            return {}, None
        if side == "reference":
            return self.targets.of(rows, batch, names)
        with evaluating(self.model):
            seen, states = capture(self.model, batch.clean.tokens, names, grad=False, mask=batch.clean.needed_mask)
        return states, seen


def _sides(terms: Sequence[Term]) -> list[str]:
    return list(dict.fromkeys(term.loss.clean_side for term in terms))


def _clean_needs(terms: Sequence[Term], side: str) -> tuple[list[str], bool]:
    """Finds what these losses read of one clean side: hook points, and whether the logits too."""
    chosen = [term for term in terms if term.loss.clean_side == side]
    names = dict.fromkeys(name for term in chosen if term.loss.needs_clean_activations for name in term.factors)
    return list(names), any(term.loss.needs_clean_logits for term in chosen)


@contextmanager
def evaluating(model: LensModel) -> Iterator[None]:
    """Puts a model in eval mode inside the block and restores its mode after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Gives the block, where dropout draws from torch's global state, a state of its own."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
