"""Directions of the residual stream, with their source and their length, and random directions to compare with.

A mean difference may be taken over all pairs, over those that share the value of a label, or for
every item by itself. Where a cue has many values, such as which answer a hint names, the mean
over all of them cancels, and only directions per value or per item say what one of them does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from ctlens import plots
from ctlens.analysis.base.positions import POSITIONS_IN_WORDS, PositionsOf
from ctlens.analysis.base.recording import Readable
from ctlens.analysis.base.result import Result
from ctlens.analysis.base.states import States, states
from ctlens.core.clusters import clustered_mean
from ctlens.core.config import generator
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.keeping import keeping
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair
from ctlens.models.hooks import Layers, resolve, site_at
from ctlens.plots import Figure

ALL_PAIRS = "all"
ITEM = "item"
# Shorter than this share of the states, a difference is the rounding of forward passes.
SAME = 1e-5
DIRECTION_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@dataclass(frozen=True)
class Directions(Result):
    """One direction per layer, or one per layer and group of pairs.

    Attributes:
        unit: `[layer, group, d]`, of length 1.
        norm: `[layer, group]`, the length that a strength of 1 stands for, in units of the stream.
        rest: `[layer, group]`, the value that the component along the direction is set to when the direction
            is ablated: the clean states' mean for a mean difference, else 0.
        layers: the number of each layer.
        site: the hook point, one of `DIRECTION_SITES`.
        source: what they were made from.
        model: whose they are.
        per: `"all"` for one group, `"item"`, or the label whose values are the groups.
        groups: the name of each group.
    """

    unit: Float[np.ndarray, "layer group d"]
    norm: Float[np.ndarray, "layer group"]
    rest: Float[np.ndarray, "layer group"]
    layers: tuple[int, ...]
    site: str
    source: str
    model: str
    per: str = ALL_PAIRS
    groups: tuple[str, ...] = ("",)

    @classmethod
    def from_vectors(
        cls,
        vectors: ArrayLike,
        layers: Sequence[int],
        *,
        site: str = "resid_post",
        source: str = "given",
        model: str = "",
        per: str = ALL_PAIRS,
        groups: Sequence[str] = ("",),
    ) -> Directions:
        """Directions from vectors, such as a probe's weights in units of the stream; their own lengths are the norms.

        >>> given = Directions.from_vectors([[3.0, 4.0]], [1], source="probe weights")
        >>> given.norm.tolist(), given.unit.tolist()
        ([[5.0]], [[[0.6, 0.8]]])

        Args:
            vectors: `[layer, d]`, or `[layer, group, d]` with several groups.
            layers: the number of each layer.
            site: the hook point, one of `DIRECTION_SITES`.
            source: what they were made from.
            model: whose they are.
            per: what the groups are, see `Directions`.
            groups: the name of each group.

        Raises:
            CtlensError: the vectors are not one for each layer and group, one has no length, or
                the site is unknown.
        """
        array = np.asarray(vectors, dtype=float)
        array = array[:, None] if array.ndim == 2 else array
        if array.ndim != 3 or array.shape[:2] != (len(layers), len(groups)):
            raise CtlensError(
                f"the vectors have shape {np.shape(vectors)}, but one vector per layer and group is expected."
            )
        at = site_at(site, tuple(layers))
        if at.site not in DIRECTION_SITES:
            raise unknown("site of directions", site, DIRECTION_SITES)
        norm = np.linalg.norm(array, axis=-1)
        for layer, group in np.argwhere(~((norm > 0) & np.isfinite(norm))):
            whose = f" for {groups[group]!r}" if groups[group] else ""
            raise CtlensError(
                f"the direction at layer {layers[layer]}{whose} has no length: leave it out, or choose other positions."
            )
        return cls(array / norm[..., None], norm, 0 * norm, tuple(layers), at.site, source, model, per, tuple(groups))

    @property
    def name(self) -> str:
        """The directions in words: their source, their model and their groups."""
        model = f" of {self.model}" if self.model else ""
        groups = "" if self.per == ALL_PAIRS else f", per {self.per}"
        return f"{self.source}{model}{groups}"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and group: the norm, and the cosine with the mean direction of the layer."""
        vectors = self.unit * self.norm[..., None]
        mean = vectors.mean(1, keepdims=True)
        length = np.linalg.norm(mean, axis=-1)
        cosine = (self.unit * mean).sum(-1) / np.where(length > 0, length, np.nan)
        rows = [
            (self.layers[layer], self.groups[group], self.norm[layer, group], cosine[layer, group])
            for layer, group in np.ndindex(self.norm.shape)
        ]
        return pd.DataFrame(rows, columns=["layer", "group", "norm", "cosine_with_mean"])

    def figure(self) -> Figure:
        """The length of the directions by layer, with its interval over groups."""
        subtitle = f"{self.name}; {self.site}"
        curve = {"directions": clustered_mean(self.norm.T)}
        title = "How long are the directions?"
        return plots.layer_curves(curve, title, y_title="length", layers=self.layers, subtitle=subtitle)

    def at(self, layers: str | int | Sequence[int]) -> Directions:
        """Picks the directions of some layers, by number, or of `"all"` layers.

        Raises:
            CtlensError: a layer has no direction.
        """
        if layers == "all":
            return self
        numbers = (layers,) if isinstance(layers, int | str) else tuple(layers)
        for number in numbers:
            if number not in self.layers:
                raise CtlensError(
                    f"there is no direction at layer {number}, only at {', '.join(map(str, self.layers))}."
                )
        if not numbers:
            raise CtlensError("there is nothing to do without a layer: name at least one.")
        chosen = [self.layers.index(number) for number in numbers]
        return replace(
            self,
            unit=self.unit[chosen],
            norm=self.norm[chosen],
            rest=self.rest[chosen],
            layers=tuple(map(int, numbers)),
        )

    def group_of(self, pairs: Sequence[Pair]) -> Int[np.ndarray, " pair"]:
        """The number of each pair's group.

        Raises:
            CtlensError: a pair is in none of the groups.
        """
        number = {group: index for index, group in enumerate(self.groups)}
        names = group_names(pairs, self.per)
        for name in names:
            if name not in number:
                raise CtlensError(
                    f"there is no direction for the {self.per} {name!r}: make them from pairs that hold it."
                )
        return np.array([number[name] for name in names])

    def hook_names(self, model: LensModel) -> list[str]:
        """The hook name of each layer on a model.

        Raises:
            CtlensError: the model has no such layer, or states of another size.
        """
        if self.unit.shape[-1] != model.cfg.d_model:
            raise CtlensError(
                f"a direction has {self.unit.shape[-1]} numbers, but the model's states {model.cfg.d_model}: "
                "make it from a model of this size."
            )
        return resolve(model, self.site, self.layers)

    def by_hook(self, model: LensModel) -> dict[str, Float[Tensor, " d"]]:
        """The direction of each layer at its own length, by hook name, for example for `ctlens.training.TrainingEdits`.

        Raises:
            CtlensError: there are several groups, or as `hook_names`.
        """
        if len(self.groups) > 1:
            raise CtlensError(
                f"there is a direction for each of {len(self.groups)} groups: make one for all pairs together."
            )
        vectors = torch.from_numpy(self.unit[:, 0] * self.norm).float()
        return dict(zip(self.hook_names(model), vectors, strict=True))

    def random(self, draws: int, seed: int = 0) -> Float[np.ndarray, "draw layer group d"]:
        """The unit vectors turned at random, each draw and layer as a whole: evenly over the sphere, angles kept.

        Groups share most of their direction, and random ones that did not would average out over pairs.
        """
        return turned(self.unit, draws, seed)


