"""Options, model loading and terminal output that all commands share."""

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

Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bars.")]
Methods = Annotated[
    str, typer.Option(help="Comma-separated losses, a training for each; act, mlpct, attct and bct by default.")
]
SeedCount = Annotated[int, typer.Option(help="Number of seeds; every training is repeated with each.")]
Steps = Annotated[int, typer.Option(help="Training steps.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the study in the folder instead of starting a new one.")
]
Workers = Annotated[
    int | None, typer.Option(help="Number of trainings that run at the same time; one per core by default.")
]
Seed = Annotated[int, typer.Option(help="Seed of the random draws.")]
ThreatNames = Annotated[
    str,
    typer.Option(
        "--threats",
        help="Comma-separated: sycophancy, jailbreak, persona, prefill, frustration, conditional; all by default.",
    ),
]
ModelSource = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Folder of a HuggingFace model, of a PEFT adapter or of a run that ctlens trained; a .gguf file; or the "
        "name of a model on the hub. By default the shipped organism.",
    ),
]
PairsFile = Annotated[
    Path | None, typer.Option("--pairs", help="JSONL file of your own pairs, each a clean and a wrapped prompt.")
]

Device = Annotated[str, typer.Option(help="Device to compute on: cpu, cuda, cuda:1, mps, or auto.")]
LoraRank = Annotated[
    int | None, typer.Option(help="Train low-rank adapters (LoRA) of this rank and leave the weights frozen.")
]
LoraTargetModules = Annotated[
    str,
    typer.Option(
        help="Comma-separated matrices that get adapters, of q, k, v, o, mlp_in, mlp_gate, mlp_out; q,v by default."
    ),
]
Dtype = Annotated[str, typer.Option(help="Number format of the weights: float32, bfloat16 or float16.")]

ThreatName = Annotated[
    str, typer.Option(help="Draw pairs of this threat, for example sycophancy, instead of reading a file.")
]


def chosen_model(source: str | None, device: str = "cpu", dtype: str = "float32") -> Any:
    """Loads the model of a `--model`, or the shipped organism, on a device and in a dtype."""
    from ctlens.models.loading import load_model
    from ctlens.organism import SHIPPED

    return load_model(source or SHIPPED, device=chosen_device(device), dtype=dtype)


def chosen_device(name: str) -> Any:
    """Returns the device of that name; raises if this machine lacks it."""
    from ctlens.core.types import device_named

    try:
        return device_named(name)
    except CtlensError as error:
        raise CtlensError(f"--{error}") from None


def is_main_process() -> bool:
    """Says whether this process writes and prints: among several that accelerate started, only the first does."""
    return os.environ.get("RANK", "0") == "0"


def chosen_tokenizer(source: str | None) -> Any:
    """Loads the tokenizer of a `--model`, or the shipped organism's."""
    if source is None:
        return chosen_model(None).tokenizer
    from ctlens.models.loading import load_tokenizer

    if (tokenizer := load_tokenizer(source)) is None:
        raise CtlensError(f"{source} holds no tokenizer: name a folder with tokenizer.json.")
    return tokenizer


def chosen_lora(rank: int | None, target_modules: tuple[str, ...]) -> LoRA | None:
    """Makes the settings of the adapters from the options; None if no option is given."""
    from ctlens.models.lora import LoRA

    if rank is None:
        if target_modules:
            raise CtlensError("--lora-target-modules needs a rank: give --lora-rank too.")
        return None
    return LoRA(rank, target_modules=target_modules) if target_modules else LoRA(rank)


def chosen_pairs(path: Path | None, threat: str, **options: Any) -> list[Pair]:
    """Reads the pairs of a file, or draws those of a threat with its options."""
    if (path is None) == (not threat):
        raise CtlensError("give either --pairs FILE or --threat NAME: pairs come from one of them.")
    if path is not None:
        from ctlens.data.formats import load_pairs

        return load_pairs(path)
    from ctlens import threats

    return threats.get(threat).pairs(**options)


def split_names(text: str) -> tuple[str, ...]:
    """Splits a comma-separated option into its names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def print_table(title: str, table: pd.DataFrame) -> None:
    """Prints a table with its title; texts from outside, such as tokens, stand as they are and are no markup."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for position, column in enumerate(table.columns):
        shown.add_column(str(column), overflow="fold", no_wrap=position == 0)
    for row in table.itertuples(index=False):
        shown.add_row(*(f"{value:.3f}" if isinstance(value, float) else _visible(str(value)) for value in row))
    Console(markup=False, emoji=False).print(shown)


def _visible(text: str) -> str:
    """A text with its control characters written out, for a terminal would obey them.

    >>> _visible("\x1b[2J é")
    '\\\\x1b[2J é'
    """
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def say(text: str) -> None:
    """Writes one line on stdout, from the main process only."""
    if is_main_process():
        sys.stdout.write(text + "\n")
