"""The result of adding a direction or taking it out: the answers of every pair, beside those with other directions.

The random band reaches from the lowest to the highest of the random directions' means over pairs: with the default of
19 draws of a kind, one more of that kind lies above them once in 20 times. Directions of concepts that are no attack
have rows of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from jaxtyping import Float

from ctlens import plots
from ctlens.analysis.base.nulls import random_band
from ctlens.analysis.base.result import ResultOverPairs
from ctlens.core.clusters import clustered_mean
from ctlens.core.errors import CtlensError
from ctlens.plots import Curve, Figure

STEER = "steer"
ABLATE = "ablate"
ALONG = "direction"
OPPOSITE = "opposite"
ISOTROPIC = "isotropic"
COVARIANCE = "covariance"
RANDOM_KINDS = (ISOTROPIC, COVARIANCE)
"""Random directions drawn evenly over the sphere, and from the covariance of the states."""
_SIGN = {STEER: -1, ABLATE: 1}
_TITLES = {
    STEER: "Does adding the direction to clean prompts bring the bad answer back?",
    ABLATE: "Does taking the direction out of wrapped prompts bring the good answer back?",
}
_EFFECT_TITLES = {
    STEER: "drop of the logit difference (nats)",
    ABLATE: "recovered logit difference (nats)",
}


@dataclass(frozen=True)
class Intervention(ResultOverPairs):
    """The answers of every pair with and without a direction.

    Attributes:
        logit_diffs: `[model, layer, alpha, variant, pair]`, `log P(good) - log P(bad)` of the whole answers in nats,
            see `ctlens.analysis.directions.edited_answers`.
        p_bad: of the same shape, the probability that the answer begins with the bad one.
        plain_logit_diffs, plain_p_bad: `[model, pair]`, without intervention.
        models: their labels.
        layers: where the intervention was made, one at a time.
        alphas: its strengths; 1 is the direction's own norm, or all of its component.
        variants: `"direction"`; for `steer` `"opposite"`; each of the random draws, `"isotropic"` or `"covariance"`;
            and of every concept its name, and `"not NAME"` for the other sign.
        action: `"steer"`, on clean prompts, or `"ablate"`, on wrapped ones.
        positions: the tokens whose state was changed.
        direction: what it is, in words.
    """

    logit_diffs: Float[np.ndarray, "model layer alpha variant pair"]
    p_bad: Float[np.ndarray, "model layer alpha variant pair"]
    plain_logit_diffs: Float[np.ndarray, "model pair"]
    plain_p_bad: Float[np.ndarray, "model pair"]
    models: tuple[str, ...]
    layers: tuple[int, ...]
    alphas: tuple[float, ...]
    variants: tuple[str, ...]
    action: str
    positions: str
    direction: str

    @property
    def effects(self) -> Float[np.ndarray, "model layer alpha variant pair"]:
        """The effects: how far `steer` lowers the logit difference, or `ablate` raises it, in nats."""
        return _SIGN[self.action] * (self.logit_diffs - self.plain_logit_diffs[:, None, None, None])

    def effect(self, variant: str = ALONG) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The mean effect of a variant over pairs and its 95 percent interval, `[model, layer, alpha]` each.

        Args:
            variant: `"direction"`, `"opposite"` or that of a concept; for the random draws see `random_band`.
        """
        effects = np.moveaxis(self.effects[..., self.variants.index(variant), :], -1, 0)
        return clustered_mean(effects, self.clusters())

    @property
    def random_band(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest mean over pairs of the random directions, `[model, layer, alpha]` each."""
        return self._band(RANDOM_KINDS)

    @property
    def concepts(self) -> tuple[str, ...]:
        """The variants of concepts."""
        return tuple(dict.fromkeys(name for name in self.variants if name not in (ALONG, OPPOSITE, *RANDOM_KINDS)))

    def _band(self, variants: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest mean over pairs of some variants; not a number where there are none."""
        of_them = self._of(variants)
        if not of_them:
            nothing = np.full(self.effects.shape[:3], np.nan)
            return nothing, nothing
        return random_band(self.effects[..., of_them, :])

    def _of(self, variants: Sequence[str]) -> list[int]:
        return [number for number, variant in enumerate(self.variants) if variant in variants]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model, layer, alpha and variant: the direction, for `steer` its opposite, and concepts.

        Returns:
            The mean `effect` over `n_pairs` in nats, with `ci_low` and `ci_high`; the lowest and the highest of the
            random directions of each kind (`isotropic_low` and so on) and of the concepts (`concepts_low`); not a
            number where there are none. `beyond_random`, whether the interval lies above all random directions and 0;
            `beyond_concepts`, whether also above the concepts. The mean probability of the bad answer, `p_bad`,
            without intervention `plain_p_bad` and under the random directions `random_p_bad`.
        """
        bands = {**{kind: self._band([kind]) for kind in RANDOM_KINDS}, "concepts": self._band(self.concepts)}
        ends = {
            f"{name}_{end}": band
            for name, both in bands.items()
            for end, band in zip(("low", "high"), both, strict=True)
        }
        random = np.fmax(self.random_band[1], 0)
        p_bad = self.p_bad.mean(-1)
        tables = []
        for variant in dict.fromkeys(name for name in self.variants if name not in RANDOM_KINDS):
            effect, ci_low, ci_high = self.effect(variant)
            columns = {
                "effect": effect,
                "ci_low": ci_low,
                "ci_high": ci_high,
                **ends,
                "beyond_random": ci_low > random,
                "beyond_concepts": ci_low > np.fmax(random, bands["concepts"][1]),
                "p_bad": p_bad[..., self.variants.index(variant)],
                "plain_p_bad": np.broadcast_to(self.plain_p_bad.mean(-1)[:, None, None], effect.shape),
                "random_p_bad": p_bad[..., self._of(RANDOM_KINDS)].mean(-1),
            }
            labels = [(*label, variant) for label in product(self.models, self.layers, self.alphas)]
            table = pd.DataFrame(labels, columns=["model", "layer", "alpha", "variant"])
            tables.append(table.assign(**{name: values.ravel() for name, values in columns.items()}))
        return pd.concat(tables, ignore_index=True).assign(n_pairs=self.logit_diffs.shape[-1])

    def figure(self, over: str = "layer", at: int | float | None = None) -> Figure:
        """The effect in each model, against depth or strength, with the opposite direction and the random band.

        Args:
            over: `"layer"` or `"alpha"`.
            at: the alpha of a figure over layers, or the layer of one over alphas; by default the
                alpha nearest 1, or the layer with the largest effect in the first model.

        Raises:
            CtlensError: `over` or `at` is not there.
        """
        axes = {"layer": (1, self.layers, self.alphas), "alpha": (0, self.alphas, self.layers)}
        if over not in axes:
            raise CtlensError(f"a figure is over 'layer' or over 'alpha', not over {over!r}.")
        fixed_axis, x, others = axes[over]
        fixed = self._default(over) if at is None else at
        if fixed not in others:
            raise CtlensError(f"there is nothing at {fixed}: choose one of {', '.join(map(str, others))}.")
        index = others.index(fixed)

        def taken(array: np.ndarray, model: int) -> np.ndarray:
            return array[model].take(index, axis=fixed_axis)

        effects = {name: self.effect(name) for name in (ALONG, OPPOSITE, *self.concepts) if name in self.variants}
        low, high = self.random_band
        panels = {}
        for model, label in enumerate(self.models):
            curves: dict[str, Curve] = {
                name: (taken(effect[0], model), taken(effect[1], model), taken(effect[2], model))
                for name, effect in effects.items()
            }
            panels[label] = curves, (taken(low, model), taken(high, model))
        held = f"alpha {fixed:g}" if over == "layer" else f"layer {fixed}"
        subtitle = f"{self.direction}; {held}; {self.logit_diffs.shape[-1]} pairs"
        return plots.against_random(
            panels, x, _TITLES[self.action], x_title=over, y_title=_EFFECT_TITLES[self.action], subtitle=subtitle
        )

    def _default(self, over: str) -> int | float:
        if over == "layer":
            return min(self.alphas, key=lambda alpha: abs(alpha - 1))
        return self.layers[int(self.effect()[0][0].mean(-1).argmax())]
