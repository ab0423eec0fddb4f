"""How likely a model finds given continuations of a prompt: all their tokens, in the context of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import torch
from tqdm.auto import tqdm

from ctlens.batch import pad, require_room
from ctlens.chat import encoded, render
from ctlens.errors import CtlensError
from ctlens.hooks import run
from ctlens.pairs import Prompt
from ctlens.sequences import TOKENS_A_PASS, Ids, batches
from ctlens.types import LensModel


@dataclass(frozen=True)
class Choice:
    """What a model makes of a multiple-choice question.

    Attributes:
        options: the answers, as the prompt names them.
        log_probabilities: of each whole option behind the prompt, in nats.
        lengths: tokens that were scored for it.
    """

    options: tuple[str, ...]
    log_probabilities: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def chosen(self) -> str | None:
        """The likeliest option; None where several are equally likely."""
        best = max(self.log_probabilities)
        return self.options[self.log_probabilities.index(best)] if self.log_probabilities.count(best) == 1 else None

    @property
    def per_token(self) -> Choice:
        """The same with the mean log-probability of an option's tokens, so that long options are not at a loss."""
        means = tuple(total / length for total, length in zip(self.log_probabilities, self.lengths, strict=True))
        return Choice(self.options, means, self.lengths)

    def share(self, option: str | None) -> float:
        """The probability of one option among all of them; NaN for an option that is not there."""
        if option not in self.options:
            return float("nan")
        return float(torch.tensor(self.log_probabilities, dtype=torch.float64).softmax(0)[self.options.index(option)])


def choose(
    model: LensModel,
    prompts: Sequence[Prompt],
    *,
    tokens_a_pass: int = TOKENS_A_PASS,
    progress: bool = False,
) -> list[Choice]:
    """The log-probability of every option of multiple-choice prompts, whole: not of its first token alone.

    An option is tokenised together with the prompt. Where its beginning fuses with the prompt's end,
    what is scored begins at the token where the options and the prompt go apart, for all of them.

    Args:
        model: in eval mode, with a tokenizer.
        prompts: with options.
        tokens_a_pass: sequences are run together, in order of length, up to so many tokens with padding.
        progress: show a progress bar when it takes more than two seconds.

    Raises:
        CtlensError: the model is in training mode, or a prompt has no options or does not fit the context.
    """
    if model.training:
        raise CtlensError("scoring needs the model in eval mode: call model.eval() first.")
    asked = [_sequences(model.tokenizer, prompt) for prompt in prompts]
    rows = list(dict.fromkeys((start, ids) for start, sequences in asked for ids in sequences))
    for _, ids in rows:
        require_room(len(ids), model.cfg.n_ctx, "a prompt with its option")
    found: dict[tuple[int, Ids], float] = {}
    together = list(batches(model, [len(ids) for _, ids in rows], 0, tokens_a_pass))
    for batch in tqdm(together, desc="options", delay=2, leave=False, disable=not progress):
        chosen = [rows[number] for number in batch]
        found |= zip(chosen, _log_probabilities(model, chosen), strict=True)
    return [
        Choice(
            prompt.options,
            tuple(found[start, ids] for ids in sequences),
            tuple(len(ids) - start for ids in sequences),
        )
        for prompt, (start, sequences) in zip(prompts, asked, strict=True)
    ]


def _sequences(tokenizer: Any, prompt: Prompt) -> tuple[int, list[Ids]]:
    """The prompt's tokens with each option behind it, and where the first that is scored stands in all of them."""
    if not prompt.options:
        raise CtlensError("a prompt has no options to choose from: give it some, or let the model answer freely.")
    rendered = render(tokenizer, prompt.turns)
    added = len(rendered.ids) - len(encoded(tokenizer, rendered.text))
    sequences = [rendered.ids[:added] + encoded(tokenizer, rendered.text + option) for option in prompt.options]
    start = len(commonprefix([rendered.ids, *(ids[:-1] for ids in sequences)]))
    if not start:
        raise CtlensError("an option fuses with all of its prompt, so that no token predicts it: give a longer prompt.")
    return start, sequences


@torch.no_grad()
def _log_probabilities(model: LensModel, rows: Sequence[tuple[int, Ids]]) -> list[float]:
    side = pad([ids for _, ids in rows]).to(next(model.parameters()).device)
    steps = run(model, side.tokens).float().log_softmax(-1)[:, :-1].gather(-1, side.tokens[:, 1:, None])[..., 0]
    return [float(steps[row, start - 1 : len(ids) - 1].double().sum()) for row, (start, ids) in enumerate(rows)]
