"""The base of every loss: a frozen config that names its hook points and computes one value per pair and hook point."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Shaped
from torch import Tensor

from ctlens.core.arguments import require_types
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.limits import POSITIVE, require
from ctlens.core.types import Activations, CleanLogits, LensModel, Logits, PerRow, Positions, Scalar, widened
from ctlens.data.alignment import WINDOWS
from ctlens.data.batch import PairBatch
from ctlens.models.hooks import Layers, resolve, select_layers, site_at

Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]
OUTPUT = "logits"
CLEAN_SIDES = ("reference", "own")
_MOVING = re.compile(r"ema\((?P<alpha>\d*\.?\d+)\)|refresh\((?P<every>\d+)(?P<gated>, gated)?\)")
ANSWERS = ("greedy", "sampled", "consensus", "rollouts")
LAYER_WEIGHTS: Mapping[str, Callable[[int, int], float]] = {
    "uniform": lambda layer, n_layers: 1.0,
    "linear": lambda layer, n_layers: (layer + 1) / n_layers,
    "exponential": lambda layer, n_layers: 2 ** (layer / n_layers) - 1,
}
"""Each function gives the weight of a layer in the mean over layers; two grow with depth (the stack paper's code)."""


@dataclass(frozen=True)
class Forwards:
    """Forwards holds the forward passes of one batch, on the clean and on the wrapped prompts.

    Attributes:
        batch: tokens and aligned positions.
        clean: activations on the clean prompts, without gradient: those of the reference or, for a loss
            with `clean="own"`, those of the trained model itself.
        wrapped: activations of the trained model on the wrapped prompts, with gradient.
        wrapped_logits: `[batch, pos, d_vocab]` of the trained model on the wrapped prompts.
        clean_logits: logits on the clean prompts; None if no loss needs them.
        advantages: for a loss on rollouts, the advantage of each row's sampled answer; else None.
        gaps: for a loss on rollouts, the gap that it closes on each row's prompt; else None.
        reference_log_p: for a preference, the reference's log-probability of each row's answer; else None.
        known: losses of each row, by hook point, that were already computed during the forward passes.
        subspaces: orthonormal bases `[rank, d]` of the subspaces that a loss asked for, by hook point.
    """

    batch: PairBatch
    clean: Activations
    wrapped: Activations
    wrapped_logits: Logits
    clean_logits: CleanLogits | None = None
    advantages: PerRow | None = None
    gaps: PerRow | None = None
    reference_log_p: PerRow | None = None
    known: Mapping[str, PerRow] = field(default_factory=dict)
    subspaces: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class MovingTarget:
    """MovingTarget says how a copy of the trained model follows it, see `ctlens.training.moving`.

    Attributes:
        alpha: the share of itself that the copy keeps at a step; of no meaning where it is refreshed.
        every: it becomes the trained model behind so many steps; 0 if it follows at every step.
        gated: only where the trained model answers the clean prompts no worse.
    """

    alpha: float = 0.0
    every: int = 0
    gated: bool = False


def moving_target(clean: str) -> MovingTarget | None:
    """Reads a clean side that moves; None for one of `CLEAN_SIDES`.

    >>> moving_target("ema(0.99)"), moving_target("refresh(8, gated)")
    (MovingTarget(alpha=0.99, every=0, gated=False), MovingTarget(alpha=0.0, every=8, gated=True))

    Raises:
        CtlensError: it is none, or it would never move.
    """
    if clean in CLEAN_SIDES:
        return None
    found = _MOVING.fullmatch(clean)
    if found is None:
        raise unknown("clean side", clean, (*CLEAN_SIDES, "ema(0.99)", "refresh(8)", "refresh(8, gated)"))
    if found["alpha"] is None:
        if int(found["every"]) < 1:
            raise CtlensError(f"{clean} is never refreshed: name how many steps lie between two refreshes.")
        return MovingTarget(every=int(found["every"]), gated=bool(found["gated"]))
    alpha = float(found["alpha"])
    if not 0 <= alpha < 1:
        raise CtlensError(f"{clean} never moves: the share that it keeps is at least 0 and less than 1.")
    return MovingTarget(alpha=alpha)


@dataclass(frozen=True)
class LossValue:
    """LossValue is the value of a loss on one batch.

    Attributes:
        total: the weighted loss, connected to the graph.
        by_hook: the unweighted value at each hook point, averaged over pairs, detached.
    """

    total: Scalar
    by_hook: Mapping[str, Scalar]


class Loss(ABC):
    """Loss is the base class of every consistency loss. Its subclasses are frozen dataclasses with options as fields.

    The total is `weight` times the mean over hook points of the mean over pairs, so that adding a
    layer or a pair does not change its scale; a loss may give its hook points factors in that mean.
    """

    name: ClassVar[str]
    weight: float

    @property
    def windows(self) -> tuple[str, ...]:
        """The loss reads these alignment windows; a loss on answers reads none."""
        return ()

    @property
    def clean_side(self) -> str:
        """The loss compares with the clean side of this model: one of `CLEAN_SIDES`, or a `moving_target`."""
        return "reference"

    @property
    def needs_clean_activations(self) -> bool:
        """True if the loss reads its hook points on the clean prompts too."""
        return True

    @property
    def needs_clean_logits(self) -> bool:
        """True if the loss reads the logits of the clean prompts."""
        return False

    @property
    def mean_over_heads(self) -> bool:
        """True if the value at a hook point is the mean of one value per head."""
        return False

    @property
    def relative_to_gap(self) -> bool:
        """True if the value at each hook point is divided by its value before training."""
        return False

    @property
    def makes_rows(self) -> bool:
        """True if the loss runs on rows of its own making, such as sampled answers, and not on the pairs themselves."""
        return False

    @property
    def keeps_variants(self) -> bool:
        """True if the pairs of one clean prompt, its variants, must come in one batch."""
        return self.answers == "consensus"

    @property
    def subspace_rank(self) -> int:
        """The rank of the subspaces that the loss is given by hook point; 0 if it takes the whole stream."""
        return 0

    @property
    def subspace_is_random(self) -> bool:
        """True if these subspaces are drawn, and not those of the shifts that wrappers make before training."""
        return False

    @property
    def answers(self) -> str:
        """The answers behind the prompts are of this kind (`ANSWERS`); empty if the loss needs no answers."""
        return "greedy" if "answer" in self.windows else ""

    @property
    def drawn_at(self) -> tuple[float, float]:
        """The reference's answers are drawn at this temperature and `top_p`, if they are sampled."""
        return 1.0, 1.0

    @property
    def answer_tail(self) -> bool:
        """True if the answers end in what the chat template writes behind an answer's end token."""
        return False

    @property
    def answers_on_both_sides(self) -> bool:
        """True if the answers must stand behind the clean prompts too."""
        return "answer" in self.windows

    def factors(self, model: LensModel) -> dict[str, float]:
        """Maps each hook point that the loss reads on this model to its factor in the mean over them."""
        return dict.fromkeys(self.hook_names(model), 1.0)

    @abstractmethod
    def hook_names(self, model: LensModel) -> list[str]:
        """Lists the full names of the hook points the loss reads on this model."""

    @abstractmethod
    def row_values(self, forwards: Forwards, hook_names: Sequence[str]) -> dict[str, PerRow]:
        """Measures the unweighted loss per hook point and pair, `[batch]` each."""

    def measure(self, forwards: Forwards, factors: Mapping[str, float]) -> LossValue:
        """Measures the loss on one batch without its weight, with or without a graph; `compute` applies the weight."""
        values = forwards.known or self.row_values(forwards, list(factors))
        by_hook = {name: values[name].mean() for name in values}
        total = torch.stack([factors.get(name, 1.0) * value for name, value in by_hook.items()]).mean()
        return LossValue(total, {name: value.detach() for name, value in by_hook.items()})

    def compute(self, forwards: Forwards, factors: Mapping[str, float]) -> LossValue:
        """Computes the weighted loss on one batch, to be trained on.

        Args:
            forwards: both sides of the batch.
            factors: from `factors(model)`.

        Raises:
            CtlensError: the loss has no gradient, because the passes kept no graph.
        """
        value = self.measure(forwards, factors)
        if not value.total.requires_grad:
            raise CtlensError(f"the loss {self.name} has no gradient: capture its activations with grad=True.")
        return replace(value, total=self.weight * value.total)


@dataclass(frozen=True)
class InternalLoss(Loss):
    """InternalLoss is a loss on activations at aligned positions.

    Attributes:
        layers: `"all"`, `"last"`, `"middle"`, `"last_half"`, `"last_quarter"`, or layer numbers.
        window: the alignment window, see `ctlens.data.alignment.align`.
        weight: factor of the total.
        layer_weights: one of `LAYER_WEIGHTS`, the factors in the mean over layers.
        clean: the model whose activations on the clean prompts are the target: the `"reference"`, or
            `"own"` for the trained model, whose activations move as it is trained; or a copy that follows it,
            `"ema(0.99)"`, `"refresh(8)"` or `"refresh(8, gated)"`, see `ctlens.training.moving`.
        gap: divide each layer's term by its value before training, which a trainer measures, so that
            every layer starts at the same value and no layer dominates by its scale.
    """

    layers: Layers = "all"
    window: str = "shared"
    weight: float = 1.0
    layer_weights: str = "uniform"
    clean: str = "reference"
    gap: bool = False

    def __post_init__(self) -> None:
        require_types(self)
        check_option("alignment window", self.window, WINDOWS)
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.layers, str):
            select_layers(1, self.layers)
        check_option("layer weights", self.layer_weights, tuple(LAYER_WEIGHTS))
        moving_target(self.clean)
        require(POSITIVE, weight=self.weight)

    @property
    def windows(self) -> tuple[str, ...]:
        """The loss reads its one alignment window."""
        return (self.window,)

    @property
    def clean_side(self) -> str:
        """The loss compares with the clean side that `clean` names."""
        return self.clean

    @property
    def relative_to_gap(self) -> bool:
        """True if each layer's term is divided by its value before training."""
        return self.gap

    @property
    @abstractmethod
    def point(self) -> str:
        """The loss reads this hook point of each layer, given in short (`ctlens.models.hooks.SHORTHANDS`)."""

    def hook_names(self, model: LensModel) -> list[str]:
        """Lists the hook point at every selected layer."""
        return resolve(model, self.point, self.layers)

    def factors(self, model: LensModel) -> dict[str, float]:
        """Maps the hook points to the factors of their layers."""
        factor = LAYER_WEIGHTS[self.layer_weights]
        n_layers = model.cfg.n_layers
        layers = select_layers(n_layers, self.layers)
        return {name: factor(layer, n_layers) for name, layer in zip(self.hook_names(model), layers, strict=True)}


