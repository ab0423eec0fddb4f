"""The kind of each token of a prompt: content, wrapper, another message of some role, or frame of the chat template."""

from __future__ import annotations

from collections.abc import Sequence

from ctlens.data.alignment import wrapper_positions
from ctlens.data.chat import Rendered

TOKEN_KINDS = ("system", "user", "assistant", "content", "wrapper", "template", "assistant header", "answer")


def token_kinds(
    clean: Rendered, wrapped: Rendered, answer: Sequence[int] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names the kind of every token of a clean and of a wrapped prompt, by the characters that the token covers.

    - `content`: the clean prompt's last message, in either prompt where it stands there exactly once.
    - `wrapper`: the text that the attack added to the messages, see `ctlens.data.alignment.wrapper_positions`.
    - `system`, `user`, `assistant`: any other message of that role.
    - `assistant header`: the part of the template behind the last message, where the answer begins.
    - `template`: the rest of the template, with the BOS.
    - `answer`: the answer behind the prompts.

    A token that reaches into two of these has the kind that comes first in this list.

    Args:
        clean, wrapped: from `ctlens.data.chat.render`.
        answer: the tokens that follow both prompts.

    Returns:
        The kinds of the clean and of the wrapped prompt's tokens, each one of `TOKEN_KINDS`.
    """
    text = clean.text[slice(*clean.contents[-1])]
    added = set(wrapper_positions(clean, wrapped))
    behind = ("answer",) * len(answer)
    return _kinds(clean, text, set()) + behind, _kinds(wrapped, text, added) + behind


def _kinds(prompt: Rendered, content: str, added: set[int]) -> tuple[str, ...]:
    kinds = ["template"] * len(prompt.ids)
    end = prompt.contents[-1][1]
    for position, (left, right) in enumerate(prompt.offsets):
        if left >= end and right > left:
            kinds[position] = "assistant header"
    for role, span in zip(prompt.roles, prompt.contents, strict=True):
        for position in prompt.positions(span):
            kinds[position] = role
    for position in added:
        kinds[position] = "wrapper"
    start = prompt.text.find(content) if prompt.text.count(content) == 1 else -1
    for position in prompt.positions((start, start + len(content))) if start >= 0 else ():
        kinds[position] = "content"
    return tuple(kinds)
