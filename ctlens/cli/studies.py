"""`ctlens compare | replicate | doses | report`."""

from __future__ import annotations

import math
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctlens.cli.common import (
    Device,
    Dtype,
    LoraRank,
    LoraTargetModules,
    Methods,
    PairsFile,
    Quiet,
    Resume,
    RunConfig,
    SeedCount,
    Steps,
    Trainable,
    Workers,
    chosen_device,
    chosen_trainable,
    named_options,
    split_names,
)
from ctlens.cli.completing import completed_from
from ctlens.cli.output import print_table, say, say_above_bars
from ctlens.core.errors import CtlensError

if TYPE_CHECKING:
    import pandas as pd

    from ctlens.study.config import Cell


def compare_command(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(help="Folder for the study: results, figures, report and all trained models.")
    ] = Path("runs/compare"),
    threats: Annotated[
        str,
        typer.Option(
            help="Comma-separated: the threats to train against; by default those of the size.",
            autocompletion=completed_from("ctlens.threats:names"),
        ),
    ] = "",
    methods: Methods = "",
    seeds: Annotated[int | None, typer.Option(help="Number of seeds: 1 with --size first or matrix, else 3.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps: 100, or 20 with --size natural.")] = None,
    window: Annotated[
        str,
        typer.Option(
            help="Tokens that every method compares: shared (content and chat tail), suffix, content or last.",
            autocompletion=completed_from("ctlens.data.alignment:WINDOWS"),
        ),
    ] = "shared",
    calibrate: Annotated[
        float | None, typer.Option(help="Scale every loss so that its gradient has this norm before the first step.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Folder of an organism, a run or a HuggingFace model, or what else ctlens loads; else the shipped "
            "organism.",
        ),
    ] = "",
    clean_born: Annotated[
        str,
        typer.Option(help="Folder of the organism's clean-born twin, to say how much of the way to it a repair went."),
    ] = "",
    pairs: PairsFile = None,
    size: Annotated[
        str,
        typer.Option(
            help="first: two threats and their controls; matrix: every threat, and what crosses the losses; full: all "
            "of it on every threat, three seeds; replicated: two threats, three seeds, one of several studies that "
            "ctlens replicate pools; natural: a real model, with adapters, three seeds and few pairs. By default "
            "natural for natural threats, and first for others.",
            autocompletion=completed_from("ctlens.study.config:STUDY_SIZES"),
        ),
    ] = "",
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print how long the study would take, without running it.")
    ] = False,
    workers: Workers = None,
    backend: Annotated[
        str,
        typer.Option(
            help="Where trainings run: loky starts processes on this machine, dask and ray use a cluster, on which "
            "each training has a GPU of its own with --device cuda."
        ),
    ] = "loky",
    scheduler: Annotated[str, typer.Option(help="Address of the dask scheduler; goes with --backend dask.")] = "",
    trainable: Trainable = "",
    lora_rank: LoraRank = None,
    lora_target_modules: LoraTargetModules = "",
    config: RunConfig = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Compares methods: trains each on every threat, evaluates and analyses the models, and writes a report."""
    from ctlens.study.claims import answer, basis
    from ctlens.study.config import earlier_study, shared_training, size_for, study_of_size
    from ctlens.study.runner import Study, seconds
    from ctlens.study.workers import Pool

    if config and size:
        raise CtlensError("--config says what a study runs, and so does --size: give one of them.")
    size = size or size_for(split_names(threats))
    earlier = earlier_study(config) if config else None
    named = named_options(context)
    asked = {"steps": steps, "window": window, "calibrate": calibrate}
    changes = {name: value for name, value in asked.items() if (name in named if earlier else value is not None)}
    if trained := chosen_trainable(trainable, lora_rank, lora_target_modules):
        changes["trainable"] = trained
    training = replace(earlier.training if earlier else shared_training(size), **changes)
    chosen: dict[str, Any] = {
        "threats": split_names(threats),
        "methods": split_names(methods),
        "training": training,
        "model": model,
        "file": str(pairs or ""),
        "device": str(chosen_device(device)),
        "dtype": dtype,
        "clean_born": clean_born,
    }
    if seeds is not None:
        chosen["seeds"] = seeds
    if earlier:
        given = {_FIELDS.get(name, name) for name in named} | {"training"}
        planned = replace(earlier, **{name: value for name, value in chosen.items() if name in given})
    else:
        planned = study_of_size(size, **chosen)
    alone = backend != "loky" and planned.device.startswith("cuda")
    pool = Pool(workers, backend, scheduler, gpus=int(alone))
    if size == "full" or estimate:
        made = len(planned.derived())
        further = f" and {made} models made of them" if made else ""
        time = _spell(seconds(planned, pool))
        say(f"{len(planned.cells())} trainings{further}, {pool.workers} at a time: about {time}.")
    if estimate:
        return
    study = Study(planned, out, resume=resume, progress=not quiet, pool=pool)
    for cell, rows in study:
        _announce(cell, rows)
    result = study.finish()
    _print_summary(result.results)
    for line in (*(" ".join(answered) for answered in answer(result.claims)), basis(result.claims)):
        say(textwrap.fill(line, shutil.get_terminal_size().columns))
    say(f"Report: {out / 'report.html'}")


_FIELDS = {"pairs": "file"}
"""The settings of a study that are called otherwise than their option."""


def replicate_command(
    studies: Annotated[
        list[Path],
        typer.Argument(help="Folders of finished studies, each of another model; those that lie in one are a group."),
    ],
    out: Annotated[Path, typer.Option(help="New folder for the pooled claims and the figures.")] = Path(
        "runs/replicated"
    ),
) -> None:
    """Pools the claims of several studies, to see which hold again in other models."""
    from ctlens import plots
    from ctlens.core.files import atomic_folder
    from ctlens.study.claims.claim import UNMEASURED
    from ctlens.study.replication import replicate

    found = replicate(studies)
    table = found.to_dataframe()
    measured = table[table["verdict"] != UNMEASURED]
    cases = measured.filter(["threat", "setting"]).drop_duplicates().itertuples(index=False)
    named = {f"{threat}-{setting.replace(' ', '-')}": found.figure(threat, setting) for threat, setting in cases}
    with atomic_folder(out) as work:
        found.save(work / "claims.csv")
        plots.write_figures({work / "figures" / name: figure for name, figure in named.items()})
    shown = table.filter(["key", "threat", "setting", "group"])
    shown["holds on"] = [f"{holds} of {n}" for holds, n in zip(table["holds"], table["n"], strict=True)]
    print_table("Claims over models", shown.assign(**{name: table[name] for name in ("value", "ci_low", "ci_high")}))
    say(f"Claims and figures: {out}")


def doses(
    threat: Annotated[
        str,
        typer.Option(
            help="Threat to train on and to evaluate on.", autocompletion=completed_from("ctlens.threats:names")
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results, the figures and all trained models.")] = Path(
        "runs/doses"
    ),
    methods: Methods = "",
    n_pairs: Annotated[str, typer.Option(help="Comma-separated numbers of training pairs.")] = "8,32,128,512",
    seeds: SeedCount = 1,
    steps: Steps = 100,
    workers: Workers = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Measures the dose response: trains on more and more pairs of one threat, to see how many a repair takes."""
    from ctlens.study.config import SHARED_TRAINING
    from ctlens.study.dose_response import DoseConfig, DoseStudy

    config = DoseConfig(
        threat, split_names(methods), _numbers(n_pairs), seeds, training=replace(SHARED_TRAINING, steps=steps)
    )
    study = DoseStudy(config, out, resume=resume, progress=not quiet, workers=workers)
    for number, cell, rows in study:
        _announce(cell, rows, f"{number} pairs, ")
    result = study.finish()
    last = "metric == 'bad_rate' and prompt_side == 'wrapped' and split == 'heldout' and step in (0, @steps)"
    found = result.results.query(last)
    print_table(
        "Bad rate on wrapped prompts", found.filter(["n_pairs", "condition", "seed", "value", "ci_low", "ci_high"])
    )
    say(f"Figures: {out / 'figures'}")


