"""Threats by name: families of wrappers, with what is good and bad under them."""

from __future__ import annotations

from ctlens.errors import unknown
from ctlens.threats.base import Case, Threat, Wrapper, judge
from ctlens.threats.jailbreak import Jailbreak
from ctlens.threats.sycophancy import Sycophancy

__all__ = ["Case", "Threat", "Wrapper", "get", "judge", "names"]

REGISTRY: dict[str, Threat] = {threat.name: threat for threat in (Sycophancy(), Jailbreak())}


def names() -> list[str]:
    """The names of all threats.

    >>> names()
    ['sycophancy', 'jailbreak']
    """
    return list(REGISTRY)


def get(name: str) -> Threat:
    """The threat of that name.

    Raises:
        CtlensError: there is none.
    """
    if name not in REGISTRY:
        raise unknown("threat", name, REGISTRY)
    return REGISTRY[name]
