"""The models on the way of a training are kept beside it and lie in the folder of its run at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import made

import ctlens as ct
from ctlens.core.errors import CtlensError
from ctlens.models.lora import LoRA, load_adapters
from ctlens.models.parameters import copy_model

PAIRS = ct.pairs(["Is it right?", "What is it?"], ["I don't think so. Is it right?", "So? What is it?"])
TOKENS = torch.arange(12)[None]


def test_a_kept_model_is_that_of_a_shorter_training_of_one_schedule(tmp_path: Path) -> None:
    model = made()
    constant = ct.TrainConfig(batch_size=2, warmup=0.0, schedule="ConstantLR", schedule_options={"factor": 1.0})

    run = ct.train(model, PAIRS, "act", config=constant, steps=4, out=tmp_path / "run", save_every=2, progress=False)
    half = ct.train(model, PAIRS, "act", config=constant, steps=2, progress=False)

    assert sorted(path.name for path in (tmp_path / "run/steps").iterdir()) == ["2", "4"]
    assert torch.equal(ct.load_model(tmp_path / "run/steps/2")(TOKENS), half.model(TOKENS))
    assert torch.equal(ct.load_model(tmp_path / "run/steps/4")(TOKENS), run.model(TOKENS))
    assert ct.load_run(tmp_path / "run").history == run.history
    assert not (tmp_path / "run.partial").exists()


def test_of_adapters_these_alone_are_kept(tmp_path: Path) -> None:
    model = made()
    config = ct.TrainConfig(trainable=LoRA(2), batch_size=2)
    run = ct.train(model, PAIRS, "act", config=config, steps=2, out=tmp_path / "run", save_every=2, progress=False)

    loaded = copy_model(model)
    load_adapters(loaded, tmp_path / "run/steps/2/adapters")

    assert [path.name for path in (tmp_path / "run/steps/2").iterdir()] == ["adapters"]
    assert torch.equal(loaded(TOKENS), run.model(TOKENS))


def test_a_folder_is_needed_and_must_be_new(tmp_path: Path) -> None:
    with pytest.raises(CtlensError, match="name a new one with out=."):
        ct.train(made(), PAIRS, "act", save_every=2)
    with pytest.raises(CtlensError, match="save_every must be at least 1, not 0"):
        ct.train(made(), PAIRS, "act", save_every=0, out=tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine").write_text("mine")
    with pytest.raises(CtlensError, match="exists already: name a new folder"):
        ct.train(made(), PAIRS, "act", out=tmp_path / "run")


def test_rate_and_batch_are_named_without_a_config() -> None:
    named = ct.train(made(), PAIRS, "act", steps=2, lr=0.01, batch_size=1, progress=False)
    config = ct.TrainConfig(steps=2, lr=0.01, batch_size=1)

    assert named.config == config
    assert named.history == ct.train(made(), PAIRS, "act", config=config, progress=False).history
