"""The probabilities of a prompt's good and bad answer, under many edits of one hook point at once.

The logit difference of a prompt is `log P(good) - log P(bad)`, in nats, each the probability that the answer
begins with exactly these words. Where both answers are one token, that is the difference of their two logits; a
beginning that both share cancels. It does not saturate as a rate does, so no change of it stays hidden. Analyses of
one linear number use the two tokens at which the answers part, see `ctlens.analysis.base.contrast`.

Only tokens from the first edited one on depend on the edit, and only from its layer on. Where the
model has a key-value cache, the tokens before it and the blocks below it are run once for all edits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctlens.analysis.base.contrast import two_answers
from ctlens.core.types import LensModel, Logits, Mask
from ctlens.data.batch import EncodedPair, pad, require_room
from ctlens.models.finite import forward
from ctlens.models.generation import MAX_BATCH_TOKENS, Ids
from ctlens.models.hooks import capturing, editing, resolve
from ctlens.models.loading import empty_cache, keep_rows

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
        self, states: Float[Tensor, "chosen row pos d"], variants: slice, prompts: Int[Tensor, " row"]
    ) -> Float[Tensor, "chosen row pos d"]:
        """Computes what some of the variants add; `prompts` names the prompt of each row."""
        component = (states * self.read[prompts][:, None]).sum(-1, keepdim=True)
        return (self.rest[prompts][:, None, None] - component) * self.write[variants][:, prompts, None]


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
        row: the row of the logits.
        position: the position of the logits, counted from the first one that is run.
        target: the token that they predict.
        counted: false where an answer is shorter than the longest.
    """

    row: Int[Tensor, "prompt answer width"]
    position: Int[Tensor, "prompt answer width"]
    target: Int[Tensor, "prompt answer width"]
    counted: Bool[Tensor, "prompt answer width"]


def _predictions(plan: Plan, starts: Sequence[int], device: torch.device) -> Predictions:
    """The indices of a plan whose rows are run from their positions `starts` on."""
    width = max(len(planned.ids) for planned in plan.answers)
    shape = (plan.answers[-1].prompt + 1, len(ANSWER_ORDER), width)
    row = torch.zeros(shape, dtype=torch.long)
    position = torch.zeros_like(row)
    target = torch.zeros_like(row)
    counted = torch.zeros(shape, dtype=torch.bool)
    for planned in plan.answers:
        at = (planned.prompt, planned.answer)
        length = len(planned.ids)
        first = planned.first - starts[planned.row]
        row[at] = planned.row
        position[at][:length] = torch.arange(first, first + length)
        target[at][:length] = torch.tensor(planned.ids)
        counted[at][:length] = True
    return Predictions(row, position, target.to(device), counted.to(device))


