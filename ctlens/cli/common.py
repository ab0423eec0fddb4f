"""Options, and what commands make of them: models, pairs, losses, settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctlens.cli.completing import completed_from
from ctlens.core.errors import CtlensError

if TYPE_CHECKING:
    from ctlens.data.pairs import Pair
    from ctlens.losses import Loss
    from ctlens.models.lora import LoRA

Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bars.")]
Methods = Annotated[
    str,
    typer.Option(
        help="Comma-separated losses, a training for each; act, mlpct, attct and bct by default.",
        autocompletion=completed_from("ctlens.losses:names", "ctlens.study.conditions:VARIANTS"),
    ),
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
        autocompletion=completed_from("ctlens.threats:names"),
    ),
]
Splits = Annotated[str, typer.Option(help="Comma-separated splits to ask: train, entities, heldout or structure.")]
PromptCount = Annotated[int, typer.Option(help="Pairs per threat and split.")]
Judged = Annotated[
    str,
    typer.Option(
        help="Your own function that judges the answers, as module:function; else the answers in the pairs decide."
    ),
]
ModelSource = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Folder of a HuggingFace model, of a PEFT adapter or of a run that ctlens trained; a .gguf file; or the "
        "name of a model on the hub. By default the shipped organism, which is also called organism.",
    ),
]
PairsFile = Annotated[
    Path | None,
    typer.Option(
        "--pairs",
        help="JSONL or CSV file of your own pairs, each a clean and a wrapped prompt; the guide shows a row of each "
        "format.",
    ),
]
LossNames = Annotated[
    list[str] | None,
    typer.Option(
        help="act, mlpct, attct, bct, rmct, opct, f2c, klct, attout, attmass, subact, dpo; as published, act:stack; "
        "or a class of your own, module:Class; repeatable.",
        autocompletion=completed_from("ctlens.losses:names"),
    ),
]

Device = Annotated[str, typer.Option(help="Device to compute on: cpu, cuda, cuda:1, mps, or auto.")]
LoraRank = Annotated[
    int | None, typer.Option(help="Train low-rank adapters (LoRA) of this rank and leave the weights frozen.")
]
LoraTargetModules = Annotated[
    str,
    typer.Option(
        help="Comma-separated matrices that get adapters, of q, k, v, o, mlp_in, mlp_gate, mlp_out; q,v by default.",
        autocompletion=completed_from("ctlens.models.matrices:MATRICES"),
    ),
]
Trainable = Annotated[
    str,
    typer.Option(
        help="Comma-separated parameter groups to train, of embed, attn, mlp, norm, unembed; attn by default.",
        autocompletion=completed_from("ctlens.models.parameters:GROUPS"),
    ),
]
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
Dtype = Annotated[
    str,
    typer.Option(
        help="Number format of the weights: float32, bfloat16 (or bf16) or float16 (or fp16).",
        callback=lambda name: _SHORT_DTYPES.get(name, name),
    ),
]
RunConfig = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="The config.json of an earlier one, or its folder, whose settings hold where no other option says "
        "otherwise.",
        callback=lambda path: path / "config.json" if path and path.is_dir() else path,
    ),
]

ThreatName = Annotated[
    str,
    typer.Option(
        help="Draw pairs of this threat, for example sycophancy, instead of reading a file.",
        autocompletion=completed_from("ctlens.threats:names"),
    ),
]


def chosen_model(source: str | None, device: str = "cpu", dtype: str = "float32", *, shard: bool = False) -> Any:
    """Loads the model of a `--model`, or the shipped organism, on a device and in a dtype, or sharded."""
    from ctlens.models.loading import load_model
    from ctlens.organism import SHIPPED

    return load_model(_named(source) or SHIPPED, device=chosen_device(device), dtype=dtype, shard=shard)


def chosen_device(name: str) -> Any:
    """Returns the device of that name; raises if this machine lacks it."""
    from ctlens.core.types import device_named

    try:
        return device_named(name)
    except CtlensError as error:
        raise CtlensError(f"--{error}") from None


def _named(source: str | None) -> str | None:
    """What a `--model` names, None for the shipped organism."""
    from ctlens.organism import SHIPPED_NAME

    return None if source == SHIPPED_NAME and not Path(source).exists() else source


def chosen_tokenizer(source: str | None) -> Any:
    """Loads the tokenizer of a `--model`, or the shipped organism's."""
    source = _named(source)
    if source is None:
        return chosen_model(None).tokenizer
    from ctlens.models.loading import load_tokenizer

    if (tokenizer := load_tokenizer(source)) is None:
        raise CtlensError(f"{source} holds no tokenizer: name a folder with tokenizer.json.")
    return tokenizer


def chosen_trainable(groups: str, rank: int | None, modules: str) -> tuple[str, ...] | LoRA | None:
    """Makes of the options what is trained: parameter groups, or adapters; None if no option is given."""
    from ctlens.models.lora import LoRA

    target_modules = split_names(modules)
    if rank is None:
        if target_modules:
            raise CtlensError("--lora-target-modules needs a rank: give --lora-rank too.")
        return split_names(groups) or None
    if groups:
        raise CtlensError("--trainable names weights and --lora-rank leaves them frozen: give one of them.")
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


def chosen_loss(text: str) -> Loss:
    """Builds the loss of a name, the published loss of `method:source`, or one of the class of `module:Class`."""
    from ctlens import losses

    name, _, source = text.partition(":")
    if "," in text:
        raise CtlensError(f"--loss takes one loss, and not {text!r}: repeat it, --loss act --loss bct.")
    if not source:
        return losses.get(name)
    if name in set(losses.table()["method"]):
        return losses.preset(name, source)
    kind = loaded(text, "--loss takes a name, a published method:source or your own module:Class")
    if not (isinstance(kind, type) and issubclass(kind, losses.Loss)):
        raise CtlensError(f"{text} is no class of losses: derive it from ctlens.losses.Loss.")
    losses.register(kind)
    return losses.get(kind.name)


def chosen_judge(text: str) -> Any:
    """Loads the function of a `--judge`; None where there is none."""
    return loaded(text, "--judge takes module:function") if text else None


def loaded(text: str, expected: str) -> Any:
    """Loads what `module:name` names, from the current folder or an installed package.

    Args:
        text: of the option.
        expected: what the option takes, for the sentence of an error.
    """
    import importlib

    module, _, name = text.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise CtlensError(f"{expected}; {text!r} cannot be loaded: {error}.") from None
    finally:
        sys.path.pop(0)


def named_options(context: typer.Context) -> set[str]:
    """The parameters of a command that its line names, and that are not there by default."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
