"""`ctlens train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctlens.cli.common import (
    Device,
    Dtype,
    LoraRank,
    LoraTargetModules,
    LossNames,
    ModelSource,
    PairsFile,
    Quiet,
    RunConfig,
    Seed,
    ThreatName,
    Trainable,
    chosen_loss,
    chosen_model,
    chosen_pairs,
    chosen_trainable,
    named_options,
    split_names,
)
from ctlens.cli.output import is_main_process, print_table, say
from ctlens.core.errors import CtlensError, UnwritableError, unknown
from ctlens.core.limits import AT_LEAST_1, NOT_NEGATIVE, require

if TYPE_CHECKING:
    from ctlens.data.pairs import Pair, Prompt
    from ctlens.losses import Loss
    from ctlens.training import Logger, TrainConfig, Trainer


def train_command(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="New folder for the run.")],
    loss: LossNames = None,
    model: ModelSource = None,
    pairs: PairsFile = None,
    threat: ThreatName = "",
    config: RunConfig = None,
    window: Annotated[
        str | None,
        typer.Option(
            help="Tokens that every loss compares: shared, suffix, content, explicit, last, answer; else its own."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Pairs per training step.")] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    retention: Annotated[
        float, typer.Option(help="Weight of retention: the KL to the untrained model on prompts that must not change.")
    ] = 10.0,
    trainable: Trainable = "",
    lora_rank: LoraRank = None,
    lora_target_modules: LoraTargetModules = "",
    accumulate: Annotated[int, typer.Option(help="Split each batch into this many parts, to save memory.")] = 1,
    memory: Annotated[
        str,
        typer.Option(help="Kept for gradients: all (fastest); layers (losses are recomputed); blocks (the model too)."),
    ] = "all",
    shard: Annotated[
        bool,
        typer.Option("--shard", help="Split all weights among the processes that torchrun started, to save memory."),
    ] = False,
    cache_folder: Annotated[
        Path | None,
        typer.Option(help="Store the untrained model's answers and activations here, for later trainings to reuse."),
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(
            help="Learning-rate schedule: linear, or a PyTorch one with its options, as CosineAnnealingLR,T_max=90."
        ),
    ] = "linear",
    stop_below: Annotated[
        float | None,
        typer.Option(
            help="Stop once the share of bad answers on held-out pairs is below this, 0 to 1; needs --threat."
        ),
    ] = None,
    track: Annotated[str, typer.Option(help="Comma-separated losses to measure without training on them.")] = "",
    calibrate: Annotated[
        float | None, typer.Option(help="Scale every loss so that its gradient has this norm before the first step.")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Keep the model behind every so many steps, in the folder steps of the run.")
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Save a checkpoint every so many steps, for --resume.")] = 50,
    log_every: Annotated[
        int, typer.Option(help="Read the numbers of the steps every so many steps; on a GPU each reading waits for it.")
    ] = 1,
    n_prompts: Annotated[
        int,
        typer.Option(
            help="Prompts that are asked before and after: held-out ones of --threat, or those of --pairs that name "
            "their answers; 0 for none."
        ),
    ] = 96,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a training that was interrupted or killed.")
    ] = False,
    log: Annotated[
        list[str] | None,
        typer.Option(help="Log to tensorboard or wandb (offline), in a folder beside the run. Repeat for both."),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Trains a model on pairs with one loss or several, saves the run, and says what it changed."""
    from ctlens.core.files import alone, require_free
    from ctlens.training import Trainer, Until
    from ctlens.training.checkpoint import has_checkpoint, identity, remove_checkpoint
    from ctlens.training.kept import take_in
    from ctlens.training.processes import settle

    every = {"--checkpoint-every": checkpoint_every, "--save-every": save_every, "--log-every": log_every}
    require(AT_LEAST_1, **every)
    require(NOT_NEGATIVE, **{"--n-prompts": n_prompts})
    if stop_below is not None and not threat:
        raise CtlensError("--stop-below measures the threat that is trained on: give --threat NAME.")
    kind, kind_options = _schedule(schedule)
    asked = {
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "retention": retention,
        "seed": seed,
        "accumulate": accumulate,
        "schedule": kind,
        "stop_below": None if stop_below is None else Until(threat, below=stop_below),
        "window": window,
        "calibrate": calibrate,
        "memory": memory,
    }
    earlier, losses = _earlier(config)
    kept = named_options(context) if config else {*asked}
    settings = {_FIELDS.get(name, name): value for name, value in asked.items() if name in kept}
    if "schedule" in settings:
        settings["schedule_options"] = kind_options
    if trained := chosen_trainable(trainable, lora_rank, lora_target_modules):
        settings["trainable"] = trained
    settled = replace(earlier, **settings)
    losses = [chosen_loss(name) for name in loss] if loss else losses
    if not losses:
        raise CtlensError("nothing says what to train with: give --loss NAME, or the config.json of a run as --config.")
    tracked = [chosen_loss(name) for name in split_names(track)]
    quiet = quiet or not is_main_process()
    with alone(out) if is_main_process() else nullcontext():
        partial = _partial(out, resume)
        finished = resume and (out / "history.csv").is_file()
        if not finished:
            require_free(out)
        chosen, retain = _data(pairs, threat, settled.seed)
        reference = chosen_model(model, settle(device), dtype, shard=shard)
        if finished:
            _require_same_training(out, identity(reference, chosen, retain, losses, tracked, settled))
            if is_main_process():
                take_in(out)
                remove_checkpoint(partial)
            say(f"Run: {out} (finished before)")
            return
        loggers = _loggers(log or [], out)
        options: dict[str, Any] = {"track": tracked, "loggers": loggers, "cache_folder": cache_folder}
        options["log_every"] = log_every
        trainer = Trainer(reference, chosen, losses, settled, retain=retain, progress=not quiet, **options)
        if has_checkpoint(partial):
            trainer.restore(partial)
        _print_alignment(trainer)
        _train_and_save(trainer, out, checkpoint_every, save_every, quiet)
    _print_course(trainer)
    if trainer.writes:  # a sharded model answers by all processes
        _print_rates(trainer, chosen, threat, n_prompts, quiet)
    say(f"Run: {out}")


