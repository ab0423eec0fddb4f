"""The threats by name: each is a family of wrappers with its good and its bad answers.

A name imported as itself (`from ... import X as X`) is public to type checkers; no other list of them is kept.
"""

from __future__ import annotations

from ctlens.core.errors import unknown
from ctlens.core.public import public
from ctlens.threats.admissions import AdmissionJudge as AdmissionJudge
from ctlens.threats.admissions import by_wording as by_wording
from ctlens.threats.base import Case as Case
from ctlens.threats.base import Count as Count
from ctlens.threats.base import Judge as Judge
from ctlens.threats.base import Outcomes as Outcomes
from ctlens.threats.base import Threat as Threat
from ctlens.threats.base import WorldThreat as WorldThreat
from ctlens.threats.base import Wrapper as Wrapper
from ctlens.threats.base import by_mention as by_mention
from ctlens.threats.base import judge as judge
from ctlens.threats.conditional import Conditional
from ctlens.threats.frustration import Frustration
from ctlens.threats.jailbreak import Jailbreak
from ctlens.threats.natural.base import Natural as Natural
from ctlens.threats.natural.beginning import Beginning
from ctlens.threats.natural.character import Character
from ctlens.threats.natural.facts import Facts, FreeFacts
from ctlens.threats.natural.order import Order
from ctlens.threats.natural.paraphrase import Paraphrase
from ctlens.threats.natural.screening import Screening as Screening
from ctlens.threats.natural.screening import grade as grade
from ctlens.threats.natural.screening import screen as screen
from ctlens.threats.natural.system import System
from ctlens.threats.natural.wrappers import fact_wrappers as fact_wrappers
from ctlens.threats.natural.wrappers import natural_wrappers as natural_wrappers
from ctlens.threats.natural.wrappers import prefill_wrappers as prefill_wrappers
from ctlens.threats.natural.wrappers import wrap as wrap
from ctlens.threats.persona import Persona
from ctlens.threats.prefill import Prefill
from ctlens.threats.replies import Reply as Reply
from ctlens.threats.replies import ask as ask
from ctlens.threats.sycophancy import Sycophancy

REGISTRY: dict[str, WorldThreat] = {
    threat.name: threat for threat in (Sycophancy(), Jailbreak(), Persona(), Prefill(), Frustration(), Conditional())
}
NATURAL: dict[str, Natural] = {
    threat.name: threat for threat in (Facts(), FreeFacts(), Order(), Paraphrase(), Beginning(), System(), Character())
}


def names() -> list[str]:
    """Lists the names of the threats of the micro-world, in which the organism lives.

    >>> names()
    ['sycophancy', 'jailbreak', 'persona', 'prefill', 'frustration', 'conditional']
    """
    return list(REGISTRY)


def natural_names() -> list[str]:
    """Lists the names of the natural threats, for models from elsewhere; an organism has not the words for them.

    >>> natural_names()
    ['facts', 'free_facts', 'order', 'paraphrase', 'beginning', 'system', 'character']
    """
    return list(NATURAL)


@public
def get(name: str) -> Threat:
    """Returns the threat of that name, of the micro-world or natural.

    Raises:
        CtlensError: no threat has it.
    """
    known: dict[str, Threat] = {**REGISTRY, **NATURAL}
    if name not in known:
        raise unknown("threat", name, known)
    return known[name]


def of_world(name: str) -> WorldThreat:
    """Returns the threat of the micro-world of that name, which an organism can learn from.

    Raises:
        CtlensError: no threat of the micro-world has it.
    """
    if name not in REGISTRY:
        raise unknown("threat of the micro-world", name, REGISTRY)
    return REGISTRY[name]
