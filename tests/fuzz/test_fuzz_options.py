"""Random values for every option of every command: it does its work or says in a sentence why not, and leaves no half.

Long work is cut off where it would begin, and counts as accepted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache, reduce
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from helpers.fuzzing import FUZZ, began, ended, tree
from helpers.models import byte_level_tokenizer, hf_model
from helpers.study_folder import write_study
from hypothesis import given, settings
from hypothesis import strategies as st

from ctlens import cli
from ctlens.evaluation import export_prompts
from ctlens.models.loading import load_model

pytestmark = pytest.mark.fuzz

Options = dict[str, tuple[str, ...]]
"""The values of each option by its name on the command line, of an argument by its place; a flag has none."""

BASES: dict[str, Options] = {
    "compare": {"--out": ("new",), "--threats": ("sycophancy",), "--methods": ("act",), "--quiet": ()},
    "replicate": {"studies": ("study", "other"), "--out": ("new",)},
    "doses": {"--threat": ("sycophancy",), "--methods": ("act",), "--n-pairs": ("4",), "--out": ("new",)},
    "train": {"--model": ("hf",), "--pairs": ("good.jsonl",), "--loss": ("act",), "--out": ("new",)},
    "evaluate": {"--model": ("hf",), "--pairs": ("good.jsonl",), "--n-prompts": ("2",)},
    "capability": {"--threats": ("sycophancy",), "--n-prompts": ("2",)},
    "audit": {"--threat": ("sycophancy",), "--n-pairs": ("2",), "--n-prompts": ("2",), "--out": ("new",)},
    "patch": {
        "--model": ("hf",),
        "--pairs": ("good.jsonl",),
        "--site": ("resid_pre",),
        "--direction": ("denoising",),
        "--out": ("new",),
    },
    "export": {"--model": ("hf",), "--out": ("new",)},
    "estimate": {
        "--model": ("hf",),
        "--loss": ("act",),
        "--length": ("24",),
        "--wrapper-length": ("4",),
        "--quiet": (),
    },
    "models": {"--architectures": ("llama",)},
    "report": {"folder": ("study",)},
    "smollm2": {"--out": ("new",)},
    "organism train": {"--out": ("new",), "--steps": ("1",)},
    "organism card": {},
    "organism sample": {"--threats": ("jailbreak",)},
    "organism leak": {"--out": ("new",), "--model": ("hf",), "--methods": ("act",)},
    "pairs inspect": {"file": ("good.jsonl",), "--model": ("hf",)},
    "pairs convert": {"file": ("good.jsonl",), "--out": ("new.jsonl",)},
    "prompts export": {"--out": ("new.jsonl",), "--pairs": ("good.jsonl",)},
    "prompts judge": {"prompts": ("exported.jsonl",), "answers": ("answers.jsonl",)},
    "pairs wrap": {"prompts": ("prompts.jsonl",), "--threat": ("jailbreak",), "--out": ("new.jsonl",)},
}
NUMBERS = (
    "-1",
    "0",
    "1",
    "2",
    "",
    "a",
    "1.5",
    "1e3",
    "nan",
    "inf",
    "-inf",
    "0.5",
    "1e-320",
    "9" * 30,
    "0x10",
    " 1 ",
    "٣",
)
PATHS = (
    *("absent", "file", "folder", "empty", ".", "", "good.jsonl", "broken.jsonl", "table.csv", "file/below", "hf"),
    *("x" * 300, "absent/below", "caf\udce9", "-", "[/INST]", "study", "a b", "NUL", "🟦"),
)
SOURCES = (*PATHS, "gpt2", "some-org/some-name", "absent.gguf", "hf/config.json", "a--b", "\n", "--help")
WORDS = (
    *("", ",", " ", "x", "act", "act,act", "act,", "act:stack", "act:", ":", "sycophancy", "sycophancy,sycophancy"),
    *("jailbreak", "shared", "last", "explicit", "answer", "resid_post", "blocks.0.hook_z", "pattern", "noising"),
    *("logit_diff,kl", "train", "heldout,heldout", "float16", "bfloat16", "float64", "meta", "cuda", "cpu:7", "mps"),
    *(
        "layers",
        "CosineAnnealingLR,T_max=0",
        "StepLR,step_size=-1",
        "linear,a=b",
        "=,",
        "é漢🟦",
        "caf\udce9",
        "[/INST]",
    ),
    *(
        "{hint}",
        "%s",
        "../x",
        "dask",
        "loky",
        "small",
        "q,v",
        "q,q",
        "json:nope",
        "nope:x",
        "8,,8",
        "\n",
        "--help",
        "0",
    ),
)
LONG_WORK = (
    ("ctlens.training.trainer", "Trainer.take_step"),
    ("ctlens.study.runner", "Study.__iter__"),
    ("ctlens.study.runner", "seconds"),
    ("ctlens.study.dose_response", "DoseStudy.__iter__"),
    ("ctlens.study.inoculation", "progress_bar"),
    ("ctlens.organism.pretrain", "make_lessons"),
    ("ctlens.compatibility", "progress_bar"),
    ("ctlens.models.smollm2", "_downloaded"),
)
"""What stands at the beginning of all work that takes long; a command that comes to it has accepted its options."""
PAIR = {"clean": "Is it right?", "wrapped": "I don't think so.\nIs it right?", "good": " yes", "bad": " no"}


def commands(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command by its full name."""
    below = getattr(group, "commands", {})
    if not below:
        yield name, group
    for command in below.values():
        yield from commands(command, f"{name} {command.name}".strip())


