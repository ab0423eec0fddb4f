"""A training that is interrupted or killed: what is left is whole, and what goes on ends where it would have."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.disk import Killed, contents, full, killed
from helpers.models import Call, byte_level_tokenizer, hf_model
from helpers.tiers import unit_first_rows

from ctlens.core.errors import CtlensError
from ctlens.core.files import write_json
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import ACT, BCT, AttCT
from ctlens.models.loading import load_model
from ctlens.models.lora import LoRA
from ctlens.models.parameters import present_weights
from ctlens.training import Phase, TrainConfig, Trainer, load_run, train
from ctlens.training.checkpoint import CHECKPOINT_FILE, read_checkpoint
from ctlens.training.interrupts import uninterrupted
from ctlens.training.step import Step
from ctlens.training.stores import OnDisk

QUESTIONS = (
    "Which term best describes the disease?",
    "Is it right?",
    "When a creature experiences feeling, what?",
    "Please answer.",
    "(A) isolated cases",
    "Here it is, what is it?",
    "They are likely sensing a texture.",
)
PAIRS = [Pair(prompt(q), prompt("I don't think it's right. " + q)) for q in QUESTIONS]
QUICK = TrainConfig(steps=8, batch_size=3, lr=3e-3, max_new_tokens=4)


@pytest.fixture
def model(tokenizer) -> LensModel:
    return load_model(hf_model("llama"), tokenizer=tokenizer)


def same(one: LensModel, other: LensModel) -> bool:
    pairs = zip(present_weights(one).values(), present_weights(other).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


VARIANTS = {
    "plain": QUICK,
    "adapters": replace(QUICK, trainable=LoRA(2)),
    "parts": replace(QUICK, accumulate=2),
    "sparse retention": replace(QUICK, retention_ratio=0.5),
    "uncached": replace(QUICK, cache=False),
    "phases": replace(QUICK, phases=(Phase(3, ("act",)), Phase(5, ("bct", "attct")))),
    "cosine": replace(QUICK, schedule="CosineAnnealingLR", schedule_options={"T_max": 6}, warmup=0.25),
    "one cycle": replace(QUICK, schedule="OneCycleLR", schedule_options={"max_lr": 3e-3, "total_steps": 8}, warmup=0.0),
}


# An epoch is 2 steps. Every setting is restored inside an epoch, before and behind the change of phase; the end of one
# is a matter of the order of the pairs, which no setting but the parts of a batch changes.
RESTORED = [*zip(VARIANTS, (1, 5) * 4, strict=True), ("plain", 4), ("parts", 4), ("phases", 1)]


@pytest.mark.parametrize(("variant", "taken"), unit_first_rows(RESTORED))
def test_a_restored_training_ends_at_the_same_weights_to_the_last_bit(model, tmp_path, variant, taken) -> None:
    config = VARIANTS[variant]
    losses = [ACT(), BCT(), AttCT()]
    whole = Trainer(model, PAIRS, losses, config)
    list(whole)
    first = Trainer(model, PAIRS, losses, config)
    for _ in range(taken):
        next(first)
    first.checkpoint(tmp_path)

    second = Trainer(model, PAIRS, losses, config)
    second.restore(tmp_path)
    assert len(second.history) == taken and same(first.model, second.model)
    list(second)

    assert same(whole.model, second.model) and not same(first.model, second.model)
    assert second.history.rows == whole.history.rows and len(second.history) == 8


@pytest.mark.slow
def test_dropout_is_drawn_anew_at_every_step_and_alike_after_a_resume(tokenizer, tmp_path, monkeypatch) -> None:
    model = load_model(hf_model("gpt2"), tokenizer=tokenizer)
    assert any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in model.modules())
    state = torch.random.get_rng_state()
    whole = Trainer(model, PAIRS, ACT(), replace(QUICK, steps=4))
    first = Trainer(model, PAIRS, ACT(), replace(QUICK, steps=4))
    second = Trainer(model, PAIRS, ACT(), replace(QUICK, steps=4))
    seeds = []
    step = Trainer._update
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", lambda *a: (seeds.append(torch.initial_seed()), step(*a))[1])
        list(whole)
    assert len(set(seeds)) == 4
    next(first)
    first.checkpoint(tmp_path)

    second.restore(tmp_path)
    list(second)

    assert same(whole.model, second.model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert train(model, PAIRS, ACT(), config=replace(QUICK, steps=4, seed=1), progress=False).history != whole.history


def hooks_of(model: LensModel) -> int:
    modules = model.modules()  # type: ignore[attr-defined]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


@pytest.mark.parametrize("memory", ["all", "layers", "blocks"])
def test_a_training_with_dropout_leaves_no_hook_behind(tokenizer, memory) -> None:
    dropping = load_model(hf_model("gpt2"), tokenizer=tokenizer)
    dropping(torch.zeros(1, 2, dtype=torch.long))  # TransformerLens puts hooks of its own on at the first pass
    before = hooks_of(dropping)

    run = train(dropping, PAIRS, [AttCT(), BCT()], config=replace(QUICK, steps=2, memory=memory), progress=False)

    assert hooks_of(dropping) == hooks_of(run.model) == before


def test_a_trainer_can_go_back_to_its_own_checkpoint(model, tmp_path) -> None:
    trainer = Trainer(model, PAIRS, ACT(), QUICK)
    for step in trainer:
        if step.index == 3:
            trainer.checkpoint(tmp_path)
    ended = {name: value.clone() for name, value in present_weights(trainer.model).items()}

    trainer.restore(tmp_path)
    list(trainer)

    assert all(torch.equal(ended[name], value) for name, value in present_weights(trainer.model).items())


def test_a_reference_that_changed_since_the_checkpoint_is_refused(model, tmp_path) -> None:
    trainer = Trainer(model, PAIRS, ACT(), QUICK)
    trainer.take_step()
    trainer.checkpoint(tmp_path)
    trainer.restore(tmp_path)  # as it was

    next(model.parameters()).data.add_(1e-3)

    with pytest.raises(CtlensError, match="is of a reference with other weights"):
        trainer.restore(tmp_path)


def test_a_checkpoint_of_another_training_is_refused(model, tmp_path) -> None:
    next(trainer := Trainer(model, PAIRS, ACT(), QUICK))
    trainer.checkpoint(tmp_path)
    other = load_model(hf_model("llama", seed=1), tokenizer=model.tokenizer)

    for change, message in (
        ((other, PAIRS, ACT(), QUICK), "a reference with other weights"),
        ((model, PAIRS[:6], ACT(), QUICK), "other pairs"),
        (
            (model, [replace(pair, wrapped=replace(pair.wrapped, bad="no")) for pair in PAIRS], ACT(), QUICK),
            "other pairs",
        ),
        ((model, PAIRS, ACT(weight=0.02), QUICK), "other losses"),
        ((model, PAIRS, ACT(), replace(QUICK, lr=1e-3)), "other settings"),
    ):
        fresh = Trainer(*change)
        with pytest.raises(CtlensError, match=f"is of {message}"):
            fresh.restore(tmp_path)
        assert len(fresh.history) == 0
    with pytest.raises(CtlensError, match="is of other pairs or other prompts"):
        Trainer(model, PAIRS, ACT(), QUICK, retain=[prompt("Hello")]).restore(tmp_path)


@pytest.mark.parametrize("content", [b"", b"short", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_broken_checkpoint_is_refused(model, tmp_path, content) -> None:
    (tmp_path / CHECKPOINT_FILE).write_bytes(content)

    with pytest.raises(CtlensError, match="cannot be read as a checkpoint"):
        Trainer(model, PAIRS, ACT(), QUICK).restore(tmp_path)
    with pytest.raises(CtlensError, match="holds no checkpoint"):
        Trainer(model, PAIRS, ACT(), QUICK).restore(tmp_path / "gone")


def test_a_checkpoint_that_fails_leaves_the_one_before(model, tmp_path, monkeypatch) -> None:
    trainer = Trainer(model, PAIRS, ACT(), QUICK)
    next(trainer)
    trainer.checkpoint(tmp_path)
    next(trainer)
    monkeypatch.setattr("ctlens.training.checkpoint.save_file", lambda *_, **__: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        trainer.checkpoint(tmp_path)

    (fresh := Trainer(model, PAIRS, ACT(), QUICK)).restore(tmp_path)
    assert len(fresh.history) == 1 and [path.name for path in tmp_path.iterdir()] == [CHECKPOINT_FILE]


@pytest.mark.processes
def test_a_checkpoint_damaged_at_random_bytes_is_refused_or_no_other(model, tmp_path) -> None:
    trainer = Trainer(model, PAIRS[:2], ACT(), QUICK)
    next(trainer)
    trainer.checkpoint(tmp_path)
    of = trainer.run.identity
    path = tmp_path / CHECKPOINT_FILE
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    weights = [value.detach() for value in trainer.parameters]
    draw = random.Random(0)
    refused = 0
    for number in range(150):
        damaged = bytearray(whole)
        if number % 3 == 2:
            del damaged[draw.randrange(len(whole)) :]
        else:  # the header is short, and is where damage is most various
            damaged[draw.randrange((header, len(whole))[number % 3])] ^= draw.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            found = read_checkpoint(tmp_path, of)
        except CtlensError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert all(map(torch.equal, found.parameters, weights)) and found.history == trainer.history
    assert refused > 140


def test_a_reference_that_was_changed_after_the_checkpoint_is_refused(model, tmp_path) -> None:
    trainer = Trainer(model, PAIRS[:2], ACT(), QUICK)
    trainer.checkpoint(tmp_path)
    with torch.no_grad():
        next(model.parameters()).add_(1)

    with pytest.raises(CtlensError, match="is of a reference with other weights"):
        trainer.restore(tmp_path)


def interrupting(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Has the process interrupted in the middle of a step, between its gradient and its update."""
    update = torch.optim.AdamW.step
    seen = []

    def interrupted(self, *arguments, **options):
        seen.append(self)
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)


