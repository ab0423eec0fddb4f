"""The visible training loop: one step at a time, with every loss on the same two forward passes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ctlens import losses as loss_registry
from ctlens.core.arguments import fitted
from ctlens.core.config import environment, generator, to_dict
from ctlens.core.errors import CtlensError, NotFinite
from ctlens.core.files import require_free, usable_folder
from ctlens.core.limits import AT_LEAST_1, require
from ctlens.core.progress import progress_bar
from ctlens.core.public import at_work, public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs, Prompts
from ctlens.losses import Loss, LossValue, require_distinct
from ctlens.models.adopt import adopt
from ctlens.models.finite import read_later
from ctlens.models.optimisation import adamw, clipped_update
from ctlens.models.parameters import evaluating
from ctlens.models.sharding import is_sharded
from ctlens.training.answers import drawn_together
from ctlens.training.calibrate import calibrate
from ctlens.training.checkpoint import identity, read_checkpoint, write_checkpoint
from ctlens.training.config import TrainConfig
from ctlens.training.edits import TrainingEdits
from ctlens.training.history import History
from ctlens.training.interrupts import uninterrupted
from ctlens.training.kept import keep_model, partial_folder, take_in
from ctlens.training.loggers import Logger, Loggers
from ctlens.training.order import batches, parts
from ctlens.training.passes import Passes, Term, backward, seeded
from ctlens.training.prepare import in_window, prepare, trained_copy
from ctlens.training.processes import processes
from ctlens.training.retention import Retention, held_prompts
from ctlens.training.run import Run
from ctlens.training.schedules import fast_forward, make_schedule
from ctlens.training.sharded_checkpoint import read_sharded_checkpoint, write_sharded_checkpoint
from ctlens.training.step import TRACKED, Seen, Step, at_step, read_together, require_finite_loss
from ctlens.training.until import look


class Trainer:
    """Trainer trains a copy of a model: iterate over it, and each round of the loop takes one step.

    After every step `trainer.model` is in eval mode, ready for an analysis; `trainer.run` is the
    training so far. An interrupt waits for the end of a step, so the training is never left half a step.

    Args:
        model: the reference; it is copied and left as it is. A training of adapters shares its frozen weights instead
            of a copy of them: they are held in memory once.
        pairs: the pairs to train on. `ctlens.pairs` makes them of two lists of texts.
        losses: one loss or several, or their names; an empty list trains on retention alone, the null control.
        config: the settings.
        retain: prompts that must not change, beside the pairs' clean prompts and benign twins. Retention holds
            them by the KL to the reference.
        track: losses, or their names, to measure without training on them, on the same forward passes.
        loggers: receive every number of the history as it comes, see `ctlens.training.loggers`.
        cache_folder: keeps the reference's answers and its activations on clean prompts on disk, for
            this training and the next; None keeps the activations in memory and no answers.
        edits: of the trained model's stream while it is trained, and only then; None for none.
        progress: show a progress bar when the reference's answers take more than two seconds.
        log_every: steps between two readings of the numbers, which are the same. On a GPU a reading waits for all
            that the GPU has yet to do. A number that is not finite ends the training at the next reading, which comes
            before anything is written; by then the weights are not finite either.

    Attributes:
        taken: number of steps.

    Raises:
        CtlensError: the pairs do not align or do not fit the context, a loss is given twice, a
            tracked loss cannot measure all pairs, the phases name other losses, there is neither a loss nor
            retention, or the model lacks the matrices for the adapters of the config.
    """

    @public
    def __init__(
        self,
        model: LensModel,
        pairs: Pairs,
        losses: Loss | str | Sequence[Loss | str],
        config: TrainConfig | None = None,
        *,
        retain: Prompts = (),
        track: Sequence[Loss | str] = (),
        loggers: Sequence[Logger] = (),
        cache_folder: str | Path | None = None,
        edits: TrainingEdits | None = None,
        progress: bool = False,
        log_every: int = 1,
    ) -> None:
        require(AT_LEAST_1, log_every=log_every)
        self.log_every = log_every
        self.config = config or TrainConfig()
        pairs, retain = list(pairs), list(retain)
        self.losses = tuple(in_window(loss, self.config.window) for loss in loss_registry.built(losses))
        self.track = tuple(in_window(loss, self.config.window) for loss in loss_registry.built(track))
        require_distinct(self.losses)
        require_distinct(self.track)
        self._described = partial(identity, model, pairs, retain, self.losses, self.track, self.config, edits)
        self.config.require_phases_of(loss.name for loss in self.losses)
        if not self.losses and not self.config.retention:
            raise CtlensError("there is nothing to train: give a loss, or a retention weight above zero.")
        self.reference = adopt(model)
        self.progress = progress
        self.processes = processes()
        self._terms = {loss.name: Term(loss, loss.factors(model)) for loss in self.losses}
        self._tracked = {TRACKED + loss.name: Term(loss, loss.factors(model)) for loss in self.track}
        self.model, self.parameters = trained_copy(model, self.config)
        with evaluating(model):
            folder = None if cache_folder is None else usable_folder(cache_folder)
            self.pairs = prepare(model, pairs, self.losses, self.track, self.config, folder=folder, progress=progress)
            self._units = drawn_together(self.pairs, self.losses)
            held = held_prompts(pairs, retain)
            self.retention = Retention(model, held, self.config) if self.config.retention and held else None
            terms = {**self._terms, **self._tracked}
            self._passes = Passes(model, self.model, self.pairs, terms, self._units, self.config, folder, edits)
            batch = next(batches(self._units, self.config))
            if is_sharded(model):
                for count in (len(batch), *([self.retention.size] if self.retention else [])):
                    self.processes.require_equal_parts(count, self.config.accumulate)
            first = parts(batch, self.config.accumulate)[0]
            self._terms, self.calibration = calibrate(self._terms, self._passes, first, self.parameters, self.config)
        self.losses = tuple(term.loss for term in self._terms.values())
        self.loggers = tuple(loggers) if self.processes.is_main else ()
        self._start(History())

    def _start(self, history: History) -> None:
        """Sets the optimiser, schedule, batches and loggers to their state after the steps of the history."""
        config = self.config
        self._history = history
        self._unread: list[Step] = []
        self.taken = len(history)
        self.optimizer = adamw(
            self.parameters, lr=config.lr, weight_decay=config.weight_decay, relative_eps=config.relative_eps
        )
        self.schedule = make_schedule(
            self.optimizer, config.schedule, config.schedule_options, config.steps, config.warmup
        )
        fast_forward(self.schedule, len(history))
        self._batches = islice(batches(self._units, config), len(history), None)
        settings = {"training": to_dict(config), "losses": [loss_registry.to_config(loss) for loss in self.losses]}
        self._sent = Loggers(self.loggers, settings, len(history.rows))

    def __len__(self) -> int:
        return self.config.steps

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        if self._is_over():
            self.close()
            raise StopIteration
        return self.take_step()

    def _is_over(self) -> bool:
        """Tells whether all steps are taken or the behaviour of `config.until` is reached; measures it if due."""
        until = self.config.until
        reached = until is not None and not self.taken % until.every and look(until, self.model, self.history)
        return reached or self.taken == self.config.steps

    @property
    def history(self) -> History:
        """The numbers of all steps taken, which are read (`read`)."""
        self.read()
        return self._history

    def read(self) -> None:
        """Reads the numbers of the steps that `log_every` left on the device, and hands them to the loggers.

        Raises:
            NotFinite: one of them is not; so will be every later call, because the weights are past mending.
        """
        read_together(self._unread)
        try:
            while self._unread:
                step = self._unread[0]
                step.require_finite()
                overall = {**step.losses, **step.tracked, "lr": step.lr, "grad_norm": step.grad_norm}
                self._history.add(step.index, overall, step.by_hook)
                del self._unread[0]
        finally:
            self._sent.catch_up(self._history.rows)

    def take_step(self) -> Step:
        """Trains the model by one step, whose numbers go into the history; iterating calls this.

        Raises:
            CtlensError: all steps are taken, or the loss is no longer finite.
        """
        index = self.taken + 1
        if index > self.config.steps:
            raise CtlensError(f"all {self.config.steps} steps are taken: make a trainer with more steps.")
        with at_work(self.reference, self.model), evaluating(self.reference):
            if self.retention:
                self.retention.prepare(self.progress)
            with uninterrupted():
                try:
                    step = self._in_train_mode(index)
                except NotFinite:
                    self.read()  # an earlier step may have been the first that was not finite
                    raise
                self.taken = index
                self._unread.append(step)
                if index % self.log_every == 0 or index == self.config.steps:
                    self.read()
        return step

    def close(self) -> None:
        """Ends the loggers. A loop that runs to its end calls this; call it after one that stops early."""
        try:
            self.read()
        finally:
            self._sent.end()

    def _in_train_mode(self, index: int) -> Step:
        """Takes a step with the model in train mode; its dropout depends only on the seed and the step."""
        dropout = generator(self.config.seed, "step", index).initial_seed()
        self.model.train()
        try:
            with at_step(index), torch.enable_grad(), seeded(dropout, next(self.model.parameters()).device):
                return self._update(index)
        finally:
            self.model.eval()

    def _update(self, index: int) -> Step:
        """Gathers the gradient of all terms over the batch, part by part, and moves the weights along it."""
        self.optimizer.zero_grad(set_to_none=True)
        seen = Seen()
        rows = next(self._batches)
        at_once = self.log_every == 1
        with nullcontext() if at_once else read_later() as finite:
            for part in parts(self.processes.share(rows), self.config.accumulate):
                self._learn_from(part, len(part) / len(rows), index, seen)
            self._hold(index, seen)
            seen.add_passes(finite or ())
            self.processes.sum_gradients(self.parameters)
            seen = seen.summed(self.processes.sum_numbers)
            if at_once:
                require_finite_loss(float(seen.total))
            lr = float(self.schedule.get_last_lr()[0])
            norm = clipped_update(self.optimizer, self.parameters, self.config.clip, check=at_once)
            self.schedule.step()
            self._passes.follow(index)
        return Step(index, lr, seen, norm)

    def _learn_from(self, rows: Sequence[int], share: float, index: int, seen: Seen) -> None:
        """Adds the gradient of some of a batch's pairs, weighted by their share of the batch, and their numbers."""
        active = {name: self._terms[name] for name in self.config.active(index, self._terms)}
        if not active and not self._tracked:
            return
        with self._passes.open() as forwards:
            found = forwards.seen(rows, active | self._tracked, step=index, grad=bool(active))
            with torch.no_grad():
                for key, term in self._tracked.items():
                    seen.add(key, term.loss.measure(found[key], term.factors), share)
                for key, value in self._passes.measured(rows).items():
                    seen.add(TRACKED + key, LossValue(value, {}), share)
            values = {name: term.loss.compute(found[name], term.factors) for name, term in active.items()}
            for name, value in values.items():
                seen.add(name, value, share)
            if values:
                total = share * torch.stack([value.total for value in values.values()]).sum()
                backward(total, self.model, [found[name] for name in values])

    def _hold(self, index: int, seen: Seen) -> None:
        """Adds the gradient of this process's parts of the retention term, if the step has the term."""
        if not self.retention:
            return
        with self._passes.open():  # its backward passes run blocks again too, where memory is "blocks"
            for divergence in self.retention.terms(self.model, index, self.processes.share):
                term = self.config.retention * divergence
                term.backward()
                seen.add_retention(term)

    @property
    def writes(self) -> bool:
        """True if this process takes part in writing what the training keeps: of a sharded model all do."""
        return self.processes.is_main or is_sharded(self.model)

    @property
    def run(self) -> Run:
        """The run is the training so far, with the model of the last step."""
        return Run(self.model, self.config, self.losses, self.history, environment(), self.calibration, self._identity)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return self._described()

    def checkpoint(self, folder: str | Path) -> None:
        """Writes a checkpoint for `restore` into a folder; it replaces an earlier checkpoint there.

        Of a sharded model all processes call it together.
        """
        kept = (self._kept, self.optimizer, self.history, self._identity)
        if is_sharded(self.model):
            write_sharded_checkpoint(folder, self.model, *kept)
        else:
            write_checkpoint(folder, *kept)

    @property
    def _kept(self) -> list[nn.Parameter]:
        """What a checkpoint holds: the trained parameters, and those of the targets that follow them."""
        followers = self._passes.followers.values()
        return [*self.parameters, *(parameter for follower in followers for parameter in follower.parameters)]

    def restore(self, folder: str | Path) -> None:
        """Takes the training back to a checkpoint, from which it goes on as if it had never stopped.

        On one thread the weights come out equal to the last bit.

        Raises:
            CtlensError: the folder has no checkpoint, or a checkpoint of another reference, or of other
                pairs, losses or settings.
        """
        described = self._described()  # anew: the reference may have been changed meanwhile
        if is_sharded(self.model):
            saved = read_sharded_checkpoint(folder, self._kept, described)
        else:
            saved = read_checkpoint(folder, described)
        with torch.no_grad():
            for parameter, value in zip(self._kept, saved.parameters, strict=True):
                parameter.copy_(value)
        self._start(saved.history)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": saved.moments})


