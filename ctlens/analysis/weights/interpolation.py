"""Interpolation: models on the straight line through the weights of a base and of a trained model.

At the amount `a` the weights are `(1 - a) base + a trained`: 0 is the base and 1 the trained model; below 0 the
training is reversed, above 1 amplified. Each such model is asked the pairs, and a probe is fitted anew on its states.
So the line tells a dose of the training's own direction from a threshold on it, whether the behaviour and the
readability of the cue change at the same amount, and whether a little more of the same training would have broken the
benign twins. The models between are models of their own: what they do need not lie between what the two ends do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ctlens import plots
from ctlens.analysis.base.contrast import ContrastBatch, contrast_batches, contrasts, logit_diffs
from ctlens.analysis.base.result import ResultOverPairs, groups_of
from ctlens.analysis.change.line import WeightLine
from ctlens.analysis.probing.probe import probe
from ctlens.analysis.probing.tasks import Task, wrapper_present
from ctlens.analysis.robustness.over_refusal import unanswered_by_pair
from ctlens.core.clusters import clustered_mean, clustered_rate
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.keeping import keeping
from ctlens.core.progress import progress_bar
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair
from ctlens.models.hooks import Layers
from ctlens.plots import Curve, CurvePanel, Figure
from ctlens.threats import Judge, ask

LOGIT_DIFF = "logit_diff"
BAD_RATE = "bad_rate"
UNANSWERED = "over_refusal"
INTERPOLATED = (
    (LOGIT_DIFF, "wrapped"),
    (LOGIT_DIFF, "clean"),
    (LOGIT_DIFF, "benign"),
    (BAD_RATE, "wrapped"),
    (UNANSWERED, "benign"),
)
"""What every model on the line is measured by: a quantity, and the prompt side that it is of."""
_Batches = dict[str, tuple[list[int], list[ContrastBatch]]]
"""By prompt side, the numbers of the pairs that have two answers there, and their prompts."""


@dataclass(frozen=True)
class Interpolation(ResultOverPairs):
    """The result of `interpolation`: what each model on the line answers, and how well the cue is read in it.

    Attributes:
        values: `[amount, measure, pair]`, measures as in `INTERPOLATED`: logit differences, and 1 or 0 for the greedy
            answers that count. NaN where a pair has no benign twin, or one without two answers for the difference.
        readable, readable_low, readable_high: `[amount, layer]`, balanced accuracy of a linear probe that is fitted on
            that model's own states at the last token, and its 95 percent interval over groups.
        shuffled: `[amount, layer]`, the same with labels shuffled in training.
        amounts: the shares of the way from the base to the trained model.
        layers: the number of each layer.
        question: what the probe was asked.
        chance: its score by guessing.
        n_read: how many prompts its score counts.
    """

    values: Float[np.ndarray, "amount measure pair"]
    readable: Float[np.ndarray, "amount layer"]
    readable_low: Float[np.ndarray, "amount layer"]
    readable_high: Float[np.ndarray, "amount layer"]
    shuffled: Float[np.ndarray, "amount layer"]
    amounts: tuple[float, ...]
    layers: tuple[int, ...]
    question: str
    chance: float
    n_read: int

    def to_dataframe(self) -> pd.DataFrame:
        """The behaviour: one row per measure and amount; a measure that no pair has is left out.

        Returns:
            The `quantity`, a logit difference or a rate, on a `prompt_side`: its `value` over the `n_pairs` that have
            it, and its 95 percent interval over topics and wrapper texts, `ci_low` and `ci_high`.
        """
        tables = []
        for quantity, side in INTERPOLATED:
            chosen = self._known(quantity, side)
            if chosen.any():
                value, low, high = self.curve(quantity, side)
                labels = {"quantity": quantity, "prompt_side": side, "amount": self.amounts}
                numbers = {"value": value, "ci_low": low, "ci_high": high, "n_pairs": int(chosen.sum())}
                tables.append(pd.DataFrame(labels | numbers))
        return pd.concat(tables, ignore_index=True)

    def readability(self) -> pd.DataFrame:
        """The probes: one row per amount and layer.

        Returns:
            The `score` with its interval over groups, `ci_low` and `ci_high`, that of labels `shuffled` in training,
            `chance`, and `n_prompts`, how many the score counts.
        """
        table = pd.DataFrame([*product(self.amounts, self.layers)], columns=["amount", "layer"])
        columns = {"score": self.readable, "ci_low": self.readable_low, "ci_high": self.readable_high}
        for name, numbers in (columns | {"shuffled": self.shuffled}).items():
            table[name] = numbers.ravel()
        return table.assign(chance=self.chance, n_prompts=self.n_read)

    def curve(self, quantity: str = LOGIT_DIFF, side: str = "wrapped") -> Curve:
        """A measure by amount with its 95 percent interval.

        Raises:
            CtlensError: there is no such measure, or no pair has it.
        """
        chosen = self._known(quantity, side)
        if not chosen.any():
            raise CtlensError(f"no pair has {quantity} on the {side} side: give pairs with such prompts.")
        values = self.values[:, INTERPOLATED.index((quantity, side)), chosen]
        if quantity == LOGIT_DIFF:
            return clustered_mean(values.T, self.clusters(chosen))
        rates = np.array([clustered_rate(of_one == 1, self.clusters(chosen)) for of_one in values])
        return rates[:, 0], rates[:, 2], rates[:, 3]

    def figure(self, layer: int | None = None) -> Figure:
        """Draws the logit differences, the rates, and the readability at one layer, by amount.

        Args:
            layer: by default the last one that was read.

        Raises:
            CtlensError: the layer was not read.
        """
        layer = self.layers[-1] if layer is None else layer
        if layer not in self.layers:
            raise unknown("layer that was read", str(layer), map(str, self.layers))
        at = self.layers.index(layer)
        probed = {"probe": (self.readable[:, at], self.readable_low[:, at], self.readable_high[:, at])}
        panels = {
            "logit difference": CurvePanel(self._curves(LOGIT_DIFF), "good minus bad answer", levels=(0,)),
            "greedy answers": CurvePanel(self._curves(BAD_RATE) | self._curves(UNANSWERED), "rate"),
            f"readable at the last token, layer {layer}": CurvePanel(
                probed, "balanced accuracy", levels=(self.chance,)
            ),
        }
        caption = (
            "Lines are means, rates and scores, bands their 95% intervals. Dotted: the base at 0, the trained model at "
            "1, no difference, and the score of guessing."
        )
        return plots.curve_panels(
            self.amounts,
            panels,
            "What do the models between a base and a trained model do, and beyond?",
            x_title="share of the way from base to trained",
            caption=caption,
            marked=(0, 1),
            subtitle=f"{self.values.shape[-1]} pairs; the probe reads {self.question} in {self.n_read} prompts",
        )

    def _known(self, quantity: str, side: str) -> np.ndarray:
        """Tells which pairs have a measure."""
        if (quantity, side) not in INTERPOLATED:
            raise unknown("measure", f"{quantity} of {side}", [f"{name} of {of}" for name, of in INTERPOLATED])
        return ~np.asarray(np.isnan(self.values[:, INTERPOLATED.index((quantity, side))]).any(0))

    def _curves(self, quantity: str) -> dict[str, Curve]:
        """The curves of a quantity by name, on the sides that some pair has."""
        sides = [side for name, side in INTERPOLATED if name == quantity and self._known(quantity, side).any()]
        what = {LOGIT_DIFF: "", BAD_RATE: "bad, ", UNANSWERED: "unanswered, "}[quantity]
        return {f"{what}{side}": self.curve(quantity, side) for side in sides}


@public
@keeping()
def interpolation(
    base: LensModel,
    trained: LensModel,
    pairs: Pairs,
    *,
    at: Sequence[float] = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5),
    task: Task | None = None,
    layers: Layers = "all",
    judge: Judge | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 64,
    progress: bool = True,
) -> Interpolation:
    """Measures the models on the straight line through the weights of a base and of a trained model.

    >>> import ctlens as ct
    >>> base, threat = ct.load_organism(), ct.threats.get("jailbreak")
    >>> trained = ct.train(base, threat.pairs(64), ct.BCT(), steps=16, progress=False).model
    >>> pairs = threat.pairs(16, split="heldout")
    >>> found = ct.analysis.interpolation(base, trained, pairs, at=(0.0, 0.5, 1.0), layers="last", progress=False)
    >>> found.to_dataframe().query("quantity == 'bad_rate'")["value"].is_monotonic_decreasing
    True

    Args:
        base: the model before training, in eval mode. Neither model is changed; a model of its own is held beside.
        trained: the model after training. Adapters count as the weights that they add up to.
        pairs: with good and bad answers on the wrapped and the clean side; benign twins are asked where there are.
            `ctlens.pairs` makes them of two lists of texts.
        at: how much of the training, in rising order.
        task: what the probes read, see `ctlens.analysis.probing.tasks`; by default whether the wrapper is there.
        layers: at which the probes read, see `ctlens.models.hooks.select_layers`.
        judge: gives the verdicts, see `ctlens.threats.Judge`; by default the answers that the prompts name decide.
        max_new_tokens: length of the longest answer, in tokens.
        batch_size: prompts per forward pass.
        progress: show a progress bar.

    Raises:
        CtlensError: the models do not compare, are in training mode or keep their weights under different names, the
            amounts do not rise, a pair has no answers, or as `wrapper_present` and `ctlens.analysis.probe`.
    """
    line = WeightLine(base, trained, tuple(map(float, at)))
    task = wrapper_present(pairs, base.tokenizer) if task is None else task
    batches = _batches(base, pairs, batch_size)
    values: list[np.ndarray] = []
    read = {}
    with progress_bar(total=len(line.at), desc="interpolation", shown=progress, leave=False) as bar:
        for amount, model in zip(line.at, line.models(), strict=True):
            values.append(_measured(model, pairs, batches, judge, max_new_tokens))
            reading: dict[str, Any] = {"layers": layers, "batch_size": batch_size, "progress": False}
            read[str(amount)] = task.states(model, **reading)
            bar.update()
    probed = probe(read, task, progress=False)
    return Interpolation(
        values=np.stack(values),
        readable=probed.score[:, 0, 0],
        readable_low=probed.ci_low[:, 0, 0],
        readable_high=probed.ci_high[:, 0, 0],
        shuffled=probed.shuffled[:, 0, 0],
        amounts=line.at,
        layers=probed.layers,
        question=probed.question,
        chance=probed.chance,
        n_read=probed.n_test,
        groups=groups_of(pairs),
    )


def _batches(model: LensModel, pairs: Sequence[Pair], batch_size: int) -> _Batches:
    """The prompts whose logits are read, by side; a benign twin may lack one of the two answers, or be lacking."""
    found: _Batches = {}
    for side in [side for quantity, side in INTERPOLATED if quantity == LOGIT_DIFF]:
        twins = [pair.side(side) for pair in pairs]
        chosen = [n for n, twin in enumerate(twins) if side != "benign" or (twin and twin.good and twin.bad)]
        rows = contrasts(model, [pairs[number] for number in chosen], side)
        found[side] = chosen, list(contrast_batches(model, rows, batch_size, progress=False))
    return found


def _measured(
    model: LensModel, pairs: Sequence[Pair], batches: _Batches, judge: Judge | None, max_new_tokens: int
) -> Float[np.ndarray, "measure pair"]:
    """Every measure of one model, in the order of `INTERPOLATED`."""
    found: dict[tuple[str, str], np.ndarray] = {}
    for side, (chosen, rows) in batches.items():
        found[LOGIT_DIFF, side] = _with_gaps(len(pairs), chosen, logit_diffs(model, rows).tolist())
    replies = ask(model, [pair.wrapped for pair in pairs], max_new_tokens=max_new_tokens, judge=judge)
    found[BAD_RATE, "wrapped"] = np.array([reply.verdict == "bad" for reply in replies], dtype=float)
    found[UNANSWERED, "benign"] = unanswered_by_pair(model, pairs, judge, max_new_tokens)
    return np.stack([found[measure] for measure in INTERPOLATED])


def _with_gaps(n: int, chosen: Sequence[int], numbers: Sequence[float]) -> Float[np.ndarray, " pair"]:
    """The numbers of some pairs among all, NaN for the others."""
    found = np.full(n, np.nan)
    found[list(chosen)] = numbers
    return found
