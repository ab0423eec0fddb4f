"""Prompts that are held out: what was fitted or trained on some prompts is asked others."""

from __future__ import annotations

from collections.abc import Sequence

from ctlens.core.errors import CtlensError
from ctlens.data.pairs import Prompt


def require_heldout(asked: Sequence[Prompt], used: Sequence[Prompt], use: str) -> None:
    """Refuses held-out prompts that were used before, and none at all.

    Args:
        asked: the held-out prompts.
        used: the other prompts.
        use: what was done with those, for the sentence, such as `"trained on"`.

    Raises:
        CtlensError: there is no held-out prompt, or one is among the others.
    """
    if not asked:
        raise CtlensError("there are no held-out pairs: give at least one.")
    known = {prompt.turns for prompt in used}
    if shared := sum(prompt.turns in known for prompt in asked):
        raise CtlensError(f"{shared} of {len(asked)} held-out prompts are {use}: give pairs of another split.")
