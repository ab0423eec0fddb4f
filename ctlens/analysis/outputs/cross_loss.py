"""Trained with one loss, measured by every loss: do trainings that look alike from outside do the same inside?

Each model's losses are taken on the same pairs and the same forward passes, so two losses of a model never differ
because their prompts do. The clean side with which a model is compared is part of the question: training moves the
clean activations too, so the distance to the reference's clean side (which is trained) and the distance to the model's
own need not agree. Irpan et al. (2025, arXiv 2510.27062) report that BCT raises the activation distance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float

from ctlens import plots
from ctlens.analysis.base.forward import encoded_batches, require_comparable
from ctlens.analysis.base.result import ResultOverPairs, groups_of
from ctlens.core.clusters import clustered_mean, clustered_ratio
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.labels import BASE
from ctlens.core.public import public
from ctlens.core.types import LensModel, PerRow
from ctlens.data.alignment import align
from ctlens.data.batch import EncodedPairs, PairBatch, encode
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair
from ctlens.losses import MEASURED, Forwards, Loss, built, require_distinct
from ctlens.models.hooks import run_capturing
from ctlens.plots import Figure
from ctlens.training.answers import answer_tail, answers_kind, drawn_at, reference_answers

_CLEAN_SIDES = {"reference": "the reference's clean prompts", "own": "each model's own clean prompts"}
_MEAN = ""
_RELATIVE = ("relative", "relative_low", "relative_high")
_OVER = ("losses", "steps")
CROSS_LOSS_COLUMNS = ("model", "step", "loss", "hook_name", "value", "ci_low", "ci_high", "n_pairs", *_RELATIVE)


@dataclass(frozen=True)
class CrossLoss(ResultOverPairs):
    """The result of `cross_loss`: every loss of every model on every pair, unweighted, in the unit of the loss.

    >>> values = np.array([[[4.0, 4.0]], [[1.0, 3.0]]])  # the reference, then a trained model; two pairs
    >>> aligned = np.array([[True, True]])
    >>> result = CrossLoss(values, aligned, ("base", "act"), ("act",), ("blocks.0.hook_resid_post",), "reference")
    >>> result.to_dataframe().query("hook_name == ''")[["model", "value", "relative"]].values.tolist()
    [['base', 4.0, 1.0], ['act', 2.0, 0.5]]

    Attributes:
        by_hook: `[model, hook, pair]`, a loss at one of its hook points; NaN where a pair does not align in the
            window of the loss.
        aligned: `[loss, pair]`, whether a pair aligns in the window of a loss.
        models: labels of the models; the first is the reference, `"base"`.
        hook_losses: along `hook`, the name of the loss; a loss with several hook points is there several times.
        hook_names: along `hook`, the name of the hook point; `"logits"` for a loss on outputs.
        clean: the clean side, `"reference"` or `"own"`.
        steps: the training step of each model, the reference's 0; empty where the models have none.
    """

    by_hook: Float[np.ndarray, "model hook pair"]
    aligned: Bool[np.ndarray, "loss pair"]
    models: tuple[str, ...]
    hook_losses: tuple[str, ...]
    hook_names: tuple[str, ...]
    clean: str
    steps: tuple[int, ...] = ()

    @property
    def losses(self) -> tuple[str, ...]:
        """The names of the losses."""
        return tuple(dict.fromkeys(self.hook_losses))

    @property
    def dropped(self) -> dict[str, int]:
        """The number of pairs, by loss, that do not align in its window and so do not count for it."""
        return dict(zip(self.losses, (~self.aligned).sum(-1).tolist(), strict=True))

    @property
    def values(self) -> Float[np.ndarray, "model loss pair"]:
        """The values of every loss, each a mean over its hook points."""
        return np.stack([self.by_hook[:, self._hooks(loss)].mean(1) for loss in self.losses], 1)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model, step, loss and hook point; `hook_name` is `""` for the mean over hook points.

        Returns:
            `step`, missing where the models have none; the mean over `n_pairs`, `value`, with its 95 percent
            interval, `ci_low` and `ci_high`; and `relative`, the value as a multiple of the reference's on the same
            pairs, with `relative_low` and `relative_high`. The reference's value is that before training, so 1 is no
            change; NaN where it is 0.
        """
        keys = list(zip(self.models, self.steps or [None] * len(self.models), strict=True))
        rows: list[tuple[Any, ...]] = []
        for row, loss in enumerate(self.losses):
            hooks = self._hooks(loss)
            hook_names = [_MEAN, *(self.hook_names[hook] for hook in hooks)]
            values = np.concatenate([self.values[:, [row]], self.by_hook[:, hooks]], 1)[..., self.aligned[row]]
            of_pairs = np.moveaxis(values, -1, 0)
            clusters = self.clusters(self.aligned[row])
            relative = clustered_ratio(of_pairs, of_pairs[:, :1], clusters)
            numbers = np.stack([*clustered_mean(of_pairs, clusters), *relative], -1)
            rows += [
                (model, step, loss, hook_name, *found[:3], values.shape[-1], *found[3:])
                for (model, step), of_model in zip(keys, numbers.tolist(), strict=True)
                for hook_name, found in zip(hook_names, of_model, strict=True)
            ]
        rows.sort(key=lambda row: keys.index(row[:2]))
        return pd.DataFrame(rows, columns=list(CROSS_LOSS_COLUMNS)).astype({"step": "Int64"})

    def figure(self, over: str = "losses") -> Figure:
        """The relative values: a row per model at its last step and a column per loss; or their course over the steps.

        Args:
            over: `"losses"`, the matrix; or `"steps"`, a panel per loss and a line per label, from 1 at step 0.

        Raises:
            CtlensError: `over` is unknown, or the models have no steps.
        """
        if over not in _OVER:
            raise unknown("axis", over, _OVER)
        if over == "steps" and not self.steps:
            raise CtlensError("the models have no steps: label them by (label, step) in cross_loss.")
        labels = tuple(dict.fromkeys(self.models[1:]))
        courses = {label: self._course(label) for label in labels}
        relative = self._relative_means()
        subtitle = f"{self.aligned.shape[1]} pairs; activations compared with {_CLEAN_SIDES[self.clean]}"
        if over == "steps":
            curves = {
                loss: {label: (steps, *relative[:, models, number]) for label, (models, steps) in courses.items()}
                for number, loss in enumerate(self.losses)
            }
            title = "Trained with one loss, measured by every loss: what else falls, and when?"
            return plots.cross_loss_steps(curves, title, subtitle=subtitle)
        value, low, high = relative[:, [models[-1] for models, _ in courses.values()]]
        title = "Trained with one loss, measured by every loss: what else falls?"
        return plots.cross_loss_matrix(labels, self.losses, (value, low, high), title, subtitle=subtitle)

    def _course(self, label: str) -> tuple[list[int], list[int]]:
        """The indices of a label's models and their steps, from step 0, at which the reference stands for the model."""
        steps = self.steps or (0,) * len(self.models)
        models = {0: 0} | {steps[number]: number for number, name in enumerate(self.models) if name == label}
        return [models[step] for step in sorted(models)], sorted(models)

    def _relative_means(self) -> Float[np.ndarray, "end model loss"]:
        """The relative values and the ends of their intervals, means over hook points."""
        table = self.to_dataframe()
        means = table.loc[table["hook_name"] == _MEAN, list(_RELATIVE)].to_numpy(dtype=float)
        return means.T.reshape(len(_RELATIVE), len(self.models), len(self.losses))

    def _hooks(self, loss: str) -> list[int]:
        return [hook for hook, name in enumerate(self.hook_losses) if name == loss]


