"""`ctlens models | export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctlens.cli.common import Dtype, Quiet, chosen_model, print_table, say, split_names
from ctlens.core.errors import CtlensError


def models(
    architectures: Annotated[
        str,
        typer.Option(
            help="Comma-separated HuggingFace model types, for example llama,gemma2; by default all that ctlens checks."
        ),
    ] = "",
    quiet: Quiet = False,
) -> None:
    """Tests which features of ctlens work on which HuggingFace architecture, with a tiny random model of each."""
    from ctlens import compatibility

    found = compatibility.support(split_names(architectures) or compatibility.ARCHITECTURES, progress=not quiet)
    print_table("What works", compatibility.support_table(found))
    for reason in compatibility.reasons(found):
        say(reason)
    if wrong := [row.architecture for row in found if row.wrong]:
        raise CtlensError(f"numbers are wrong on {', '.join(wrong)}: do not use it with these library versions.")


def export(
    model: Annotated[Path, typer.Option(help="Folder of a run, or of a model of ctlens or HuggingFace.")],
    out: Annotated[Path, typer.Option(help="New folder that transformers loads.")],
    dtype: Dtype = "float32",
) -> None:
    """Writes a trained model as a HuggingFace folder with merged adapters; its logits stay the same."""
    from ctlens.core.files import require_free
    from ctlens.models.export import export_huggingface

    require_free(out)
    say(f"HuggingFace folder: {export_huggingface(chosen_model(model, dtype=dtype), out)}")
