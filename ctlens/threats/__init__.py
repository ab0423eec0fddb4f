"""Threats by name: families of wrappers, with what is good and bad under them."""

from __future__ import annotations

from ctlens.core.errors import unknown
from ctlens.threats.base import Case, Count, Outcomes, Threat, Wrapper, judge
from ctlens.threats.conditional import Conditional
from ctlens.threats.frustration import Frustration
from ctlens.threats.jailbreak import Jailbreak
from ctlens.threats.natural import fact_wrappers, natural_wrappers, prefill_wrappers, wrap
from ctlens.threats.persona import Persona
from ctlens.threats.prefill import Prefill
from ctlens.threats.replies import Judge, Reply, ask
from ctlens.threats.sycophancy import Sycophancy

__all__ = [
    "Case",
    "Count",
    "Judge",
    "Outcomes",
    "Reply",
    "Threat",
    "Wrapper",
    "ask",
    "fact_wrappers",
    "get",
    "judge",
    "names",
    "natural_wrappers",
    "prefill_wrappers",
    "wrap",
]

REGISTRY: dict[str, Threat] = {
    threat.name: threat for threat in (Sycophancy(), Jailbreak(), Persona(), Prefill(), Frustration(), Conditional())
}


def names() -> list[str]:
    """The names of all threats.

    >>> names()
    ['sycophancy', 'jailbreak', 'persona', 'prefill', 'frustration', 'conditional']
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
