"""What a shell completes behind an option."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import cast


def completed_from(*sources: str) -> Callable[[str], list[str]]:
    """Completes the last of several comma-separated names.

    Args:
        sources: `module:attribute` of what holds the names, or gives them when it is called. It is imported when a
            shell asks, for `ctlens --help` must not take as long as that.

    >>> completed_from("ctlens.models.parameters:GROUPS")("attn,m")
    ['attn,mlp']
    """

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        names = []
        for source in sources:
            module, _, attribute = source.partition(":")
            found = getattr(import_module(module), attribute)
            names.extend(cast(Iterable[str], found() if callable(found) else found))
        return [f"{before}{comma}{name}" for name in names if name.startswith(last)]

    return complete