def test_an_interrupt_returns_a_usable_run_after_a_whole_step(model, tmp_path, monkeypatch) -> None:
    interrupting(monkeypatch, step=3)

    with pytest.warns(UserWarning, match="interrupted after 3 of 8 steps"):
        run = train(model, PAIRS, ACT(), config=QUICK, progress=False)

    assert len(run.history) == 3 and run.stopped == "interrupted" and not run.model.training
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    three = Trainer(model, PAIRS, ACT(), QUICK)
    for _ in range(3):
        next(three)
    assert same(run.model, three.model) and run.history.rows == three.history.rows
    assert run.figure().data and load_run(run.save(tmp_path / "run")).stopped == "interrupted"


def test_an_interrupted_trainer_goes_on(model, monkeypatch) -> None:
    whole = train(model, PAIRS, ACT(), config=QUICK, progress=False)
    interrupting(monkeypatch, step=5)
    trainer = Trainer(model, PAIRS, ACT(), QUICK)

    with pytest.raises(KeyboardInterrupt):
        list(trainer)
    assert len(trainer.history) == 5 and trainer.run.stopped == "interrupted"
    list(trainer)

    assert same(whole.model, trainer.model) and whole.stopped == trainer.run.stopped == "all steps"


def test_an_interrupt_waits_for_the_end_of_the_block_in_the_main_thread_alone() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("the rest")
    assert done == ["the rest"]

    thread = threading.Thread(target=lambda: done.append(uninterrupted().__enter__()))
    thread.start()
    thread.join()
    assert done == ["the rest", None] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