@public
def cross_loss(
    reference: LensModel,
    models: Mapping[str, LensModel] | Mapping[int, LensModel] | Mapping[tuple[str, int], LensModel],
    pairs: Pairs,
    losses: Loss | str | Sequence[Loss | str] | None = None,
    *,
    clean: str = "reference",
    max_new_tokens: int = 16,
    batch_size: int = 64,
    progress: bool = True,
) -> CrossLoss:
    """Measures every model by every loss, on the same pairs and the same forward passes.

    Args:
        reference: the model before training, in eval mode.
        models: trained models in eval mode, by label, such as the loss trained with; or by label and
            step, for the course of several trainings.
        pairs: clean and wrapped prompts. A pair that does not align in the window of a loss is left out for that loss
            alone, and counted in `CrossLoss.dropped`. `ctlens.pairs` makes them of two lists of texts.
        losses: what to measure by, losses or their names; None for `ctlens.losses.MEASURED`, each as it is by default.
            Weights do not matter.
        clean: the clean side of the distance. `"reference"`: the reference on the clean prompt, as
            trained. `"own"`: each model on the clean prompt. It does not concern BCT, whose targets
            are the reference's answers (or the pairs' own targets) in both cases.
        max_new_tokens: longest answer the reference generates as a target, in tokens.
        batch_size: pairs per forward pass.
        progress: show a progress bar.

    Raises:
        CtlensError: a model does not compare with the reference or is in training mode, there are
            no models, no losses or no pairs, a label or loss is given twice, a key is no label or
            step, the clean side is unknown, no pair aligns for some loss, or a loss makes its own
            rows or targets.
    """
    chosen = _chosen(losses, clean)
    labels, steps = _labels(models)
    everyone = (reference, *models.values())
    for model in everyone:
        require_comparable(reference, model)
    encoded = _with_answers(reference, _encode(reference, pairs, chosen), chosen, max_new_tokens, progress)
    aligned = _aligned(encoded, chosen)
    hooks, values = _compare(everyone, encoded, chosen, clean, batch_size, progress)
    row_of = {loss.name: row for row, loss in enumerate(chosen)}
    counts = aligned[[row_of[hook.loss] for hook in hooks]]
    return CrossLoss(
        by_hook=np.where(counts, values, np.nan),
        aligned=aligned,
        models=labels,
        hook_losses=tuple(hook.loss for hook in hooks),
        hook_names=tuple(hook.name for hook in hooks),
        clean=clean,
        steps=steps,
        groups=groups_of(pairs),
    )


