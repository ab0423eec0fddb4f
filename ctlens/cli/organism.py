"""`ctlens organism train | card | sample | leak`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctlens.cli.common import (
    Device,
    Methods,
    ModelSource,
    Quiet,
    SeedCount,
    Steps,
    ThreatNames,
    chosen_device,
    chosen_model,
    split_names,
)
from ctlens.cli.completing import completed_from
from ctlens.cli.output import command, print_table, say

if TYPE_CHECKING:
    from ctlens.organism import ReLoRA

organism_app = typer.Typer(
    help="Make or describe the organism, a small model made from scratch with known vulnerabilities.",
    no_args_is_help=True,
)


@organism_app.command("train")
@command
def train_organism_command(
    out: Annotated[Path, typer.Option(help="New folder for the organism and its card.")],
    seed: Annotated[int, typer.Option(help="Seed of weights and corpus.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Pretraining steps; by default those of the preset.")] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="Size of the organism: small (0.6M parameters, as shipped), or for a GPU large (about 10M) or huge "
            "(about 50M).",
            autocompletion=completed_from("ctlens.organism.pretrain:PRESETS"),
        ),
    ] = "small",
    relora_rank: Annotated[
        int | None,
        typer.Option(help="Pretrain low-rank adapters of this rank, merged into the weights and restarted (ReLoRA)."),
    ] = None,
    relora_every: Annotated[
        int | None, typer.Option(help="Merge the adapters and start new ones every so many steps.")
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="Where the vulnerability comes from: learnt together with all else, put afterwards into a clean-born "
            "model, or left out (clean-born).",
            autocompletion=completed_from("ctlens.organism.pretrain:RECIPES"),
        ),
    ] = "together",
    clean_born: Annotated[
        Path | None,
        typer.Option(help="Folder of the clean-born twin for --recipe afterwards; without it one is pretrained first."),
    ] = None,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Trains an organism from scratch, writes its folder with its card, and says whether it is one to study."""
    from ctlens.core.labels import CLEAN_BORN
    from ctlens.organism import card, outside_bands, train_organism

    relora = _relora(rank=relora_rank, every=relora_every)
    options = {"preset": preset, "relora": relora, "recipe": recipe, "clean_born": clean_born}
    train_organism(out, seed=seed, steps=steps, **options, device=chosen_device(device), progress=not quiet)
    say(f"Organism: {out}")
    if recipe != CLEAN_BORN and (outside := outside_bands(card(out)["behaviour"])):
        say(f"{len(outside)} numbers are outside of the bands of an organism; train it longer. The first: {outside[0]}")


def _relora(rank: int | None, every: int | None) -> ReLoRA | None:
    """Makes the settings of ReLoRA from the options; None if no option is given."""
    if rank is None and every is None:
        return None
    from ctlens.models.lora import LoRA
    from ctlens.organism import ReLoRA

    settings = ReLoRA()
    lora = settings.lora if rank is None else LoRA(rank, target_modules=settings.lora.target_modules)
    return ReLoRA(lora, every=settings.every if every is None else every)


@organism_app.command("card")
@command
def card_command(
    model: Annotated[Path | None, typer.Option(help="Folder of an organism; by default the shipped one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Markdown file for the card, instead of the terminal.")] = None,
) -> None:
    """Shows how an organism was made and how it behaves, as measured when it was trained."""
    from ctlens import organism
    from ctlens.core.files import write_text
    from ctlens.organism.describe import card_text

    text = card_text(organism.card(model) if model else organism.card())
    if out is None:
        say(text)
    else:
        write_text(out, text)


@organism_app.command("sample")
@command
def sample_command(
    threats: ThreatNames = "",
    split: Annotated[
        str,
        typer.Option(
            help="Split to draw from: train, entities, heldout or structure.",
            autocompletion=completed_from("ctlens.world.world:SPLITS"),
        ),
    ] = "train",
    n_examples: Annotated[int, typer.Option(help="How many examples of each threat to show.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
) -> None:
    """Shows examples of every threat: wrapped, clean and benign, with the good and the bad answer."""
    from ctlens import threats as registry
    from ctlens.organism.describe import examples

    for example in examples(split_names(threats) or registry.names(), split, n_examples, seed):
        say(example)


@organism_app.command("leak")
@command
def leak_command(
    out: Annotated[Path, typer.Option(help="New folder for the table and the figure.")],
    model: ModelSource = None,
    methods: Methods = "",
    seeds: SeedCount = 1,
    steps: Steps = 100,
    quiet: Quiet = False,
) -> None:
    """Teaches an organism bad advice in one domain, and measures how far it spreads and which training stops it."""
    from dataclasses import replace

    from ctlens.core.files import require_free
    from ctlens.study.inoculation import LEAK_TRAINING, leak

    require_free(out)
    training = replace(LEAK_TRAINING, steps=steps)
    found = leak(chosen_model(model), split_names(methods), seeds, training=training, progress=not quiet)
    found.save(out)
    print_table("Bad advice on risky questions outside the narrow domain", found.to_dataframe())
    print_table("System prompts that bring bad advice back", found.elicited())
    say(f"Figure: {out / 'leak.html'}")