@dataclass(frozen=True)
class VectorLoss(InternalLoss):
    """VectorLoss is a loss on activation vectors: a distance at each aligned token, averaged over tokens.

    Attributes:
        site: the hook point that it reads, from the class's `sites`; in full, as `"blocks.3.hook_resid_post"`, it
            names the layer too.
        distance: the name of the distance, from the class's `distances`.
    """

    sites: ClassVar[tuple[str, ...]]
    distances: ClassVar[Mapping[str, Distance]]
    site: str = ""
    distance: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        at = site_at(self.site, self.layers)
        object.__setattr__(self, "site", at.site)
        object.__setattr__(self, "layers", at.layers)
        check_option(f"site of {self.name}", self.site, self.sites)
        check_option(f"distance of {self.name}", self.distance, tuple(self.distances))

    @property
    def point(self) -> str:
        """The loss reads the hook point of its site."""
        return self.site

    def row_values(self, forwards: Forwards, hook_names: Sequence[str]) -> dict[str, PerRow]:
        """Measures the distance per hook point and pair, averaged over aligned tokens; the clean side is detached."""
        matched = forwards.batch.matched[self.window]
        distance = self.distances[self.distance]
        values: dict[str, PerRow] = {}
        for name in hook_names:
            wrapped = at_positions(forwards.wrapped[name], matched.wrapped)
            clean = at_positions(forwards.clean[name], matched.clean).detach()
            values[name] = matched.row_mean(distance(wrapped, clean))
        return values


def require_distinct(losses: Sequence[Loss]) -> None:
    """Raises a `CtlensError` when two losses have the same name."""
    names = [loss.name for loss in losses]
    if len(set(names)) < len(names):
        raise CtlensError(f"a loss is given twice ({', '.join(names)}): name each once and set its weight.")


def check_option(kind: str, value: str, known: Sequence[str]) -> None:
    """Raises a `CtlensError` unless `value` is a `known` one."""
    if value not in known:
        raise unknown(kind, value, known)


def at_positions(activation: Shaped[Tensor, "batch pos *d"], positions: Positions) -> Shaped[Tensor, "batch width *d"]:
    """Takes the activation vectors at given positions of each row, in float32 at least."""
    rows = torch.arange(len(activation), device=activation.device)[:, None]
    flat = (rows * activation.shape[1] + positions).flatten()  # one index: its backward pass is the fastest
    return widened(activation.flatten(0, 1).index_select(0, flat).unflatten(0, positions.shape))