_FIELDS = {"stop_below": "until"}
"""The settings of a training that are called otherwise than their option."""


def _earlier(path: Path | None) -> tuple[TrainConfig, list[Loss]]:
    """The settings and the losses of a run's config.json; those of any training and no loss where none is given."""
    from ctlens import losses as loss_registry
    from ctlens.core.config import from_dict
    from ctlens.core.reading import read_json
    from ctlens.training import TrainConfig

    if path is None:
        return TrainConfig(), []
    held = read_json(path, "training", "losses")
    if not isinstance(held["losses"], list):
        raise CtlensError(f"{path} does not list a run's losses: give the config.json that ctlens train wrote.")
    return from_dict(TrainConfig, held["training"]), [loss_registry.from_config(loss) for loss in held["losses"]]


def _data(path: Path | None, threat: str, seed: int) -> tuple[list[Pair], list[Prompt]]:
    """The pairs to train on and the prompts to hold, those of a study of the threat."""
    from ctlens import threats
    from ctlens.study.cells import NEUTRAL_PROMPTS
    from ctlens.study.config import StudyConfig

    chosen = chosen_pairs(path, threat, n_pairs=StudyConfig.n_pairs, split="train", seed=seed)
    return chosen, threats.get(threat).neutral(NEUTRAL_PROMPTS, seed=seed) if threat else []


def _print_rates(trainer: Trainer, pairs: Sequence[Pair], threat: str, n_prompts: int, quiet: bool) -> None:
    """Prints how often the model answered badly and well before the training, and how often it does now."""
    import pandas as pd

    from ctlens.evaluation import evaluate

    known = [pair for pair in pairs if _names_answers(pair)][:n_prompts]
    if not n_prompts:
        return
    if not threat and not known:
        say("The pairs name no good and bad answers, so nothing is asked before and after: give 'good' and 'bad'.")
        return
    options: dict[str, Any] = {"threats": [threat], "n_prompts": n_prompts} if threat else {"pairs": known}
    models = {"before": trainer.reference, "after": trainer.model}
    tables = [
        evaluate(model, progress=not quiet, **options).summary().assign(model=name) for name, model in models.items()
    ]
    title = f"Before and after, {f'{threat}, held out' if threat else f'{len(known)} of the pairs trained on'}"
    print_table(title, pd.concat(tables).filter(["model", "bad wrapped", "good clean", "good benign"]))


def _names_answers(pair: Pair) -> bool:
    sides = [side for side in (pair.clean, pair.wrapped, pair.benign) if side is not None]
    return all(side.good is not None or side.bad is not None for side in sides)


def _schedule(text: str) -> tuple[str, dict[str, float]]:
    """Splits `NAME,option=number,...` into the name and the options."""
    name, *rest = split_names(text) or ("",)
    options: dict[str, float] = {}
    for part in rest:
        key, _, value = part.partition("=")
        try:
            options[key] = int(value) if value.lstrip("-").isdecimal() else float(value)
        except ValueError:
            raise CtlensError(f"--schedule takes NAME,option=number, not {part!r}.") from None
    return name, options


def _loggers(names: list[str], out: Path) -> list[Logger]:
    """Makes the loggers of these names, with a folder beside that of the run."""
    from ctlens.training import TensorBoard, WeightsAndBiases

    log_folder = out.with_name(out.name + ".log")
    known = {"tensorboard": lambda: TensorBoard(log_folder), "wandb": lambda: WeightsAndBiases(folder=log_folder)}
    for name in names:
        if name not in known:
            raise unknown("logger", name, known)
    return [known[name]() for name in dict.fromkeys(names)] if is_main_process() else []


