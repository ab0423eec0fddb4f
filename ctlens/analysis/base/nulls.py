"""Nulls: a number that is found where there is nothing to find, for an effect to be held against.

Any training changes a model and any edit changes an answer, so an effect says little until it stands beside its null:

- *retention alone*, a training without consistency loss, is the floor of `shift_similarity` and the control of
  `erase_or_mask`. It is a null only as far as it moved the model at all, which `hardly_moved` tells;
- *random directions* as long as the real one are the null of `steer`, `ablate` and `shift_similarity`: an effect of the
  first two must lie above the `random_band`. These and `boundary_direction` have both evenly drawn ones and ones drawn
  from the covariance of the states;
- *concepts* that are no attack, such as a prompt's length, are a null of `steer` and `ablate` too, see
  `ctlens.analysis.directions.concepts`;
- *label swaps*, pairs whose answer moves because another thing is asked, are a null of every analysis that takes pairs:
  what it finds on them too is how the model fetches an answer, and not how it gives in;
- *random keys*, as many as the real ones, are the null of `knockout`, see `ctlens.analysis.attention.cuts`;
- *shuffled labels* and random features are those of `probe`, see `ctlens.analysis.probing.classifiers`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float

from ctlens.core.config import generator
from ctlens.core.errors import CtlensError
from ctlens.core.public import public
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair, Prompt, clusters_of

# A null that moved less than this share of the models it is held against is called weak. Chosen by eye.
WEAK_NULL = 0.05


def hardly_moved(name: str, share: float, role: str) -> str:
    """The warning in a figure that a null moved too little to be one; empty for a null that moved enough.

    >>> hardly_moved("retention", 0.02, "floor"), hardly_moved("retention", 0.4, "floor")
    ('; retention hardly moved (2.0% of the others): a weak floor', '')

    Args:
        name: of the null.
        share: how far the null moved, as a share of how far the models moved that it is held against.
        role: what it is called in that analysis, `"floor"` or `"control"`.
    """
    if not share < WEAK_NULL:  # also where there is no share
        return ""
    words = f"{share:.1%}" if share >= 0.0005 else "under 0.1%"
    return f"; {name} hardly moved ({words} of the others): a weak {role}"


@public
def label_swaps(pairs: Pairs, pool: Pairs = ()) -> list[Pair]:
    """Makes pairs whose answer moves for a reason that is no attack: the wrapped prompt asks about something else.

    It is the clean prompt of another pair, to which this pair's bad answer is the right one. A head or a direction that
    carries the answer there as well as under the attack serves retrieval, not the attack. The two prompts share the
    question's words and not its subject: where they have as many tokens, `window="position"` aligns them.

    >>> import ctlens as ct
    >>> pairs = ct.threats.get("sycophancy").pairs(96, split="heldout")
    >>> swapped = ct.analysis.label_swaps(pairs)[0]
    >>> [(prompt.turns[0].content, prompt.good, prompt.bad) for prompt in (swapped.clean, swapped.wrapped)]
    [('what is the city of mavik ?', 'lima', 'cairo'), ('what is the city of vokin ?', 'lima', 'cairo')]

    Args:
        pairs: with good and bad answers on the wrapped side. `ctlens.pairs` makes them of two lists of texts.
        pool: the pairs whose clean prompts may be asked, by default `pairs`.

    Returns:
        Those of the pairs to whose bad answer the pool has a question, in their order; their label `wrapper` is what
        the other question is about.

    Raises:
        CtlensError: it has none for any of them.
    """
    asked: dict[str | None, dict[Prompt, str]] = {}
    for pair in pool or pairs:
        asked.setdefault(pair.clean.good, {}).setdefault(pair.clean, clusters_of(pair)[0])
    found = []
    for number, pair in enumerate(pairs):
        others = asked.get(pair.wrapped.bad, {}) if pair.wrapped.bad else {}
        if others:
            other, topic = list(others.items())[number % len(others)]
            wrapped = replace(pair.wrapped, turns=other.turns)
            found.append(
                replace(pair, wrapped=wrapped, benign=None, shared=(), labels={**pair.labels, "wrapper": topic})
            )
    if not found:
        raise CtlensError(
            "no question of the pool has a bad answer of these pairs for its right one: give a pool of more pairs."
        )
    return found


def random_band(effects: Float[np.ndarray, "*axes draw pair"]) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest of the random draws' mean effects over pairs.

    With 19 draws, the mean effect of one more random draw lies above the band once in 20 times.

    >>> low, high = random_band(np.array([[0.0, 2.0], [2.0, 4.0]]))
    >>> float(low), float(high)
    (1.0, 3.0)
    """
    means = effects.mean(-1)
    return means.min(-1), means.max(-1)


def random_directions(d: int, draws: int, *shape: int) -> Float[np.ndarray, "draw ... d"]:
    """Random directions of length 1, evenly over the sphere and the same in every call."""
    drawn = np.random.default_rng(0).normal(size=(draws, *shape, d))
    return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)


def random_from_covariance(
    centred: Float[np.ndarray, "layer state d"], draws: int, seed: int = 0
) -> Float[np.ndarray, "draw layer d"]:
    """Random directions of length 1 from the normal distribution with the covariance of some states.

    They point where states vary anyway, and so change more of what follows than directions evenly over the sphere do.

    Args:
        centred: the states less their mean, by layer; their order does not matter.
        draws: how many.
        seed: of the draws.
    """
    draw = generator(seed, "directions from a covariance")
    drawn = []
    for states in centred.astype(float):
        values, axes = np.linalg.eigh(states.T @ states)
        root = (axes * np.sqrt(values.clip(0))) @ axes.T  # the symmetric one: axes of equal variance may turn
        normal = torch.randn(draws, len(values), generator=draw, dtype=torch.float64).numpy()
        drawn.append(normal @ root)
    vectors = np.stack(drawn, 1)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
