"""The visible loop: one step at a time, every loss on the same two forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from ctlens.adapters import LoRA, add_adapters, has_adapters, merge_adapters
from ctlens.batch import EncodedPair, EncodedPairs, collate, encode
from ctlens.config import environment, generator
from ctlens.errors import CtlensError
from ctlens.hooks import capture
from ctlens.losses import RMCT, Forwards, Loss, LossValue, require_distinct
from ctlens.pairs import Pair, Prompt
from ctlens.parameters import copy_model, freeze
from ctlens.training.answers import answers_kind, drawn_together, reference_answers
from ctlens.training.config import TrainConfig
from ctlens.training.retention import Retention, held_prompts
from ctlens.training.rollouts import Rollouts
from ctlens.training.run import History, Run
from ctlens.types import LensModel


@dataclass(frozen=True)
class Step:
    """What one step saw, before its update.

    Attributes:
        index: from 1.
        losses: the weighted value of each loss, of `retention` and of their sum, `total`.
        by_hook: the unweighted value of each loss at each hook point.
        lr: learning rate of the update.
        grad_norm: norm of the gradient before clipping.
    """

    index: int
    losses: Mapping[str, float]
    by_hook: Mapping[str, Mapping[str, float]]
    lr: float
    grad_norm: float


class Trainer:
    """Trains a copy of a model; iterate over it to take the steps.

    After every step `trainer.model` is in eval mode and may be looked at; `trainer.run` is the
    training so far.

    Args:
        model: the reference; it is copied and left as it is.
        pairs: pairs to train on.
        losses: one loss or several; none trains on retention alone, the null control.
        config: the settings.
        retain: prompts to hold beside the pairs' clean prompts and benign twins.
        progress: show a progress bar when the reference's answers take more than two seconds.

    Raises:
        CtlensError: the pairs do not align or do not fit the context, a loss is given twice, or
            there is nothing to train, or nowhere to put the adapters of the config.
    """

    def __init__(
        self,
        model: LensModel,
        pairs: Sequence[Pair],
        losses: Loss | Sequence[Loss],
        config: TrainConfig | None = None,
        *,
        retain: Sequence[Prompt] = (),
        progress: bool = False,
    ) -> None:
        self.config = config or TrainConfig()
        self.losses = (losses,) if isinstance(losses, Loss) else tuple(losses)
        require_distinct(self.losses)
        if not self.losses and not self.config.retention:
            raise CtlensError("there is nothing to train: give a loss, or a retention weight above zero.")
        self.reference = model
        self.factors = {loss.name: loss.factors(model) for loss in self.losses}
        with evaluating(model):
            self.pairs = self._encode(pairs, progress)
            self.rollouts = {
                loss: Rollouts(model, self.pairs.rows, loss, self.config)
                for loss in self.losses
                if isinstance(loss, RMCT)
            }
            held = held_prompts(pairs, retain)
            keeps = self.config.retention and held
            self.retention = Retention(model, held, self.config.answer_tokens) if keeps else None
        self.model = copy_model(model)
        self.parameters = _trained_parameters(self.model, self.config)
        eps = self.config.relative_eps / sum(parameter.numel() for parameter in self.parameters) ** 0.5
        self.optimizer = AdamW(self.parameters, lr=self.config.lr, eps=eps, weight_decay=self.config.weight_decay)
        self.schedule = LambdaLR(self.optimizer, self.config.lr_factor)
        self.history = History()
        self._rows = _epochs(drawn_together(self.pairs, self.losses), self.config)
        self._retention_draw = generator(self.config.seed, "retention")

    def _encode(self, pairs: Sequence[Pair], progress: bool) -> EncodedPairs:
        windows = dict.fromkeys(window for loss in self.losses for window in loss.windows)
        encoded = encode(pairs, self.reference.tokenizer, windows=windows, n_ctx=self.reference.cfg.n_ctx)
        if kind := answers_kind(self.losses):
            length, seed = self.config.answer_tokens, self.config.seed
            answers = reference_answers(self.reference, encoded, length, kind=kind, seed=seed, progress=progress)
            both_sides = any(loss.answers_on_both_sides for loss in self.losses)
            return encoded.with_answers(answers, both_sides=both_sides).answered().aligned(windows)
        return encoded

    def __len__(self) -> int:
        return self.config.steps

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        if len(self.history) == self.config.steps:
            raise StopIteration
        self.model.train()
        try:
            with torch.enable_grad(), evaluating(self.reference):
                step = self._step()
        finally:
            self.model.eval()
        self.history.add(step.index, step.losses, step.by_hook, step.lr, step.grad_norm)
        return step

    def _step(self) -> Step:
        rows = [self.pairs.rows[index] for index in next(self._rows)]
        values = self._loss_values(rows) | self._rollout_values(rows)
        terms = {name: value.total for name, value in values.items()}
        if self.retention:
            held = self.retention.loss(self.model, (self.config.batch_size + 1) // 2, self._retention_draw)
            terms["retention"] = self.config.retention * held
        total = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(total):
            raise CtlensError(f"the loss is {total.item()} at step {len(self.history) + 1}: lower lr or the weights.")
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        lr = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        losses = {name: float(term.detach()) for name, term in terms.items()} | {"total": float(total.detach())}
        by_hook = {name: _floats(value.by_hook) for name, value in values.items()}
        return Step(len(self.history) + 1, losses, by_hook, lr, float(norm))

    def _loss_values(self, rows: Sequence[EncodedPair]) -> dict[str, LossValue]:
        paired = [loss for loss in self.losses if loss not in self.rollouts]
        if not paired:
            return {}
        batch = collate(rows).to(next(self.model.parameters()).device)
        names = list(dict.fromkeys(name for factors in self.factors.values() for name in factors))
        clean, wrapped = batch.clean, batch.wrapped
        targets, clean_logits = {}, None
        if names or any(loss.needs_clean_logits for loss in self.losses):
            clean_logits, targets = capture(self.reference, clean.tokens, names, grad=False, mask=clean.needed_mask)
        logits, states = capture(self.model, wrapped.tokens, names, grad=True, mask=wrapped.needed_mask)
        forwards = Forwards(batch, targets, states, logits, clean_logits)
        return {loss.name: loss.compute(forwards, self.factors[loss.name]) for loss in paired}

    def _rollout_values(self, rows: Sequence[EncodedPair]) -> dict[str, LossValue]:
        """The losses on answers that the model gives now."""
        values = {}
        for loss, rollouts in self.rollouts.items():
            with evaluating(self.model):
                drawn = rollouts.draw(self.model, rows, len(self.history) + 1)
            values[loss.name] = loss.compute(drawn.seen_by(self.model), {})
        return values

    @property
    def run(self) -> Run:
        """The training so far, with the model as it stands."""
        return Run(self.model, self.config, self.losses, self.history, environment())


def train(
    model: LensModel,
    pairs: Sequence[Pair],
    losses: Loss | Sequence[Loss],
    *,
    steps: int | None = None,
    seed: int | None = None,
    config: TrainConfig | None = None,
    retain: Sequence[Prompt] = (),
    progress: bool = True,
) -> Run:
    """Trains a copy of `model` so that the wrapper of the pairs no longer matters.

    Args:
        model, pairs, losses, config, retain: as in `Trainer`.
        steps, seed: replace those of the config.
        progress: show a progress bar.

    Returns:
        The finished run; `model` is unchanged.

    Raises:
        CtlensError: as `Trainer`, or the loss is no longer finite.
    """
    changes = {name: value for name, value in (("steps", steps), ("seed", seed)) if value is not None}
    config = replace(config or TrainConfig(), **changes)
    trainer = Trainer(model, pairs, losses, config, retain=retain, progress=progress)
    with tqdm(total=len(trainer), desc=label(trainer.losses), disable=not progress, leave=False) as bar:
        for step in trainer:
            bar.set_postfix(loss=f"{step.losses['total']:.4f}", refresh=False)
            bar.update()
    return trainer.run


def label(losses: Sequence[Loss]) -> str:
    """The name of a method: its losses joined by `+`, or `retention` for none."""
    return "+".join(loss.name for loss in losses) or "retention"


@contextmanager
def evaluating(model: LensModel) -> Iterator[None]:
    """Puts a model in eval mode inside the block and restores its mode after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _trained_parameters(model: LensModel, config: TrainConfig) -> list[torch.nn.Parameter]:
    """Freezes everything but what the config trains; adapters of an earlier training become weights."""
    if has_adapters(model):
        merge_adapters(model)
    if isinstance(config.trainable, LoRA):
        return add_adapters(model, config.trainable, config.seed)
    return freeze(model, config.trainable)


def _epochs(units: Sequence[Sequence[int]], config: TrainConfig) -> Iterator[list[int]]:
    """Batches of row numbers without end; every epoch is a new order of all units, whose rows stay together."""
    draw = generator(config.seed, "batches")
    count = sum(map(len, units))
    size = min(config.batch_size, count)
    while True:
        order = [row for unit in torch.randperm(len(units), generator=draw).tolist() for row in units[unit]]
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))


def _floats(by_hook: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return dict(zip(by_hook, torch.stack(list(by_hook.values())).tolist(), strict=True))