def train(
    model: LensModel,
    pairs: Pairs,
    losses: Loss | str | Sequence[Loss | str],
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    config: TrainConfig | None = None,
    retain: Prompts = (),
    track: Sequence[Loss | str] = (),
    loggers: Sequence[Logger] = (),
    cache_folder: str | Path | None = None,
    edits: TrainingEdits | None = None,
    out: str | Path | None = None,
    save_every: int | None = None,
    log_every: int = 1,
    progress: bool = True,
) -> Run:
    """Trains a copy of `model` so that the wrapper of the pairs no longer matters.

    An interrupt from the keyboard or a notebook ends the training after the step it is in, with a warning.

    Args:
        model, pairs, losses, config, retain, track, loggers, cache_folder, edits: as in `Trainer`.
        steps, batch_size, lr, seed: replace those of the config.
        out: new folder in which the run is saved at its end.
        save_every: also keep the model behind every so many steps, in `out/steps/25`, `out/steps/50`, ..., which
            `ctlens.load_model` reads; of a training by a `LoRA` the adapters alone. It needs `out`.
        log_every: as in `Trainer`.
        progress: show a progress bar.

    Returns:
        The run, finished or, as `Run.stopped` says, interrupted; `model` is unchanged.

    Raises:
        CtlensError: see `Trainer`; or the loss is no longer finite, or the folder is taken.
    """
    given = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed}
    changes = {name: value for name, value in given.items() if value is not None}
    folder = _folder_for(out, save_every)
    config = replace(fitted("config", config, TrainConfig | None) or TrainConfig(), **changes)
    options: dict[str, Any] = {"retain": retain, "track": track, "loggers": loggers, "cache_folder": cache_folder}
    trainer = Trainer(model, pairs, losses, config, edits=edits, log_every=log_every, progress=progress, **options)
    try:
        with progress_bar(total=len(trainer), desc=method_name(trainer.losses), shown=progress, leave=False) as bar:
            for step in trainer:
                if step.is_read:
                    bar.set_postfix(loss=f"{step.losses['total']:.4f}", refresh=False)
                bar.update()
                if folder and save_every and step.index % save_every == 0 and trainer.writes:
                    trainer.read()
                    keep_model(trainer.model, step.index, folder)
    except KeyboardInterrupt:
        warnings.warn(f"interrupted after {len(trainer.history)} of {len(trainer)} steps", stacklevel=2)
    finally:
        trainer.close()
    if folder and trainer.writes:
        trainer.run.save(folder)
    if folder and trainer.processes.is_main:
        take_in(folder)
    return trainer.run


def _folder_for(out: str | Path | None, save_every: int | None) -> Path | None:
    """The folder of a run, which must be new, and nothing of an earlier training beside it."""
    require(AT_LEAST_1, save_every=fitted("save_every", save_every, int | None))
    if fitted("out", out, str | Path | None) is None:
        if save_every is not None:
            raise CtlensError("save_every keeps models in the folder of the run: name a new one with out=.")
        return None
    folder = Path(str(out))
    require_free(folder)
    require_free(partial_folder(folder))
    return folder


def method_name(losses: Sequence[Loss]) -> str:
    """Names a method: its losses joined by `+`, or `retention` if it has no loss."""
    return "+".join(loss.name for loss in losses) or "retention"
