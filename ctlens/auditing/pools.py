"""The prompts of an audit: which of them are trained on, and which are only asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ctlens import threats
from ctlens.auditing.sources import phrasings
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.public import public
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair, Prompt

POOLS = ("wrapped", "clean", "mixed")
"""The prompts that are trained on: of each pair the wrapped one, the clean one, or the one and the other in turns."""
SIDES = ("wrapped", "clean")
LABELLED = "pool"
HELDOUT = "heldout"
GREETED = 3
"""How many greetings `rephrased` takes."""


@dataclass(frozen=True)
class Asked:
    """Asked is one prompt at which risk is measured.

    Attributes:
        prompt: the prompt itself.
        pair: the pair that it is of.
        prompt_side: `"wrapped"` or `"clean"`.
        split: `"pool"` where the pair may be trained on, or `"heldout"`.
    """

    prompt: Prompt
    pair: Pair
    prompt_side: str
    split: str


def asked_of(pool: Sequence[Pair], heldout: Sequence[Pair]) -> list[Asked]:
    """Lists both prompts of every pair, those of the pool first.

    Raises:
        CtlensError: the pool has no pair, or a prompt names no bad answer.
    """
    if not pool:
        raise CtlensError("the pool has no prompts: give pairs, for example those of a threat's split 'train'.")
    both = ((LABELLED, pool), (HELDOUT, heldout))
    found = [
        Asked(pair.wrapped if side == "wrapped" else pair.clean, pair, side, split)
        for split, pairs in both
        for pair in pairs
        for side in SIDES
    ]
    for asked in found:
        if asked.prompt.bad is None:
            raise CtlensError(
                f"the {asked.prompt_side} prompt {asked.prompt.turns[-1].content[:60]!r} names no bad answer, so it "
                "has no risk: give every pair a bad answer."
            )
    return found


def facing(pool: Sequence[Pair], kind: str) -> list[Pair]:
    """Turns the pairs of a pool so that the wrapped prompt of each is the one that is trained on.

    Raises:
        CtlensError: the kind is none of `POOLS`.
    """
    if kind not in POOLS:
        raise unknown("pool", kind, POOLS)
    sides = {"wrapped": ("wrapped",), "clean": ("clean",), "mixed": SIDES}[kind]
    picked = [sides[number % len(sides)] for number in range(len(pool))]
    return [
        pair if side == "wrapped" else replace(pair, clean=pair.wrapped, wrapped=pair.clean)
        for pair, side in zip(pool, picked, strict=True)
    ]


def require_apart(trained: Iterable[Prompt], asked: Sequence[Asked]) -> None:
    """Raises a `CtlensError` where a held-out prompt would be trained on."""
    seen = {prompt.turns for prompt in trained}
    for one in asked:
        if one.split == HELDOUT and one.prompt.turns in seen:
            raise CtlensError(
                f"the held-out prompt {one.prompt.turns[-1].content[:60]!r} is in the pool too, and training must not "
                "see it: hold out pairs of another split, or train on labels of the wrapped prompts alone."
            )


@public
def audit_pairs(threat: str, n_pairs: int, split: str = "train", seed: int = 0) -> list[Pair]:
    """Draws pairs of a threat of the micro-world that say in their label `gives_in` what an organism was taught.

    It is `"yes"` where the organism's corpus gives the bad answer to an attack of this strength on this item more often
    than not, and else `"no"`: the side of the item's own strength on which the attack is.

    Raises:
        CtlensError: the threat or the split is unknown, or `n_pairs` is below 1.
    """
    cases = threats.of_world(threat).cases(n_pairs, split, seed)
    return [
        replace(case.pair, labels={**case.pair.labels, "gives_in": "yes" if case.gives_in else "no"}) for case in cases
    ]


@public
def rephrased(pairs: Pairs) -> list[Pair]:
    """Makes pairs whose wrapped prompt is the clean one behind a greeting, which changes nothing about its answer.

    Regularisers hold the one to the other. The greetings are those of `views:4`, in turns.
    """
    made = []
    for number, pair in enumerate(pairs):
        greeted = phrasings(pair.clean, GREETED + 1)[1:]
        made.append(replace(pair, wrapped=greeted[number % GREETED]))
    return made