class _LossHook(NamedTuple):
    """A loss at one hook point: the name of the loss, and that of the hook point or `"logits"`."""

    loss: str
    name: str


def _chosen(losses: Loss | str | Sequence[Loss | str] | None, clean: str) -> tuple[Loss, ...]:
    """Checks the clean side and the losses to measure by, and gives the losses."""
    if clean not in _CLEAN_SIDES:
        raise unknown("clean side", clean, list(_CLEAN_SIDES))
    chosen = built(MEASURED if losses is None else losses)
    if not chosen:
        raise CtlensError("there is nothing to measure by: give a loss, or None for `ctlens.losses.MEASURED`.")
    require_distinct(chosen)
    for loss in chosen:
        if loss.makes_rows or loss.keeps_variants:
            raise CtlensError(f"{loss.name} trains on answers that it draws or chooses itself: leave it out.")
    return chosen


def _with_answers(
    reference: LensModel, encoded: EncodedPairs, losses: Sequence[Loss], max_new_tokens: int, progress: bool
) -> EncodedPairs:
    """Appends the reference's answers to the pairs if a loss is on answers."""
    kind = answers_kind(losses)
    if not kind:
        return encoded
    answers = reference_answers(
        reference,
        encoded,
        max_new_tokens,
        kind=kind,
        drawn_at=drawn_at(losses),
        tail=answer_tail(losses, reference.tokenizer),
        progress=progress,
    )
    return encoded.with_answers(answers, both_sides=any(loss.answers_on_both_sides for loss in losses))