# The command line.

GOOD = [
    {"clean": question, "wrapped": "I don't think so.\n" + question}
    for question in ("Is it right?", "Please answer.", "Here it is")
]
LINE = "train --quiet --model hf --pairs good.jsonl --loss act --loss bct --steps 8 --batch-size 2 --lr 0.003"


@pytest.fixture
def place(tmp_path: Path, monkeypatch, capsys) -> Path:
    hf_model("llama").save_pretrained(tmp_path / "hf")
    capsys.readouterr()  # its progress
    byte_level_tokenizer().save_pretrained(tmp_path / "hf")
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    monkeypatch.chdir(tmp_path)
    return tmp_path


KILLER = """
import os, signal, sys
from ctlens import cli
from ctlens.training import Trainer
take, number, after = Trainer.__next__, int(sys.argv[1]), int(sys.argv[2])
def next_or_end(self):
    if len(self.history) == after:
        os.kill(os.getpid(), number)
    return take(self)
Trainer.__next__ = next_or_end
sys.argv[1:] = sys.argv[3].split()
cli.main()
"""


WAITER = """
import sys
from ctlens import cli
from ctlens.training import Trainer
take = Trainer.__next__
def next_or_wait(self):
    if len(self.history) == 1:
        print("after one step", flush=True)
        sys.stdin.read()
    return take(self)
Trainer.__next__ = next_or_wait
sys.argv[1:] = sys.argv[1].split()
cli.main()
"""


