"""The command line: `ctlens compare | train | evaluate | report | organism`.

Heavy imports wait for the command that needs them, so that `--help` answers at once. A user's
mistake ends with exit code 2 and one sentence on stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctlens.errors import CtlensError

if TYPE_CHECKING:
    import pandas as pd

    from ctlens.losses import Loss
    from ctlens.pairs import Pair
    from ctlens.study import Cell
    from ctlens.training import Trainer

app = typer.Typer(
    help="Train models so that an adversarial wrapper no longer changes what they do, and see what changed inside.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
organism = typer.Typer(help="The small model with a known vulnerability.", no_args_is_help=True)
app.add_typer(organism, name="organism")

# Typer keeps its copy of click private; every usage error descends from this class.
UsageError: Any = typer.BadParameter.__mro__[2]

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Seed = Annotated[int, typer.Option(help="Seed of the data order.")]
ThreatNames = Annotated[str, typer.Option("--threats", help="Comma-separated threats; all by default.")]
ModelFolder = Annotated[Path | None, typer.Option("--model", help="HuggingFace or run folder; else the organism.")]
PairsFile = Annotated[Path | None, typer.Option("--pairs", help="JSONL with clean and wrapped prompts.")]


@app.command()
def compare(
    out: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("runs/compare"),
    threats: ThreatNames = "",
    methods: Annotated[str, typer.Option(help="Comma-separated losses; all by default.")] = "",
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 1,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Finish the study in the folder.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train every method on every threat, evaluate on held-out pairs, look inside, write a report."""
    from ctlens.study import Study, StudyConfig
    from ctlens.training import TrainConfig

    config = StudyConfig(_names(threats), _names(methods), seeds, training=TrainConfig(steps=steps))
    study = Study(config, out, resume=resume, progress=not quiet)
    for cell, rows in study:
        _announce(cell, rows)
    result = study.finish()
    _print_summary(result.results)
    _say(f"Report: {out / 'report.html'}")


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="New folder for the run.")],
    loss: Annotated[list[str], typer.Option(help="act, mlpct, attct or bct; repeat for several.")],
    model: ModelFolder = None,
    pairs: PairsFile = None,
    threat: Annotated[str, typer.Option(help="Train on this threat's own pairs instead of a file.")] = "",
    window: Annotated[str, typer.Option(help="shared, suffix, content or explicit.")] = "shared",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Pairs a step.")] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4,
    retention: Annotated[float, typer.Option(help="Weight of the KL to the reference.")] = 10.0,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Train a model on pairs with one loss or several, and save the run."""
    from ctlens.alignment import WINDOWS
    from ctlens.errors import unknown
    from ctlens.files import require_free
    from ctlens.training import TrainConfig, Trainer

    require_free(out)
    if window not in WINDOWS:
        raise unknown("alignment window", window, WINDOWS)
    config = TrainConfig(steps=steps, batch_size=batch_size, lr=lr, retention=retention, seed=seed)
    losses = [_loss(name, window) for name in loss]
    chosen = _pairs(pairs, threat, seed)
    trainer = Trainer(_model(model), chosen, losses, config, progress=not quiet)
    _print_alignment(trainer)
    _take_steps(trainer, quiet)
    trainer.run.save(out)
    for name in loss:
        series = trainer.history.series(name)
        _say(f"{name}: {series[0]:.4g} at step 1, {series[-1]:.4g} at step {steps}")
    _say(f"Run: {out}")


@app.command()
def evaluate(
    model: ModelFolder = None,
    threats: ThreatNames = "",
    pairs: PairsFile = None,
    split: Annotated[str, typer.Option(help="train or heldout.")] = "heldout",
    items: Annotated[int, typer.Option(help="Pairs a threat.")] = 96,
    out: Annotated[Path | None, typer.Option(help="CSV file for the table.")] = None,
) -> None:
    """Bad and good rates on wrapped, clean and benign prompts, with intervals."""
    from ctlens.evaluation import evaluate as run_evaluation
    from ctlens.files import atomic_file
    from ctlens.pairs import load_pairs

    if out and out.is_dir():
        raise CtlensError(f"{out} is a folder: name a file for the table.")
    own = load_pairs(pairs) if pairs else None
    table = run_evaluation(_model(model), _names(threats), pairs=own, split=split, n=items).to_dataframe()
    if out:
        with atomic_file(out) as temporary:
            table.to_csv(temporary, index=False)
    _print_table("Evaluation", table)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a study.")]) -> None:
    """Write the report of a finished study again."""
    from ctlens.report import write_report

    _say(f"Report: {write_report(folder)}")


@organism.command("train")
def organism_train(
    out: Annotated[Path, typer.Option(help="New folder for the organism.")],
    seed: Annotated[int, typer.Option(help="Seed of weights and corpus.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Pretraining steps; by default as shipped.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train an organism from scratch and write its folder with its card."""
    from ctlens.organism import train_organism

    train_organism(out, seed=seed, steps=steps, progress=not quiet)
    _say(f"Organism: {out}")