def _partial(out: Path, resume: bool) -> Path:
    """Finds the folder of the checkpoints, which is beside that of the run."""
    from ctlens.core.files import usable_folder
    from ctlens.training.checkpoint import has_checkpoint
    from ctlens.training.kept import partial_folder

    if not out.name:
        raise CtlensError(f"{out} exists already: name a new folder.")
    partial = usable_folder(partial_folder(out))
    if has_checkpoint(partial) and not resume:
        raise CtlensError(f"{partial} holds an interrupted training: pass --resume to go on with it, or remove it.")
    return partial


def _require_same_training(out: Path, here: dict[str, Any]) -> None:
    """Raises a `CtlensError` unless the finished run in a folder is of this `identity`."""
    from ctlens.core.reading import read_json
    from ctlens.training.checkpoint import require_same

    advice = "repeat the training as it was, or name a new folder with --out."
    if not (there := read_json(out / "config.json").get("identity")):
        raise CtlensError(f"the run in {out} does not say what it is of, as an earlier ctlens wrote it: {advice}")
    require_same(there, here, f"the run in {out}", advice)


def _train_and_save(trainer: Trainer, out: Path, every: int, kept_every: int | None, quiet: bool) -> None:
    """Takes the remaining steps and saves the run; an interrupt saves a checkpoint instead."""
    from ctlens.models.sharding import is_sharded
    from ctlens.training.checkpoint import remove_checkpoint
    from ctlens.training.kept import partial_folder, take_in

    partial = partial_folder(out)
    try:
        _take_steps(trainer, out, every, kept_every, quiet)
        if trainer.writes:
            _save(trainer, out, partial)
        if is_main_process():
            take_in(out)
        trainer.processes.wait()
    except KeyboardInterrupt:
        if is_sharded(trainer.model):  # the processes may be at different steps
            sys.stderr.write("ctlens: interrupted; go on from the last checkpoint with the same command and --resume\n")
        elif len(trainer.history) and is_main_process():
            trainer.checkpoint(partial)
            done = f"{len(trainer.history)} of {len(trainer)} steps"
            sys.stderr.write(f"ctlens: interrupted after {done}; go on with the same command and --resume\n")
        raise
    finally:
        trainer.close()
    if is_main_process():
        remove_checkpoint(partial)


def _save(trainer: Trainer, out: Path, partial: Path) -> None:
    """Saves the run; where that is refused, a checkpoint in its stead, so that `--resume` only has to save."""
    from ctlens.models.sharding import is_sharded

    try:
        trainer.run.save(out)
    except CtlensError:
        if not is_sharded(trainer.model):  # one process cannot write a checkpoint alone
            with suppress(UnwritableError):
                trainer.checkpoint(partial)
        raise


def _take_steps(trainer: Trainer, out: Path, every: int, kept_every: int | None, quiet: bool) -> None:
    from ctlens.core.progress import progress_bar
    from ctlens.training.kept import keep_model, partial_folder

    with progress_bar(trainer, desc="train", initial=len(trainer.history), total=len(trainer), shown=not quiet) as bar:
        for step in bar:
            if step.is_read:
                bar.set_postfix(loss=f"{step.losses['total']:.4g}", refresh=False)
            if kept_every and step.index % kept_every == 0 and trainer.writes:
                trainer.read()
                keep_model(trainer.model, step.index, out)
            if step.index % every == 0 and trainer.writes:
                trainer.checkpoint(partial_folder(out))


def _print_course(trainer: Trainer) -> None:
    """Prints each loss at its first and last step, and the rate at which the training ended early."""
    history = trainer.history
    until = trainer.config.until
    for name in [loss.name for loss in trainer.losses] + [f"tracked/{loss.name}" for loss in trainer.track]:
        if series := history.series(name):
            say(f"{name}: {series[0]:.4g} at step 1, {series[-1]:.4g} at step {history.steps_of(name)[-1]}")
    if until and trainer.run.stopped == "target reached":
        rate = history.series(until.metric)[-1]
        say(f"Ended after {len(history)} steps: {until.metric} {rate:.3f} is below {until.below:g}")


def _print_alignment(trainer: Trainer) -> None:
    """Prints how many tokens each window aligns, and the reason for every token or pair that is left out."""
    pairs = trainer.pairs
    windows = dict.fromkeys(window for loss in trainer.losses for window in loss.windows)
    for window in windows:
        say(f"Window {window}: {pairs.coverage(window):.1%} of the tokens aligned in {len(pairs)} pairs")
        for reason, count in pairs.token_drops(window).items():
            say(f"  {count} tokens left out: {reason}")
    for reason, count in pairs.dropped.items():
        say(f"  {count} pairs left out: {reason}")