def ended(line: str, *, by: signal.Signals, after: int) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own, which is sent a signal after some steps."""
    program = [sys.executable, "-c", KILLER, str(by.value), str(after), line]
    return subprocess.run(program, capture_output=True, text=True)


@pytest.mark.processes
def test_a_killed_command_goes_on_to_the_same_weights(call: Call, place: Path) -> None:
    assert call(f"{LINE} --out whole").code == 0
    killed = ended(f"{LINE} --out run --checkpoint-every 2", by=signal.SIGKILL, after=5)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in place.iterdir()) == [
        ".run.lock",  # the system has freed it, and the next process that ends removes it
        "good.jsonl",
        "hf",
        "run.partial",
        "whole",
    ]

    refused = call(f"{LINE} --out run")
    other = call(f"{LINE} --out run --resume --seed 3")
    done = call(f"{LINE} --out run --resume")
    again = call(f"{LINE} --out run --resume")

    assert refused.code == 2 and "run.partial holds an interrupted training: pass --resume" in refused.err
    assert other.code == 2 and "is of other settings" in other.err
    assert done.code == again.code == 0 and "Run: run (finished before)" in again.out
    assert "act: " in done.out and "at step 8" in done.out
    assert (place / "run/model/weights.safetensors").read_bytes() == (
        place / "whole/model/weights.safetensors"
    ).read_bytes()
    assert (place / "run/history.csv").read_text() == (place / "whole/history.csv").read_text()
    assert sorted(path.name for path in place.iterdir()) == ["good.jsonl", "hf", "run", "whole"]


SHORT = f"{LINE.replace('--steps 8', '--steps 3')} --checkpoint-every 1"


@pytest.mark.processes
def test_kills_at_random_writes_leave_what_a_resume_ends_like_the_unbroken_run(call: Call, place: Path) -> None:
    with killed(place, 0) as disk:
        assert call(f"{SHORT} --out whole").code == 0
    draw = random.Random(0)
    kills = 0
    while kills < 12:
        at = draw.randint(1, disk.seen)
        try:
            with killed(place, at):
                assert call(f"{SHORT} --out run --resume").code == 0
        except Killed:
            kills += 1
        else:
            shutil.rmtree("run")  # it was done before the kill was due
    assert call(f"{SHORT} --out run --resume").code == 0

    assert contents(place / "run") == contents(place / "whole")
    assert sorted(path.name for path in place.iterdir()) == ["good.jsonl", "hf", "run", "whole"]


@pytest.mark.processes
def test_a_full_disk_at_any_write_is_one_sentence_and_a_resume_goes_on(call: Call, place: Path) -> None:
    with full(place, 0) as disk:
        assert call(f"{SHORT} --out whole").code == 0
    before = contents(place)
    for at in sorted(random.Random(1).sample(range(1, disk.seen + 1), 4)):
        with full(place, at):
            ended = call(f"{SHORT} --out run --resume")
        assert ended.code == 2 and ended.err.count("\n") == 1, at
        assert "run" in ended.err and "cannot be written (No space left on device): make room there" in ended.err
        left = contents(place)
        assert before.items() <= left.items() and set(left) - set(before) <= {f"run.partial/{CHECKPOINT_FILE}"}
        assert call(f"{SHORT} --out run --resume").code == 0
        assert contents(place / "run") == contents(place / "whole") and not (place / "run.partial").exists()
        shutil.rmtree("run")


def test_a_limit_on_the_size_of_files_is_one_sentence_at_any_size(call: Call, place: Path) -> None:
    before = contents(place)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 2_000, 60_000):  # nothing; configs; a model, but no checkpoint
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            ended = call(f"{SHORT} --out run --resume")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert ended.code == 2 and ended.err.count("\n") == 1
        assert "cannot be written (File too large): raise the limit on the size of files" in ended.err
        assert contents(place) == before and sorted(path.name for path in place.iterdir()) == ["good.jsonl", "hf"]
    assert call(f"{SHORT} --out run").code == 0


def test_a_full_cache_folder_is_one_sentence_and_is_used_once_there_is_room(call: Call, place: Path) -> None:
    line = f"{LINE} --steps 1 --cache-folder cache --out run"
    for at in (1, 3, 7):  # the folder, the answers, a target
        with full(place / "cache", at):
            ended = call(line)
        assert ended.code == 2 and ended.err.count("\n") == 1
        assert "ctlens: cache" in ended.err and "cannot be written (No space left on device): make" in ended.err
        assert sorted(path.name for path in place.iterdir() if path.name != "cache") == ["good.jsonl", "hf"]
        assert not list(place.rglob(".*"))
    assert call(line).code == call(f"{line}-alone".replace("--cache-folder cache", "")).code == 0
    assert (place / "run/model/weights.safetensors").read_bytes() == (
        place / "run-alone/model/weights.safetensors"
    ).read_bytes()


def test_what_another_training_put_into_a_cache_meanwhile_stays_and_is_used(model, tmp_path, monkeypatch) -> None:
    theirs = [(5, 6)] * len(PAIRS)
    Trainer(model, PAIRS, BCT(), QUICK, cache_folder=tmp_path)
    (path,) = tmp_path.glob("answers-*.json")
    held = json.loads(path.read_text())
    path.unlink()

    def slow(reference, asked, **options):
        write_json(path, {**held, "answers": theirs})
        return [(7, 8)] * len(asked)

    monkeypatch.setattr("ctlens.training.answers.generate", slow)
    pairs = Trainer(model, PAIRS, BCT(), QUICK, cache_folder=tmp_path).pairs

    assert [row.answer for row in pairs.rows] == theirs
    store = OnDisk(tmp_path / "targets")
    store.put(0, {"x": torch.ones(1)})
    store.put(0, {"x": torch.zeros(1)})
    assert store.get(0, "x", slice(None)) == torch.ones(1)


@pytest.mark.processes
def test_two_commands_on_one_run_leave_it_to_the_first(call: Call, place: Path) -> None:
    assert call(f"{SHORT} --out whole").code == 0
    program = [sys.executable, "-c", WAITER, f"{SHORT} --out run"]
    first = subprocess.Popen(program, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert first.stdout and any("after one step" in line for line in first.stdout)

    second = call(f"{SHORT} --out run --resume")
    first.communicate("go on")

    assert second.code == 2 and second.err.count("\n") == 1
    assert "run is being written by another process: wait for its end, or name another folder" in second.err
    assert first.returncode == 0 and contents(place / "run") == contents(place / "whole")
    assert sorted(path.name for path in place.iterdir()) == ["good.jsonl", "hf", "run", "whole"]


def test_what_is_put_in_the_way_of_a_run_stays_and_the_training_is_kept(call: Call, place: Path, monkeypatch) -> None:
    def filled(self: Trainer) -> Step:
        (place / "run").mkdir(exist_ok=True)
        (place / "run" / "theirs").write_text("mine")
        return take(self)

    take = Trainer.__next__
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "__next__", filled)
        ended = call(f"{LINE} --steps 1 --out run")

    assert ended.code == 2 and ended.err.count("\n") == 1 and "run exists already" in ended.err
    assert contents(place / "run") == {"theirs": b"mine"}
    shutil.rmtree("run")
    assert "pass --resume to go on" in call(f"{LINE} --steps 1 --out run").err
    assert call(f"{LINE} --steps 1 --out run --resume").code == 0


def test_the_folder_of_checkpoints_is_ours_only_where_it_holds_one(call: Call, place: Path) -> None:
    (place / "run.partial").mkdir()
    (place / "run.partial" / "notes").write_text("mine")

    assert call(f"{LINE} --steps 1 --out run").code == 0

    assert contents(place / "run.partial") == {"notes": b"mine"}


def test_a_finished_run_is_that_of_the_same_training_or_says_what_differs(call: Call, place: Path) -> None:
    rows = (place / "good.jsonl").read_text().splitlines()
    (place / "fewer.jsonl").write_text("\n".join(rows[:2]))
    hf_model("llama", seed=1).save_pretrained(place / "other")
    byte_level_tokenizer().save_pretrained(place / "other")
    line = f"{LINE} --steps 1 --out run"
    assert call(line).code == 0
    before = contents(place / "run")

    for change, sentence in (
        ("--steps 2", "is of other settings (settings.steps is 1 there and 2 here)"),
        ("--lr 0.1", "is of other settings (settings.lr is 0.003 there and 0.1 here)"),
        ("--loss attct", "is of other losses (losses.trained.2 is missing there and {'name': 'attct'"),
        ("--track mlpct", "is of other losses (losses.tracked.0 is missing there and {'name': 'mlpct'"),
        ("--pairs fewer.jsonl", "is of other pairs"),
        ("--model other", "is of a reference with other weights"),
        ("--model gone", "gone is no model folder"),
    ):
        ended = call(f"{line} --resume {change}")
        assert ended.code == 2 and ended.err.count("\n") == 1 and "finished before" not in ended.out, change
        assert sentence in ended.err, (change, ended.err)
    assert call(f"{line} --resume").out == "Run: run (finished before)\n"
    assert contents(place / "run") == before
    config = json.loads((place / "run" / "config.json").read_text())
    del config["identity"]
    (place / "run" / "config.json").write_text(json.dumps(config))
    assert "an earlier ctlens wrote it" in call(f"{line} --resume").err and load_run(place / "run").identity == {}


@pytest.mark.processes
def test_an_interrupted_command_says_how_to_go_on(call: Call, place: Path) -> None:
    stopped = ended(f"{LINE} --out run", by=signal.SIGINT, after=3)

    assert stopped.returncode == 130
    assert stopped.stderr == "ctlens: interrupted after 3 of 8 steps; go on with the same command and --resume\n"
    assert not (place / "run").exists()
    assert call(f"{LINE} --out run --resume").code == 0
    assert len(load_run(place / "run").history) == 8
