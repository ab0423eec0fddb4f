"""Directions that have nothing to do with an attack: what any change of a prompt writes into the stream.

A direction that is beyond random ones may still be no more than "the prompt got longer", "there is text in front of the
request" or "it is about something else", which random directions hardly ever are. `steer` and `ablate` take these
directions beside the one in question, at its length and with both signs, for their sign means nothing.

At the last token of a prompt its position is its length: both are one concept here.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from jaxtyping import Bool

from ctlens.analysis.base.positions import PositionsOf
from ctlens.analysis.base.recording import Readable, model_of
from ctlens.analysis.base.states import States, states
from ctlens.analysis.directions.directions import SAME, Directions, mean_difference
from ctlens.core.errors import CtlensError
from ctlens.core.keeping import keeping
from ctlens.core.public import public
from ctlens.data.chat import render
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import clusters_of
from ctlens.models.hooks import Layers

HARMLESS_WRAPPER = "harmless wrapper"
LENGTH = "length"
TOPIC = "topic"


@public
@keeping()
def concept_directions(
    model: Readable,
    pairs: Pairs,
    *,
    name: str,
    harmless: Pairs = (),
    positions: str | PositionsOf = "last",
    site: str = "resid_post",
    layers: Layers = "all",
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Directions]:
    """Makes the directions of a prompt's length, of its topic and of a harmless wrapper, by concept.

    >>> import ctlens as ct
    >>> model, pairs = ct.load_organism(), ct.threats.get("jailbreak").pairs(32, split="heldout")
    >>> found = ct.analysis.concept_directions(model, pairs, name="base", layers=[2], progress=False)
    >>> {concept: direction.source for concept, direction in found.items()}
    {'length': 'longer less shorter clean prompts', 'topic': "clean prompts about 'virus' less others"}

    Args:
        model: in eval mode, or its recording.
        pairs: clean and wrapped prompts; length and topic are those of the clean ones, so that no attack is in them.
            Where all have one length, or one topic, that concept is left out. `ctlens.pairs` makes them of two lists of
            texts.
        name: of the model; it stands in every result.
        harmless: pairs whose wrapped prompts have a harmless text where the attack would stand, for example
            `ctlens.threats.neutral_pairs(pairs, tokenizer)` in the micro-world; without them that concept is left out.
        positions: where the states are read, see `ctlens.analysis.base.states`; one that both sides have.
        site: the hook point, one of `ctlens.analysis.directions.directions.DIRECTION_SITES`.
        layers: which ones, see `ctlens.models.hooks.select_layers`.
        batch_size: prompts per forward pass.
        progress: show a progress bar.

    Raises:
        CtlensError: there is no concept to be had, or as `mean_difference`.
    """
    options: dict[str, Any] = {"positions": positions, "site": site, "layers": layers}
    options |= {"batch_size": batch_size, "progress": progress}
    found = {}
    if harmless:
        found[HARMLESS_WRAPPER] = mean_difference(model, harmless, name=name, **options)
    clean = states(model, pairs, side="clean", **options)
    tokenizer = model_of(model).tokenizer
    lengths = np.array([len(render(tokenizer, pair.clean.turns).ids) for pair in pairs])
    topics = [topic for topic, _ in map(clusters_of, pairs)]
    common = Counter(topics).most_common(1)[0][0]
    splits = {
        LENGTH: (lengths > np.median(lengths), "longer less shorter clean prompts"),
        TOPIC: (np.array([topic == common for topic in topics]), f"clean prompts about {common!r} less others"),
    }
    for concept, (chosen, source) in splits.items():
        if chosen.any() and not chosen.all():
            found |= _between(clean, chosen, concept, source, name)
    if not found:
        raise CtlensError(
            "all clean prompts have one length and one topic, so there is no concept to tell them apart: give more "
            "pairs, or harmless ones."
        )
    return found


def _between(
    clean: States, chosen: Bool[np.ndarray, " prompt"], concept: str, source: str, name: str
) -> dict[str, Directions]:
    """The difference of the mean states of some prompts and the rest; none where they agree at a layer."""
    values = clean.values.astype(float)
    means = values[:, chosen].mean(1) - values[:, ~chosen].mean(1)
    size = np.linalg.norm(values, axis=-1).mean(1)
    if (np.linalg.norm(means, axis=-1) < SAME * size).any():
        return {}
    return {concept: Directions.from_vectors(means, clean.layers, site=clean.site, source=source, model=name)}