def turned(
    vectors: Float[np.ndarray, "layer group d"], draws: int, seed: int = 0
) -> Float[np.ndarray, "draw layer group d"]:
    """Vectors turned at random, each draw and layer as a whole, so that their lengths and angles stay."""
    draw = generator(seed, "random directions")
    within = [np.linalg.qr(of_layer.T).R for of_layer in vectors]
    return np.stack([[(_frame(vectors.shape[-1], len(r), draw) @ r).T for r in within] for _ in range(draws)])


def _frame(d: int, size: int, draw: torch.Generator) -> Float[np.ndarray, "d size"]:
    """Orthonormal columns, evenly over all there are."""
    columns, signs = np.linalg.qr(torch.randn(d, size, generator=draw, dtype=torch.float64).numpy())
    return columns * np.sign(np.diag(signs))


def group_names(pairs: Sequence[Pair], per: str) -> list[str]:
    """The name of each pair's group.

    Raises:
        CtlensError: a pair lacks the label.
    """
    if per == ALL_PAIRS:
        return [""] * len(pairs)
    if per == ITEM:
        return [" / ".join(turn.content for turn in (*pair.clean.turns, *pair.wrapped.turns)) for pair in pairs]
    for pair in pairs:
        if per not in pair.labels:
            raise unknown("label", per, [ALL_PAIRS, ITEM, *pair.labels])
    return [pair.labels[per] for pair in pairs]