def report(folder: Annotated[Path, typer.Argument(help="Folder of a study.")]) -> None:
    """Writes the report of a finished study again, without training."""
    from ctlens.study.report import write_report

    say(f"Report: {write_report(folder)}")


def _numbers(text: str) -> tuple[int, ...]:
    given = split_names(text)
    if not all(number.isdecimal() for number in given):
        raise CtlensError(f"--n-pairs takes whole numbers separated by commas, not {text!r}.")
    return tuple(map(int, given))


def _spell(seconds: float) -> str:
    """Writes a length of time in words.

    >>> _spell(250), _spell(5000)
    ('4 minutes', '1.4 hours')
    """
    return f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{max(1, round(seconds / 60))} minutes"


def _announce(cell: Cell, rows: pd.DataFrame, dose: str = "") -> None:
    """Prints one line as soon as a cell is done, above the progress bar."""
    name = f"{cell.threat}, {dose}{cell.condition}, seed {cell.seed}"
    own = (
        "metric == 'bad_rate' and prompt_side == 'wrapped' and split == 'heldout' and evaluated_threat == @cell.threat"
    )
    found = rows.query(own).to_dict("records")
    if not found:  # a second seed for the analyses, which answers no questions
        say_above_bars(f"{name}: trained")
        return
    last = found[-1]
    low = last["ci_low"]
    interval = (
        "too few topics or wrapper texts for an interval" if math.isnan(low) else f"{low:.0%} to {last['ci_high']:.0%}"
    )
    say_above_bars(f"{name}: bad rate on wrapped {last['value']:.0%} [{interval}]")


def _print_summary(results: pd.DataFrame) -> None:
    """Prints one row per threat and condition, narrow enough for a terminal of 80 columns."""
    from ctlens.study.results import overview

    table = overview(results).rename(columns={"good clean": "clean", "good benign": "benign"})
    table["threat"] = table["threat"].mask(table["threat"].duplicated(), "")
    for prompt_side in ("clean", "benign"):
        table[prompt_side] = table[prompt_side].map(lambda rate: rate.percent)
    print_table("Bad answers to wrapped prompts by split, and good answers", table)
