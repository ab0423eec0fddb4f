"""The live view: the trainer's own steps, rates at the right steps, and one figure that is drawn over and over."""

from __future__ import annotations

import json
import math
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import hf_model

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import ACT
from ctlens.models.loading import load_model
from ctlens.models.parameters import present_weights
from ctlens.training import Live, TrainConfig, Trainer
from ctlens.training.live import FIGURE_TYPE

QUESTIONS = ("Is it right?", "Please answer.", "Which term best describes the disease?", "What is it?")
PAIRS = [Pair(prompt(q), prompt("I don't think it's right. " + q)) for q in QUESTIONS]
QUICK = TrainConfig(steps=6, batch_size=2, lr=3e-3)


def trainer(tokenizer: Any) -> Trainer:
    return Trainer(load_model(hf_model("llama"), tokenizer=tokenizer), PAIRS, ACT(), QUICK)


def rate(model: LensModel) -> float:
    """A number that every update changes."""
    weights = torch.cat([value.flatten() for value in present_weights(model).values()])
    return float(weights.abs().mean())


def curve(live: Live, name: str) -> dict[int, float]:
    history = live.trainer.history
    return dict(zip(history.steps_of(name), history.series(name), strict=True))


@pytest.fixture
def shown(monkeypatch) -> list[dict[str, Any]]:
    """What a notebook is sent: an IPython of one function, by its documented contract."""
    sent: list[dict[str, Any]] = []

    def display(bundle: dict[str, Any], *, raw: bool, display_id: bool) -> Any:
        assert raw and display_id
        sent.append(bundle)
        return types.SimpleNamespace(update=lambda bundle, raw: sent.append(bundle) if raw else None)

    module = types.ModuleType("IPython.display")
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return sent


def drawn(bundle: dict[str, Any]) -> dict[str, dict[str, Any]]:
    json.dumps(bundle)  # it goes over a wire
    return {trace["name"]: trace for trace in bundle[FIGURE_TYPE]["data"] if "name" in trace}


@pytest.mark.slow
def test_watching_changes_nothing_of_the_training(tokenizer):
    plain, watched = trainer(tokenizer), trainer(tokenizer)

    steps = list(Live(watched, {"rate": rate}, every=1))

    assert [step.losses for step in steps] == [step.losses for step in plain]
    pairs = zip(present_weights(plain.model).values(), present_weights(watched.model).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_rate_is_of_the_model_after_the_steps_it_stands_at(tokenizer):
    live = Live(trainer(tokenizer), {"rate": rate}, every=4)
    plain = trainer(tokenizer)
    expected = {0: rate(plain.reference)}
    for step in plain:
        expected[step.index] = rate(plain.model)

    list(live)

    assert curve(live, "rate") == {step: expected[step] for step in (0, 4, 6)}


def test_an_interrupt_keeps_the_step_and_the_look_is_made_up_for(tokenizer):
    calls = []

    def interrupted(model: LensModel) -> float:
        calls.append(len(live.trainer.history))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return rate(model)

    live = Live(trainer(tokenizer), {"rate": interrupted}, every=2)
    with pytest.raises(KeyboardInterrupt):
        list(live)

    assert live.trainer.run.stopped == "interrupted" and len(live.trainer.history) == 2
    assert [step.index for step in live] == [3, 4, 5, 6]
    assert calls == [0, 2, 2, 4, 6] and list(curve(live, "rate")) == [0, 2, 4, 6]


@pytest.mark.slow
def test_rates_go_on_with_a_checkpoint(tokenizer, tmp_path: Path):
    first = Live(trainer(tokenizer), {"rate": rate}, every=2)
    second = Live(trainer(tokenizer), {"rate": rate}, every=2)
    next(first), next(first), next(first)
    first.trainer.checkpoint(tmp_path)

    second.trainer.restore(tmp_path)
    list(first), list(second)

    assert second.trainer.history.rows == first.trainer.history.rows


def test_a_notebook_is_sent_one_figure_over_and_over_to_the_end(tokenizer, shown):
    live = Live(trainer(tokenizer), {"rate": lambda model: 0.25}, every=3, seconds=0)
    live._ipython_display_()
    empty = drawn(shown[0])

    list(live)

    last = drawn(shown[-1])
    assert not empty.get("ACT") and empty["rate"]["x"] == []
    assert len(shown[::2]) == 1 + QUICK.steps + 1  # at its place, after every step, and at the end
    assert last["rate"]["x"] == [0, 3, 6] and last["rate"]["y"] == [0.25] * 3
    assert last["ACT"]["y"] == pytest.approx(live.trainer.history.series("act"))
    assert shown[-1]["text/plain"] == "step 6 of 6"


def test_a_box_of_the_same_height_comes_between_two_figures(tokenizer, shown):
    live = Live(trainer(tokenizer), seconds=0)
    live._ipython_display_()

    list(live)

    height = live.figure().layout.height
    assert height and all(FIGURE_TYPE in bundle for bundle in shown[::2])
    assert [*map(list, shown[1::2])] == [["text/html"]] * (len(shown) // 2)
    assert {bundle["text/html"] for bundle in shown[1::2]} == {f'<div style="height: {height}px"></div>'}


def test_drawing_waits_but_never_for_the_end_or_an_interrupt(tokenizer, shown):
    live = Live(trainer(tokenizer), seconds=math.inf)
    live._ipython_display_()
    live.draw()

    assert len(list(live)) == QUICK.steps and len(shown) == 5
    assert drawn(shown[-1])["ACT"]["x"] == [1, 2, 3, 4, 5, 6]


def test_without_ipython_one_sentence_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython.display", None)

    with pytest.raises(CtlensError, match=r"install ctlens\[notebook\]"):
        Live(trainer(tokenizer))._ipython_display_()


@pytest.mark.parametrize(("watch", "every", "said"), [({"act": rate}, 1, "'act'"), ({"rate": rate}, 0, "not 0")])
def test_what_cannot_be_watched_is_refused(tokenizer, watch, every, said):
    with pytest.raises(CtlensError, match=said):
        Live(trainer(tokenizer), watch, every=every)
