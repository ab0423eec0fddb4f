"""What the benchmarks measure with: every loss and analysis runs on their input, and live bytes are counted right."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ctlens as ct
from ctlens.losses import LOSSES
from ctlens.models.counting import Counting


@pytest.fixture
def modules(monkeypatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    for name in ("step", "memory", "analysis"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import memory
    import step

    monkeypatch.setattr(step, "BATCH", 2)
    return step, memory


def test_every_loss_on_two_passes_takes_a_step_on_their_batch(modules) -> None:
    step, _ = modules
    config = ct.ModelConfig(d_vocab=512, n_layers=1, n_heads=2, d_model=8, d_mlp=8)
    reference = ct.build(config)
    model = ct.build(config, seed=1)
    pairs = step.batch()

    assert pairs.wrapped.tokens.shape == (2, 64) and pairs.opening.tolist() == [1, 1]
    assert {"act", "mlpct", "attct", "bct"} <= step.losses().keys() - {"attct, lifted"} <= LOSSES.keys() | {step.BARE}
    for loss in step.losses().values():
        step.step(reference, model, pairs, loss)


def test_live_bytes_are_those_worked_out_by_hand() -> None:
    seen = []
    with Counting() as live:
        x = torch.zeros(1000, requires_grad=True)
        seen.append(live.now)  # 1000 floats of 4 bytes
        y = (x * 3).exp().sum()  # the exponential stays for the backward pass, its argument does not; one float for y
        seen.append(live.now)
        y.backward()  # a gradient in place of the exponential
        seen.append(live.now)
        view = x.detach().view(10, 100)  # no memory of its own
        seen.append(live.now)
        del x, y, view
    assert seen == [4000, 8004, 8004, 8004]
    assert live.now == 0 and live.peak >= 12_000


@pytest.mark.slow
def test_every_analysis_of_the_benchmark_gives_a_result_with_its_figure(modules) -> None:
    import analysis

    base = ct.load_organism()
    models = analysis.trained(base, steps=1, short=1)
    todo = analysis.analyses(base, models, n=48)

    assert {name.split(",")[0] for name in todo} >= {"probe", "residual_shift", "steer", "erase_or_mask"}
    for name in ("residual_shift", "logit_lens", "logit_attribution"):
        found = todo[name]()
        assert len(found.to_dataframe()) and len(found.figure().data)
    seen = analysis.held(lambda: torch.zeros(100_000))
    assert 400_000 <= seen < 500_000


def test_the_gpu_benchmark_says_when_there_is_none(modules, monkeypatch, capsys) -> None:
    monkeypatch.delitem(sys.modules, "gpu", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    import gpu

    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2 and "no GPU here: nothing was measured" in capsys.readouterr().err
