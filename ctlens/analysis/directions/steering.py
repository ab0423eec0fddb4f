"""Edits that show what a direction does to behaviour: it is added to clean prompts, or taken out of wrapped ones.

`steer` adds `alpha v` to the state of a clean prompt at one layer. How far the logit difference of good and bad
answer drops says how strongly everything above that layer still reacts to the direction. It does not say
whether the model writes the direction by itself: a model that no longer does and a model that never changed
react alike.

`ablate` takes the direction out of a wrapped prompt's state, `x - (x . u - rest) u`. For a mean
difference `rest` is the component of the clean states, because a state without any would be as
unusual as one with too much; for other directions it is 0, a plain projection. How far the logit difference
recovers says whether the behaviour rests on the direction there.

Any change of a state lowers the logit difference, so every effect stands beside other directions: for `steer`
of equal norm, for `ablate` the change `-(x . u - rest) r` along another unit vector `r`, as long as that along `u`.
Random ones are *isotropic*, evenly over the sphere, or drawn from the *covariance* of the first model's states where
they are edited, and so point where states vary anyway. Directions of *concepts* that are no attack, as
`concept_directions` makes them, take both signs.

An edit changes all that comes after it, so the models must run and no recording can stand for them. Only the
direction can come from a recording, by `mean_difference` or `probe_direction`. The answers without an edit come
from the same passes, as one variant in twenty or more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ctlens.analysis.base.forward import comparable_by_label, pair_batches
from ctlens.analysis.base.nulls import random_from_covariance
from ctlens.analysis.base.positions import CHOSEN, PositionsOf, positions_mask
from ctlens.analysis.base.result import groups_of
from ctlens.analysis.base.states import centred, states
from ctlens.analysis.directions.directions import SAME, Directions
from ctlens.analysis.directions.edited_answers import Edit, EditedAnswers
from ctlens.analysis.directions.interventions import (
    ABLATE,
    ALONG,
    COVARIANCE,
    ISOTROPIC,
    OPPOSITE,
    RANDOM_KINDS,
    STEER,
    Intervention,
)
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.keeping import keeping
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair


@public
@keeping()
def steer(
    models: LensModel | Mapping[str, LensModel],
    pairs: Pairs,
    direction: Directions,
    *,
    alphas: Sequence[int | float] = (0.5, 1.0, 2.0),
    layers: str | int | Sequence[int] = "all",
    positions: str | PositionsOf = "last",
    concepts: Mapping[str, Directions] | None = None,
    nulls: Sequence[str] = RANDOM_KINDS,
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
        pairs: their clean prompts are used; they name a good and a bad answer. `ctlens.pairs` makes them of two lists
            of texts.
        direction: where and what, see `mean_difference` and `Directions.from_vectors`.
        alphas: strengths; 1 is the direction's own norm.
        layers: those of the direction, or some of them by number.
        positions: the tokens whose state changes, see `ctlens.analysis.base.states`.
        concepts: directions of one group that are no attack's, by name, at the same site and layers at least.
        nulls: which kinds of random directions, `"isotropic"` and `"covariance"`; the second takes prompts whose states
            differ, and is left out where there are none.
        draws: how many random directions of each kind.
        seed: of the random directions.
        batch_size: pairs per batch.
        progress: show a progress bar.

    Raises:
        CtlensError: a model is in training mode, does not fit the direction or the pairs, a layer
            has no direction, a pair has no direction or no two answers, or there is nothing to do.
    """
    chosen = direction.at(layers)
    at: dict[str, Any] = {"side": "clean", "positions": positions, "batch_size": batch_size, "progress": progress}
    variants, others = _others(models, pairs, chosen, concepts or {}, nulls, draws, seed, at)
    units = np.concatenate([[chosen.unit, -chosen.unit], others])
    written = np.reshape(alphas, (-1, 1, 1, 1, 1)) * units * chosen.norm[..., None]
    return intervene(STEER, models, pairs, chosen, written, (ALONG, OPPOSITE, *variants), alphas=alphas, **at)


