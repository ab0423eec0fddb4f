"""Enumeration of a model's answers: every answer above some probability, with what the rest weighs together.

The answers to a prompt are a tree of tokens. It is walked level by level, all prompts of a batch at once, along the
distribution that `ctlens.models.generation` draws from, so the probabilities are those with which it gives each answer,
whole or cut at the longest. Branches of small probability are left out, and their mass is stated. With few branches per
level and none too small, the same walk is a beam search.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from ctlens.core.errors import CtlensError
from ctlens.core.limits import AT_LEAST_1, POSITIVE, PROBABILITY, SHARE_OF_ALL, require
from ctlens.core.types import LensModel
from ctlens.data.batch import require_room
from ctlens.models.generation import next_shares
from ctlens.models.kv_cache import MAX_BATCH_TOKENS, Ids, NextLogits, Sequences, batches_by_length

# A prompt grows into so many sequences at most, so fewer prompts are walked together than are decoded together.
_BRANCHES = 8


@dataclass(frozen=True)
class Branching:
    """Branching says which distribution the answers are enumerated of, and which branches are followed.

    Attributes:
        temperature, top_p: of the draws, as of `ctlens.models.generation.Sampling`.
        smallest: a branch of a smaller probability is left out.
        most: of each level the likeliest so many branches are followed.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    smallest: float = 1e-4
    most: int = 256

    def __post_init__(self) -> None:
        require(POSITIVE, temperature=self.temperature)
        require(PROBABILITY, top_p=self.top_p)
        require(SHARE_OF_ALL, smallest=self.smallest)
        require(AT_LEAST_1, most=self.most)


@dataclass(frozen=True)
class Enumerated:
    """Enumerated holds the answers to one prompt, the likeliest first.

    Attributes:
        answers: the tokens of each, with the end token where it has one.
        probabilities: of each, as it is drawn; with the mass that was missed they sum to 1.
        log_p: of each, the sum of the log-probabilities of its tokens at temperature 1, in nats.
    """

    answers: tuple[Ids, ...]
    probabilities: Float[np.ndarray, " answer"]
    log_p: Float[np.ndarray, " answer"]

    @property
    def missed(self) -> float:
        """The mass of all answers that were left out."""
        return max(0.0, 1.0 - float(self.probabilities.sum()))


@torch.no_grad()
def enumerate_answers(
    model: LensModel,
    prompts: Sequence[Ids],
    branching: Branching | None = None,
    *,
    max_new_tokens: int = 16,
    ends: Collection[int] = (),
) -> list[Enumerated]:
    """Enumerates the answers to each prompt; equal prompts are walked once.

    Args:
        model: in eval mode.
        prompts: token ids, any lengths, no padding.
        branching: the distribution, and which branches are followed.
        max_new_tokens: an answer is cut here, and counts as it is.
        ends: the tokens of which any closes an answer, as `ctlens.models.generation.end_tokens` lists them.

    Raises:
        CtlensError: the model is in training mode, a prompt is empty or leaves no room in the context.
    """
    if model.training:
        raise CtlensError("enumerating needs the model in eval mode: call model.eval() first.")
    if not all(prompts):
        raise CtlensError("an empty prompt cannot be continued: give at least one token.")
    branching = branching or Branching()
    distinct = list(dict.fromkeys(prompts))
    for ids in distinct:
        require_room(len(ids) + max_new_tokens, model.cfg.n_ctx, "a prompt with its answer")
    lengths = [len(ids) for ids in distinct]
    together = batches_by_length(model, lengths, max_new_tokens, MAX_BATCH_TOKENS // _BRANCHES)
    found: dict[Ids, Enumerated] = {}
    for batch in together:
        walk = _Walk(model, [distinct[i] for i in batch], branching, frozenset(ends))
        walk.go(max_new_tokens)
        found |= {distinct[i]: walk.enumerated(row) for row, i in enumerate(batch)}
    return [found[ids] for ids in prompts]


class _Walk:
    """One walk down the trees of some prompts: its open branches, and the answers that have come to their end."""

    def __init__(self, model: LensModel, prompts: Sequence[Ids], branching: Branching, ends: frozenset[int]) -> None:
        self.branching = branching
        self.ends = ends
        self.sequences = Sequences(model, prompts)
        self.owners = np.arange(len(prompts))
        self.answers: list[Ids] = [()] * len(prompts)
        self.drawn = np.zeros(len(prompts))  # the log-probability of each open branch as it is drawn
        self.plain = np.zeros(len(prompts))  # the same at temperature 1
        self.closed: list[list[tuple[Ids, float, float]]] = [[] for _ in prompts]

    def go(self, max_new_tokens: int) -> None:
        """Walks down to the longest answers."""
        logits = self.sequences.run()
        for remaining in reversed(range(max_new_tokens)):
            rows, tokens = self._grow(logits)
            ended = np.isin(tokens, list(self.ends)) | (remaining == 0)
            for branch in np.flatnonzero(ended):
                closed = (self.answers[branch], float(self.drawn[branch]), float(self.plain[branch]))
                self.closed[int(self.owners[branch])].append(closed)
            self._take(~ended)
            if not len(self.answers):
                return
            device = logits.device
            self.sequences.keep(torch.from_numpy(rows[~ended]).to(device))
            following = torch.from_numpy(tokens[~ended]).to(device)
            logits = self.sequences.extend(following[:, None], torch.ones_like(following))[:, -1]

    def _grow(self, logits: NextLogits) -> tuple[Int[np.ndarray, " branch"], Int[np.ndarray, " branch"]]:
        """Replaces every open branch by its followed children; returns the row and the token that each came from."""
        shares = next_shares(logits, self.branching.temperature, self.branching.top_p).double()
        shares /= shares.sum(-1, keepdim=True)
        drawn = self.drawn[:, None] + shares.log().numpy()
        plain = self.plain[:, None] + logits.double().log_softmax(-1).cpu().numpy()
        followed = np.isfinite(drawn) & (np.exp(drawn) >= self.branching.smallest)
        rows, tokens = np.nonzero(followed)
        likely = self._likeliest(self.owners[rows], drawn[rows, tokens])
        rows, tokens = rows[likely], tokens[likely]
        self.owners = self.owners[rows]
        self.answers = [(*self.answers[row], int(token)) for row, token in zip(rows, tokens, strict=True)]
        self.drawn = drawn[rows, tokens]
        self.plain = plain[rows, tokens]
        return rows, tokens

    def _likeliest(
        self, owners: Int[np.ndarray, " branch"], drawn: Float[np.ndarray, " branch"]
    ) -> Int[np.ndarray, " chosen"]:
        """The numbers of each prompt's likeliest branches, as many as are followed."""
        order = np.lexsort((-drawn, owners))
        starts = np.searchsorted(owners[order], owners[order])
        return order[np.arange(len(order)) - starts < self.branching.most]

    def _take(self, chosen: np.ndarray) -> None:
        self.answers = [self.answers[branch] for branch in np.flatnonzero(chosen)]
        self.owners = self.owners[chosen]
        self.drawn = self.drawn[chosen]
        self.plain = self.plain[chosen]

    def enumerated(self, prompt: int) -> Enumerated:
        """The answers to one prompt, likeliest first."""
        found = sorted(self.closed[prompt], key=lambda closed: (-closed[1], closed[0]))
        drawn = np.array([closed[1] for closed in found])
        plain = np.array([closed[2] for closed in found])
        return Enumerated(tuple(closed[0] for closed in found), np.exp(drawn), plain)
