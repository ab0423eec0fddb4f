"""What a direction does to behaviour: added to clean prompts, or taken out of wrapped ones.

`steer` adds `alpha v` to the state of a clean prompt at one layer. How far the margin of the good
answer drops says how strongly everything above that layer still reacts to the direction. It says
nothing of whether the model writes the direction by itself: a model that no longer does, and one
that never changed, react alike.

`ablate` takes the direction out of a wrapped prompt's state, `x - (x . u - rest) u`. For a mean
difference `rest` is the component of the clean states, because a state without any would be as
unusual as one with too much; for other directions it is 0, a plain projection. How far the margin
recovers says whether the behaviour rests on the direction there.

Any change of a state costs margin, so every effect stands beside random directions: for `steer`
of equal norm, for `ablate` the change `-(x . u - rest) r` along a random unit vector `r`, as long
as that along `u`.

An edit changes all that comes after it, margins too, so the models must run, and no recording can
stand for them. What can be had beforehand is the direction, from `mean_difference` or
`probe_direction` of a recording. The margins without an edit come from the same passes, where they
are one variant in twenty or more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float

from ctlens.analysis.base.forward import batches, labelled
from ctlens.analysis.base.positions import CHOSEN, PositionsOf, positions_mask
from ctlens.analysis.directions.directions import Directions
from ctlens.analysis.directions.interventions import ABLATE, FIXED, RANDOM, STEER, Intervention
from ctlens.analysis.directions.margins import Asked, Edit
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair

SIDE = {STEER: "clean", ABLATE: "wrapped"}


def steer(
    models: LensModel | Mapping[str, LensModel],
    pairs: Sequence[Pair],
    direction: Directions,
    *,
    alphas: Sequence[int | float] = (0.5, 1.0, 2.0),
    layers: str | int | Sequence[int] = "all",
    positions: str | PositionsOf = "last",
    draws: int = 19,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Intervention:
    """Adds a direction to clean prompts, one layer at a time, beside its opposite and random ones of equal norm.

    >>> import ctlens as ct
    >>> pairs, model = ct.threats.get("jailbreak").pairs(8, split="heldout"), ct.load_organism()
    >>> direction = ct.analysis.mean_difference(model, pairs, name="base", layers=[2], progress=False)
    >>> found = ct.analysis.steer({"base": model}, pairs, direction, alphas=[1], draws=4, progress=False)
    >>> found.to_dataframe().query("variant == 'direction'")["beyond_random"].tolist()
    [True]

    Args:
        models: one, or several of one shape by their labels, in eval mode; they are run, see this module.
        pairs: their clean prompts are used; they name a good and a bad answer.
        direction: where and what, see `mean_difference` and `Directions.from_vectors`.
        alphas: strengths; 1 is the direction's own norm.
        layers: those of the direction, or some of them by number.
        positions: whose state changes, see `ctlens.analysis.base.states`.
        draws: how many random directions.
        seed: of the random directions.
        batch_size: pairs a batch.
        progress: show a progress bar.

    Raises:
        CtlensError: a model is in training mode, does not fit the direction or the pairs, a layer
            has no direction, a pair has no direction or no two answers, or there is nothing to do.
    """
    chosen = direction.at(layers)
    units = np.concatenate([[chosen.unit, -chosen.unit], _random(chosen, draws, seed)])
    strengths = np.reshape(alphas, (-1, 1, 1, 1, 1))
    written = strengths * units * chosen.norm[..., None]
    return _intervene(STEER, models, pairs, chosen, written, alphas, positions, batch_size, progress)


def ablate(
    models: LensModel | Mapping[str, LensModel],
    pairs: Sequence[Pair],
    direction: Directions,
    *,
    layers: str | int | Sequence[int] = "all",
    positions: str | PositionsOf = "last",
    draws: int = 19,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Intervention:
    """Takes a direction out of wrapped prompts, one layer at a time, beside equal changes along random ones.

    >>> import ctlens as ct
    >>> pairs, model = ct.threats.get("jailbreak").pairs(8, split="heldout"), ct.load_organism()
    >>> direction = ct.analysis.mean_difference(model, pairs, name="base", layers=[2], progress=False)
    >>> ct.analysis.ablate({"base": model}, pairs, direction, draws=4, progress=False).margins.shape
    (1, 1, 1, 5, 8)

    Arguments and errors are those of `steer`; the wrapped prompts are used.
    """
    chosen = direction.at(layers)
    written = np.concatenate([[chosen.unit], _random(chosen, draws, seed)])[None]
    return _intervene(ABLATE, models, pairs, chosen, written, (1.0,), positions, batch_size, progress)


def _random(direction: Directions, draws: int, seed: int) -> Float[np.ndarray, "draw layer group d"]:
    if draws < 2:
        raise CtlensError(f"a band needs at least 2 random directions, not {draws}.")
    return direction.random(draws, seed)


def _intervene(
    action: str,
    models: LensModel | Mapping[str, LensModel],
    pairs: Sequence[Pair],
    direction: Directions,
    written: Float[np.ndarray, "alpha variant layer group d"],
    alphas: Sequence[int | float],
    positions: str | PositionsOf,
    batch_size: int,
    progress: bool,
) -> Intervention:
    """The margins of all models with and without, see `ctlens.analysis.directions.margins.Edit` for what is written."""
    named = labelled(models)
    if not len(alphas):
        raise CtlensError("there is nothing to do without a strength: give at least one alpha.")
    groups = direction.group_of(pairs)
    read, rest = direction.unit, direction.rest[..., None]
    if action == STEER:
        read, rest = 0 * read, 0 * rest + 1
    found = []
    for model in named.values():
        names = direction.hook_names(model)
        chunks, done = [], 0
        for rows, batch in batches(model, pairs, "shared", batch_size, progress):
            asked = Asked(model, rows, SIDE[action], positions_mask(positions, SIDE[action], rows, batch))
            of_rows = groups[done : done + len(rows)]
            chunks.append(_log_probabilities(asked, names, *(part[..., of_rows, :] for part in (written, read, rest))))
            done += len(rows)
        found.append(np.concatenate(chunks, -2))
    answers = np.stack(found)  # [model, layer, strength and variant, pair, answer]
    plain, edited = (
        answers[:, 0, 0],
        answers[:, :, 1:].reshape(*answers.shape[:2], *written.shape[:2], *answers.shape[3:]),
    )
    drawn = (RANDOM,) * (written.shape[1] - len(FIXED[action]))
    return Intervention(
        margins=edited[..., 0] - edited[..., 1],
        p_bad=np.exp(edited[..., 1]),
        plain_margins=plain[..., 0] - plain[..., 1],
        plain_p_bad=np.exp(plain[..., 1]),
        models=tuple(map(str, named)),
        layers=direction.layers,
        alphas=tuple(map(float, alphas)),
        variants=FIXED[action] + drawn,
        action=action,
        positions=positions if isinstance(positions, str) else CHOSEN,
        direction=direction.name,
    )


def _log_probabilities(
    asked: Asked,
    names: Sequence[str],
    written: Float[np.ndarray, "alpha variant layer prompt d"],
    read: Float[np.ndarray, "layer prompt d"],
    rest: Float[np.ndarray, "layer prompt 1"],
) -> Float[np.ndarray, "layer edit prompt answer"]:
    """Those without an edit first, then every strength with every variant."""
    flat = written.reshape(-1, *written.shape[2:])
    with_none = np.concatenate([np.zeros_like(flat[:1]), flat])
    write, reads, rests = (
        torch.tensor(array, dtype=torch.float32, device=asked.device) for array in (with_none, read, rest[..., 0])
    )
    return np.stack(
        [
            asked.log_probabilities(name, Edit(write[:, layer], reads[layer], rests[layer]))
            for layer, name in enumerate(names)
        ]
    )
