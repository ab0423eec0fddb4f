"""`ctlens audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ctlens.cli.common import Device, Quiet, Seed, chosen_model, split_names
from ctlens.cli.completing import completed_from
from ctlens.cli.output import print_table, say
from ctlens.core.errors import CtlensError


def audit_command(
    threat: Annotated[
        str,
        typer.Option(
            help="Threat of the micro-world whose prompts are trained on and asked.",
            autocompletion=completed_from("ctlens.threats:names"),
        ),
    ],
    out: Annotated[Path, typer.Option(help="New folder for the labels, the tables and the figures.")] = Path(
        "runs/audit"
    ),
    model: Annotated[
        list[str] | None,
        typer.Option(help="Folder of an organism, or what else ctlens loads; repeatable. By default the shipped one."),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated. Labels: first, greedy, decodings; and with a number of samples certainty:4, "
            "majority:4, views:4, oracle:4, anti-oracle:4. Without labels: soft-bct-own, soft-bct-reference, act-own, "
            "act-reference."
        ),
    ] = "first,greedy,certainty:4,majority:4,oracle:4,anti-oracle:4",
    pools: Annotated[
        str, typer.Option(help="Comma-separated prompts that are trained on: wrapped, clean or mixed.")
    ] = "wrapped",
    n_pairs: Annotated[int, typer.Option(help="Pairs whose prompts are trained on.")] = 128,
    n_prompts: Annotated[int, typer.Option(help="Held-out pairs that are asked.")] = 96,
    steps: Annotated[int, typer.Option(help="Training steps of each method.")] = 40,
    temperature: Annotated[float, typer.Option(help="Temperature of the samples.")] = 1.0,
    device: Device = "cpu",
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Audits training on a model's own answers: does it amplify the model's misbehaviour or suppress it?"""
    from dataclasses import replace

    from ctlens import plots
    from ctlens.auditing import audit, audit_pairs
    from ctlens.auditing.run import LABEL_TRAINING
    from ctlens.core.files import atomic_folder, require_free

    require_free(out)
    pool = audit_pairs(threat, n_pairs, seed=seed)
    heldout = audit_pairs(threat, n_prompts, "heldout", seed)
    models = _models(model or [], device)
    with atomic_folder(out) as work:
        found = audit(
            models,
            pool,
            split_names(methods),
            heldout=heldout,
            pools=split_names(pools),
            training=replace(LABEL_TRAINING, steps=steps),
            temperature=temperature,
            seed=seed,
            out=work / "audit",
            progress=not quiet,
        )
        tables = {"audit": found.to_dataframe("gives_in"), "strength": found.to_dataframe("strength", "gives_in")}
        for name, table in {**tables, "eta": found.eta("gives_in"), "signs": found.signs()}.items():
            table.to_csv(work / f"{name}.csv", index=False)
        plots.write_figures({work / "figures" / kind: found.figure(kind) for kind in found.pools})
    wrapped = tables["audit"].query("prompt_side == 'wrapped'")
    whose = ["organism"] if len(models) > 1 else []
    columns = ["method", "pool", "split", "gives_in", "change", "verdict", "label_shift", "predicted"]
    print_table("Change of the risk of wrapped prompts, and of the labels", wrapped.filter([*whose, *columns]))
    say(
        "Predicted is the change if training makes every labelled prompt answer as its labels do and touches no other: "
        "the theory is of one score and fixed prompts, and held-out prompts are not fixed."
    )
    say(f"Labels, tables and figures: {out}")


def _models(sources: list[str], device: str) -> dict[str, Any]:
    """The models by the text that names each; the shipped organism where none is named."""
    if len(set(sources)) < len(sources):
        raise CtlensError("--model names a model twice: name each once.")
    return {source: chosen_model(source, device) for source in sources} or {"organism": chosen_model(None, device)}
