"""The threats by name: each is a family of wrappers with its good and its bad answers.

A name imported as itself (`from ... import X as X`) is public to type checkers; no other list of them is kept.
"""

from __future__ import annotations

from ctlens.core.errors import unknown
from ctlens.core.public import public
from ctlens.threats.base import Case as Case
from ctlens.threats.base import Count as Count
from ctlens.threats.base import Outcomes as Outcomes
from ctlens.threats.base import Threat as Threat
from ctlens.threats.base import Wrapper as Wrapper
from ctlens.threats.base import judge as judge
from ctlens.threats.conditional import Conditional
from ctlens.threats.frustration import Frustration
from ctlens.threats.jailbreak import Jailbreak
from ctlens.threats.natural import fact_wrappers as fact_wrappers
from ctlens.threats.natural import natural_wrappers as natural_wrappers
from ctlens.threats.natural import prefill_wrappers as prefill_wrappers
from ctlens.threats.natural import wrap as wrap
from ctlens.threats.persona import Persona
from ctlens.threats.prefill import Prefill
from ctlens.threats.replies import Judge as Judge
from ctlens.threats.replies import Reply as Reply
from ctlens.threats.replies import ask as ask
from ctlens.threats.sycophancy import Sycophancy

REGISTRY: dict[str, Threat] = {
    threat.name: threat for threat in (Sycophancy(), Jailbreak(), Persona(), Prefill(), Frustration(), Conditional())
}


def names() -> list[str]:
    """Lists the names of all threats.

    >>> names()
    ['sycophancy', 'jailbreak', 'persona', 'prefill', 'frustration', 'conditional']
    """
    return list(REGISTRY)


@public
def get(name: str) -> Threat:
    """Returns the threat of that name.

    Raises:
        CtlensError: no threat has it.
    """
    if name not in REGISTRY:
        raise unknown("threat", name, REGISTRY)
    return REGISTRY[name]
