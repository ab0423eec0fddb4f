"""Loggers get every number of the history and no other, and are ended however a training ends; nothing is sent."""

from __future__ import annotations

import builtins
import json
import resource
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.models import Call, byte_level_tokenizer, chat_model, hf_model

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.inputs import save_pairs
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import ACT, KLCT
from ctlens.training import TensorBoard, TrainConfig, Trainer, WeightsAndBiases, train

QUESTIONS = ("Is it right?", "When a creature experiences feeling, what?", "Please answer.")
PAIRS = [Pair(prompt(q), prompt("I don't think it's right. " + q)) for q in QUESTIONS]
CONFIG = TrainConfig(steps=3, batch_size=2, max_new_tokens=3, retention_ratio=0.5)


class Told:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.settings: list[Mapping[str, Any]] = []
        self.values: dict[int, dict[str, float]] = {}
        self.ended = 0

    def begin(self, settings: Mapping[str, Any]) -> None:
        self.settings.append(settings)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        assert step not in self.values and not self.ended
        self.values[step] = dict(values)

    def end(self) -> None:
        self.ended += 1


@pytest.fixture(scope="module")
def model() -> LensModel:
    return chat_model("llama")


def numbers(trainer_or_run: Any) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for step, name, hook, value in trainer_or_run.history.rows:
        found.setdefault(step, {})[f"{name}/{hook}" if hook else name] = value
    return found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_logger_is_told_what_the_history_has(model: LensModel) -> None:
    told = Told()
    run = train(model, PAIRS, ACT(), config=CONFIG, track=[KLCT()], loggers=[told], progress=False)
    assert told.values == numbers(run) and set(told.values) == {1, 2, 3}
    assert {"act", "total", "lr", "grad_norm", "tracked/klct", "act/blocks.0.hook_resid_post"} <= set(told.values[1])
    assert len(told.settings) == told.ended == 1
    assert told.settings[0]["training"]["steps"] == 3 and told.settings[0]["losses"][0]["name"] == "act"
    assert json.dumps(told.settings[0])


def test_logging_changes_no_number(model: LensModel) -> None:
    runs = [train(model, PAIRS, ACT(), config=CONFIG, loggers=loggers, progress=False) for loggers in ((), (Told(),))]
    assert runs[0].history.rows == runs[1].history.rows


def test_the_visible_loop_ends_its_loggers(model: LensModel) -> None:
    told = Told()
    trainer = Trainer(model, PAIRS, ACT(), CONFIG, loggers=[told])
    for step in trainer:
        assert list(told.values) == list(range(1, step.index + 1))
    assert told.ended == 1
    trainer.close()
    assert told.ended == 1 and len(told.settings) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, CtlensError])
def test_a_training_that_stops_ends_them(
    model: LensModel, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    whole = Trainer._update

    def stop(self: Trainer, index: int) -> Any:
        if index == 2:
            raise error
        return whole(self, index)

    monkeypatch.setattr(Trainer, "_update", stop)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            train(model, PAIRS, ACT(), config=CONFIG, loggers=[told], progress=False)
        except error:
            assert error is CtlensError
    assert set(told.values) == {1} and told.ended == 1


def test_a_resumed_training_goes_on_where_its_logger_was(model: LensModel, tmp_path: Path) -> None:
    first, second = Told(), Told()
    trainer = Trainer(model, PAIRS, ACT(), CONFIG, loggers=[first])
    next(trainer)
    trainer.checkpoint(tmp_path)
    again = Trainer(model, PAIRS, ACT(), CONFIG, loggers=[second])
    again.restore(tmp_path)
    assert [step.index for step in again] == [2, 3]
    assert set(first.values) == {1} and set(second.values) == {2, 3}
    assert {**first.values, **second.values} == numbers(again)


def test_tensorboard_reads_the_history(model: LensModel, tmp_path: Path) -> None:
    run = train(model, PAIRS, ACT(), config=CONFIG, loggers=[TensorBoard(tmp_path / "tb")], progress=False)
    found = scalars(tmp_path / "tb")
    for step, values in numbers(run).items():
        for name, value in values.items():
            assert dict(found[name])[step] == pytest.approx(value, rel=1e-6)
    assert sum(map(len, found.values())) == len(run.history.rows)


@pytest.mark.processes
def test_weights_and_biases_keeps_a_run_without_a_network(model: LensModel, tmp_path: Path) -> None:
    logger = WeightsAndBiases("mine", folder=tmp_path)
    train(model, PAIRS, ACT(), config=CONFIG, loggers=[logger], progress=False)
    (kept,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [path.stat().st_size > 0 for path in kept.glob("run-*.wandb")] == [True]
    text = next(kept.glob("run-*.wandb")).read_bytes()
    assert b"mine" in text and b"grad_norm" in text and b"blocks.0.hook_resid_post" in text


@pytest.mark.parametrize(("make", "library"), [(lambda: TensorBoard("x"), "tensorboard"), (WeightsAndBiases, "wandb")])
def test_a_missing_library_names_the_extra(make: Any, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any, **options: Any) -> Any:
        if library in name:
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(CtlensError, match=r"pip install 'ctlens\[logging\]'"):
        make()


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(CtlensError, match="did you mean 'offline'"):
        WeightsAndBiases(mode="ofline")


@pytest.mark.slow
def test_the_command_logs_beside_the_run(call: Call, tmp_path: Path) -> None:
    hf_model("llama").save_pretrained(tmp_path / "hf")
    byte_level_tokenizer(chat=True).save_pretrained(tmp_path / "hf")
    save_pairs(tmp_path / "own.jsonl", PAIRS)
    call("--help")
    line = f"train --model {tmp_path}/hf --pairs {tmp_path}/own.jsonl --loss act --steps 2 --batch-size 2 --quiet"
    ended = call(f"{line} --log tensorboard --log wandb --out {tmp_path}/run")
    assert (ended.code, ended.err) == (0, "")
    assert len(scalars(tmp_path / "run.log")["act"]) == 2
    assert list((tmp_path / "run.log" / "wandb").glob("offline-run-*"))
    assert (tmp_path / "run" / "history.csv").is_file()
    wrong = call(f"{line} --log tensorbord --out {tmp_path}/other")
    assert wrong.code == 2 and "did you mean 'tensorboard'" in wrong.err


@pytest.mark.parametrize("size", [0, 300])  # TensorBoard's first write fails, or one in the middle
def test_a_log_that_cannot_be_written_is_one_sentence(call: Call, tmp_path: Path, size: int) -> None:
    hf_model("llama").save_pretrained(tmp_path / "hf")
    byte_level_tokenizer(chat=True).save_pretrained(tmp_path / "hf")
    save_pairs(tmp_path / "own.jsonl", PAIRS)
    line = f"train --model {tmp_path}/hf --pairs {tmp_path}/own.jsonl --loss act --steps 2 --batch-size 2 --quiet"
    call("--help")  # takes the progress of saving the model
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        ended = call(f"{line} --log tensorboard --out {tmp_path}/run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert ended.code == 2 and ended.err.count("\n") == 1 and "run.log cannot be written (File too l" in ended.err
    assert not (tmp_path / "run").exists()
    assert call(f"{line} --out {tmp_path}/run --resume").code == 0
