"""The command line: help without heavy imports, and one sentence with exit code 2 for every mistake of a user."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from helpers.models import Call, byte_level_tokenizer, hf_model

from ctlens import __version__, cli, losses, threats
from ctlens.analysis import Patching, patch
from ctlens.auditing import audit
from ctlens.evaluation import evaluate
from ctlens.models.loading import load_model
from ctlens.organism import load_organism
from ctlens.study.cells import CellTraining
from ctlens.study.config import NATURAL_TRAINING, SHARED_TRAINING, Cell, StudyConfig, study_of_size
from ctlens.study.dose_response import DOSES, DoseConfig, dose_response
from ctlens.study.runner import Study
from ctlens.training import TrainConfig, load_run
from ctlens.training.checkpoint import CHECKPOINT_FILE
from ctlens.training.estimate import estimate
from ctlens.world import SPLITS

GOOD = {"clean": "Is it right?", "wrapped": "I don't think so.\nIs it right?"}
JSONL = {
    "good": [GOOD, GOOD],
    "list": [GOOD, "[1, 2]"],
    "cut": [GOOD, '{"clean": "Is it'],
    "lacking": [GOOD, "", {"clean": "Is it right?"}],
    "foreign": [{**GOOD, "prompt": "x"}],
    "number": [{**GOOD, "clean": 3}],
    "messages": [{**GOOD, "clean": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]}],
    "empty": [],
    "apart": [{"clean": "Is it right?", "wrapped": "Something else."}],
    "long": [{"clean": "yes no " * 300, "wrapped": "So? " + "yes no " * 300}],
}
HELP_PROGRAM = """
import sys
from ctlens import cli
for line in sys.argv[1].split(","):
    sys.argv = ["ctlens", *line.split()]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code