def _compare(
    models: Sequence[LensModel],
    encoded: EncodedPairs,
    losses: Sequence[Loss],
    clean: str,
    batch_size: int,
    progress: bool,
) -> tuple[list[_LossHook], Float[np.ndarray, "model hook pair"]]:
    """The losses at their hook points, and their values for every model on the same batches, the reference first."""
    hook_names = {loss.name: loss.hook_names(models[0]) for loss in losses}
    needed = list(dict.fromkeys(name for names in hook_names.values() for name in names))
    hooks: list[_LossHook] = []
    chunks = []
    for _, batch in encoded_batches(models[0], encoded.rows, batch_size, progress):
        by_model = [_measure(losses, forwards, hook_names) for forwards in _forwards(models, batch, needed, clean)]
        hooks = list(by_model[0])
        values = torch.stack([torch.stack(list(of_model.values())) for of_model in by_model])
        chunks.append(values.double().cpu().numpy())
    return hooks, np.concatenate(chunks, -1)


def _measure(
    losses: Sequence[Loss], forwards: Forwards, hook_names: Mapping[str, list[str]]
) -> dict[_LossHook, PerRow]:
    """Computes every loss of one model on one batch, at each of its hook points."""
    return {
        _LossHook(loss.name, name): values
        for loss in losses
        for name, values in loss.row_values(forwards, hook_names[loss.name]).items()
    }


def _labels(models: Mapping[Any, LensModel]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The labels of the reference and the models, and their steps if they have any."""
    if not models:
        raise CtlensError("there are no models: give at least one, by its label.")
    over_steps = any(isinstance(key, tuple) for key in models)
    keys: list[tuple[str, int]] = []
    for key in models:
        match key:
            case (str(label), int(step)) if step >= 0:
                keys.append((label, step))
            case str() | int() if not over_steps:
                keys.append((str(key), 0))
            case _:
                raise CtlensError(f"{key!r} labels no model: give a label, or for all a pair of label and step.")
    if len(set(keys)) < len(keys) or any(label == BASE for label, _ in keys):
        names = ", ".join(map(str, models))
        raise CtlensError(f"a label is given twice ({names}): {BASE!r} is the reference.")
    labels, steps = zip((BASE, 0), *keys, strict=True)
    return labels, steps if over_steps else ()


def _encode(reference: LensModel, pairs: Sequence[Pair], losses: Sequence[Loss]) -> EncodedPairs:
    """All pairs, each with its alignment in every window."""
    windows = dict.fromkeys(window for loss in losses for window in loss.windows if window != "answer")
    encoded = encode(pairs, reference.tokenizer, windows=(), n_ctx=reference.cfg.n_ctx)
    rows = tuple(
        replace(row, alignments={name: align(row.clean, row.wrapped, name, shared=row.pair.shared) for name in windows})
        for row in encoded.rows
    )
    return EncodedPairs(rows, {})


def _aligned(pairs: EncodedPairs, losses: Sequence[Loss]) -> Bool[np.ndarray, "loss pair"]:
    """Tells whether each pair aligns in all windows of a loss."""
    refusals = [[[row.alignments[name].refusal for name in loss.windows] for row in pairs.rows] for loss in losses]
    for loss, of_loss in zip(losses, refusals, strict=True):
        if all(any(found) for found in of_loss):
            reason = next(filter(None, of_loss[0]))
            raise CtlensError(f"none of the {len(pairs)} pairs aligns for {loss.name} ({reason}): choose its window.")
    return np.array([[not any(found) for found in of_loss] for of_loss in refusals])


def _forwards(models: Sequence[LensModel], batch: PairBatch, names: Sequence[str], clean: str) -> Iterator[Forwards]:
    """Runs both sides of a batch on every model, the reference first; the clean side once if all share it."""
    side = None
    for model in models:
        if side is None or clean == "own":
            side = run_capturing(model, batch.clean.tokens, names, grad=False, mask=batch.clean.needed_mask)
        clean_logits, targets = side
        logits, states = run_capturing(model, batch.wrapped.tokens, names, grad=False, mask=batch.wrapped.needed_mask)
        yield Forwards(batch, targets, states, logits, clean_logits)
