"""The probabilities of a prompt's good and bad answer, under many edits of one hook point at once.

The logit difference of a prompt is `log P(good) - log P(bad)`, in nats, each the probability that the answer
begins with exactly these words. Where both answers are one token, that is the difference of their two logits; a
beginning that both share cancels. It does not saturate as a rate does, so no change of it stays hidden. Analyses of
one linear number use the two tokens at which the answers part, see `ctlens.analysis.base.contrast`.

Only tokens from the first edited one on depend on the edit, and only from its layer on. Where the model's blocks
are known, the tokens before it and the blocks below it are run once for all edits, see
`ctlens.analysis.directions.edited_rows`; elsewhere whole sequences are run, with a hook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ctlens.analysis.base.contrast import two_answers
from ctlens.analysis.directions.edited_rows import edited_rows
from ctlens.core.errors import NotFinite
from ctlens.core.types import LensModel, Mask
from ctlens.data.batch import EncodedPair, pad, require_room
from ctlens.models.finite import advice, forward, is_finite
from ctlens.models.generation import MAX_BATCH_TOKENS, Ids
from ctlens.models.hooks import editing

ANSWER_ORDER = ("good", "bad")  # along the axis of answers


@dataclass(frozen=True)
class Edit:
    """An edit of the state `x` at a prompt's edited tokens, which adds `(rest - x . read) write`.

    A vector is added with `read` 0 and `rest` 1; a direction is taken out with `read` and `write` along it.

    Attributes:
        write: `[variant, prompt, d]`, one vector per prompt; every variant is a forward pass of its own.
        read: `[prompt, d]`.
        rest: `[prompt]`.
    """

    write: Float[Tensor, "variant prompt d"]
    read: Float[Tensor, "prompt d"]
    rest: Float[Tensor, " prompt"]

    def change(
        self, states: Float[Tensor, "#chosen row pos d"], variants: slice, prompts: Int[Tensor, " row"]
    ) -> Float[Tensor, "chosen row pos d"]:
        """Computes what some of the variants add; `prompts` names the prompt of each row."""
        component = (states * self.read[prompts][:, None]).sum(-1, keepdim=True)
        return (self.rest[prompts][:, None, None] - component) * self.write[variants][:, prompts, None]


def adding(write: Float[Tensor, "variant prompt d"]) -> Edit:
    """The edit that adds these vectors, whatever the state is."""
    return Edit(write, torch.zeros_like(write[0]), torch.ones_like(write[0, :, 0]))


class PlannedAnswer(NamedTuple):
    """The tokens at which one answer of one prompt is read.

    Attributes:
        prompt: the number of the prompt.
        answer: the number of the answer, as in `ANSWER_ORDER`.
        row: the sequence that is run for it.
        first: the position in that sequence that predicts the answer's first token, the prompt's last one.
        ids: the answer's tokens.
    """

    prompt: int
    answer: int
    row: int
    first: int
    ids: Ids


@dataclass(frozen=True)
class Plan:
    """The sequences that are run to ask prompts for their answers, and where each answer is read in them.

    Attributes:
        sequences: per row, a prompt and an answer up to the last token, which nothing needs to follow.
        prompts: per row, the number of its prompt.
        answers: one entry per prompt and answer.
    """

    sequences: tuple[Ids, ...]
    prompts: tuple[int, ...]
    answers: tuple[PlannedAnswer, ...]


def plan_sequences(prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]) -> Plan:
    """Plans one sequence per prompt and answer, and one for both where they differ in their last token alone.

    Prompts `(1, 2)`, asked for `(8,)` or `(9,)`, and `(3,)`, asked for `(8,)` or `(7, 9)`, need three rows:
    `(1, 2)` for both answers of the first, `(3,)` and `(3, 7)` for those of the second.

    Args:
        prompts: their tokens.
        answers: of each prompt, the tokens of its answers.
    """
    row_of: dict[tuple[int, Ids], int] = {}
    found = []
    for number, ids in enumerate(prompts):
        for which, answer in enumerate(answers[number]):
            row = row_of.setdefault((number, (*ids, *answer[:-1])), len(row_of))
            found.append(PlannedAnswer(number, which, row, len(ids) - 1, answer))
    return Plan(tuple(ids for _, ids in row_of), tuple(number for number, _ in row_of), tuple(found))


class Predictions(NamedTuple):
    """The logits that predict the tokens of the answers, as indices that gather all of them at once.

    Attributes:
        wanted: the positions whose logits are read, each once, numbered over all rows.
        number: of each predicted token, the number of its position in `wanted`.
        target: the token that is predicted there.
        counted: false where an answer is shorter than the longest.
    """

    wanted: Int[Tensor, " wanted"]
    number: Int[Tensor, "prompt answer width"]
    target: Int[Tensor, "prompt answer width"]
    counted: Bool[Tensor, "prompt answer width"]


def _predictions(plan: Plan, starts: Sequence[int], span: int, device: torch.device) -> Predictions:
    """The indices of a plan of whose rows `span` positions are run, from their positions `starts` on."""
    width = max(len(planned.ids) for planned in plan.answers)
    shape = (plan.answers[-1].prompt + 1, len(ANSWER_ORDER), width)
    index = torch.full(shape, plan.answers[0].row * span + plan.answers[0].first - starts[plan.answers[0].row])
    target = torch.zeros_like(index)
    counted = torch.zeros(shape, dtype=torch.bool)
    for planned in plan.answers:
        at = (planned.prompt, planned.answer)
        length = len(planned.ids)
        first = planned.row * span + planned.first - starts[planned.row]
        index[at][:length] = torch.arange(first, first + length)
        target[at][:length] = torch.tensor(planned.ids)
        counted[at][:length] = True
    wanted, number = index.unique(return_inverse=True)
    return Predictions(wanted.to(device), number.to(device), target.to(device), counted.to(device))


class EditedAnswers:
    """The two answers to a batch of prompts, ready to be run under edits by one model.

    Args:
        model: in eval mode, with a tokenizer.
        rows: the pairs.
        side: which prompt of a pair, `"clean"` or `"wrapped"`.
        edited: `[batch, pos]`, the tokens that edits change; at least one per prompt.
        hook_names: the hook points of the edits.

    Raises:
        CtlensError: a prompt names no good or no bad answer, twice the same, or is too long with it.
    """

    def __init__(
        self, model: LensModel, rows: Sequence[EncodedPair], side: str, edited: Mask, hook_names: Sequence[str]
    ) -> None:
        self.model = model
        self.n_prompts = len(rows)
        self.device = next(model.parameters()).device
        prompts: list[Ids] = [getattr(row, side).ids for row in rows]
        answers = [
            two_answers(model.tokenizer, getattr(row.pair, side), getattr(row, side), f"a {side} prompt", end=False)
            for row in rows
        ]
        plan = plan_sequences(prompts, answers)
        for ids in plan.sequences:
            require_room(len(ids) + 1, model.cfg.n_ctx, "a prompt with its answer")
        sequences = pad(plan.sequences).to(self.device)
        self.tokens = sequences.tokens
        self.prompts = torch.tensor(plan.prompts, device=self.device)
        self.edited = F.pad(edited, (0, self.tokens.shape[1] - edited.shape[1]))[self.prompts]
        self.fast = edited_rows(model, self.tokens, self.edited, sequences.mask.sum(-1), hook_names)
        starts = [0] * len(self.tokens)
        if self.fast is not None:
            starts = self.fast.positions[:, 0].tolist()
            self.edited = self.edited.gather(1, self.fast.positions)
        self.predicted = _predictions(plan, starts, self.edited.shape[1], self.device)

    def tensor(self, array: np.ndarray) -> Tensor:
        """Numbers for an edit, where the model is."""
        return torch.tensor(array, dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def log_probabilities(self, hook_name: str, edit: Edit) -> Float[np.ndarray, "variant prompt answer"]:
        """The log-probability of each of `ANSWER_ORDER` under each variant of an edit, in nats."""
        together = max(1, MAX_BATCH_TOKENS // self.edited.numel())
        chunks = [
            self._under(hook_name, edit, slice(first, first + together))
            for first in range(0, len(edit.write), together)
        ]
        return torch.cat(chunks).double().cpu().numpy()

    @torch.enable_grad()
    def gradients(self, hook_name: str, added: Float[Tensor, "variant prompt d"]) -> Float[Tensor, "variant prompt d"]:
        """The gradient of the logit difference of the two answers in vectors that are added."""
        together = max(1, MAX_BATCH_TOKENS // self.edited.numel())
        return torch.cat([self._gradient(hook_name, chunk) for chunk in added.split(together)])

    def _gradient(self, hook_name: str, added: Tensor) -> Tensor:
        added = added.detach().requires_grad_()
        good, bad = self._under(hook_name, adding(added), slice(None)).unbind(-1)
        return torch.autograd.grad((good - bad).sum(), added)[0]

    def _under(self, hook_name: str, edit: Edit, variants: slice) -> Float[Tensor, "chosen prompt answer"]:
        number, target, counted = self.predicted[1:]
        if self.fast is None:
            logits = self._under_hooks(hook_name, edit, variants)
        else:
            states = self.fast.states[hook_name][None]
            change = edit.change(states, variants, self.prompts) * self.edited[..., None]
            logits = self.fast.under(hook_name, change, self.predicted.wanted)
            if not is_finite(logits):
                raise NotFinite(f"the model edited at {hook_name} computes nan or infinity: {advice(self.model)}.")
        chances = logits.float().log_softmax(-1)
        return (chances[:, number, target] * counted).sum(-1)

    def _under_hooks(self, hook_name: str, edit: Edit, variants: slice) -> Float[Tensor, "chosen wanted d_vocab"]:
        """The wanted logits, from whole sequences whose states are edited by a hook."""
        count = len(edit.write[variants])

        def replace(activation: Tensor) -> Tensor:
            states = activation.unflatten(0, (count, -1))
            change = edit.change(states, variants, self.prompts)
            return torch.where(self.edited[..., None], states + change, states).flatten(0, 1)

        with editing(self.model, {hook_name: replace}):
            logits = forward(self.model, self.tokens.repeat(count, 1))
        return logits.unflatten(0, (count, -1)).flatten(1, 2)[:, self.predicted.wanted]
