"""What a model replies to prompts: its greedy answer, how that is judged, and how likely each answer's opening was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

from ctlens.batch import require_room
from ctlens.chat import answer_ids, end_token, render
from ctlens.decoding import Ids, decode
from ctlens.pairs import Prompt
from ctlens.threats.base import judge
from ctlens.types import LensModel


@dataclass(frozen=True)
class Reply:
    """A model's reply to one prompt.

    Attributes:
        answer: greedy, as text.
        verdict: `"good"`, `"bad"` or `"other"`.
        good_probability, bad_probability: that the answer begins with the first token of the prompt's
            good and of its bad answer. NaN where the prompt names none, and both where one token
            cannot tell them apart.
    """

    answer: str
    verdict: str
    good_probability: float
    bad_probability: float


def ask(
    model: LensModel, prompts: Sequence[Prompt], *, max_new_tokens: int = 16, progress: bool = False
) -> list[Reply]:
    """The reply to each prompt; those that read alike are decoded once.

    Args:
        model: in eval mode, with a tokenizer.
        prompts: with the answers that count as good or bad.
        max_new_tokens: longest answer, in tokens.
        progress: show a progress bar when it takes more than two seconds.

    Raises:
        CtlensError: a prompt names no answer, or does not fit the context.
    """
    for prompt in dict.fromkeys(prompts):
        judge(prompt, "")  # refuses a prompt without answers before the work of decoding
    tokenizer = model.tokenizer
    ids = {turns: render(tokenizer, turns).ids for turns in dict.fromkeys(prompt.turns for prompt in prompts)}
    for row in ids.values():
        require_room(len(row) + max_new_tokens, model.cfg.n_ctx, "a prompt with its answer")
    openings = _openings(tokenizer, prompts)
    wanted: dict[Ids, dict[int, None]] = {row: {} for row in ids.values()}
    for prompt in prompts:
        wanted[ids[prompt.turns]].update(dict.fromkeys(openings[prompt].values()))
    decoded = decode(
        model, list(wanted), first_tokens=[tuple(tokens) for tokens in wanted.values()],
        max_new_tokens=max_new_tokens, end=end_token(tokenizer), progress=progress,
    )  # fmt: skip
    texts = dict(zip(wanted, tokenizer.batch_decode(decoded.answers, skip_special_tokens=True), strict=True))
    likely = {
        row: dict(zip(tokens, found, strict=True))
        for (row, tokens), found in zip(wanted.items(), decoded.first_probabilities, strict=True)
    }
    replies = {}
    for prompt in dict.fromkeys(prompts):
        row = ids[prompt.turns]
        sides = {side: likely[row][token] for side, token in openings[prompt].items()}
        answer = texts[row].strip()
        replies[prompt] = Reply(answer, judge(prompt, answer), sides.get("good", nan), sides.get("bad", nan))
    return [replies[prompt] for prompt in prompts]


def _openings(tokenizer: Any, prompts: Sequence[Prompt]) -> dict[Prompt, Mapping[str, int]]:
    """Per prompt, the first token of its good and bad answer; none where one token cannot tell them apart."""
    named = {answer: None for prompt in prompts for answer in (prompt.good, prompt.bad) if answer is not None}
    first = {answer: ids[0] for answer in named if (ids := answer_ids(tokenizer, answer))}
    openings: dict[Prompt, Mapping[str, int]] = {}
    for prompt in prompts:
        sides = (("good", prompt.good), ("bad", prompt.bad))
        tokens = {side: first[answer] for side, answer in sides if answer in first}
        openings[prompt] = tokens if len(set(tokens.values())) == len(tokens) else {}
    return openings
