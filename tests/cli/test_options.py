"""One word for one option, on all commands."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import pytest
import typer

import ctlens as ct
from ctlens import cli
from ctlens.cli import common

WITHDRAWN = {
    "--items": "--n-pairs or --n-prompts",
    "--lora-sites": "--lora-target-modules",
    "--organism": "--model",
    "--count": "--n-facts",
    "--row": "--pair",
    "--folder": "--model or --out",
    "--batch": "--batch-size",
    "--learning-rate": "--lr",
    "--output": "--out",
    "--verbose": "--quiet",
}
"""Words that other options have had or could have, and what the thing is called."""
SEVERAL = {
    ("--n-pairs", "doses"): "a model is trained on each of several numbers of pairs",
    ("--model", "audit"): "several organisms are audited, for an interval over them",
}
"""Options that take another kind of value than on the other commands, and why."""
COUNTS = {"--seeds", "--steps", "--workers", "--processes"}
"""Whole numbers of things that go without `n-`, because the plural says it."""


class Option(NamedTuple):
    """An option of a command."""

    command: str
    names: tuple[str, ...]
    kind: str
    help: str


def options(group: Any, before: str = "") -> Iterator[Option]:
    """The options of all commands."""
    for name, found in group.commands.items():
        if hasattr(found, "commands"):
            yield from options(found, f"{before}{name} ")
            continue
        hints = get_type_hints(found.callback)
        for each in found.params:
            if each.param_type_name == "option":
                kind = _kind(hints.get(each.name, bool))
                yield Option(f"{before}{name}", tuple(each.opts), kind, each.help or "")


def _kind(hint: Any) -> str:
    """The kind of value of a type hint: a file or folder is named by a text."""
    kinds = {str(part).replace("pathlib.Path", "str") for part in get_args(hint) or (hint,) if part is not type(None)}
    return f"{'several of ' if get_origin(hint) is list else ''}{' or '.join(sorted(kinds))}"


ALL = list(options(typer.main.get_command(cli.app)))


def test_every_command_is_looked_at() -> None:
    assert {"train", "compare", "pairs wrap", "organism train"} <= {option.command for option in ALL}


def test_an_option_has_one_spelling() -> None:
    assert [option for option in ALL if len(option.names) != 1] == []


def test_an_option_takes_the_same_kind_of_value_wherever_it_is() -> None:
    kinds: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for option in ALL:
        (name,) = option.names
        if (name, option.command) not in SEVERAL:
            kinds[name][option.kind].append(option.command)
    assert {name: dict(found) for name, found in kinds.items() if len(found) > 1} == {}


def test_what_is_excepted_differs() -> None:
    for name, command in SEVERAL:
        own = {option.kind for option in ALL if (name, option.command) == (option.names[0], command)}
        others = {option.kind for option in ALL if option.names[0] == name and option.command != command}
        assert own and not own & others


def test_a_number_of_things_is_called_n() -> None:
    counting = ("number of", "how many", "pairs ", "prompts ", "held-out pairs")
    numbers = [option for option in ALL if option.kind == str(int) and option.help.lower().startswith(counting)]
    named = {option.names[0] for option in numbers} - COUNTS - {"--batch-size", "--pair"}
    assert len(named) > 2 and all(name.startswith("--n-") for name in named), named


@pytest.mark.parametrize("word", WITHDRAWN)
def test_a_withdrawn_word_does_not_come_back(word: str) -> None:
    assert [option.command for option in ALL if word in option.names] == [], WITHDRAWN[word]


def test_the_shipped_organism_has_a_name_where_a_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert repr(common.chosen_model("organism")) == repr(ct.load_organism())
    assert common.chosen_tokenizer("organism").get_vocab() == ct.load_organism().tokenizer.get_vocab()
    (tmp_path / "organism").mkdir()  # a folder of that name is the folder
    with pytest.raises(ct.CtlensError, match="organism is no model folder"):
        common.chosen_model("organism")
