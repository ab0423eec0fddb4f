"""`ctlens compare | doses | report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctlens.cli.common import Methods, Quiet, Resume, Seeds, Steps, ThreatNames, Workers, names, print_table, say
from ctlens.errors import CtlensError

if TYPE_CHECKING:
    import pandas as pd

    from ctlens.study import Cell


def compare(
    out: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("runs/compare"),
    threats: ThreatNames = "",
    methods: Methods = "",
    seeds: Seeds = 1,
    steps: Steps = 100,
    window: Annotated[str, typer.Option(help="Of all methods: shared, suffix, content or last.")] = "shared",
    calibrate: Annotated[float | None, typer.Option(help="Weigh methods to this gradient norm at the start.")] = None,
    workers: Workers = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Train every method on every threat, evaluate on held-out pairs, look inside, write a report."""
    from ctlens.study import Study, StudyConfig
    from ctlens.training import TrainConfig

    training = TrainConfig(steps=steps, window=window, calibrate=calibrate)
    config = StudyConfig(names(threats), names(methods), seeds, training=training)
    study = Study(config, out, resume=resume, progress=not quiet, workers=workers)
    for cell, rows in study:
        _announce(cell, rows)
    _print_summary(study.finish().results)
    say(f"Report: {out / 'report.html'}")


def doses(
    threat: Annotated[str, typer.Option(help="Trained and evaluated on.")],
    out: Annotated[Path, typer.Option(help="Folder of the studies.")] = Path("runs/doses"),
    methods: Methods = "",
    pairs: Annotated[str, typer.Option(help="Comma-separated numbers of training pairs.")] = "8,32,128,512",
    seeds: Seeds = 1,
    steps: Steps = 100,
    workers: Workers = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Train on more and more pairs of one threat: how much does a repair take?"""
    from ctlens.doses import DoseConfig, DoseStudy
    from ctlens.training import TrainConfig

    config = DoseConfig(threat, names(methods), _numbers(pairs), seeds, training=TrainConfig(steps=steps))
    study = DoseStudy(config, out, resume=resume, progress=not quiet, workers=workers)
    for number, cell, rows in study:
        _announce(cell, rows, f"{number} pairs, ")
    result = study.finish()
    last = "metric == 'bad_rate' and arm == 'wrapped' and split == 'heldout' and step in (0, @steps)"
    found = result.results.query(last)
    print_table("Bad rate on wrapped prompts", found.filter(["pairs", "method", "seed", "value", "ci_low", "ci_high"]))
    say(f"Figures: {out / 'figures'}")


def report(folder: Annotated[Path, typer.Argument(help="Folder of a study.")]) -> None:
    """Write the report of a finished study again."""
    from ctlens.report import write_report

    say(f"Report: {write_report(folder)}")


def _numbers(text: str) -> tuple[int, ...]:
    given = names(text)
    if not all(number.isdecimal() for number in given):
        raise CtlensError(f"--pairs takes whole numbers separated by commas, not {text!r}.")
    return tuple(map(int, given))


def _announce(cell: Cell, rows: pd.DataFrame, dose: str = "") -> None:
    """One line as soon as a cell is done, above the progress bar."""
    from tqdm.auto import tqdm

    own = "metric == 'bad_rate' and arm == 'wrapped' and split == 'heldout' and evaluated_threat == @cell.threat"
    last = rows.query(own).to_dict("records")[-1]
    interval = f"[{last['ci_low']:.0%} to {last['ci_high']:.0%}]"
    name = f"{cell.threat}, {dose}{cell.method}, seed {cell.seed}"
    tqdm.write(f"{name}: bad rate on wrapped {last['value']:.0%} {interval}")


def _print_summary(results: pd.DataFrame) -> None:
    """A line per threat and method, narrow enough for a terminal of 80 columns."""
    from ctlens.tables import overview

    table = overview(results).rename(columns={"good clean": "clean", "good benign": "benign"})
    table["threat"] = table["threat"].mask(table["threat"].duplicated(), "")
    for arm in ("clean", "benign"):
        table[arm] = table[arm].map(lambda rate: rate.percent)
    print_table("Bad answers to wrapped prompts by split, and good answers", table)