@public
@keeping()
def mean_difference(
    model: Readable | tuple[States, States],
    pairs: Pairs,
    *,
    name: str,
    per: str = ALL_PAIRS,
    positions: str | PositionsOf = "last",
    site: str = "resid_post",
    layers: Layers = "all",
    batch_size: int = 64,
    progress: bool = True,
) -> Directions:
    """The mean difference of the wrapped and the clean states of a model, by layer.

    >>> import ctlens as ct
    >>> pairs = ct.threats.get("sycophancy").pairs(32, split="heldout")
    >>> model = ct.load_organism()
    >>> one = ct.analysis.mean_difference(model, pairs, name="base", progress=False)
    >>> each = ct.analysis.mean_difference(model, pairs, name="base", per="item", progress=False)
    >>> bool((one.norm < each.norm.mean(1, keepdims=True)).all())  # hinted values cancel
    True

    Args:
        model: in eval mode; or its recording; or its wrapped and its clean states, from `ctlens.analysis.base.states`.
        pairs: clean and wrapped prompts. `ctlens.pairs` makes them of two lists of texts.
        name: of the model; it stands in every result.
        per: `"all"` pairs together, `"item"`: each by itself, or a label: its values by themselves.
        positions: where the states are read, see `ctlens.analysis.base.states`; one that both sides have.
        site: the hook point, one of `DIRECTION_SITES`.
        layers: which ones, see `ctlens.models.hooks.select_layers`.
        batch_size: prompts per forward pass.
        progress: show a progress bar. Like the positions, the site, the layers and the batch size it is not
            used where states are given.

    Raises:
        CtlensError: the model is in training mode, a name is unknown, a pair lacks the label, clean
            and wrapped states agree, so that there is no direction, or given states do not fit.
    """
    names = group_names(pairs, per)
    groups = tuple(dict.fromkeys(names))
    options = {"positions": positions, "site": site, "layers": layers, "batch_size": batch_size, "progress": progress}
    if isinstance(model, tuple):
        wrapped, clean = _counterparts(*model, len(pairs))
    else:
        wrapped = states(model, pairs, side="wrapped", **options)
        clean = states(model, pairs, side="clean", **options)
    members = [[number for number, own in enumerate(names) if own == group] for group in groups]
    source = f"mean difference of wrapped and clean {POSITIONS_IN_WORDS[wrapped.positions]}"
    return difference_of(wrapped, clean, members, source=source, model=name, per=per, groups=groups)


def difference_of(
    states: States,
    at_rest: States,
    members: Sequence[Sequence[int]],
    *,
    source: str,
    model: str,
    per: str = ALL_PAIRS,
    groups: Sequence[str] = ("",),
) -> Directions:
    """The mean of some states less that of others, by group; ablated, it leaves the others' mean component.

    Args:
        states, at_rest: of the same prompts, or of their counterparts, at one site and layers.
        members: the numbers of each group's prompts.
        source: what they are made from.
        model: whose they are.
        per: what the groups are, see `Directions`.
        groups: the name of each group.

    Raises:
        CtlensError: both agree at a layer, so that there is no direction.
    """
    rest = _group_means(at_rest, members)
    means = _group_means(states, members) - rest
    size = np.linalg.norm(at_rest.values, axis=-1).mean(1, keepdims=True)
    means[np.linalg.norm(means, axis=-1) < SAME * size] = 0
    found = Directions.from_vectors(
        means, states.layers, site=states.site, source=source, model=model, per=per, groups=groups
    )
    return replace(found, rest=(rest * found.unit).sum(-1))


def _group_means(found: States, members: Sequence[Sequence[int]]) -> Float[np.ndarray, "layer group d"]:
    """The mean state of each group of pairs."""
    return np.stack([found.values[:, of_group].astype(float).mean(1) for of_group in members], 1)


def _counterparts(wrapped: States, clean: States, n_pairs: int) -> tuple[States, States]:
    """Checks that both are of the same site, layers and positions of all pairs, and raises a `CtlensError` if not."""
    kinds = [(side.site, side.positions, side.layers, side.values.shape[1]) for side in (wrapped, clean)]
    if kinds[0] != kinds[1] or kinds[0][-1] != n_pairs or (wrapped.side, clean.side) != ("wrapped", "clean"):
        raise CtlensError(
            "give the wrapped and then the clean states of these pairs, at one site, positions and layers."
        )
    return wrapped, clean