class EditedAnswers:
    """The two answers to a batch of prompts, ready to be run under edits by one model.

    Args:
        model: in eval mode, with a tokenizer.
        rows: the pairs.
        side: which prompt of a pair, `"clean"` or `"wrapped"`.
        edited: `[batch, pos]`, the tokens that edits change; at least one per prompt.

    Raises:
        CtlensError: a prompt names no good or no bad answer, twice the same, or is too long with it.
    """

    def __init__(self, model: LensModel, rows: Sequence[EncodedPair], side: str, edited: Mask) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        prompts: list[Ids] = [getattr(row, side).ids for row in rows]
        answers = [
            two_answers(model.tokenizer, getattr(row.pair, side), getattr(row, side), f"a {side} prompt", end=False)
            for row in rows
        ]
        plan = plan_sequences(prompts, answers)
        for ids in plan.sequences:
            require_room(len(ids) + 1, model.cfg.n_ctx, "a prompt with its answer")
        self.cache, starts = self._run_prefixes(plan.sequences, edited[list(plan.prompts)])
        self.prompts = torch.tensor(plan.prompts, device=self.device)
        rest = pad([ids[start:] for ids, start in zip(plan.sequences, starts, strict=True)])
        self.tokens = rest.tokens.to(self.device)
        self.real = rest.mask.to(self.device)
        self.entering = self._run_unedited() if self.cache is not None else []
        self.edited = torch.zeros_like(self.real)
        for row, (number, start) in enumerate(zip(plan.prompts, starts, strict=True)):
            self.edited[row, edited[number].nonzero()[:, 0] - start] = True
        self.predicted = _predictions(plan, starts, self.device)

    def _run_prefixes(self, sequences: Sequence[Ids], edited: Mask) -> tuple[Any, list[int]]:
        """A cache of the tokens before each first edited one, and how many they are; None and 0 without a cache."""
        starts: list[int] = edited.int().argmax(-1).tolist()
        cache: Any = empty_cache(self.model, len(sequences)) if min(starts) else None
        if cache is None:
            return None, [0] * len(sequences)
        prefixes = pad([ids[:start] for ids, start in zip(sequences, starts, strict=True)]).to(self.device)
        with torch.no_grad():
            forward(self.model, prefixes.tokens, past_kv_cache=cache, attention_mask=prefixes.mask.long())
        return cache, starts

    @torch.no_grad()
    def log_probabilities(self, hook_name: str, edit: Edit) -> Float[np.ndarray, "variant prompt answer"]:
        """The log-probability of each of `ANSWER_ORDER` under each variant of an edit, in nats."""
        together = max(1, MAX_BATCH_TOKENS // self.tokens.numel())
        chunks = [
            self._under(hook_name, edit, slice(first, first + together))
            for first in range(0, len(edit.write), together)
        ]
        return torch.cat(chunks).double().cpu().numpy()

    def _under(self, hook_name: str, edit: Edit, variants: slice) -> Float[Tensor, "chosen prompt answer"]:
        count = len(edit.write[variants])

        def replace(activation: Tensor) -> Tensor:
            states = activation.unflatten(0, (count, -1))
            change = edit.change(states, variants, self.prompts)
            return torch.where(self.edited[..., None], states + change, states).flatten(0, 1)

        layer = int(hook_name.split(".")[1])
        if self.cache is not None and hook_name.endswith("hook_resid_post") and layer + 1 < self.model.cfg.n_layers:
            layer += 1
            hook_name = f"blocks.{layer}.hook_resid_pre"  # the same state, and the block below is not run again
        with editing(self.model, {hook_name: replace}):
            logits = self._forward(torch.arange(len(self.tokens), device=self.device).repeat(count), layer)
        wanted = self.predicted
        predicted = logits.unflatten(0, (count, -1))[:, wanted.row, wanted.position].float().log_softmax(-1)
        tokens = wanted.target.expand(count, *wanted.target.shape)[..., None]
        return (predicted.gather(-1, tokens)[..., 0] * wanted.counted).sum(-1)

    def _forward(self, rows: Int[Tensor, " run"], layer: int = 0) -> Logits:
        """The logits of some rows; with a cache, blocks below `layer` are not run again."""
        if self.cache is None:
            return forward(self.model, self.tokens[rows])
        cache = copy.deepcopy(self.cache)
        keep_rows(cache, rows)
        real = self.real[rows].long()
        if not layer:
            return forward(self.model, self.tokens[rows], past_kv_cache=cache, attention_mask=real)
        seen = torch.cat([cache.previous_attention_mask, real], 1)
        begun = self.entering[layer][rows]
        return forward(self.model, begun, start_at_layer=layer, past_kv_cache=cache, attention_mask=seen)

    def _run_unedited(self) -> list[Float[Tensor, "row pos d"]]:
        """Runs the prompts without an edit and returns the state that enters each block."""
        names = resolve(self.model, "resid_pre")
        store: dict[str, Tensor] = {}
        with torch.no_grad(), capturing(self.model, names, store):
            self._forward(torch.arange(len(self.tokens), device=self.device))
        return [store[name] for name in names]