COMMANDS: dict[str, Any] = dict(commands(typer.main.get_command(cli.app)))


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to work in, with a small model and files that are good, broken or something else."""
    folder = tmp_path_factory.mktemp("options")
    hf_model("llama").save_pretrained(folder / "hf")
    byte_level_tokenizer().save_pretrained(folder / "hf")
    for name in ("study", "other"):
        write_study(folder / name)
        config = {"threats": ["sycophancy"], "methods": ["act", "bct"], "weights": name}
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "good.jsonl").write_text(f"{json.dumps(PAIR)}\n" * 2)
    (folder / "prompts.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": "How?"}\n')
    export_prompts(folder / "exported.jsonl", pairs=[PAIR])
    (folder / "answers.jsonl").write_text(
        "".join(f'{{"id": "pairs-{prompt_side}-0", "answer": "yes"}}\n' for prompt_side in ("wrapped", "clean"))
    )
    (folder / "broken.jsonl").write_text('{"clean": "Is it')
    (folder / "table.csv").write_text("prompt,prefill\nWhy?,Sure:\n")
    (folder / "file").write_text("mine")
    (folder / "empty").write_text("")
    (folder / "folder").mkdir()
    (folder / "folder/mine").write_text("mine")
    with pytest.MonkeyPatch.context() as patch:
        for module, name in LONG_WORK:
            *owner, attribute = name.split(".")
            patch.setattr(reduce(getattr, owner, import_module(module)), attribute, began)
        patch.setattr("ctlens.models.loading.load_model", cache(load_model))  # what is loaded once, a command can share
        patch.chdir(folder)
        yield folder


def written(command: str, options: Options) -> list[str]:
    """The words of a command line; what is empty stays a word of its own."""
    words = command.split()
    for name, values in options.items():
        if not name.startswith("--"):
            words += values
        elif values:
            words += [word for value in values for word in (name, value)]
        else:
            words.append(name)
    return words


def choices(command: str, parameter: Any) -> tuple[str, ...]:
    """Good, bad and absurd values for one option, by the type that its command declares."""
    if parameter.name == "model":
        return SOURCES
    declared = str(get_type_hints(COMMANDS[command].callback)[parameter.name])
    if "Path" in declared:
        return PATHS
    return NUMBERS if "int" in declared or "float" in declared else WORDS


def values_for(command: str, parameter: Any) -> st.SearchStrategy[tuple[str, ...]]:
    """The values of one option on a line; a flag has none."""
    if getattr(parameter, "is_flag", False):
        return st.just(())
    drawn = st.sampled_from(choices(command, parameter))
    return st.lists(drawn, min_size=1, max_size=2 if parameter.multiple else 1).map(tuple)


def name_of(parameter: Any) -> str:
    return parameter.opts[0] if parameter.param_type_name == "option" else parameter.name


@st.composite
def lines(draw: st.DrawFn, command: str, first: Any) -> list[str]:
    """A command line on which one option has a random value, and up to two others too."""
    parameters = [parameter for parameter in COMMANDS[command].params if name_of(parameter) != "--help"]
    others = draw(st.lists(st.sampled_from(parameters), max_size=2))
    options = dict(BASES[command])
    for parameter in (first, *others):
        options[name_of(parameter)] = draw(values_for(command, parameter))
    return written(command, options)


EVERY = [
    pytest.param(command, parameter, id=f"{command} {name_of(parameter)}")
    for command, known in COMMANDS.items()
    for parameter in known.params
    if name_of(parameter) != "--help"
]


def test_every_command_has_a_line_that_is_accepted(place: Path) -> None:
    assert {*BASES} == {*COMMANDS}
    for command, options in BASES.items():
        found = ended(*written(command, options))
        assert found.code == 0, (command, found.err)
        clear(place)


@pytest.mark.parametrize(("command", "parameter"), EVERY)
@settings(FUZZ, max_examples=3)
@given(data=st.data())
def test_random_options_end_with_code_0_or_2_and_leave_no_halves(
    command: str, parameter: Any, data: st.DataObject, place: Path
) -> None:
    words = data.draw(lines(command, parameter))
    before = tree(place)

    found = ended(*words)

    assert found.code in (0, 2), (words, found.err)
    if found.code == 2:
        assert found.err.startswith("ctlens: ") and found.err.count("\n") == 1, (words, found.err)
        assert tree(place) == before, words
    clear(place)


KEPT = (
    *("hf", "study", "other", "good.jsonl", "prompts.jsonl", "exported.jsonl", "answers.jsonl", "broken.jsonl"),
    *("table.csv", "file", "empty", "folder"),
)


def clear(place: Path) -> None:
    """Removes what an accepted command has written."""
    for path in place.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
