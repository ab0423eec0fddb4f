"""The result of a comparison of shifts: every number between its ceiling and its floors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from ctlens import plots
from ctlens.analysis.base.nulls import WEAK_NULL, hardly_moved
from ctlens.analysis.base.positions import ALIGNED_POSITIONS, POSITIONS_IN_WORDS, STATE_POSITIONS
from ctlens.analysis.base.result import ResultOverPairs
from ctlens.analysis.residual.likeness import ceilings
from ctlens.analysis.residual.shift_vectors import SHIFT_PARTS
from ctlens.analysis.residual.similarity_statistics import STATISTICS, title_of
from ctlens.core.errors import CtlensError, unknown
from ctlens.plots import Figure

_PART_IN_TITLE = {"all": "", "along": " along the clean-wrapped gap", "off": " off the clean-wrapped gap"}
_READING = "outlined: ceilings; in brackets: not above the floor"
_CORRECTED = "; divided by the ceilings"
UNDECIDED = ""
AT_FLOOR = "at the floor"
ABOVE_FLOOR = "above the floor"
BELOW_CEILING = "between floor and ceiling"
AT_CEILING = "at the ceiling"
SIMILARITY_VERDICTS = (UNDECIDED, AT_FLOOR, ABOVE_FLOOR, BELOW_CEILING, AT_CEILING)
_OF_ONE = ("random_low", "random_high", "length")
_OF_TWO = (*STATISTICS, "n_prompts", "by_prompt", "without_seed")
_COLUMNS = [
    *("quantity", "part", "positions", "layer", "a", "b"),
    *STATISTICS,
    *("ceiling", "floor", "random_low", "random_high"),
    *("length_a", "length_b", "weak_floor", "n_prompts", "verdict"),
]


@dataclass(frozen=True)
class ShiftSimilarity(ResultOverPairs):
    """The result of `shift_similarity`: how alike the shifts of trained models are, for each two methods.

    Attributes:
        value: `[quantity, part, positions, layer, a, b]`, the mean over pairs of different seeds; the
            diagonal holds the ceilings. NaN where there is none: at the wrapper's tokens there is
            no gap to split by, and a method of one seed has no ceiling.
        ci_low, ci_high: its 95 percent interval over prompts.
        seed_low, seed_high: its range over pairs of seeds.
        corrected, corrected_low, corrected_high: the value divided by `sqrt(ceiling_a ceiling_b)`,
            and the interval over prompts.
        random_low, random_high: `[quantity, part, positions, layer, a]`, where 95 percent of random
            directions are.
        length: `[part, positions, layer, a]`, the root mean square length of the shifts over prompts and
            seeds; a null that hardly moved is a weak floor.
        n_prompts: `[part, positions, layer, a, b]`, the prompts with a shift.
        by_prompt: `[part, positions, layer, prompt, a, b]`, the cosine of each prompt, the mean over pairs of
            different seeds, for intervals of what is made of several; NaN without a shift.
        without_seed: the same without the models of each seed in turn, for intervals over seeds (the jackknife); NaN
            for a method without another.
        quantities: labels of the first axis.
        methods: labels of the last axes.
        layers: the number of each layer.
        null: the method that is the floor; `""` for none.
        one_seed: the methods with one seed only.
        site: the hook point.
    """

    value: Float[np.ndarray, "quantity part positions layer a b"]
    ci_low: Float[np.ndarray, "quantity part positions layer a b"]
    ci_high: Float[np.ndarray, "quantity part positions layer a b"]
    seed_low: Float[np.ndarray, "quantity part positions layer a b"]
    seed_high: Float[np.ndarray, "quantity part positions layer a b"]
    corrected: Float[np.ndarray, "quantity part positions layer a b"]
    corrected_low: Float[np.ndarray, "quantity part positions layer a b"]
    corrected_high: Float[np.ndarray, "quantity part positions layer a b"]
    random_low: Float[np.ndarray, "quantity part positions layer a"]
    random_high: Float[np.ndarray, "quantity part positions layer a"]
    length: Float[np.ndarray, "part positions layer a"]
    n_prompts: Int[np.ndarray, "part positions layer a b"]
    by_prompt: Float[np.ndarray, "part positions layer prompt a b"]
    without_seed: Float[np.ndarray, "seed part positions layer prompt a b"]
    quantities: tuple[str, ...]
    methods: tuple[str, ...]
    layers: tuple[int, ...]
    null: str
    one_seed: tuple[str, ...]
    site: str

    def floor(self, statistic: str = "value") -> Float[np.ndarray, "quantity part positions layer a b"]:
        """The larger of two methods' numbers with the null; NaN with the null itself, or without one."""
        if not self.null:
            return np.full(self.value.shape, np.nan)
        null = self.methods.index(self.null)
        own: np.ndarray = getattr(self, statistic)[..., null].copy()
        own[..., null] = np.nan
        return np.maximum(own[..., :, None], own[..., None, :])

    def verdicts(self) -> np.ndarray:
        """Judges where each number stands, as one of `SIMILARITY_VERDICTS`; `[quantity, part, positions, layer, a, b]`.

        At the floor: the interval over prompts or the range over seeds reaches the random band or
        the null's. At the ceiling: one of them, corrected, reaches 1, as two seeds of one method. None
        of the cosine along the gap at the last token, which is a mere sign.
        """
        verdicts = np.where(self._above_floors(), self._against_ceiling(), AT_FLOOR)
        null = [method == self.null for method in self.methods]
        with_null = np.logical_or.outer(null, null)
        itself = np.eye(len(self.methods), dtype=bool)
        verdicts = np.where(itself | with_null | np.isnan(self.value), UNDECIDED, verdicts)
        if "cosine" in self.quantities:
            verdicts[self._at("cosine", "along", "last")] = UNDECIDED
        return verdicts

    def _above_floors(self) -> np.ndarray:
        """Tells whether the interval and the range over seeds both lie above the random band and the null's."""
        random = np.maximum(self.random_high[..., :, None], self.random_high[..., None, :])
        floors = (random, self.floor("ci_high"), self.floor("seed_high"))
        return np.fmin(self.ci_low, self.seed_low) > np.nan_to_num(np.fmax.reduce(floors))

    def _against_ceiling(self) -> np.ndarray:
        """The verdicts of numbers above their floors."""
        corrected = np.fmax(self.corrected_high, self.seed_high / ceilings(self.value))
        below = np.where(corrected >= 1, AT_CEILING, BELOW_CEILING)
        return np.where(np.isnan(self.corrected), ABOVE_FLOOR, below)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per quantity, part, positions, layer and two methods; the ceiling is a method with itself.

        `weak_floor` marks a null that is shorter than a twentieth of both shifts: random directions
        are then the floor that counts.
        """
        random = [np.maximum(band[..., :, None], band[..., None, :]) for band in (self.random_low, self.random_high)]
        floors = [ceilings(self.value), self.floor(), *random]
        numbers = np.stack([*(getattr(self, name) for name in STATISTICS), *floors])
        verdicts = self.verdicts()
        rows = []
        for at in np.ndindex(self.value.shape):
            quantity, part, positions, layer, a, b = at
            if a <= b and (STATE_POSITIONS[positions] != "wrapper" or SHIFT_PARTS[part] == "all"):
                names = (self.quantities[quantity], SHIFT_PARTS[part], STATE_POSITIONS[positions], self.layers[layer])
                lengths = self.length[part, positions, layer, [a, b]].tolist()
                weak = self._null_length(part, positions, layer) < WEAK_NULL * min(lengths)
                found = (*numbers[:, *at].tolist(), *lengths, weak, int(self.n_prompts[at[1:]]), str(verdicts[at]))
                rows.append((*names, self.methods[a], self.methods[b], *found))
        return pd.DataFrame(rows, columns=_COLUMNS)

    def among(self, methods: Sequence[str]) -> ShiftSimilarity:
        """The same comparison of some of the methods.

        Raises:
            CtlensError: one was not compared.
        """
        for name in methods:
            if name not in self.methods:
                raise unknown("compared method", name, self.methods)
        at = [self.methods.index(name) for name in methods]
        one: dict[str, np.ndarray] = {name: getattr(self, name)[..., at] for name in _OF_ONE}
        two: dict[str, np.ndarray] = {name: getattr(self, name)[..., at, :][..., at] for name in _OF_TWO}
        kept = tuple(name for name in self.one_seed if name in methods)
        null = self.null if self.null in methods else ""
        return replace(self, **one, **two, methods=tuple(methods), one_seed=kept, null=null)

    def figure(self, quantity: str = "cosine", part: str = "off", layer: int | None = None) -> Figure:
        """Draws every method with every other at one layer (by default the last one), one matrix per positions."""
        layer = self.layers[-1] if layer is None else layer
        panels = {}
        for positions in ALIGNED_POSITIONS:
            at = self._at(quantity, part, positions, layer)
            raw = self.value[at], self.ci_low[at], self.ci_high[at]
            corrected = self.corrected[at], self.corrected_low[at], self.corrected_high[at]
            panels[POSITIONS_IN_WORDS[positions]] = (raw, corrected, self.verdicts()[at] == AT_FLOOR)
        title = f"Which trainings shift alike{_PART_IN_TITLE[part]}?"
        above = _CORRECTED if np.isfinite(self.corrected[self._at(quantity, part)]).any() else ""
        subtitle = f"{self._called(quantity)}, layer {layer}; {_READING}{above}{self._warning()}"
        return plots.similarity_matrix(self.methods, panels, title, null=self.null, subtitle=subtitle)

    def curves(self, quantity: str = "cosine", part: str = "off", positions: str = "last") -> Figure:
        """Draws every method with every other by layer, one panel per method, with its ceiling and its floors."""
        at = self._at(quantity, part, positions)
        value, low, high = self.value[at], self.ci_low[at], self.ci_high[at]
        panels = {
            method: {other: (value[:, a, b], low[:, a, b], high[:, a, b]) for b, other in enumerate(self.methods)}
            for a, method in enumerate(self.methods)
            if method != self.null
        }
        lows, highs = self.random_low[at], self.random_high[at]
        random = {method: (lows[:, a], highs[:, a]) for a, method in enumerate(self.methods)}
        title = f"Which trainings shift alike{_PART_IN_TITLE[part]}, {POSITIONS_IN_WORDS[positions]}?"
        subtitle = self._called(quantity) + self._warning()
        return plots.similarity_curves(self.layers, panels, random, title, y_title="similarity", subtitle=subtitle)

    def _at(self, quantity: str, part: str, positions: str | None = None, layer: int | None = None) -> tuple[int, ...]:
        """The index of a number in the arrays, along as many axes as are named."""
        if part != "all" and positions == "wrapper":
            raise CtlensError("the wrapper has no clean counterpart, so its shift has no parts: choose part='all'.")
        axes = (
            ("quantity", self.quantities),
            ("part", SHIFT_PARTS),
            ("positions", STATE_POSITIONS),
            ("layer", self.layers),
        )
        names = [name for name in (quantity, part, positions, layer) if name is not None]
        asked = [(what, name, known) for (what, known), name in zip(axes, names, strict=False)]
        for what, name, known in asked:
            if name not in known:
                raise unknown(what, str(name), [str(value) for value in known])
        return tuple(known.index(name) for _, name, known in asked)

    def _null_length(self, part: int, positions: int, layer: int) -> float:
        """The length of the null's shift; infinite without a null."""
        return float(self.length[part, positions, layer, self.methods.index(self.null)]) if self.null else np.inf

    def _called(self, quantity: str) -> str:
        return f"{title_of(quantity)}, {self.n_prompts.max()} prompts"

    def _warning(self) -> str:
        words = f"; one seed only, hence no ceiling: {', '.join(self.one_seed)}" if self.one_seed else ""
        length = dict(zip(self.methods, self.length[0, 0].mean(0).tolist(), strict=True))
        share = length.pop(self.null, np.inf) / min(length.values(), default=np.inf)
        return words + hardly_moved(self.null, share, "floor")
