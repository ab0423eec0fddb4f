"""`ctlens train | evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctlens.cli.common import (
    Device,
    Dtype,
    LoraRank,
    LoraTargetModules,
    ModelSource,
    PairsFile,
    Quiet,
    Seed,
    ThreatName,
    ThreatNames,
    chosen_lora,
    chosen_model,
    chosen_pairs,
    is_main_process,
    print_table,
    say,
    split_names,
)
from ctlens.core.errors import CtlensError, UnwritableError, unknown
from ctlens.core.limits import AT_LEAST_1, require

if TYPE_CHECKING:
    from ctlens.core.types import LensModel
    from ctlens.losses import Loss
    from ctlens.threats import Threat
    from ctlens.training import Logger, Trainer


def train_command(
    out: Annotated[Path, typer.Option(help="New folder for the run.")],
    loss: Annotated[
        list[str],
        typer.Option(
            help="act, mlpct, attct, bct, rmct, opct, f2c, klct, attout, attmass, subact, dpo, or as published: "
            "act:stack; repeatable."
        ),
    ],
    model: ModelSource = None,
    pairs: PairsFile = None,
    threat: ThreatName = "",
    window: Annotated[
        str | None,
        typer.Option(
            help="Tokens that every loss compares: shared, suffix, content, explicit, last, answer; else its own."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Pairs per training step.")] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4,
    retention: Annotated[
        float, typer.Option(help="Weight of retention: the KL to the untrained model on prompts that must not change.")
    ] = 10.0,
    lora_rank: LoraRank = None,
    lora_target_modules: LoraTargetModules = "",
    accumulate: Annotated[int, typer.Option(help="Split each batch into this many parts, to save memory.")] = 1,
    memory: Annotated[
        str,
        typer.Option(help="Kept for gradients: all (fastest); layers (losses are recomputed); blocks (the model too)."),
    ] = "all",
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
    checkpoint_every: Annotated[int, typer.Option(help="Save a checkpoint every so many steps.")] = 50,
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
    """Trains a model on pairs with one loss or several, and saves the run."""
    from dataclasses import replace

    from ctlens.core.files import alone, require_free
    from ctlens.training import TrainConfig, Trainer, Until
    from ctlens.training.checkpoint import has_checkpoint, identity, remove_checkpoint
    from ctlens.training.processes import settle

    require(AT_LEAST_1, **{"--checkpoint-every": checkpoint_every})
    if stop_below is not None and not threat:
        raise CtlensError("--stop-below measures the threat that is trained on: give --threat NAME.")
    kind, options = _schedule(schedule)
    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        retention=retention,
        seed=seed,
        accumulate=accumulate,
        schedule=kind,
        schedule_options=options,
        until=None if stop_below is None else Until(threat, below=stop_below),
        window=window,
        calibrate=calibrate,
        memory=memory,
    )
    if lora := chosen_lora(lora_rank, split_names(lora_target_modules)):
        config = replace(config, trainable=lora)
    losses = [_loss(name) for name in loss]
    tracked = [_loss(name) for name in split_names(track)]
    quiet = quiet or not is_main_process()
    with alone(out) if is_main_process() else nullcontext():
        partial = _partial(out, resume)
        finished = resume and (out / "history.csv").is_file()
        if not finished:
            require_free(out)
        chosen = chosen_pairs(pairs, threat, n_pairs=256, split="train", seed=seed)
        reference = chosen_model(model, settle(device), dtype)
        if finished:
            _require_same_training(out, identity(reference, chosen, (), losses, tracked, config))
            remove_checkpoint(partial)
            say(f"Run: {out} (finished before)")
            return
        loggers = _loggers(log or [], out)
        options: dict[str, Any] = {"track": tracked, "loggers": loggers, "cache_folder": cache_folder}
        trainer = Trainer(reference, chosen, losses, config, progress=not quiet, **options)
        if has_checkpoint(partial):
            trainer.restore(partial)
        _print_alignment(trainer)
        _train_and_save(trainer, out, partial, checkpoint_every, quiet)
    _print_course(trainer)
    say(f"Run: {out}")


def evaluate_command(
    model: ModelSource = None,
    threats: ThreatNames = "",
    pairs: PairsFile = None,
    split: Annotated[
        str, typer.Option(help="Comma-separated splits to ask: train, entities, heldout or structure.")
    ] = "heldout",
    n_prompts: Annotated[int, typer.Option(help="Pairs per threat and split.")] = 96,
    base: Annotated[
        str,
        typer.Option(
            help="The model before training: of natural threats, only questions that it answers right without an "
            "attack are asked. By default the model itself."
        ),
    ] = "",
    judge: Annotated[
        str,
        typer.Option(
            help="Your own function that judges the answers, as module:function; else the answers in the pairs decide."
        ),
    ] = "",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    per_token: Annotated[
        bool,
        typer.Option(
            "--per-token",
            help="In multiple choice, score an option by its mean log-probability per token instead of the sum.",
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="CSV file for the table.")] = None,
) -> None:
    """Measures how often a model answers well and badly: on wrapped, clean and benign prompts, with intervals."""
    from ctlens.core.files import atomic_file, usable_file
    from ctlens.data.formats import load_pairs
    from ctlens.evaluation import evaluate

    if out:
        usable_file(out)
    own = load_pairs(pairs) if pairs else None
    options: dict[str, Any] = {
        "pairs": own,
        "split": split_names(split),
        "n_prompts": n_prompts,
        "judge": _judge(judge) if judge else None,
        "per_token": per_token,
    }
    chosen = chosen_model(model, device, dtype)
    asked = _screened(split_names(threats), chosen_model(base, device, dtype) if base else chosen)
    table = evaluate(chosen, asked, **options).to_dataframe()
    if out:
        with atomic_file(out) as temporary:
            table.to_csv(temporary, index=False)
    print_table("Evaluation", table)


def _screened(names: Sequence[str], base: LensModel) -> list[Threat]:
    """Finds the threats of these names, the natural ones with the questions that a model answers right when clean."""
    from ctlens.threats import Natural, get, screen

    found: list[Threat] = []
    for threat in map(get, names):
        if isinstance(threat, Natural):
            screening = screen(base, threat)
            say(screening.sentence)
            threat = screening.threat
        found.append(threat)
    return found


def _judge(text: str) -> Any:
    """Loads the function of `module:function` from the current folder or an installed package."""
    import importlib

    module, _, name = text.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CtlensError(f"--judge takes module:function; {text!r} cannot be loaded: {error}.") from None
    finally:
        sys.path.pop(0)


def _loss(text: str) -> Loss:
    """Builds the loss of a name, or the published loss of `method:source`."""
    from ctlens import losses

    name, _, source = text.partition(":")
    return losses.preset(name, source) if source else losses.get(name)


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

    if not out.name:
        raise CtlensError(f"{out} exists already: name a new folder.")
    partial = usable_folder(out.with_name(out.name + ".partial"))
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


def _train_and_save(trainer: Trainer, out: Path, partial: Path, every: int, quiet: bool) -> None:
    """Takes the remaining steps and saves the run; an interrupt saves a checkpoint instead."""
    from ctlens.training.checkpoint import remove_checkpoint

    try:
        _take_steps(trainer, partial, every, quiet)
        if is_main_process():
            _save(trainer, out, partial)
        trainer.processes.wait()
    except KeyboardInterrupt:
        if len(trainer.history) and is_main_process():
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
    try:
        trainer.run.save(out)
    except CtlensError:
        with suppress(UnwritableError):
            trainer.checkpoint(partial)
        raise


def _take_steps(trainer: Trainer, partial: Path, every: int, quiet: bool) -> None:
    from ctlens.core.progress import progress_bar

    with progress_bar(trainer, desc="train", initial=len(trainer.history), total=len(trainer), shown=not quiet) as bar:
        for step in bar:
            bar.set_postfix(loss=f"{step.losses['total']:.4g}", refresh=False)
            if step.index % every == 0 and is_main_process():
                trainer.checkpoint(partial)


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
