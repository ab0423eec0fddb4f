"""Preferences: each pair as two rows, its wrapped prompt with the preferred and with the bad answer, for DPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel, PerRow
from ctlens.data.batch import EncodedPair, PairBatch, collate, moved, require_room
from ctlens.data.chat import answer_ids
from ctlens.losses import Forwards
from ctlens.losses.outputs import answer_log_p
from ctlens.models.generation import Ids
from ctlens.models.hooks import run
from ctlens.models.sharding import in_step


@dataclass(frozen=True)
class Preferred:
    """Preferred holds the answers of one step, with what the reference gives them.

    Attributes:
        batch: the pairs with their preferred answers, then the same pairs with the bad ones.
        log_p: the reference's log-probability of each row's answer, in nats.
    """

    batch: PairBatch
    log_p: PerRow

    def seen_by(self, model: LensModel) -> Forwards:
        """Runs the model on the answers and keeps the graph."""
        side = self.batch.wrapped
        logits = run(model, side.tokens, side.needed_mask)
        return Forwards(self.batch, {}, {}, logits, reference_log_p=self.log_p)


class Preferences:
    """Preferences lays out both answers of each pair; what the reference gives them is worked out once.

    Args:
        reference: the model before training, in eval mode.
        pairs: all pairs of the training, with the answers that are preferred.

    Raises:
        CtlensError: a pair names no bad answer, or it is the preferred one, or does not fit the context.
    """

    def __init__(self, reference: LensModel, pairs: Sequence[EncodedPair]) -> None:
        self.reference = reference
        self._bad: dict[Ids, dict[str, Ids]] = {}
        self._known: dict[tuple[Ids, Ids], float] = {}
        for number, row in enumerate(pairs, start=1):
            bad = self._bad_answer(row, number)
            if bad == row.answer:
                raise CtlensError(
                    f"the answer that is preferred in pair {number} is its bad one: leave out pairs whose clean prompt "
                    "is answered badly, or give them a target."
                )
            require_room(len(row.wrapped.ids) + len(bad), reference.cfg.n_ctx, "a prompt with its bad answer")

    def draw(self, model: LensModel, rows: Sequence[EncodedPair], step: int, *part: int) -> Preferred:
        """Lays out some pairs; nothing about it is random.

        Args:
            model: says where the rows are wanted.
            rows: the pairs of the step.
            step: number of the step.
            part: number of the part, if the step's pairs come in several parts.
        """
        good = [replace(row, clean_answer=(), alignments={}) for row in rows]
        both = [*good, *(replace(row, answer=self._bad_answer(row)) for row in good)]
        batch = collate(both).to(next(model.parameters()).device)
        keys = [(row.wrapped.ids, row.answer) for row in both]
        with torch.no_grad(), in_step(self.reference):
            if not set(keys) <= set(self._known):
                logits = run(self.reference, batch.wrapped.tokens, batch.wrapped.needed_mask)
                self._known |= dict(zip(keys, answer_log_p(logits, batch).tolist(), strict=True))
        known = torch.tensor([self._known[key] for key in keys])
        return Preferred(batch, moved(known, batch.wrapped.tokens.device))

    def _bad_answer(self, row: EncodedPair, number: int = 0) -> Ids:
        """The tokens of a pair's bad answer behind its wrapped prompt."""
        text = row.pair.wrapped.bad
        if text is None:
            raise CtlensError(f"DPO prefers an answer over the bad one, and pair {number} names none: give it one.")
        of_prompt = self._bad.setdefault(row.wrapped.ids, {})
        if text not in of_prompt:
            of_prompt[text] = answer_ids(self.reference.tokenizer, row.wrapped, text)
        return of_prompt[text]
