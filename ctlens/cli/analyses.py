"""`ctlens patch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctlens.cli.common import (
    Device,
    Dtype,
    ModelSource,
    PairsFile,
    Quiet,
    ThreatName,
    chosen_model,
    chosen_pairs,
    split_names,
)
from ctlens.cli.completing import completed_from
from ctlens.cli.output import say


def patch_command(
    out: Annotated[Path, typer.Option(help="New folder for the patched values (a table) and the figure.")],
    site: Annotated[
        str,
        typer.Option(
            help="Hook point to patch: resid_pre, resid_mid, resid_post, attn_out, mlp_out, mlp_post, z or pattern, of "
            "every layer; or one of these in full, as blocks.3.hook_resid_post."
        ),
    ],
    direction: Annotated[
        str,
        typer.Option(
            help="denoising puts clean activations into the wrapped run, noising wrapped ones into the clean run."
        ),
    ],
    model: ModelSource = None,
    pairs: PairsFile = None,
    threat: ThreatName = "",
    split: Annotated[
        str,
        typer.Option(
            help="Split of the threat's pairs: train, entities, heldout or structure.",
            autocompletion=completed_from("ctlens.world.world:SPLITS"),
        ),
    ] = "heldout",
    n_pairs: Annotated[int, typer.Option(help="How many pairs of the threat to patch.")] = 64,
    positions: Annotated[
        str,
        typer.Option(help="Tokens to patch: each (every aligned token by itself), or last, content or all (together)."),
    ] = "each",
    metrics: Annotated[
        str,
        typer.Option(
            help="Comma-separated measures of the answer: logit_diff, probability, kl. The figure shows the first."
        ),
    ] = "logit_diff",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    quiet: Quiet = False,
) -> None:
    """Patches activations: clean ones into the run on the wrapped prompt, or the reverse, and measures the answer."""
    from ctlens.analysis import patch
    from ctlens.core.files import atomic_folder, require_free
    from ctlens.plots import save_figure

    require_free(out)
    chosen = chosen_pairs(pairs, threat, n_pairs=n_pairs, split=split)
    found = patch(
        chosen_model(model, device, dtype),
        chosen,
        site=site,
        direction=direction,
        positions=positions,
        metrics=split_names(metrics),
        progress=not quiet,
    )
    with atomic_folder(out) as work:
        found.save(work / "patching.safetensors")
        found.to_dataframe().to_csv(work / "patching.csv", index=False)
        save_figure(found.figure(), work / "patching")
    for metric, target, source in zip(found.metrics, found.target.mean(-1), found.source.mean(-1), strict=True):
        say(f"{metric}, {len(chosen)} pairs: {target:.3f} before patching, {source:.3f} in the other run")
    say(f"Patching: {out}")
