"""`ctlens prompts export | judge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctlens.cli.common import Judged, PairsFile, PromptCount, Seed, Splits, ThreatNames, chosen_judge, split_names
from ctlens.cli.evaluating import NumbersFile, show_evaluation
from ctlens.cli.output import command, say

prompts_app = typer.Typer(
    help="Give the prompts of an evaluation to another tool, and judge its answers.", no_args_is_help=True
)


@prompts_app.command("export")
@command
def export_command(
    out: Annotated[Path, typer.Option(help="New JSONL file, with a row per prompt.")],
    threats: ThreatNames = "",
    pairs: PairsFile = None,
    split: Splits = "heldout",
    n_prompts: PromptCount = 96,
    seed: Seed = 0,
    model: Annotated[
        str | None,
        typer.Option(help="Write each prompt also as this model's chat template has it; what evaluate --model takes."),
    ] = None,
) -> None:
    """Writes the prompts that evaluate would ask: with ids, answers and what goes together in an interval."""
    from ctlens.cli.common import chosen_tokenizer
    from ctlens.core.files import new_file
    from ctlens.data.formats import load_pairs
    from ctlens.evaluation import export_prompts

    new_file(out, ".jsonl")
    n_rows = export_prompts(
        out,
        split_names(threats) or None,
        pairs=load_pairs(pairs) if pairs else None,
        split=split_names(split),
        n_prompts=n_prompts,
        seed=seed,
        tokenizer=chosen_tokenizer(model) if model else None,
    )
    say(f"{n_rows} prompts: {out}")


@prompts_app.command("judge")
@command
def judge_command(
    prompts: Annotated[Path, typer.Argument(help="JSONL file that export wrote.")],
    answers: Annotated[
        Path,
        typer.Argument(help="JSONL file with an id and an answer per row, or the samples that lm-eval logged."),
    ],
    judge: Judged = "",
    out: NumbersFile = None,
) -> None:
    """Judges the answers that another tool got to exported prompts: the rates and intervals that evaluate gives."""
    from ctlens.core.files import new_file
    from ctlens.evaluation import judge_answers

    if out:
        new_file(out, ".csv")
    show_evaluation(judge_answers(prompts, answers, judge=chosen_judge(judge)), out)
