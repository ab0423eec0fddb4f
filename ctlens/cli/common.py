"""What the commands share: options, the model that is meant, tables and lines on the terminal."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctlens.core.errors import CtlensError

if TYPE_CHECKING:
    import pandas as pd

    from ctlens.data.pairs import Pair
    from ctlens.models.lora import LoRA

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Methods = Annotated[str, typer.Option(help="Comma-separated losses; act, mlpct, attct and bct by default.")]
Seeds = Annotated[int, typer.Option(help="Number of seeds.")]
Steps = Annotated[int, typer.Option(help="Training steps.")]
Resume = Annotated[bool, typer.Option("--resume", help="Finish the study in the folder.")]
Workers = Annotated[int | None, typer.Option(help="Trainings at a time; by default one a core.")]
Seed = Annotated[int, typer.Option(help="Seed of the data order.")]
ThreatNames = Annotated[str, typer.Option("--threats", help="Comma-separated threats; all by default.")]
ModelFolder = Annotated[Path | None, typer.Option("--model", help="HuggingFace or run folder; else the organism.")]
PairsFile = Annotated[Path | None, typer.Option("--pairs", help="JSONL with clean and wrapped prompts.")]

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps.")]
LoraRank = Annotated[int | None, typer.Option(help="Train adapters of this rank beside frozen weights.")]
LoraSites = Annotated[str, typer.Option(help="Of q, k, v, o, mlp_in, mlp_gate, mlp_out; q,v by default.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")]

Threat = Annotated[str, typer.Option(help="This threat's own pairs instead of a file.")]


def chosen_model(folder: Path | None, device: str = "cpu", dtype: str = "float32") -> Any:
    """The model of a folder, or the shipped organism, where and how it is asked for."""
    from ctlens.models.loading import load_model
    from ctlens.organism import SHIPPED

    return load_model(folder or SHIPPED, device=chosen_device(device), dtype=dtype)


def chosen_device(name: str) -> Any:
    """The device of that name, if this machine has it."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise CtlensError(f"--device {name} cannot be used here, name cpu, cuda or mps: {reason}") from None
    return device


def is_main_process() -> bool:
    """Whether this process writes and prints; of several that accelerate started, the first."""
    return os.environ.get("RANK", "0") == "0"


def chosen_tokenizer(folder: Path | None) -> Any:
    """The tokenizer of a folder, or the shipped organism's."""
    if folder is None:
        return chosen_model(None).tokenizer
    from ctlens.models.loading import load_tokenizer

    if (tokenizer := load_tokenizer(folder)) is None:
        raise CtlensError(f"{folder} holds no tokenizer: name a folder with tokenizer.json.")
    return tokenizer


def chosen_lora(rank: int | None, sites: tuple[str, ...]) -> LoRA | None:
    """The adapters that the options ask for; None where none is given."""
    from ctlens.models.lora import LoRA

    if rank is None:
        if sites:
            raise CtlensError("--lora-sites needs a rank: give --lora-rank too.")
        return None
    return LoRA(rank, sites=sites) if sites else LoRA(rank)


def chosen_pairs(path: Path | None, threat: str, **options: Any) -> list[Pair]:
    """The pairs of a file, or those of a threat with its options."""
    if (path is None) == (not threat):
        raise CtlensError("give either --pairs FILE or --threat NAME.")
    if path is not None:
        from ctlens.data.formats import load_pairs

        return load_pairs(path)
    from ctlens import threats

    return threats.get(threat).pairs(**options)


def names(text: str) -> tuple[str, ...]:
    """The names in a comma-separated option."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def print_table(title: str, table: pd.DataFrame) -> None:
    """A table with its title."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for position, column in enumerate(table.columns):
        shown.add_column(str(column), overflow="fold", no_wrap=position == 0)
    for row in table.itertuples(index=False):
        shown.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row))
    Console().print(shown)


def say(text: str) -> None:
    """One line on stdout, from one process."""
    if is_main_process():
        sys.stdout.write(text + "\n")
