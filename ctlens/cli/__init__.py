"""The command line: `ctlens compare | doses | train | evaluate | audit | patch | export | smollm2 | pairs | ...`.

Heavy imports wait for the command that needs them, so that `--help` answers at once. A user's
mistake ends with exit code 2 and one sentence on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from ctlens import __version__
from ctlens.cli import analyses, audits, evaluating, models, organism, pairs, prompts, studies, training
from ctlens.cli.output import DOCUMENT, command, say
from ctlens.core.errors import CtlensError

app = typer.Typer(
    help="Train a language model to answer alike with and without an adversarial wrapper, and see what changed inside.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_COMMANDS = {
    "compare": studies.compare_command,
    "replicate": studies.replicate_command,
    "doses": studies.doses,
    "train": training.train_command,
    "evaluate": evaluating.evaluate_command,
    "capability": evaluating.capability_command,
    "audit": audits.audit_command,
    "patch": analyses.patch_command,
    "export": models.export,
    "models": models.models,
    "estimate": models.estimate_command,
    "report": studies.report,
    "smollm2": models.smollm2,
}
for name, function in _COMMANDS.items():
    app.command(name)(command(function))
app.add_typer(organism.organism_app, name="organism")
app.add_typer(pairs.pairs_app, name="pairs")
app.add_typer(prompts.prompts_app, name="prompts")


def print_version(wanted: bool) -> None:
    """Prints name and version and ends the program if `--version` was given."""
    if wanted:
        say(f"ctlens {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Holds the options that belong to no command."""


# Typer keeps its copy of click private; every usage error descends from this class.
UsageError: Any = typer.BadParameter.__mro__[2]


def _require_text(arguments: Sequence[str]) -> None:
    """Refuses arguments whose bytes are no text: a report or a figure that names them could not be written."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise CtlensError(f"the argument {argument!r} is no UTF-8: rename the file, or type it anew.") from None


def main() -> None:
    """Runs the command line; a user's mistake is one sentence on stderr and exit code 2."""
    _write_any_text()
    DOCUMENT.begin()
    try:
        _require_text(sys.argv[1:])
        code = app(prog_name="ctlens", standalone_mode=False) or 0
        DOCUMENT.end()
    except (CtlensError, UsageError, OSError) as error:
        text = getattr(error, "format_message", error.__str__)() or "name a command."
        sys.stderr.write("ctlens: " + " ".join(text.split()) + "\n")
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    sys.exit(code)  # after the except block, so that an interrupted command has been freed and its workers have ended


def _write_any_text() -> None:
    """Lets a console that is not UTF-8, as on Windows where output is redirected, show `?` for what it cannot write."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