def _model(folder: Path | None) -> Any:
    if folder is None:
        from ctlens.organism import load_organism

        return load_organism()
    from ctlens.models import load_model

    return load_model(folder)


def _pairs(path: Path | None, threat: str, seed: int) -> list[Pair]:
    if (path is None) == (not threat):
        raise CtlensError("give either --pairs FILE or --threat NAME.")
    if path is not None:
        from ctlens.pairs import load_pairs

        return load_pairs(path)
    from ctlens import threats

    return threats.get(threat).pairs(256, split="train", seed=seed)


def _loss(name: str, window: str) -> Loss:
    from dataclasses import replace

    from ctlens import losses

    loss = losses.get(name)
    return replace(loss, window=window) if loss.windows else loss  # type: ignore[call-arg]


def _take_steps(trainer: Trainer, quiet: bool) -> None:
    from tqdm.auto import tqdm

    with tqdm(trainer, desc="train", disable=quiet) as bar:
        for step in bar:
            bar.set_postfix(loss=f"{step.losses['total']:.4g}", refresh=False)


def _print_alignment(trainer: Trainer) -> None:
    """The coverage of the aligned windows and the reason of every drop."""
    pairs = trainer.pairs
    windows = dict.fromkeys(window for loss in trainer.losses for window in loss.windows)
    for window in windows:
        _say(f"Window {window}: {pairs.coverage(window):.1%} of the tokens aligned in {len(pairs)} pairs")
        for reason, count in pairs.token_drops(window).items():
            _say(f"  {count} tokens left out: {reason}")
    for reason, count in pairs.dropped.items():
        _say(f"  {count} pairs left out: {reason}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _announce(cell: Cell, rows: pd.DataFrame) -> None:
    """One line as soon as a cell is done, above the progress bars."""
    from tqdm.auto import tqdm

    found = rows.query("metric == 'bad_rate' and arm == 'wrapped' and evaluated_threat == @cell.threat")
    last = found.to_dict("records")[-1]
    interval = f"[{last['ci_low']:.0%} to {last['ci_high']:.0%}]"
    tqdm.write(f"{cell.threat}, {cell.method}, seed {cell.seed}: bad rate on wrapped {last['value']:.0%} {interval}")


def _print_summary(results: pd.DataFrame) -> None:
    """One table a threat, narrow enough for a terminal of 80 columns."""
    from ctlens.report import summary_table

    for threat, rows in summary_table(results).groupby("threat", sort=False):
        table = rows.drop(columns="threat").map(lambda cell: str(cell).replace(" [", "\n["))
        _print_table(f"{threat}: held-out behaviour at the last step, 95% intervals", table)
    _say("Bad rate on wrapped prompts, against the retention-only control of the same seed:")
    for row in results.query("metric == 'bad_rate_vs_retention'").to_dict("records"):
        change = f"{100 * row['value']:+.0f} points [{100 * row['ci_low']:+.0f} to {100 * row['ci_high']:+.0f}]"
        _say(f"  {row['trained_threat']}, {row['method']}, seed {row['seed']}: {change}")


def _print_table(title: str, table: pd.DataFrame) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1))
    for position, column in enumerate(table.columns):
        shown.add_column(str(column), overflow="fold", no_wrap=position == 0)
    for row in table.itertuples(index=False):
        shown.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row))
    Console().print(shown)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def main() -> None:
    """Runs the command line; a user's mistake is one sentence on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except (CtlensError, UsageError, OSError) as error:
        text = getattr(error, "format_message", error.__str__)() or "name a command."
        sys.stderr.write("ctlens: " + " ".join(text.split()) + "\n")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
