"""How likely the good and the bad answer of a prompt are, under many edits of one hook point at once.

The margin of a prompt is `log P(good) - log P(bad)`, in nats, each the probability that the answer
begins with exactly these words. Where both are one token it is their difference of logits; a
shared beginning cancels. Unlike a rate it does not saturate, so a shifted margin cannot hide. What follows
a single linear number uses the two tokens at which the answers part, `ctlens.analysis.base.contrast`.

Only tokens from the first edited one on depend on the edit, and only from its layer on. Where the
model has a key-value cache, the tokens before it and the blocks below it are run once for all edits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctlens.analysis.base.contrast import two_answers
from ctlens.core.types import LensModel, Logits, Mask
from ctlens.data.batch import EncodedPair, pad, require_room
from ctlens.models.generation import TOKENS_A_PASS, Ids
from ctlens.models.hooks import capturing, editing, resolve
from ctlens.models.loading import empty_cache, keep_rows

ANSWERS = ("good", "bad")


@dataclass(frozen=True)
class Edit:
    """What is added to the state `x` of a prompt at its edited tokens: `(rest - x . read) write`.

    A vector is added with `read` 0 and `rest` 1; a direction is taken out with `read` and `write` along it.

    Attributes:
        write: `[variant, prompt, d]`, one vector a prompt; every variant is a forward pass of its own.
        read: `[prompt, d]`.
        rest: `[prompt]`.
    """

    write: Float[Tensor, "variant prompt d"]
    read: Float[Tensor, "prompt d"]
    rest: Float[Tensor, " prompt"]

    def change(
        self, states: Float[Tensor, "chosen row pos d"], variants: slice, prompts: Int[Tensor, " row"]
    ) -> Float[Tensor, "chosen row pos d"]:
        """What is added under some of the variants; `prompts` tells the prompt of each row."""
        component = (states * self.read[prompts][:, None]).sum(-1, keepdim=True)
        return (self.rest[prompts][:, None, None] - component) * self.write[variants][:, prompts, None]


class Asked:
    """A batch of prompts with their two answers, of one model.

    Args:
        model: in eval mode, with a tokenizer.
        rows: the pairs.
        side: which prompt of a pair, `"clean"` or `"wrapped"`.
        edited: `[batch, pos]`, the tokens that edits change; at least one a prompt.

    Raises:
        CtlensError: a prompt names no good or no bad answer, twice the same, or is too long with it.
    """

    def __init__(self, model: LensModel, rows: Sequence[EncodedPair], side: str, edited: Mask) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        prompts: list[Ids] = [getattr(row, side).ids for row in rows]
        answers = [two_answers(model.tokenizer, getattr(row.pair, side), f"a {side} prompt", end=False) for row in rows]
        places = {  # prompt and answer up to its last token; most often the same for both answers
            (number, (*ids, *answer[:-1])): None for number, ids in enumerate(prompts) for answer in answers[number]
        }
        sequences = list(places)
        for _, ids in sequences:
            require_room(len(ids) + 1, model.cfg.n_ctx, "a prompt with its answer")
        starts = self._run_prefixes([ids for _, ids in sequences], edited[[number for number, _ in sequences]])
        self.prompts = torch.tensor([number for number, _ in sequences], device=self.device)
        rest = pad([ids[start:] for (_, ids), start in zip(sequences, starts, strict=True)])
        self.tokens, self.real = rest.tokens.to(self.device), rest.mask.to(self.device)
        self.entering = self._run_unedited() if self.cache is not None else []
        self.edited = torch.zeros_like(self.real)
        for row, ((number, _), start) in enumerate(zip(sequences, starts, strict=True)):
            self.edited[row, edited[number].nonzero()[:, 0] - start] = True
        self._place_answers(prompts, answers, {place: row for row, place in enumerate(sequences)}, starts)

    def _run_prefixes(self, sequences: Sequence[Ids], edited: Mask) -> list[int]:
        """Fills the cache with the tokens before each first edited one, and tells how many they are."""
        starts: list[int] = edited.int().argmax(-1).tolist()
        self.cache: Any = empty_cache(self.model, len(sequences)) if min(starts) else None
        if self.cache is None:
            return [0] * len(sequences)
        prefixes = pad([ids[:start] for ids, start in zip(sequences, starts, strict=True)]).to(self.device)
        with torch.no_grad():
            self.model(prefixes.tokens, past_kv_cache=self.cache, attention_mask=prefixes.mask.long())
        return starts

    def _place_answers(
        self,
        prompts: Sequence[Ids],
        answers: Sequence[Sequence[Ids]],
        rows: dict[tuple[int, Ids], int],
        starts: Sequence[int],
    ) -> None:
        """The row and position that predict each token of each answer, `[prompt, answer, width]`."""
        width = max(len(answer) for pair in answers for answer in pair)
        shape = (len(prompts), len(ANSWERS), width)
        self.row, self.position, self.target = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
        self.counted = torch.zeros(shape, dtype=torch.bool, device=self.device)
        for number, ids in enumerate(prompts):
            for side, answer in enumerate(answers[number]):
                row = rows[number, (*ids, *answer[:-1])]
                self.row[number, side] = row
                before = len(ids) - 1 - starts[row]
                self.position[number, side, : len(answer)] = torch.arange(before, before + len(answer))
                self.target[number, side, : len(answer)] = torch.tensor(answer)
                self.counted[number, side, : len(answer)] = True
        self.target = self.target.to(self.device)

    @torch.no_grad()
    def log_probabilities(self, hook_name: str, edit: Edit) -> Float[np.ndarray, "variant prompt answer"]:
        """The log-probability of each of `ANSWERS` under each variant of an edit, in nats."""
        together = max(1, TOKENS_A_PASS // self.tokens.numel())
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
            layer, hook_name = layer + 1, f"blocks.{layer + 1}.hook_resid_pre"  # the same state, a block further on
        with editing(self.model, {hook_name: replace}):
            logits = self._forward(torch.arange(len(self.tokens), device=self.device).repeat(count), layer)
        predicted = logits.unflatten(0, (count, -1))[:, self.row, self.position].float().log_softmax(-1)
        tokens = self.target.expand(count, *self.target.shape)[..., None]
        return (predicted.gather(-1, tokens)[..., 0] * self.counted).sum(-1)

    def _forward(self, rows: Int[Tensor, " run"], layer: int = 0) -> Logits:
        """The logits of some rows; with a cache, blocks below `layer` are not run again."""
        if self.cache is None:
            return self.model(self.tokens[rows])
        cache = copy.deepcopy(self.cache)
        keep_rows(cache, rows)
        real = self.real[rows].long()
        if not layer:
            return self.model(self.tokens[rows], past_kv_cache=cache, attention_mask=real)
        seen = torch.cat([cache.previous_attention_mask, real], 1)
        run = cast(Any, self.model)
        return run(self.entering[layer][rows], start_at_layer=layer, past_kv_cache=cache, attention_mask=seen)

    def _run_unedited(self) -> list[Float[Tensor, "row pos d"]]:
        """The state that enters each block, without an edit."""
        names, store = resolve(self.model, "resid_pre"), {}
        with torch.no_grad(), capturing(self.model, names, store):
            self._forward(torch.arange(len(self.tokens), device=self.device))
        return [store[name] for name in names]