@public
@keeping()
def ablate(
    models: LensModel | Mapping[str, LensModel],
    pairs: Pairs,
    direction: Directions,
    *,
    layers: str | int | Sequence[int] = "all",
    positions: str | PositionsOf = "last",
    concepts: Mapping[str, Directions] | None = None,
    nulls: Sequence[str] = RANDOM_KINDS,
    draws: int = 19,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Intervention:
    """Takes a direction out of wrapped prompts, one layer at a time, beside equal changes along random ones.

    >>> import ctlens as ct
    >>> pairs, model = ct.threats.get("jailbreak").pairs(8, split="heldout"), ct.load_organism()
    >>> direction = ct.analysis.mean_difference(model, pairs, name="base", layers=[2], progress=False)
    >>> ct.analysis.ablate({"base": model}, pairs, direction, draws=4, progress=False).logit_diffs.shape
    (1, 1, 1, 9, 8)

    Arguments and errors are those of `steer`; the wrapped prompts are used.
    """
    chosen = direction.at(layers)
    at: dict[str, Any] = {"side": "wrapped", "positions": positions, "batch_size": batch_size, "progress": progress}
    variants, others = _others(models, pairs, chosen, concepts or {}, nulls, draws, seed, at)
    written = np.concatenate([[chosen.unit], others])[None]
    return intervene(ABLATE, models, pairs, chosen, written, (ALONG, *variants), **at)


def _others(
    models: LensModel | Mapping[str, LensModel],
    pairs: Sequence[Pair],
    direction: Directions,
    concepts: Mapping[str, Directions],
    nulls: Sequence[str],
    draws: int,
    seed: int,
    at: dict[str, Any],
) -> tuple[list[str], Float[np.ndarray, "variant layer group d"]]:
    """The other directions that stand beside one: the name of each, and its unit vectors.

    Raises:
        CtlensError: a kind of random direction is unknown, there are fewer than two draws, no null at all, or a concept
            does not fit.
    """
    for kind in nulls:
        if kind not in RANDOM_KINDS:
            raise unknown("kind of random direction", kind, RANDOM_KINDS)
    if not nulls:
        raise CtlensError("an effect says nothing without a null: name at least one kind of random direction.")
    drawn = {}
    if ISOTROPIC in nulls:
        drawn[ISOTROPIC] = random_units(direction, draws, seed)
    if COVARIANCE in nulls:
        first = next(iter(comparable_by_label(models).values()))
        direction.hook_names(first)  # refuses one of another size before states are read
        found = states(first, pairs, site=direction.site, layers=direction.layers, **at)
        spread = centred(found)
        if np.linalg.norm(spread, axis=-1).max(1).min() > SAME * np.linalg.norm(found.values, axis=-1).mean():
            of_layers = random_from_covariance(spread, draws, seed)[:, :, None]
            drawn[COVARIANCE] = np.broadcast_to(of_layers, (draws, *direction.unit.shape))
    if not drawn:
        raise CtlensError(
            "the states of these prompts do not differ, so there is no covariance to draw from: name 'isotropic' too."
        )
    names = [kind for kind, units in drawn.items() for _ in units]
    signed = []
    for name, concept in concepts.items():
        unit = _unit_of(name, concept, direction)
        signed += [unit, -unit]
        names += [name, f"not {name}"]
    return names, np.concatenate([*drawn.values(), *([signed] if signed else [])])


def _unit_of(name: str, concept: Directions, direction: Directions) -> Float[np.ndarray, "layer group d"]:
    """The unit vectors of a concept, one per group of the direction.

    Raises:
        CtlensError: it is of another site, lacks a layer or has several groups, or its name stands for something else.
    """
    if name in (ALONG, OPPOSITE, *RANDOM_KINDS):
        raise CtlensError(f"{name!r} is the name of another variant: call the concept something else.")
    if concept.site != direction.site or len(concept.groups) > 1:
        raise CtlensError(
            f"the concept {name!r} is at {concept.site} for {len(concept.groups)} groups, and the direction at "
            f"{direction.site}: make it there, for all pairs together."
        )
    return np.broadcast_to(concept.at(direction.layers).unit, direction.unit.shape)


def random_units(direction: Directions, draws: int, seed: int) -> Float[np.ndarray, "draw layer group d"]:
    """Random directions for a band, see `Directions.random`; raises a `CtlensError` for fewer than two."""
    if draws < 2:
        raise CtlensError(f"a band needs at least 2 random directions, not {draws}.")
    return direction.random(draws, seed)


def intervene(
    action: str,
    models: LensModel | Mapping[str, LensModel],
    pairs: Sequence[Pair],
    direction: Directions,
    written: Float[np.ndarray, "alpha variant layer group d"],
    variants: Sequence[str],
    *,
    side: str,
    alphas: Sequence[int | float] = (1.0,),
    positions: str | PositionsOf = "last",
    batch_size: int = 64,
    progress: bool = True,
) -> Intervention:
    """Runs every model with and without the edits.

    Args:
        action: `"steer"`, which adds what is written, or `"ablate"`, which writes it for the direction's component.
        models, pairs, direction, alphas, positions, batch_size, progress: as of `steer`.
        written: the `write` of `edited_answers.Edit`.
        variants: the name of each variant.
        side: which prompt of a pair is edited, `"clean"` or `"wrapped"`.
    """
    named = comparable_by_label(models)
    if not len(alphas):
        raise CtlensError("there is nothing to do without a strength: give at least one alpha.")
    numbers = direction.group_of(pairs)
    read = direction.unit
    rest = direction.rest[..., None]
    if action == STEER:  # the vector itself is added, whatever the state is
        read = np.zeros_like(read)
        rest = np.ones_like(rest)
    log_probabilities = []
    for model in named.values():
        names = direction.hook_names(model)
        chunks = []
        done = 0
        for rows, batch in pair_batches(model, pairs, "shared", batch_size, progress):
            mask = positions_mask(positions, side, rows, batch)
            answers = EditedAnswers(model, rows, side, mask, names)
            of_rows = numbers[done : done + len(rows)]
            chunks.append(
                _log_probabilities(answers, names, written[..., of_rows, :], read[:, of_rows], rest[:, of_rows])
            )
            done += len(rows)
        log_probabilities.append(np.concatenate(chunks, -2))
    return _result(
        np.stack(log_probabilities),
        models=tuple(map(str, named)),
        alphas=tuple(map(float, alphas)),
        variants=tuple(variants),
        action=action,
        positions=positions if isinstance(positions, str) else CHOSEN,
        direction=direction,
        groups=groups_of(pairs),
    )


def _result(
    log_probabilities: Float[np.ndarray, "model layer edit pair answer"],
    *,
    models: tuple[str, ...],
    alphas: tuple[float, ...],
    variants: tuple[str, ...],
    action: str,
    positions: str,
    direction: Directions,
    groups: dict[str, np.ndarray],
) -> Intervention:
    """The result from the log-probabilities of both answers: first without an edit, then per strength and variant."""
    plain = log_probabilities[:, 0, 0]
    edited = log_probabilities[:, :, 1:]
    edited = edited.reshape(*edited.shape[:2], len(alphas), len(variants), *edited.shape[3:])
    return Intervention(
        logit_diffs=edited[..., 0] - edited[..., 1],
        p_bad=np.exp(edited[..., 1]),
        plain_logit_diffs=plain[..., 0] - plain[..., 1],
        plain_p_bad=np.exp(plain[..., 1]),
        models=models,
        layers=direction.layers,
        alphas=alphas,
        variants=variants,
        action=action,
        positions=positions,
        direction=direction.name,
        groups=groups,
    )


def _log_probabilities(
    answers: EditedAnswers,
    names: Sequence[str],
    written: Float[np.ndarray, "alpha variant layer prompt d"],
    read: Float[np.ndarray, "layer prompt d"],
    rest: Float[np.ndarray, "layer prompt 1"],
) -> Float[np.ndarray, "layer edit prompt answer"]:
    """The log-probabilities without an edit first, then under every strength with every variant."""
    flat = written.reshape(-1, *written.shape[2:])
    with_none = np.concatenate([np.zeros_like(flat[:1]), flat])
    write = answers.tensor(with_none)
    reads = answers.tensor(read)
    rests = answers.tensor(rest[..., 0])
    return np.stack(
        [
            answers.log_probabilities(name, Edit(write[:, layer], reads[layer], rests[layer]))
            for layer, name in enumerate(names)
        ]
    )