heavy = {"torch", "transformers", "transformer_lens", "pandas", "plotly", "scipy"} & set(sys.modules)
sys.exit(" ".join(heavy) or 0)
"""


def commands(group: Any, name: str = "") -> Iterator[str]:
    """The names of all commands, for example `organism train`; empty for `ctlens` itself."""
    yield name
    for below in getattr(group, "commands", {}).values():
        yield from commands(below, f"{name} {below.name}".strip())


COMMANDS = list(commands(typer.main.get_command(cli.app)))


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, good and bad pairs, and folders that are taken, broken or hold another study."""
    place = tmp_path_factory.mktemp("materials")
    hf_model("llama").save_pretrained(place / "hf")
    byte_level_tokenizer().save_pretrained(place / "hf")
    for name, rows in JSONL.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (place / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (place / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    (place / "file").write_text("mine")
    (place / "foreign.json").write_text('{"hidden_size": 8}')
    (place / "strange.json").write_text('{"model_type": "llamma"}')
    for folder, name, text in (("taken", "notes.txt", "mine"), ("broken", "config.json", "{"), ("nothing", "", "")):
        (place / folder).mkdir()
        if name:
            (place / folder / name).write_text(text)
    Study(StudyConfig(seeds=2, training=replace(SHARED_TRAINING, steps=3)), place / "study", progress=False)
    shutil.copytree(place / "hf", place / "weightless")
    (place / "weightless" / "model.safetensors").write_bytes(b"short")
    (place / "foreign").mkdir()
    (place / "foreign" / "results.csv").write_text("a,b\n1,2\n")
    return place


@pytest.fixture
def place(materials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the materials as the working folder."""
    monkeypatch.chdir(shutil.copytree(materials, tmp_path / "place"))
    return tmp_path


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_the_commands_of_the_design_are_there() -> None:
    assert {"compare", "doses", "train", "evaluate", "audit", "patch", "report", "organism", "estimate"} <= set(
        COMMANDS
    )


def test_an_estimate_is_a_table_and_a_sentence(call: Call, place: Path) -> None:
    ended = call("estimate --quiet --loss act --model hf --batch-size 2 --length 32 --wrapper-length 8 --budget-gib 1")

    assert ended.code == 0 and ended.err == ""
    assert "patterns" in ended.out and "which fits in 1 GiB." in ended.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(call: Call, command: str) -> None:
    ended = call(f"{command} --help")

    assert ended.code == 0 and ended.err == ""
    assert f"Usage: ctlens {command}".strip() in ended.out


def test_the_version_is_that_of_the_package(call: Call) -> None:
    ended = call("--version")

    assert (ended.code, ended.out, ended.err) == (0, f"ctlens {__version__}\n", "")


@pytest.mark.processes
def test_help_and_the_version_load_nothing_heavy() -> None:
    lines = [*(f"{command} --help" for command in COMMANDS), "--version"]

    done = subprocess.run([sys.executable, "-c", HELP_PROGRAM, ",".join(lines)], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


TRAIN = "train --quiet --model hf --out new"
PATCH = "patch --quiet --out new --direction noising"
ESTIMATE = "estimate --quiet --loss act --length 32 --wrapper-length 8"
MISTAKES = {
    # the estimate
    f"{ESTIMATE}": "Missing option '--model'",
    f"{ESTIMATE} --model gone.json": "gone.json is no file",
    f"{ESTIMATE} --model broken": "config.json",
    f"{ESTIMATE} --model foreign.json": "foreign.json names no model_type",
    f"{ESTIMATE} --model strange.json": "unknown model_type in strange.json 'llamma'; did you mean 'llama'",
    f"{ESTIMATE} --model hf --budget-gib -3": "budget_gib must be a positive number, not -3.0",
    f"{ESTIMATE} --model hf --dtype bfloat16": "half precision are too coarse to train",
    # the pairs
    f"{TRAIN} --loss act --pairs gone.jsonl": "gone.jsonl does not exist",
    f"{TRAIN} --loss act --pairs taken": "taken does not exist or is no file",
    f"{TRAIN} --loss act --pairs list.jsonl": "list.jsonl, line 2: a list, but an object with named fields is expected",
    f"{TRAIN} --loss act --pairs cut.jsonl": "cut.jsonl, line 2: not JSON",
    f"{TRAIN} --loss act --pairs lacking.jsonl": "lacking.jsonl, line 3: the field 'wrapped' is missing",
    f"{TRAIN} --loss act --pairs foreign.jsonl": "foreign.jsonl, line 1: unknown field 'prompt'",
    f"{TRAIN} --loss act --pairs number.jsonl": "number.jsonl, line 1: 'clean' must be a text",
    f"{TRAIN} --loss act --pairs messages.jsonl": "no chat template",
    f"{TRAIN} --loss act --pairs bytes.jsonl": "not UTF-8",
    f"{TRAIN} --loss act --pairs empty.jsonl": "empty.jsonl holds no rows",
    f"{TRAIN} --loss act --pairs apart.jsonl": "none of the 1 pairs aligns",
    f"{TRAIN} --loss act --pairs long.jsonl": "model's context is 256",
    f"{TRAIN} --loss act": "give either --pairs FILE or --threat NAME",
    f"{TRAIN} --loss act --pairs good.jsonl --threat jailbreak": "give either --pairs FILE or --threat NAME",
    # the settings
    "train --out . --pairs good.jsonl --loss act": ". exists already: name a new folder",
    f"{TRAIN} --pairs good.jsonl": "give --loss NAME, or the config.json of a run as --config",
    f"{TRAIN} --pairs good.jsonl --loss atct": "unknown loss 'atct'; did you mean 'attct'",
    f"{TRAIN} --pairs good.jsonl --loss act --loss act": "given twice",
    f"{TRAIN} --pairs good.jsonl --loss act,bct": "repeat it, --loss act --loss bct",
    "evaluate --pairs good.jsonl --out good.jsonl": "good.jsonl exists already: name a new file",
    "evaluate --pairs good.jsonl --out numbers.txt": "numbers.txt would hold something else than its name says",
    "prompts export --pairs good.jsonl --out prompts.csv": "prompts.csv would hold something else than its name says",
    "pairs wrap good.jsonl --threat sycophancy --name Bob --out new.jsonl": "--name goes with --threat persona",
    f"{TRAIN} --pairs good.jsonl --loss act:stak": "unknown source of act 'stak'; did you mean 'stack'",
    f"{TRAIN} --pairs good.jsonl --loss act --calibrate 0": "calibrate must be a positive number, not 0.0",
    f"{TRAIN} --loss act --threat jailbrake": "unknown threat 'jailbrake'; did you mean 'jailbreak'",
    f"{TRAIN} --pairs good.jsonl --loss act --window sufix": "unknown alignment window 'sufix'",
    f"{TRAIN} --pairs good.jsonl --loss bct --window sufix": "unknown alignment window 'sufix'",
    f"{TRAIN} --pairs good.jsonl --loss act --window explicit": "none of the 2 pairs aligns",
    f"{TRAIN} --pairs good.jsonl --loss act --steps 0": "steps must be at least 1, not 0",
    f"{TRAIN} --pairs good.jsonl --loss act --steps two": "Invalid value for '--steps'",
    f"{TRAIN} --pairs good.jsonl --loss act --lr nan": "lr must be a positive number",
    f"{TRAIN} --pairs good.jsonl --loss act --batch-size 0": "batch_size must be at least 1",
    f"{TRAIN} --pairs good.jsonl --loss act --speed 9": "No such option: --speed",
    f"{TRAIN} --pairs good.jsonl --loss act --lora-rank 0": "the rank of an adapter must be",
    f"{TRAIN} --pairs good.jsonl --loss act --lora-rank 2 --lora-target-modules q,w": "unknown matrix in target_mod",
    f"{TRAIN} --pairs good.jsonl --loss act --lora-rank 99": "allows no rank above",
    f"{TRAIN} --pairs good.jsonl --loss act --lora-target-modules q": "give --lora-rank too",
    f"{TRAIN} --pairs good.jsonl --loss act --accumulate 0": "accumulate must be at least 1, not 0",
    f"{TRAIN} --pairs good.jsonl --loss act --checkpoint-every 0": "--checkpoint-every must be at least 1, not 0",
    f"{TRAIN} --pairs good.jsonl --loss act --schedule cosine": "unknown learning-rate schedule 'cosine'",
    f"{TRAIN} --pairs good.jsonl --loss act --schedule StepLR,step_size": "NAME,option=number, not 'step_size'",
    f"{TRAIN} --pairs good.jsonl --loss act --schedule StepLR,size=3": "StepLR does not work with size=3",
    f"{TRAIN} --pairs good.jsonl --loss act --stop-below 0.1": "give --threat NAME",
    f"{TRAIN} --threat jailbreak --loss act --stop-below 2": "below is a probability above 0, up to 1, not 2.0",
    f"{TRAIN} --pairs good.jsonl --loss act --track mlptc": "unknown loss 'mlptc'; did you mean 'mlpct'",
    "train --quiet --model hf --loss act --pairs good.jsonl --out taken --resume": "taken exists already",
    f"{TRAIN} --pairs good.jsonl --loss nope:Mine": "'nope:Mine' cannot be loaded: No module named 'nope'",
    f"{TRAIN} --pairs good.jsonl --loss json:dumps": "json:dumps is no class of losses: derive it from",
    f"{TRAIN} --pairs good.jsonl --loss act --trainable attn --lora-rank 2": "give one of them",
    f"{TRAIN} --pairs good.jsonl --loss act --trainable atn": "unknown parameter group 'atn'; did you mean 'attn'",
    f"{TRAIN} --pairs good.jsonl --loss act --save-every 0": "--save-every must be at least 1, not 0",
    f"{TRAIN} --pairs good.jsonl --config foreign.json": "foreign.json",
    "compare --quiet --out new --config foreign.json": "foreign.json",
    "compare --quiet --out new --config study/config.json --size first": "and so does --size: give one of them",
    # the folders
    "train --quiet --model hf --loss act --pairs good.jsonl --out taken": "taken exists already",
    "train --quiet --model hf --loss act --pairs good.jsonl --out file": "file exists already",
    "train --quiet --model gone --loss act --pairs good.jsonl --out new": "gone is no model folder",
    "train --quiet --model taken --loss act --pairs good.jsonl --out new": "taken is no model folder",
    "train --quiet --model file --loss act --pairs good.jsonl --out new": "file is no model folder",
    "train --quiet --model broken --loss act --pairs good.jsonl --out new": "not a valid JSON file",
    "train --quiet --model weightless --loss act --pairs good.jsonl --out new": "weightless does not load",
    # evaluate
    "evaluate --n-prompts 0": "n_prompts must be at least 1, not 0",
    "evaluate --n-prompts 2 --split test": "unknown split 'test'",
    "evaluate --threats jailbreak,flattery": "unknown threat 'flattery'",
    "evaluate --n-prompts 2 --split heldout,test": "unknown split 'test'",
    "evaluate --threats jailbreak,sycophancy --pairs good.jsonl": "name one of jailbreak, sycophancy",
    "evaluate --model hf --pairs good.jsonl": "neither a good nor a bad answer",
    "evaluate --model nothing --n-prompts 2": "nothing is no model folder",
    "evaluate --n-prompts 2 --threats jailbreak --out taken": "taken is a folder",
    # patch
    f"{PATCH} --threat jailbreak --site resid": "unknown site 'resid'; did you mean 'resid_pre' or 'resid_mid'",
    f"{PATCH} --threat jailbreak --site z --positions wrapper": "no twin in the clean prompt",
    f"{PATCH} --threat jailbreak --site z --metrics accuracy": "unknown metric 'accuracy'",
    f"{PATCH} --threat jailbreak --site z --n-pairs 0": "n_pairs must be at least 1, not 0",
    f"{PATCH} --threat jailbreak --site z --split test": "unknown split 'test'",
    f"{PATCH} --threat jailbrake --site z": "unknown threat 'jailbrake'; did you mean 'jailbreak'",
    f"{PATCH} --threat jailbreak": "Missing option '--site'",
    f"{PATCH} --site z": "give either --pairs FILE or --threat NAME",
    f"{PATCH} --model hf --pairs good.jsonl --site z": "names no good and bad answer",
    f"{PATCH} --model gone --threat jailbreak --site z": "gone is no model folder",
    "patch --quiet --out new --threat jailbreak --site z": "Missing option '--direction'",
    "patch --quiet --out new --threat jailbreak --site z --direction back": "unknown direction 'back'",
    "patch --quiet --out taken --threat jailbreak --site z --direction noising": "taken exists already",
    # compare
    "compare --quiet --out taken": "taken exists already",
    "compare --quiet --out file": "file exists already",
    "compare --quiet --out file/inside": "file",
    "compare --quiet --out study": "study holds another study",
    "compare --quiet --out study --resume": "study holds another study",
    "compare --quiet --out study --size matrix --seeds 2 --steps 3": "study holds this study: pass --resume",
    "compare --quiet --out broken --resume": "broken/config.json is not JSON",
    "compare --quiet --out new --seeds 0": "seeds must be at least 1",
    "compare --quiet --out new --steps 0": "steps must be at least 1",
    "compare --quiet --out new --methods act,retention": "unknown loss 'retention'",
    "compare --quiet --out new --methods act,act": "each once",
    "compare --quiet --out new --threats flattery": "unknown threat 'flattery'",
    "compare --quiet --out new --size whole": "unknown size of a study 'whole'",
    "compare --quiet --out new --workers 0": "workers must be at least 1, not 0",
    # doses
    "doses --out new": "Missing option '--threat'",
    "doses --out new --threat flattery": "unknown threat 'flattery'",
    "doses --out new --threat jailbreak --n-pairs 8,x": "--n-pairs takes whole numbers separated by commas, not '8,x'",
    "doses --out new --threat jailbreak --n-pairs 8,8": "each once",
    "doses --out new --threat jailbreak --n-pairs 8,0": "n_pairs must be at least 1, not 0",
    "doses --out new --threat jailbreak --workers 0": "workers must be at least 1, not 0",
    "doses --out taken --threat jailbreak": "taken exists already",
    # report, organism, commands
    "report gone": "gone/results.csv does not exist",
    "report file": "does not exist",
    "report nothing": "run the study first",
    "report foreign": "lacks the columns trained_threat",
    "organism train --out taken": "taken exists already",
    "organism train --out new --steps 0": "at least 1",
    "organism train --out new --preset vast": "unknown preset 'vast'",
    "organism train --out new --relora-rank 0": "the rank of an adapter",
    "organism train --out new --relora-rank 97": "is above 96, the smallest size of a matrix: lower it",
    "organism train --out new --relora-every 0": "every must be at least 1, not 0",
    "organism card --model nothing": "card.json",
    "organism sample --split hidden": "unknown split 'hidden'",
    "organism sample --threats flattery": "unknown threat of the micro-world 'flattery'",
    "organism sample --n-examples 0": "n_pairs must be at least 1, not 0",
    "organism leak --out taken": "taken exists already",
    "organism leak --out new --seeds 0": "seeds must be at least 1",
    "organism leak --out new --methods atct": "unknown loss 'atct'; did you mean 'attct'",
    "organism leak --quiet --out new --model hf": "no chat template",
    "organism grow": "No such command 'grow'",
    "compete": "No such command 'compete'",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_no_trace(call: Call, place: Path, line: str) -> None:
    before = tree(place)

    ended = call(line)

    assert ended.code == 2
    assert ended.err.startswith("ctlens: ") and ended.err.count("\n") == 1
    assert MISTAKES[line] in ended.err
    assert ended.out == ""
    assert tree(place) == before


def test_a_patching_is_written_whole(call: Call, place: Path, monkeypatch) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr("ctlens.plots.save_figure", lambda figure, stem: drawn.append(stem))

    ended = call(f"{PATCH} --threat sycophancy --n-pairs 4 --site resid_post --positions last --metrics logit_diff,kl")

    assert ended.code == 0 and ended.err == ""
    assert ended.out.endswith("Patching: new\n") and ended.out.startswith("logit_diff, 4 pairs: ")
    table = pd.read_csv("new/patching.csv")
    found = Patching.load("new/patching.safetensors")
    pairs = threats.get("sycophancy").pairs(4, split="heldout")
    options = {"site": "resid_post", "direction": "noising", "positions": "last", "progress": False}
    expected = patch(load_organism(), pairs, metrics=("logit_diff", "kl"), **options)
    np.testing.assert_allclose(found.values, expected.values, atol=1e-5)
    np.testing.assert_allclose(table["value"], expected.to_dataframe()["value"], atol=1e-5)
    assert [stem.name for stem in drawn] == ["patching"]


def test_the_organism_s_card_goes_to_the_terminal_or_a_file(call: Call, place: Path) -> None:
    shown, written = call("organism card"), call("organism card --out card.md")

    assert (shown.code, written.code) == (0, 0)
    assert shown.out == Path("card.md").read_text() + "\n"
    assert shown.out.count("\n| ") == 1 + len(threats.names()) * len(SPLITS)


def test_samples_show_every_threat_and_prompt_side_with_the_answers_that_count(call: Call) -> None:
    ended = call("organism sample --split structure --n-examples 2")

    assert ended.code == 0
    for name in threats.names():
        assert ended.out.count(f"{name}, structure: wrapper") == 2
        for case in threats.of_world(name).cases(2, "structure"):
            assert f"good: {case.good}" in ended.out and f"bad: {case.bad}" in ended.out
            assert f"good: {case.benign}" in ended.out
    for prompt_side in ("wrapped", "clean", "benign"):
        assert ended.out.count(f"\n  {prompt_side}") == 2 * len(threats.names())


@pytest.mark.parametrize("line", ["", "organism"])
def test_no_command_shows_the_help_and_what_is_missing(call: Call, line: str) -> None:
    ended = call(line)

    assert ended.code == 2 and "Commands" in ended.out
    assert ended.err == "ctlens: name a command.\n"


@pytest.mark.processes
def test_a_mistake_is_the_only_line_on_a_real_terminal(place: Path) -> None:
    command = [sys.executable, "-m", "ctlens", *f"{TRAIN} --loss act --pairs apart.jsonl".split()]

    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("ctlens: none of the 1 pairs aligns") and done.stderr.count("\n") == 1
    assert not Path("new").exists()


def test_a_target_too_long_for_the_context_is_refused_before_training(call: Call, place: Path) -> None:
    Path("long.jsonl").write_text(json.dumps({**GOOD, "target": "yes no " * 200}))

    ended = call(f"{TRAIN} --loss bct --pairs long.jsonl")

    assert ended.code == 2 and "the wrapped prompt of pair 1 has" in ended.err
    assert not Path("new").exists()


def test_an_interrupt_before_the_first_step_ends_with_130_and_leaves_nothing(
    call: Call, place: Path, monkeypatch
) -> None:
    monkeypatch.setattr("ctlens.training.Trainer.__next__", interrupt)
    before = tree(place)

    ended = call(f"{TRAIN} --loss act --pairs good.jsonl --steps 2")

    assert ended.code == 130 and ended.err == ""
    assert tree(place) == before


def test_an_interrupt_after_the_last_step_leaves_what_a_resume_saves(call: Call, place: Path, monkeypatch) -> None:
    line = f"{TRAIN} --loss act --pairs good.jsonl --steps 2"
    with monkeypatch.context() as patch:
        patch.setattr("ctlens.training.run.save_model", interrupt)
        ended = call(line)

    assert ended.code == 130 and "interrupted after 2 of 2 steps; go on with the same command" in ended.err
    assert not Path("new").exists() and Path("new.partial").is_dir()
    assert call(f"{line} --resume").code == 0
    assert Path("new/history.csv").is_file() and not Path("new.partial").exists()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_is_a_sentence_too(call: Call, place: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = tree(place)
    line = f"{TRAIN} --loss act --pairs good.jsonl --steps 1"

    with monkeypatch.context() as patch:
        patch.setattr("ctlens.training.run.save_model", full)
        ended = call(line)

    sentence = "new cannot be written (No space left on device): make room there and repeat the command"
    assert ended.code == 2 and ended.err.startswith(f"ctlens: {sentence}; ") and ended.err.count("\n") == 1
    kept = {str(place / "place" / name) for name in ("new.partial", f"new.partial/{CHECKPOINT_FILE}")}
    after = tree(place)
    assert set(after) - set(before) == kept and before.items() <= after.items()
    assert call(f"{line} --resume").code == 0 and len(load_run("new").history) == 1
    assert not Path("new.partial").exists()


def test_a_programming_error_keeps_its_traceback(place: Path, monkeypatch) -> None:
    monkeypatch.setattr("ctlens.training.run.save_model", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", f"ctlens {TRAIN} --loss act --pairs good.jsonl --steps 1".split())

    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_pairs_left_out_are_counted_with_their_reason(call: Call, place: Path) -> None:
    Path("mixed.jsonl").write_text("\n".join(json.dumps(row) for row in [GOOD, *JSONL["apart"], GOOD]))

    ended = call(f"{TRAIN} --loss act --pairs mixed.jsonl --steps 1")

    assert ended.code == 0
    assert "tokens aligned in 2 pairs" in ended.out
    assert "1 pairs left out: the text of the window is not in the wrapped prompt" in ended.out


@pytest.mark.parametrize("options", ["", "--threats prefill --methods act"])
def test_an_estimate_counts_the_models_that_the_study_counts(call: Call, place: Path, options, monkeypatch) -> None:
    monkeypatch.setattr("ctlens.study.runner.seconds", lambda config, pool: 7200.0)

    ended = call(f"compare --estimate --workers 2 --out new {options}")
    counted = sum(map(int, re.findall(r"(\d+) (?:trainings|models)", ended.out)))

    assert ended.code == 0 and ended.out.endswith("2 at a time: about 2.0 hours.\n")
    assert not Path("new").exists()
    chosen = {"threats": ("prefill",), "methods": ("act",)} if options else {}
    assert counted == len(Study(study_of_size("first", **chosen), "new"))


def test_adapters_are_trained_and_saved_beside_the_merged_model(call: Call, place: Path) -> None:
    ended = call(f"{TRAIN} --loss act --pairs good.jsonl --steps 2 --lora-rank 2 --lora-target-modules q,mlp_out")

    assert ended.code == 0 and ended.err == ""
    lora = {"rank": 2, "alpha": 16.0, "target_modules": ["q", "mlp_out"]}
    assert json.loads(Path("new/config.json").read_text())["training"]["trainable"] == lora
    assert json.loads(Path("new/adapters/adapters.json").read_text())["lora"] == lora
    assert call("evaluate --model new --pairs good.jsonl --n-prompts 2").err.count("Traceback") == 0


def test_a_published_loss_is_trained_calibrated_and_written_down(call: Call, place: Path) -> None:
    ended = call(f"{TRAIN} --loss attct:stack-jailbreak --pairs good.jsonl --steps 1 --calibrate 0.5 --window shared")

    assert ended.code == 0 and ended.err == ""
    config = json.loads(Path("new/config.json").read_text())
    published = losses.to_config(losses.preset("attct", "stack-jailbreak"))
    (trained,) = config["losses"]
    assert trained == {**published, "window": "shared", "weight": trained["weight"]}
    assert trained["weight"] == pytest.approx(0.5 / config["calibration"]["gradient_norms"]["attct"])


@pytest.mark.slow
def test_a_threat_s_own_pairs_train_the_organism(call: Call, place: Path) -> None:
    ended = call("train --quiet --loss act --loss bct --threat jailbreak --steps 2 --out new")

    assert ended.code == 0 and ended.err == ""
    assert re.search(r"Window shared: \d\d\.\d% of the tokens aligned in 256 pairs", ended.out)
    assert "512 tokens left out: token outside the shared part" in ended.out
    assert all(f"{loss}: " in ended.out for loss in ("act", "bct"))
    assert json.loads(Path("new/config.json").read_text())["training"]["steps"] == 2


@pytest.mark.slow
def test_tracked_losses_and_the_reached_target_are_told(call: Call, place: Path) -> None:
    line = "train --quiet --loss act --threat jailbreak --steps 2 --accumulate 2 --batch-size 8 --out new"
    ended = call(f"{line} --track mlpct,bct --stop-below 1 --schedule ExponentialLR,gamma=0.5")

    assert ended.code == 0 and ended.err == ""
    lines = ended.out.splitlines()
    assert re.fullmatch(r"Ended after 0 steps: bad_rate 0\.\d{3} is below 1", lines[-7])
    training = json.loads(Path("new/config.json").read_text())["training"]
    assert training["schedule"] == "ExponentialLR" and training["schedule_options"] == {"gamma": 0.5}
    assert training["accumulate"] == 2 and training["until"]["threat"] == "jailbreak"
    ended = call(line.replace("new", "other") + " --track mlpct,bct")
    assert all(
        re.search(rf"^tracked/{name}: [\d.e-]+ at step 1, [\d.e-]+ at step 2$", ended.out, re.M)
        for name in ("mlpct", "bct")
    )


OF_LIBRARY = {
    "train": (
        cli.training.train_command,
        TrainConfig,
        {"steps", "batch_size", "lr", "retention", "seed", "accumulate"},
    ),
    "evaluate": (cli.evaluating.evaluate_command, evaluate, {"split", "n_prompts", "per_token"}),
    "patch": (cli.analyses.patch_command, patch, {"positions"}),
    "audit": (cli.audits.audit_command, audit, {"temperature", "seed"}),
    "estimate": (cli.models.estimate_command, estimate, {"length", "wrapper_length", "dtype", "processes"}),
    "estimate's training": (
        cli.models.estimate_command,
        TrainConfig,
        {"batch_size", "retention", "accumulate", "memory"},
    ),
    "doses": (cli.studies.doses, dose_response, {"seeds"}),
}


@pytest.mark.parametrize("command", OF_LIBRARY)
def test_defaults_are_those_of_the_library(command: str) -> None:
    function, library, least = OF_LIBRARY[command]
    given = {name: entry.default for name, entry in inspect.signature(function).parameters.items()}
    theirs = {name: entry.default for name, entry in inspect.signature(library).parameters.items()}
    settled = {"trainable", "progress", "out", "pairs", "threats", "model", "config", "methods", "n_pairs", "metrics"}
    settled |= {"judge", "selectors", "pools"}

    shared = (given.keys() & theirs.keys()) - settled  # those of other kinds: "" for what a config has, texts for lists
    assert least <= shared
    assert {name: given[name] for name in shared} == {name: theirs[name] for name in shared}


def test_defaults_of_the_studies_are_those_of_the_library() -> None:
    compare = {name: entry.default for name, entry in inspect.signature(cli.studies.compare_command).parameters.items()}
    assert (compare["steps"], compare["window"]) == (None, StudyConfig().training.window)  # None: those of the size
    help_text = cli.studies.compare_command.__annotations__["steps"]
    assert f"{SHARED_TRAINING.steps}, or {NATURAL_TRAINING.steps} with --size natural" in str(help_text)
    doses = {name: entry.default for name, entry in inspect.signature(cli.studies.doses).parameters.items()}
    assert doses["n_pairs"] == ",".join(map(str, DOSES)) and doses["steps"] == SHARED_TRAINING.steps


def test_the_short_names_of_dtypes_are_those_that_people_type(call: Call, place: Path) -> None:
    found = [
        call(f"estimate --quiet --loss act --model hf --lora-rank 2 --length 24 --wrapper-length 4 --dtype {name}")
        for name in ("bf16", "bfloat16")
    ]

    assert found[0].code == 0 and found[0].out == found[1].out


def test_options_of_one_kind_have_one_name_on_all_commands() -> None:
    help_of: dict[str, set[str]] = {}
    for command in COMMANDS:
        for parameter in command_named(command).params:
            help_of.setdefault(parameter.name, set()).add(str(parameter.opts[0]))

    assert all(len(names) == 1 for names in help_of.values()), help_of
    words = {
        "--model",
        "--pairs",
        "--out",
        "--device",
        "--dtype",
        "--seed",
        "--quiet",
        "--json",
        "--n-prompts",
        "--split",
    }
    assert words <= {name for names in help_of.values() for name in names}
    assert not {"--folder", "--gpu", "--items", "--n", "--output"} & {
        name for names in help_of.values() for name in names
    }


def command_named(name: str) -> Any:
    """The command of a full name."""
    found: Any = typer.main.get_command(cli.app)
    for word in name.split():
        found = found.commands[word]
    return found


def test_every_command_prints_one_object_if_asked() -> None:
    for name in COMMANDS:
        command = command_named(name)
        assert getattr(command, "commands", None) or "as_json" in {parameter.name for parameter in command.params}, name


def test_a_run_is_trained_again_from_its_config(call: Call, place: Path) -> None:
    first = call(f"{TRAIN} --loss act --loss klct --pairs good.jsonl --steps 3 --lr 0.01 --trainable mlp")
    again = call("train --quiet --model hf --pairs good.jsonl --config new/config.json --out again")
    other = call(
        "train --quiet --model hf --pairs good.jsonl --config new/config.json --steps 2 --loss act --out other"
    )

    assert (first.code, again.code, other.code) == (0, 0, 0), again.err + other.err
    assert Path("new/history.csv").read_text() == Path("again/history.csv").read_text()
    training = json.loads(Path("other/config.json").read_text())["training"]
    assert (training["steps"], training["lr"], training["trainable"]) == (2, 0.01, ["mlp"])


def test_models_on_the_way_are_kept_and_load(call: Call, place: Path) -> None:
    ended = call(f"{TRAIN} --loss act --pairs good.jsonl --steps 4 --save-every 2")

    assert ended.code == 0 and sorted(path.name for path in Path("new/steps").iterdir()) == ["2", "4"]
    assert not Path("new.partial").exists()
    tokens = torch.arange(20)[None]
    found = {name: load_model(Path("new", name))(tokens) for name in ("steps/4", "steps/2", ".")}
    assert torch.equal(found["steps/4"], found["."]) and not torch.equal(found["steps/2"], found["."])


def test_a_loss_of_ones_own_is_named_by_its_module(call: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))
    Path("own_losses.py").write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom ctlens import losses\n\n\n"
        "@dataclass(frozen=True)\nclass Mine(losses.ACT):\n    name: ClassVar[str] = 'mine'\n"
    )

    ended = call(f"{TRAIN} --loss own_losses:Mine --pairs good.jsonl --steps 1")

    assert ended.code == 0, ended.err
    assert json.loads(Path("new/config.json").read_text())["losses"][0]["name"] == "mine"


def test_a_training_says_the_rates_before_and_after_where_answers_are_named(call: Call, place: Path) -> None:
    silent = call(f"{TRAIN} --loss act --pairs good.jsonl --steps 1")
    Path("named.jsonl").write_text(json.dumps({**GOOD, "good": "yes", "bad": "no"}) + "\n")
    told = call("train --quiet --model hf --loss act --pairs named.jsonl --steps 1 --out told --json")
    none = call("train --quiet --model hf --loss act --pairs named.jsonl --steps 1 --out none --n-prompts 0")

    assert "name no good and bad answers" in silent.out and "Before and after" not in none.out
    assert [row["model"] for row in json.loads(told.out)["tables"]["Before and after"]] == ["before", "after"]


@pytest.mark.slow
def test_a_run_from_the_command_line_is_the_condition_of_that_name_in_a_study(call: Call, place: Path) -> None:
    ended = call("train --quiet --loss act --threat jailbreak --steps 2 --n-prompts 0 --out new")

    assert ended.code == 0, ended.err
    config = StudyConfig(threats=("jailbreak",), methods=("act",), training=replace(SHARED_TRAINING, steps=2))
    trainer = CellTraining(config, place, Cell("jailbreak", "act", 0)).trainer()
    taken = list(trainer)
    run = load_run("new")
    assert len(taken) == 2 and run.history == trainer.history
    assert all(torch.equal(*both) for both in zip(run.model.parameters(), trainer.model.parameters(), strict=True))


def test_progress_goes_to_stderr_and_only_when_wanted(call: Call, place: Path, monkeypatch) -> None:
    monkeypatch.setattr("ctlens.core.progress.sys", Mock(stderr=Mock(isatty=lambda: True)))  # pytest's is no terminal
    line = "train --model hf --loss act --pairs good.jsonl --steps 2 --out"

    loud, quiet = call(f"{line} loud"), call(f"{line} quiet --quiet")

    assert "2/2" in loud.err and quiet.err == ""
    assert loud.out.replace("loud", "") == quiet.out.replace("quiet", "")


@pytest.mark.slow
def test_compare_prints_a_line_a_cell_and_one_table_of_80_columns(call: Call, place: Path, monkeypatch) -> None:
    monkeypatch.setattr("ctlens.plots.export.find_spec", lambda _: None)
    monkeypatch.setattr("ctlens.study.config.ANALYSED_THREATS", ())
    monkeypatch.setattr("ctlens.study.config.StudyConfig", partial(StudyConfig, n_pairs=8, n_prompts=12))
    monkeypatch.setenv("COLUMNS", "80")
    ended = call(
        "compare --quiet --size matrix --threats sycophancy,jailbreak --methods act --steps 1 --workers 1 --out new"
    )

    lines = ended.out.splitlines()
    assert ended.code == 0 and ended.err == "" and lines[-1] == "Report: new/report.html"
    assert [line.split(":")[0] for line in lines[:4]] == [
        f"{threat}, {condition}, seed 0" for threat in ("sycophancy", "jailbreak") for condition in ("retention", "act")
    ]
    (header,) = [line.split() for line in lines if line.startswith("threat")]
    assert header == ["threat", "condition", "entities", "heldout", "structure", "clean", "benign"]
    assert sum(" base " in line for line in lines) == 2 and max(map(len, lines)) <= 80


@pytest.mark.slow
def test_doses_prints_a_line_a_cell_and_the_bad_rates(call: Call, place: Path, monkeypatch) -> None:
    monkeypatch.setattr("ctlens.plots.export.find_spec", lambda _: None)
    monkeypatch.setattr("ctlens.study.dose_response.DoseConfig", partial(DoseConfig, n_prompts=12))
    ended = call("doses --quiet --threat jailbreak --methods act --n-pairs 4 --steps 1 --workers 1 --out new")

    lines = ended.out.splitlines()
    assert ended.code == 0 and ended.err == "" and lines[-1] == "Figures: new/figures"
    assert lines[0].startswith("jailbreak, 4 pairs, retention, seed 0: bad rate on wrapped")
    table = pd.read_csv("new/doses.csv")
    assert all(
        f"{value:.3f}" in ended.out
        for value in table.query("metric == 'bad_rate' and split == 'heldout' and prompt_side == 'wrapped'")["value"]
    )


def test_evaluate_prints_a_table_and_writes_the_same_numbers(call: Call, place: Path) -> None:
    ended = call("evaluate --threats sycophancy --n-prompts 6 --out deep/table.csv")

    table = pd.read_csv("deep/table.csv")
    assert ended.code == 0
    assert list(table.columns[:4]) == ["evaluated_threat", "split", "prompt_side", "metric"]
    assert set(table["split"]) == {"heldout"} and set(table["n_prompts"]) == {6}
    bad = table.query("prompt_side == 'wrapped' and metric == 'bad_rate'")["value"].item()
    assert f" {bad:.0%} [" in ended.out and " 100% [" in ended.out
    assert all(f"{value:.3f}" in ended.out for value in table.query("metric == 'brr'")["value"])
    printed = json.loads(call("evaluate --threats sycophancy --n-prompts 6 --json").out)
    (row,) = printed["tables"]["How often answers are bad and good"]
    assert (row["threat"], row["bad wrapped"]["value"], row["bad wrapped"]["n_prompts"]) == ("sycophancy", bad, 6)


def test_evaluate_screens_natural_threats_on_the_base(call: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no chat template" in call("evaluate --model hf --threats facts").err
    byte_level_tokenizer(chat=True).save_pretrained("hf")

    ended = call("evaluate --model hf --base hf --threats facts --n-prompts 4 --out table.csv")

    table = pd.read_csv("table.csv").query("prompt_side == 'clean' and metric == 'good_rate'")
    assert ended.code == 0 and table["value"].tolist() == [1.0]
    assert re.search(r"\d+ of 400 questions of facts are answered right without an attack", ended.out)
    monkeypatch.setattr("ctlens.threats.natural.screening.LEAST_RIGHT", 401)
    refused = call("evaluate --model hf --threats facts --out other.csv")
    assert refused.code == 2 and "401 are needed" in refused.err and not Path("other.csv").exists()


def test_evaluate_judges_the_users_own_pairs_in_a_run_folder(call: Call, place: Path) -> None:
    Path("own.jsonl").write_text(json.dumps({**GOOD, "good": "(A", "bad": "(B"}))
    assert call(f"{TRAIN} --loss act --pairs own.jsonl --steps 1").code == 0

    ended = call("evaluate --model new --pairs own.jsonl --out table.csv")

    assert ended.code == 0
    lines = Path("table.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3 and all(line.startswith("pairs,,") for line in lines[1:])
