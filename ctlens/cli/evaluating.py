"""`ctlens evaluate | capability`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctlens.cli.common import (
    Device,
    Dtype,
    Judged,
    ModelSource,
    PairsFile,
    PromptCount,
    Quiet,
    Splits,
    ThreatNames,
    chosen_judge,
    chosen_model,
    split_names,
)
from ctlens.cli.output import is_main_process, print_table, say

if TYPE_CHECKING:
    from ctlens.core.types import LensModel
    from ctlens.evaluation import Evaluation
    from ctlens.threats import Threat

NumbersFile = Annotated[
    Path | None, typer.Option("--out", help="New CSV file for every number, also of the threats' own metrics.")
]


def evaluate_command(
    model: ModelSource = None,
    threats: ThreatNames = "",
    pairs: PairsFile = None,
    split: Splits = "heldout",
    n_prompts: PromptCount = 96,
    base: Annotated[
        str,
        typer.Option(
            help="The model before training: of natural threats, only questions that it answers right without an "
            "attack are asked. By default the model itself."
        ),
    ] = "",
    judge: Judged = "",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    per_token: Annotated[
        bool,
        typer.Option(
            "--per-token",
            help="In multiple choice, score an option by its mean log-probability per token instead of the sum.",
        ),
    ] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Split all weights among the processes that torchrun started.")
    ] = False,
    out: NumbersFile = None,
    quiet: Quiet = False,
) -> None:
    """Measures how often a model answers well and badly: on wrapped, clean and benign prompts, with intervals."""
    from ctlens.core.files import new_file
    from ctlens.data.formats import load_pairs
    from ctlens.evaluation import evaluate
    from ctlens.training.processes import settle

    if out:
        new_file(out, ".csv")
    own = load_pairs(pairs) if pairs else None
    options: dict[str, Any] = {
        "pairs": own,
        "split": split_names(split),
        "n_prompts": n_prompts,
        "judge": chosen_judge(judge),
        "progress": not quiet and is_main_process(),
        "per_token": per_token,
    }
    settled = settle(device)
    chosen = chosen_model(model, settled, dtype, shard=shard)
    asked = _screened(split_names(threats), chosen_model(base, settled, dtype, shard=shard) if base else chosen)
    found = evaluate(chosen, asked or None, **options)
    show_evaluation(found, out)


def capability_command(
    model: ModelSource = None,
    base: Annotated[str, typer.Option(help="The model before training, which the changes are from.")] = "",
    threats: Annotated[
        str,
        typer.Option(
            help="Comma-separated threats whose clean prompts are asked; by default the natural ones, or those of the "
            "micro-world for a model that knows only its words."
        ),
    ] = "",
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 file of a text whose perplexity is measured, in words the model knows.")
    ] = None,
    split: Splits = "heldout",
    n_prompts: PromptCount = 96,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of the text that the model sees at once; its context by default.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens by which it goes on through the text; half of --max-length by default.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Annotated[Path | None, typer.Option(help="New CSV file for the accuracies and their changes.")] = None,
    quiet: Quiet = False,
) -> None:
    """Measures what a training costs where there is no attack: accuracy on clean prompts, and perplexity of a text."""
    from ctlens.core.files import atomic_file, new_file
    from ctlens.evaluation import capability

    if out:
        new_file(out, ".csv")
    models = {"base": chosen_model(base, device, dtype)} if base else {}
    models["model"] = chosen_model(model, device, dtype)
    options: dict[str, Any] = {"text": text, "max_length": max_length, "stride": stride, "progress": not quiet}
    found = capability(models, split_names(threats) or None, split=split_names(split), n_prompts=n_prompts, **options)
    table = found.to_dataframe()
    if out:
        with atomic_file(out) as temporary:
            table.to_csv(temporary, index=False)
    print_table("How many clean prompts are answered well", table)
    if found.texts:
        print_table("How well the text is predicted", found.text_table())


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


def show_evaluation(found: Evaluation, out: Path | None) -> None:
    """Prints the rates and metrics of an evaluation, and writes its numbers where a file is named."""
    from ctlens.core.files import atomic_file

    if out and is_main_process():
        with atomic_file(out) as temporary:
            found.to_dataframe().to_csv(temporary, index=False)
    print_table("How often answers are bad and good", found.summary())
    if not (own_metrics := found.metrics()).empty:
        print_table("The metrics of the threats", own_metrics)
