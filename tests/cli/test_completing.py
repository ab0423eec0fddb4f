"""A shell completes names: of losses, threats, splits and what else an option takes by name."""

from __future__ import annotations

from typing import Any

import click
import pytest
import typer

from ctlens import cli


def option(command: str, name: str) -> tuple[click.Context, click.Parameter]:
    """An option and the context that a shell asks it in."""
    commands: Any = typer.main.get_command(cli.app)
    found = commands.commands[command]
    by_name = {flag: each for each in found.params for flag in each.opts}
    return click.Context(found, info_name=command), by_name[f"--{name}"]


@pytest.mark.parametrize(
    ("command", "name", "begun", "completed"),
    [
        ("compare", "threats", "sycophancy,p", ["sycophancy,persona", "sycophancy,prefill"]),
        ("compare", "methods", "bct,klct_s", ["bct,klct_sharp"]),
        ("compare", "size", "m", ["matrix"]),
        ("compare", "window", "c", ["content"]),
        ("train", "loss", "mlp", ["mlpct"]),
        ("train", "trainable", "attn,m", ["attn,mlp"]),
        ("train", "lora-target-modules", "mlp_", ["mlp_in", "mlp_gate", "mlp_out"]),
        ("train", "threat", "nothing", []),
        ("patch", "split", "", ["train", "entities", "heldout", "structure"]),
    ],
)
def test_the_last_of_several_names_is_completed(command: str, name: str, begun: str, completed: list[str]) -> None:
    context, parameter = option(command, name)

    assert sorted(item.value for item in parameter.shell_complete(context, begun)) == sorted(completed)
